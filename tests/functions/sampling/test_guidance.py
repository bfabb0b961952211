"""Guidance by a run's snapshots: which file is the guide, and what is refused."""

import json
import shutil

import pytest

import sample
from functions.sampling import calibration
from functions.sampling.guidance import find_guide
from functions.support.checkpoint import load_weights
from functions.support.errors import UserError
from functions.support.run_folder import checkpoints_of, find_checkpoints
from tests.conftest import call, newest, train_tiny
from tests.spoilt_files import same

FEW = ["--sampler", "dpm++", "--steps", 3, "--n", 2, "--device", "cpu", "--individual"]


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """Return a finished run of 10 steps, with snapshots of steps 4, 8 and 10."""
    runs = tmp_path_factory.mktemp("guided")
    return train_tiny(pictures, runs, "--diffusion.snapshot-every", 4)


def test_snapshots_are_the_averaged_weights_in_float16(run):
    assert [path.stem for path in checkpoints_of(run, "snapshots")] == [
        f"step-{i:08d}" for i in (4, 8, 10)
    ]
    saved = load_weights(checkpoints_of(run, "snapshots")[-1])
    weights = newest(run)["ema"]
    assert same(saved.weights, {name: weight.half() for name, weight in weights.items()})
    assert saved.kind == "EMA"
    assert saved.provenance["step"] == 10


def test_a_step_is_the_nearest_snapshot_or_checkpoint(run):
    saved = load_weights(checkpoints_of(run)[-1])
    steps = {"0": "snapshots/step-00000004", "5": "checkpoints/step-00000005"}
    # Later files, and the snapshot of the model itself, are no guides.
    steps |= {"7": "snapshots/step-00000008", "99": "snapshots/step-00000008"}
    early = load_weights(checkpoints_of(run)[0])
    assert find_guide("9", early) == [run / "snapshots/step-00000004.safetensors"]
    for step, file in steps.items():
        assert find_guide(step, saved) == [run / f"{file}.safetensors"]
    assert find_guide(str(run), saved) == find_checkpoints(run)
    with pytest.raises(UserError, match="snapshot-every"):
        find_guide("4", load_weights(checkpoints_of(run, "snapshots")[0]))


def test_files_and_the_manifest_hold_the_guide_and_its_weight(run, tmp_path, capsys):
    """Files of one guide are never taken for those of another, or of none."""
    call(sample.main, run, *FEW, "--guide", 4)
    digest = load_weights(checkpoints_of(run, "snapshots")[0]).digest
    assert "guide" in capsys.readouterr().out
    folder = next(run.glob(f"samples/*guided1.5-{digest[:8]}*"))
    facts = json.loads((folder / "samples.json").read_text())
    assert (facts["guide"], facts["guidance"]) == (digest, 1.5)

    out = [*FEW, "--out", tmp_path / "images"]
    call(sample.main, run, *out)
    for flags in (["--guide", 4], ["--guide", 4, "--guidance", 2]):
        with pytest.raises(UserError, match="with other settings"):
            call(sample.main, run, *out, *flags)


@pytest.mark.slow
def test_either_network_has_its_own_calibration(run, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "IMAGE_COUNT", 12)
    copy = shutil.copytree(run, tmp_path / run.name)
    call(sample.main, copy, *FEW, "--guide", 4, "--calibrate", "own")
    names = {path.name.split("-calibration-")[0] for path in copy.rglob("*calibration*")}
    assert names == {"step-00000004", "step-00000010"}


def test_a_damaged_snapshot_is_named_and_other_files_are_passed_over(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / run.name)
    (copy / "snapshots" / "step-0000004a.safetensors").write_bytes(b"")
    damaged = checkpoints_of(copy, "snapshots")[0]
    data = bytearray(damaged.read_bytes())
    data[-9] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(UserError, match=damaged.name):
        call(sample.main, copy, *FEW, "--guide", 4)


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--diffusion.timesteps-diff", 50], "another noise schedule"),
        (
            ["--model.image-size", 32, "--model.dim-multiply", "1,2,2"],
            r"its images are \(3, 32, 32\)",
        ),
    ],
)
def test_a_guide_of_another_shape_or_schedule_is_refused(run, trained, flags, reason):
    other = trained(*flags, "--diffusion.epochs", 1)
    with pytest.raises(UserError, match=f"cannot guide .*{reason}"):
        call(sample.main, run, *FEW, "--guide", other)


def test_a_guide_of_another_step_is_said(run, tmp_path, capsys):
    call(sample.main, run, *FEW, "--guide", 3, "--out", tmp_path)
    assert "guide: step 4, nearest to 3\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "main, flags, message",
    [
        (sample.main, ["--guidance", 2], "needs a --guide"),
        (sample.main, ["--guide", 4, "--guidance", "nan"], "from 0 to"),
        (sample.main, ["--guide", 4, "--export", "x.safetensors"], "ignored with --export"),
    ],
)
def test_what_cannot_be_guided_is_refused(main, flags, message, run):
    with pytest.raises(UserError, match=message):
        call(main, run, *flags)
