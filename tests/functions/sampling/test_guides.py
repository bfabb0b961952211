"""Guidance by a run's snapshots: which file is the guide, and what is refused."""

import json
import shutil

import pytest

import sample
from functions.sampling.generation import find_guide
from functions.saved.checkpoint import load_weights
from functions.saved.run_folder import checkpoints_of, step_of
from tests.conftest import call, refused, train_tiny

FEW = "--sampler dpm++ --steps 3 --n 2 --device cpu --individual"


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """Return a finished run of 10 steps, with snapshots of steps 4, 8 and 10."""
    runs = tmp_path_factory.mktemp("guided")
    return train_tiny(pictures, runs, "--diffusion.snapshot-every 4")


def test_a_step_is_the_nearest_snapshot_or_checkpoint(run):
    early, late = (load_weights(path) for path in checkpoints_of(run))
    # Later files, and the snapshot of the model itself, are no guides.
    for saved, step, file in (
        (late, "0", "snapshots/step-00000004"),
        (late, "5", "checkpoints/step-00000005"),
        (late, "7", "snapshots/step-00000008"),
        (late, "99", "snapshots/step-00000008"),
        (early, "9", "snapshots/step-00000004"),
    ):
        assert find_guide(step, saved) == run / f"{file}.safetensors"
    assert find_guide(str(run), late) == run
    with refused("snapshot-every"):
        find_guide("4", load_weights(checkpoints_of(run, "snapshots")[0]))


def test_only_files_of_the_run_have_its_past(run, trained, tmp_path):
    """A model file of another run is none of them, whatever its folder."""
    other = trained("--diffusion.snapshot-every 4 --diffusion.seed 1")
    for place in ("models", "checkpoints"):
        copy = shutil.copytree(run, tmp_path / place / run.name)
        (copy / place).mkdir(exist_ok=True)
        model = copy / place / "step-00000011.safetensors"
        shutil.copy(checkpoints_of(other)[-1], model)
        with refused("no earlier snapshots in its run"):
            call(sample, model, FEW, "--guide 4")
    # A resumed run may have more epochs and smaller batches; another version may have other fields.
    saved = load_weights(checkpoints_of(run)[-1])
    del saved.config["diffusion"]["log_snr_shift"]
    saved.config["diffusion"] |= {"epochs": 9, "batch_size": 4, "gone": 1}
    assert step_of(find_guide("4", saved)) == 4


def test_an_exported_file_has_its_guide_beside_it(run, tmp_path):
    early, *_, last = checkpoints_of(run, "snapshots")
    model = shutil.copy(last, tmp_path / "faces.safetensors")
    with refused(r"there is no faces-guide\.safetensors beside it"):
        find_guide("4", load_weights(model))
    shutil.copy(early, tmp_path / "faces-guide.safetensors")
    with refused(r"faces-guide.safetensors is of step 4: use --guide 4"):
        find_guide("99", load_weights(model))
    # The images are those of the run.
    for path in (last, model):
        call(sample, path, FEW, "--guide 4 --out", tmp_path / path.stem)
    for name in ("00000.png", "00001.png"):
        images = [(tmp_path / path.stem / name).read_bytes() for path in (last, model)]
        assert images[0] == images[1]


def test_the_manifest_holds_the_guide_and_its_weight(run, tmp_path, capsys):
    """Files of one guide are never taken for those of another, or of none."""
    call(sample, run, FEW, "--guide 3 --out", tmp_path)
    snapshot = checkpoints_of(run, "snapshots")[0]
    assert f"guide {snapshot}: " in capsys.readouterr().out
    facts = json.loads((tmp_path / "samples.json").read_text())
    digest = load_weights(snapshot).digest[:16]
    assert facts.items() >= {"guide": digest, "guidance": 1.5}.items()


@pytest.mark.parametrize(
    "flags",
    ["--diffusion.timesteps-diff 50", "--model.image-size 8 --model.dim-multiply 1"],
)
def test_a_guide_of_another_shape_or_schedule_is_refused(run, trained, flags):
    flags += " --model.transformer-layers 0 --diffusion.epochs 1"
    with refused(r"another shape of images, or another noise schedule"):
        call(sample, run, FEW, "--guide", trained(flags))
