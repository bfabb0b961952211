"""evaluate.py from its command line to its files, with a small network in InceptionV3's place."""

import functools
import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

import evaluate
from functions.evaluation.reference_statistics import read_reference
from functions.support.errors import UserError
from tests.conftest import ROOT, call, script
from tests.functions.evaluation.small_extractor import small_extractor

BPD = ["--t-stride", "100", "--device", "cpu"]
FAST = ["--n", "12", "--sampler", "ddim", "--steps", "2", "--batch-size", "5", "--device", "cpu"]
IMAGES = ["--metrics", "fid,kid,prc", "--reference-images", "20", *FAST]
needs_fidelity = pytest.mark.skipif(
    find_spec("torch_fidelity") is None, reason="requirements-eval.txt is not installed"
)
small_main = functools.partial(evaluate.main, small_extractor)


def results_of(folder, what):
    return {path.name: path.read_bytes() for path in folder.glob(f"*-{what}-*")}


def test_bits_per_dim_of_a_run(tiny_run, tmp_path, capsys):
    call(evaluate.main, tiny_run, *BPD, "--out", tmp_path)
    printed = capsys.readouterr().out
    first = results_of(tmp_path, "bpd")
    (name,) = (name for name in first if name.endswith(".json"))
    assert name.startswith("step-00000010-bpd-") and name.replace(".json", ".png") in first
    found = json.loads(first[name])
    assert found["bits_per_dim"] == pytest.approx(found["rate"] + found["distortion"])
    assert found["images"] == 5 and found["standard_error"] > 0
    assert f"{found['bits_per_dim']:.4f}" in printed and found["protocol"] in printed
    assert "5 of 5 validation images" in found["protocol"] and "EMA weights" in found["protocol"]
    assert sum(found["curves"]["timesteps"]) == 100
    with Image.open(tmp_path / name.replace(".json", ".png")) as figure:
        assert figure.size > (1000, 300)

    call(evaluate.main, tiny_run, *BPD, "--out", tmp_path)  # the same again, bit for bit
    assert results_of(tmp_path, "bpd") == first
    call(evaluate.main, tiny_run, *BPD, "--out", tmp_path, "--images", "2", "--bpd-variance", "large", "--no-clip")
    more = results_of(tmp_path, "bpd")
    assert len(more) == 4 and first.items() < more.items()


@needs_fidelity
def test_images_of_a_run(tiny_run, tmp_path, capsys):
    arguments = [tiny_run, *IMAGES, "--out", tmp_path]
    call(small_main, *arguments)
    captured = capsys.readouterr()
    first = results_of(tmp_path, "fid-kid-prc")
    (name,) = first
    found = json.loads(first[name])
    for text in (
        "12 samples, ddim, 2 steps",
        "EMA weights",
        "20 train images",
        "no JPEG",
        "rounded to uint8",
        "seed 0",
    ):
        assert text in found["protocol"]
    assert found["protocol"] in captured.out
    assert "ONLY 12 SAMPLES, NOT 50,000" in captured.err
    assert all(np.isfinite(found[metric]) for metric in ("fid", "kid", "precision", "recall"))
    call(small_main, *arguments)
    assert results_of(tmp_path, "fid-kid-prc") == first
    call(small_main, *arguments, "--seed", "1")
    call(small_main, *arguments, "--reference-split", "val")
    assert len(results_of(tmp_path, "fid-kid-prc")) == 3


@needs_fidelity
def test_a_published_reference_gives_the_same_fid(tiny_run, tmp_path, capsys):
    public = tmp_path / "public.npz"
    call(small_main, tiny_run, *FAST, "--metrics", "fid", "--save-reference", public, "--out", tmp_path / "a")
    assert read_reference(public, 16, small_extractor()).features is None
    call(small_main, tiny_run, *FAST, "--metrics", "fid", "--reference", public, "--out", tmp_path / "b")
    one, other = (next((tmp_path / folder).iterdir()).read_bytes() for folder in "ab")
    assert one == other
    with pytest.raises(UserError, match="--reference has statistics for fid alone"):
        call(small_main, tiny_run, *FAST, "--metrics", "fid,kid", "--reference", public)
    capsys.readouterr()


def test_other_images_than_in_training_are_said_loudly(tiny_run, pictures, tmp_path, capsys):
    some = shutil.copytree(pictures, tmp_path / "some", ignore=shutil.ignore_patterns("0004*", "*.packed*"))
    call(evaluate.main, tiny_run, *BPD, "--dataset-name", some, "--images", "1", "--out", tmp_path)
    assert "NOT THE IMAGES IT WAS TRAINED ON" in capsys.readouterr().err
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["standard_error"] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--metrics", "bpd,is"], "'bpd,is' is not a list of metrics; there are bpd, fid, kid, prc"),
        (["--sampler", "heun"], "invalid choice: 'heun'"),
        (["--spacing", "even"], "invalid choice: 'even'"),
        (["--metrics", "fid", "--steps", "101"], "steps is 101; a model with 100 timesteps takes 1 to 100"),
        (["--images", "0"], "not an integer of at least 1"),
        (["--metrics", "fid", "--n", "3"], "--n is 3; 4 images are the fewest"),
        (["--metrics", "fid", "--reference", "none.npz"], "none.npz: no sound reference statistics"),
        (["--dataset-name", "nowhere"], "nowhere"),
        (["--metrics", "fid", "--reference-images", "1"], "an empty reference: 1 train image(s), 4 are the fewest"),
        (["--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tiny_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, evaluate.plain_errors():
        call(small_main, tiny_run, "--out", tmp_path, *arguments)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and message in captured.err
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@needs_fidelity
def test_without_weights_the_script_says_what_to_get(tiny_run, tmp_path):
    ended = script(ROOT / "evaluate.py", tiny_run, "--metrics", "kid", "--weights", tmp_path / "none.pth", *FAST)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "none.pth: not the weights that are at https://github.com/toshas" in ended.stderr
