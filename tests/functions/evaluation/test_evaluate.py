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
from tests.conftest import call
from tests.functions.evaluation.parts import small_extractor

BPD = ["--t-stride", "100", "--device", "cpu"]
FAST = ["--n", "12", "--sampler", "ddim", "--steps", "2", "--batch-size", "5", "--device", "cpu"]
needs_fidelity = pytest.mark.skipif(
    not find_spec("torch_fidelity"), reason="requirements-eval.txt is not installed"
)
small_main = functools.partial(evaluate.main, small_extractor)


def results_of(folder, what):
    return {path.name: path.read_bytes() for path in folder.glob(f"*-{what}-*")}


@pytest.mark.slow
def test_bits_per_dim_of_a_run(tiny_run, tmp_path, capsys):
    call(evaluate.main, "--runs", tiny_run.parent, *BPD, "--out", tmp_path)
    printed = capsys.readouterr().out
    first = results_of(tmp_path, "bpd")
    (name,) = (name for name in first if name.endswith(".json"))
    assert name.startswith("step-00000010-bpd-")
    found = json.loads(first[name])
    assert found["bits_per_dim"] == pytest.approx(found["rate"] + found["distortion"])
    assert found["images"] == 5 and found["standard_error"] > 0
    assert f"{found['bits_per_dim']:.4f}" in printed and found["protocol"] in printed
    assert "5 of 5 validation images" in found["protocol"] and "EMA weights" in found["protocol"]
    curves = found["curves"]
    assert sum(curves["timesteps"]) == 100
    # At the end of the way, all but L_0 is read
    assert curves["rate"][0] == pytest.approx(found["rate"])
    np.testing.assert_allclose(curves["rmse"], 127.5 * np.sqrt(curves["mse_x_0"]))
    assert Image.open(tmp_path / name.replace(".json", ".png")).size > (1000, 300)

    call(evaluate.main, tiny_run, *BPD, "--out", tmp_path)  # the same again, bit for bit
    assert results_of(tmp_path, "bpd") == first
    other = ["--images", "2", "--bpd-variance", "large", "--no-clip", "--precision", "bfloat16"]
    call(evaluate.main, tiny_run, *BPD, *other, "--out", tmp_path)
    more = results_of(tmp_path, "bpd")
    assert len(more) == 4 and first.items() < more.items()
    (protocol,) = (
        json.loads(more[name])["protocol"]
        for name in more.keys() - first.keys()
        if name.endswith(".json")
    )
    assert (
        "2 of 5" in protocol
        and "variance large, x_0 not clipped, EMA weights, bfloat16" in protocol
    )


@pytest.mark.slow
@needs_fidelity
def test_images_of_a_run(tiny_run, tmp_path, capsys):
    arguments = [
        tiny_run,
        *FAST,
        "--metrics",
        "fid,kid,prc",
        "--reference-images",
        "20",
        "--out",
        tmp_path,
    ]
    call(small_main, *arguments)
    captured = capsys.readouterr()
    first = results_of(tmp_path, "fid-kid-prc")
    (name,) = first
    found = json.loads(first[name])
    for text in (
        "12 samples, ddim, 2 steps",
        "EMA weights",
        "20 train images",
        "rounded to uint8, no JPEG",
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

    public = tmp_path / "public.npz"
    call(
        small_main,
        *arguments,
        "--metrics",
        "fid",
        "--save-reference",
        public,
        "--out",
        tmp_path / "a",
    )
    assert read_reference(public, 16, small_extractor()).features is None
    call(small_main, *arguments, "--metrics", "fid", "--reference", public, "--out", tmp_path / "b")
    assert len({next((tmp_path / folder).iterdir()).read_bytes() for folder in "ab"}) == 1


@pytest.mark.slow
def test_other_images_than_in_training_are_said_loudly(tiny_run, pictures, tmp_path, capsys):
    some = shutil.copytree(
        pictures, tmp_path / "some", ignore=shutil.ignore_patterns("0004*", "*.packed*")
    )
    call(evaluate.main, tiny_run, *BPD, "--dataset-name", some, "--images", "1", "--out", tmp_path)
    assert "NOT THE IMAGES IT WAS TRAINED ON" in capsys.readouterr().err
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["standard_error"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--metrics bpd,is",
            "'bpd,is' is not a list of metrics; there are bpd, bands, fid, kid, prc",
        ),
        ("--images 0", "not an integer of at least 1"),
        ("--metrics fid --n 3", "--n is 3; 4 images are the fewest"),
        ("--metrics fid --steps 101", "steps is 101; a model with 100 timesteps takes 1 to 100"),
        (
            "--metrics fid --reference none.npz",
            "none.npz: no sound reference statistics ([Errno 2] No such file",
        ),
        ("--metrics fid,kid --reference a.npz", "--reference has statistics for fid alone"),
        (
            "--metrics fid --reference-images 1",
            "an empty reference: 1 train image(s), 4 are the fewest",
        ),
        pytest.param(
            "--metrics fid --weights none.pth",
            "none.pth: not the weights that are at",
            marks=needs_fidelity,
        ),
        ("--dataset-name nowhere", "nowhere"),
        ("--device tpu", "device is 'tpu'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments, message, tiny_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # so that it is undone afterwards
    with pytest.raises(SystemExit) as ended, evaluate.plain_errors():
        call(small_main, tiny_run, *arguments.split(), "--out", tmp_path)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and message in captured.err
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
