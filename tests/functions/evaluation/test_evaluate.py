"""evaluate.py from its command line to its files, with a small network in InceptionV3's place."""

import functools
import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

import evaluate
from functions.support.checkpoint import load_weights
from functions.support.run_folder import checkpoints_of
from tests.conftest import call
from tests.functions.evaluation.parts import small_extractor

BPD = ["--t-stride", "100", "--device", "cpu"]
FAST = ["--n", "12", "--sampler", "ddim", "--steps", "2", "--batch-size", "5", "--device", "cpu"]
needs_fidelity = pytest.mark.skipif(
    not find_spec("torch_fidelity"), reason="requirements-eval.txt is not installed"
)
small_main = functools.partial(evaluate.main, small_extractor)


def results_of(folder, metrics):
    """Return the bytes of all files of these metrics, by name."""
    return {path.name: path.read_bytes() for path in folder.glob(f"*-{metrics}-*")}


@pytest.mark.slow
def test_bits_per_dim_of_a_run(tiny_run, tmp_path, capsys):
    call(evaluate.main, "--runs", tiny_run.parent, *BPD, "--out", tmp_path)
    printed = capsys.readouterr().out
    first = results_of(tmp_path, "bpd")
    (name,) = (name for name in first if name.endswith(".json"))
    assert name.startswith("step-00000010-bpd-")

    result = json.loads(first[name])
    assert result["bits_per_dim"] == pytest.approx(result["rate"] + result["distortion"])
    assert result["images"] == 5
    assert result["standard_error"] > 0
    assert f"{result['bits_per_dim']:.4f}" in printed
    assert result["protocol"] in printed
    assert "5 of 5 validation images" in result["protocol"]
    assert "EMA weights" in result["protocol"]

    curves = result["curves"]
    assert sum(curves["timesteps"]) == 100
    # At the end of the way, a receiver has read all terms but L_0.
    assert curves["rate"][0] == pytest.approx(result["rate"])
    np.testing.assert_allclose(curves["rmse"], 127.5 * np.sqrt(curves["mse_x_0"]))
    figure = name.replace(".json", ".png")
    width, height = Image.open(tmp_path / figure).size
    assert width > 1000
    assert height > 300

    # The same command again writes the same, bit for bit.
    call(evaluate.main, tiny_run, *BPD, "--out", tmp_path)
    assert results_of(tmp_path, "bpd") == first

    # Other settings add two files, and their protocol says them.
    other = ["--images", "2", "--bpd-variance", "large", "--no-clip", "--precision", "bfloat16"]
    call(evaluate.main, tiny_run, *BPD, *other, "--out", tmp_path)
    both = results_of(tmp_path, "bpd")
    assert len(both) == 4
    assert first.items() < both.items()
    new_names = both.keys() - first.keys()
    (name,) = (name for name in new_names if name.endswith(".json"))
    protocol = json.loads(both[name])["protocol"]
    assert "2 of 5" in protocol
    assert "variance large, x_0 not clipped, EMA weights, float32" in protocol


@pytest.mark.slow
@needs_fidelity
def test_images_of_a_run(tiny_run, tmp_path, capsys):
    """FID, KID, precision and recall of 12 samples: values, protocol and warning are there."""
    metrics = ["--metrics", "fid,kid,prc", "--reference-images", "20"]
    arguments = [tiny_run, *FAST, *metrics, "--out", tmp_path]
    call(small_main, *arguments)
    captured = capsys.readouterr()

    first = results_of(tmp_path, "fid-kid-prc")
    (name,) = first
    result = json.loads(first[name])
    for text in (
        "12 samples, ddim, trailing, 2 steps",
        "EMA weights",
        "20 train images",
        "rounded to uint8, no JPEG",
        "seed 0",
    ):
        assert text in result["protocol"]
    assert result["protocol"] in captured.out
    assert "ONLY 12 SAMPLES, NOT 50,000" in captured.err
    for metric in ("fid", "kid", "precision", "recall"):
        assert np.isfinite(result[metric])

    # The same command again writes the same, bit for bit. Other settings write files beside it.
    call(small_main, *arguments)
    assert results_of(tmp_path, "fid-kid-prc") == first
    call(small_main, *arguments, "--seed", "1")
    call(small_main, *arguments, "--reference-split", "val")
    assert len(results_of(tmp_path, "fid-kid-prc")) == 3

    # Guided samples are other samples, and the protocol names the guide by its hash.
    before = results_of(tmp_path, "fid-kid-prc")
    call(small_main, *arguments, "--guide", 5)
    (guided,) = results_of(tmp_path, "fid-kid-prc").keys() - before.keys()
    guided = json.loads((tmp_path / guided).read_text())
    digest = load_weights(checkpoints_of(tiny_run)[0]).digest
    assert f"guided by {digest[:8]}, weight 1.5" in guided["protocol"]
    assert guided["fid"] != result["fid"]

    # The warnings are about FID, so results without it have none.
    call(small_main, *arguments, "--metrics", "kid", "--out", tmp_path / "kid")
    [kid] = results_of(tmp_path / "kid", "kid").values()
    assert json.loads(kid)["warnings"] == []


@pytest.mark.slow
def test_other_images_than_in_training_are_said_loudly(tiny_run, pictures, tmp_path, capsys):
    ignored = shutil.ignore_patterns("0004*", "*.packed*")
    fewer = shutil.copytree(pictures, tmp_path / "some", ignore=ignored)
    call(evaluate.main, tiny_run, *BPD, "--dataset-name", fewer, "--images", "1", "--out", tmp_path)
    assert "NOT THE IMAGES IT WAS TRAINED ON" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["standard_error"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--metrics bpd,is",
            "'bpd,is' is not a list of metrics; the metrics are bpd, fid, kid, prc",
        ),
        ("--images 0", "not an integer of at least 1"),
        ("--metrics fid --n 3", "--n is 3; it must be 4 or more"),
        ("--metrics fid --steps 101", "steps is 101; a model with 100 timesteps takes 1 to 100"),
        (
            "--metrics fid --reference-images 1",
            "too few real images: 1 in train; there must be 4 or more",
        ),
        pytest.param(
            "--metrics fid --weights none.pth",
            "none.pth cannot be loaded as the file from",
            marks=needs_fidelity,
        ),
        ("--dataset-name nowhere", "nowhere"),
        # bpd wants the images all the same, and before hours of sampling.
        ("--metrics bpd,fid --dataset-name nowhere", "nowhere"),
        ("--device tpu", "device is 'tpu'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments, message, tiny_run, tmp_path, capsys, monkeypatch
):
    # Loading weights sets this variable. Here it is set first, so that pytest restores it.
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    with pytest.raises(SystemExit) as ended, evaluate.exit_on_user_error():
        call(small_main, tiny_run, *arguments.split(), "--out", tmp_path)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
