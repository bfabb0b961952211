"""An average whose length is chosen after training is that of the weights of every step."""

import shutil

import pytest
import torch

import evaluate
import sample
from functions.sampling import reconstruction
from functions.sampling.guidance import find_guide
from functions.sampling.reconstruction import reconstruct
from functions.support.checkpoint import load_weights, verify_checkpoint
from functions.support.errors import UserError
from functions.support.run_folder import checkpoints_of, power_snapshots
from tests.conftest import POWER_EMA, POWER_PARTS, call, newest, train_tiny
from tests.functions.test_ema import shares

FEW = ["--sampler", "dpm++", "--steps", 2, "--n", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """Return a run of 20 steps with the checkpoints of all, and power averages of every second.

    Its weights move far in a step, compared with the rounding of float16.
    """
    flags = "--diffusion.snapshot-every 2 --diffusion.epochs 4 --diffusion.learning-rate 0.03"
    flags += " --diffusion.lr-schedule constant"
    flags += " --diffusion.checkpoint-every 1 --diffusion.keep-checkpoints 20"
    flags += " --diffusion.sample-every 20 --diffusion.validate-every 20"
    runs = tmp_path_factory.mktemp("averaged")
    return train_tiny(pictures, runs, *POWER_EMA, *flags.split())


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / run.name)


def damage(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def trajectory(run):
    """Return the weights of all steps, as vectors in float64."""
    files = [verify_checkpoint(path) for path in checkpoints_of(run)]
    return torch.stack([vector(file.tensors("model.")) for file in files])


def vector(weights):
    return torch.cat([weight.flatten().double() for weight in weights.values()])


@pytest.mark.parametrize("at", [20, 12])
@pytest.mark.parametrize("length", [0.05, 0.08, 0.1, 0.15])
def test_it_is_the_average_of_the_weights_of_all_steps(length, at, run, trajectory):
    """The distance to the average that is a tenth longer is the unit, with 10 or 6 snapshots."""
    saved = load_weights(reconstruct(run, length, at))
    expected = shares(length, at) @ trajectory[:at]
    unit = (shares(1.1 * length, at) @ trajectory[:at] - expected).norm()
    assert (vector(saved.weights) - expected).norm() < 0.1 * unit
    assert saved.provenance["step"] == at
    assert all(weight.dtype == torch.float32 for weight in saved.weights.values())


def test_snapshots_are_the_averages_of_the_checkpoint_in_float16(run):
    """Each is also a model by itself."""
    assert list(power_snapshots(run).values())[-3:] == [(18, 0.1), (20, 0.05), (20, 0.1)]
    averages = newest(run)
    for part, path in zip(POWER_PARTS, list(power_snapshots(run))[-2:], strict=True):
        saved = load_weights(path)
        for name, weight in saved.weights.items():
            assert torch.equal(weight, averages[part][name].half().float())


def test_nothing_takes_power_averages_for_the_model_or_its_guide(run):
    names = [path.name for path in checkpoints_of(run, "snapshots")]
    assert names == [f"step-{step:08d}.safetensors" for step in range(2, 21, 2)]
    saved = load_weights(reconstruct(run, 0.07))
    assert find_guide("4", saved) == [run / "snapshots" / "step-00000004.safetensors"]


def test_a_second_call_finds_the_file_unless_a_snapshot_is_another(copy, monkeypatch):
    sources = []
    original = reconstruction.load_weights

    def watched(path):
        sources.append(path)
        return original(path)

    monkeypatch.setattr(reconstruction, "load_weights", watched)
    path = reconstruct(copy, 0.06, 4)
    assert reconstruct(copy, 0.06, 5) == path == reconstruct(copy, 0.06, 4)
    assert sources == list(power_snapshots(copy))[:4]
    digest = load_weights(path).digest

    # A damaged file is written anew.
    damage(path)
    assert load_weights(reconstruct(copy, 0.06, 4)).digest == digest
    shutil.copy(sources[2], sources[0])
    assert load_weights(reconstruct(copy, 0.06, 4)).digest != digest


def test_it_goes_on_like_any_model(copy, tmp_path, capsys):
    length = ["--ema-length", 0.08]
    call(sample.main, copy, *length, "--at", 13, *FEW, "--guide", 4)
    printed = capsys.readouterr().out
    assert "step-00000012-length-0.08.safetensors: EMA weights after 12 of 20 steps" in printed
    assert "snapshots/step-00000004.safetensors: EMA weights" in printed
    assert list(copy.glob("samples/step-00000012-length-0.08-dpmpp2-guided1.5-*/grid.png"))

    # The newest run is found, too.
    exported = tmp_path / "exported.safetensors"
    call(sample.main, "--runs", copy.parent, *length, "--export", exported, "--device", "cpu")
    assert load_weights(exported).digest == load_weights(reconstruct(copy, 0.08)).digest
    few = ["--metrics", "bands", "--images", 2, "--device", "cpu"]
    call(evaluate.main, copy, *length, *few)
    assert list(copy.rglob("step-00000020-length-0.08-bands*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ema-length", 0.21], "from 0.03 to 0.2"),
        (["--ema-length", "nan"], "from 0.03 to 0.2"),
        (["--at", 4], "--at needs an --ema-length"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused(flags, message, run):
    with pytest.raises(UserError, match=message):
        call(sample.main, run, *flags)


def test_a_run_without_power_averages_and_a_damaged_one_are_named(tiny_run, copy):
    with pytest.raises(UserError, match=f"{tiny_run.name} has no power averages"):
        call(sample.main, tiny_run, "--ema-length", 0.08)
    damaged = list(power_snapshots(copy))[5]
    damage(damaged)
    with pytest.raises(UserError, match=damaged.name):
        call(sample.main, copy, "--ema-length", 0.09)
