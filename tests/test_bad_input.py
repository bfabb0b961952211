"""Scripts that are given what cannot work print one line that says why, and end with status 2.

They write nothing.
"""

import runpy
import sys

import pytest

from tests.conftest import ROOT

# Each command has its sentence. The texts {empty} and {pictures} stand for a folder without and
# with images, {run} for a trained model, {recipe} for its samples at a temperature of 0.5, and
# {init} for a training that begins with it.
COMMANDS = {
    "train.py --diffusion.dataset-name no/such/folder": "no/such/folder",
    "train.py --diffusion.dataset-name {pictures} --diffusion.batch-size 47": "fewer than one step",
    "train.py --diffusion.learning-rate -1": "learning_rate is -1.0; it must be",
    "train.py --diffusion.clip-grad-norm inf": "clip_grad_norm is inf; it must be finite",
    "train.py --resume {empty}": "not a run folder with a checkpoint",
    "train.py --resume": "no unfinished run",
    "train.py --resume {run} --diffusion.objective v": "cannot change diffusion.objective;",
    "train.py --resume {run} --init {run}": "--init starts a new run, but --resume continues one",
    "{init} --model.image-size 63": "image_size is 63; it must be a multiple of 2",
    "{init} --model.base-dim 16": "base_dim is 8 for the weights of",
    "{init} --diffusion.objective v": "objective is eps for the weights of",
    "{init} --model.dim-multiply 1 3": "dim_multiply is [1, 2] for the weights of",
    "{init} --diffusion.beta-end 0.03": "beta_end is 0.02 for the weights of",
    "train.py --init {root}/pretrained/people.toml": "people.toml is a recipe, and no model",
    "train.py --device gpu": "'gpu'",
    "train.py --device cuda:99": "PyTorch must have it",
    "train.py fases": "there is no experiment 'fases', but faces, faces-v",
    "train.py --model.norm-groups 7": "norm_groups is 7; it must be a divisor of 32",
    "train.py --diffusion.epochs x": "epochs is 'x'; it must be an integer",
    "train.py --diffusion.epoch 3": "unrecognized: --diffusion.epoch 3; is --diffusion.epochs",
    "train.py --diffusion.labels yes": "labels is 'yes'; it must be True or False",
    "train.py --model.dim-multiply 1,2": "dim_multiply is ['1,2']; it must be a list, and",
    "train.py --diffusion.objective w": 'objective is \'w\'; it must be "eps" or "v"',
    "train.py --diffusion.optimizer sgd": 'optimizer is \'sgd\'; it must be "adam" or "muon"',
    "train.py --diffusion.precision half": "precision is 'half'; it must be ",
    "train.py --diffusion.epochs": "--diffusion.epochs: expected one argument (see",
    "train.py --diffusion.epochs 3 faces": "unrecognized: faces; words come before all flags (see",
    "train.py --labels true": "unrecognized: --labels true; is --diffusion.labels meant?",
    "train.py --cgf 2": "unrecognized: --cgf 2 (see",
    "train.py --model.dim-multiply": "dim_multiply is (); it must be a list of one or more",
    "edit.py vary 0 {run} --depths": "depths is (); it must be a list of one or more",
    "sample.py {run} --n 0": "n is 0; it must be 1 or more",
    "sample.py {run} --sampler dpm++ --variance large": "add --variance None",
    "sample.py {run} {run}": "before the flags must be [RUN], and there is",
    f"sample.py {{run}} --seed {'9' * 400}": "seed is 9",
    f"sample.py {{run}} --steps {'9' * 400}": "99; it must be finite, and at most 2^64",
    "sample.py {run} --seed 1.5": "seed is '1.5'; it must be an integer",
    "sample.py {run} --sampler dpm++ --eta 0 --temperature 0.5": "and these add none (--eta)",
    "sample.py {run} --sampler ddim --variance large": "--sampler ddim are --spacing and --eta",
    "sample.py {run} --n 101": "a grid shows up to 100 images; for 101 add --individual",
    "sample.py {root}/README.md": "README.md: the file is truncated, damaged or not a checkpoint",
    "sample.py {run} --sampler new": 'sampler is \'new\'; it must be "ddpm" or "ddim" or',
    "sample.py {run} --guidance 1.5": "needs a --guide",
    "sample.py {run} --label 2": "--label: the model was trained without labels",
    "sample.py {run} --cfg 2": "--cfg needs a --label",
    "sample.py {run} --label 2 --cfg 2 --guide 30": "a label guides; add --cfg None or",
    "sample.py {run} --enlarge {run} {run}": "cannot enlarge: it was not trained to",
    "sample.py {recipe} --sampler ddim": "and these add none (--eta); add --temperature 1",
    "sample.py none.toml": "none.toml: there is no such file",
    "sample.py runs/faces-20260101-120000": "faces-20260101-120000: there is no such file",
    "sample.py {run} --steps 101": "steps is 101; a model with 100 timesteps takes 1 to 100",
    "sample.py {run} --steps 1 --guide 5": "at which --guide or --cfg changes anything; take more",
    "edit.py vry 1 {run}": "the first word must be interpolate or vary or inpaint or enlarge, and",
    "edit.py vary": "before the flags must be A [RUN], and there is nothing",
    "edit.py inpaint 0 {recipe} --eta 1": "--sampler ddpm are --spacing and --variance; add --eta",
    "edit.py vary 1 {run} --label 2 blue": "an edit has one --label",
    "edit.py inpaint a.png {run} --sampler dpm++": "depend on earlier steps",
    "edit.py inpaint a.png {run} --temperature 0.5": "with --temperature 1",
    "edit.py vary {root}/README.md {run}": "README.md: not a PNG",
    "edit.py interpolate no.png 1 {run}": "no.png: No such file",
    "evaluate.py {run} --images 1 --out {empty}": "needs two held-out images or more; there are 1",
    # The folder is an error before the measurement, which may take hours, shows its bar.
    "evaluate.py {run} --t-stride 100 --out {empty}/notes.txt/out": "notes.txt",
    "evaluate.py distance {empty}": "before the flags must be FOLDER DATA, and there is",
    "evaluate.py {run} --bpd-variance no": "bpd_variance is 'no'; it must be",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_errors_are_one_line_and_leave_nothing(
    command, pictures, tiny_run, tmp_path, monkeypatch, capsys
):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("not an image")
    recipe = empty / "cool.toml"
    recipe.write_text(f'model = "{tiny_run}"\nsampler = "dpm++"\ntemperature = 0.5')
    init = f"train.py --init {tiny_run} --diffusion.dataset-name {pictures}"
    command_line = command.format(
        empty=empty, pictures=pictures, recipe=recipe, root=ROOT, run=tiny_run, init=init
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
