"""Scripts that are given what cannot work print one line that says why, and end with status 2.

They write nothing.
"""

import runpy
import sys

import pytest

from tests.conftest import ROOT

# Each command has its sentence. The texts {empty} and {pictures} stand for a folder without and
# with images, {run} for a trained model, and {init} for a training that begins with it.
COMMANDS = {
    "train.py --diffusion.dataset-name no/such/folder": "no/such/folder",
    "train.py --diffusion.dataset-name {pictures} --diffusion.batch-size 47": "fewer than one step",
    "train.py --diffusion.learning-rate -1": "learning_rate is -1;",
    "train.py --diffusion.clip-grad-norm inf": "clip_grad_norm is 'inf'; it must be a number",
    "train.py --resume {empty}": "not a run folder with a checkpoint",
    "train.py --resume": "no unfinished run",
    "train.py --resume {run} --init {run}": "--init starts a new run, but --resume continues one",
    "{init} --model.image-size 64": "image_size is 16 for the weights of",
    "{init} --model.base-dim 16": "base_dim is 8 for the weights of",
    "{init} --diffusion.objective v": "objective is eps for the weights of",
    "{init} --model.dim-multiply 1,2,2": "dim_multiply is (1, 2) for the weights of",
    "{init} --diffusion.beta-end 2": "beta_end is 0.02 for the weights of",
    "train.py --init {root}/pretrained/people.toml": "people.toml is a recipe, and no model",
    "train.py --device gpu": "'gpu'",
    "train.py --device cuda:99": "PyTorch must have it",
    "train.py fases": "invalid choice: 'fases' (choose from",
    "sample.py --n 0": "--n/-n: n is 0; it must be 1 or more",
    f"sample.py --seed {'9' * 400}": "argument --seed: seed is 9",
    f"sample.py --steps {'9' * 400}": "99; it must be finite, and at most 2^64",
    "sample.py --label a,": "argument --label: label is",
    "sample.py {run} --sampler dpm++ --eta 0 --temperature 0.5": "and these add none (--eta)",
    "sample.py {run} --sampler ddim --variance large": "--sampler ddim are --spacing and --eta",
    "sample.py {run} --n 101": "a grid shows up to 100 images; for 101 add --individual",
    "sample.py {root}/README.md": "README.md: the file is truncated, damaged or not a checkpoint",
    "sample.py {run} --guidance 1.5": "needs a --guide",
    "sample.py {run} --label 2": "--label: the model was trained without labels",
    "sample.py {run} --cfg 2": "--cfg needs a --label",
    "sample.py {run} --label 2 --cfg 2 --guide 30": "--cfg and --guide exclude each other",
    "sample.py {run} --enlarge {run} --enlarge {run}": "cannot enlarge: it was not trained with",
    "sample.py none.toml": "none.toml: there is no such file",
    "sample.py runs/faces-20260101-120000": "faces-20260101-120000: there is no such file",
    "sample.py {run} --steps 101": "steps is 101; a model with 100 timesteps takes 1 to 100",
    "sample.py {run} --steps 1 --guide 5": "at which --guide or --cfg changes anything; take more",
    "sample.py --n 36 --indices 3,7": "--indices: not allowed with --n",
    "edit.py vary 1 {run} --label 2,blue": "an edit has one --label",
    "edit.py inpaint a.png {run} --sampler dpm++": "depend on earlier steps",
    "edit.py inpaint a.png {run} --temperature 0.5": "with --temperature 1",
    "edit.py vary {root}/README.md {run}": "README.md: not a PNG",
    "edit.py interpolate no.png 1 {run}": "no.png: No such file",
    "evaluate.py {run} --images 1 --out {empty}": "needs two held-out images or more; there are 1",
    # The folder is an error before the measurement, which may take hours, shows its bar.
    "evaluate.py {run} --t-stride 100 --out {empty}/notes.txt/out": "notes.txt",
    "evaluate.py distance": "required: DATA (see evaluate.py distance --help)",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_errors_are_one_line_and_leave_nothing(
    command, pictures, tiny_run, tmp_path, monkeypatch, capsys
):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("not an image")
    init = f"train.py --init {tiny_run} --diffusion.dataset-name {pictures}"
    command_line = command.format(
        empty=empty, pictures=pictures, root=ROOT, run=tiny_run, init=init
    )
    name, *arguments = command_line.split()
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--runs", str(tmp_path / "runs")])
    monkeypatch.chdir(tmp_path)
    before = {*tiny_run.rglob("*")}

    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / name), run_name="__main__")

    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert COMMANDS[command] in error
    assert error.count("\n") == 1
    assert [*tmp_path.iterdir()] == [empty]
    assert {*tiny_run.rglob("*")} == before
