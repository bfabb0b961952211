"""Models of diffusers run as that library runs them, and ours are written for it to read."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import edit
import evaluate
import sample
from figures.saved_model import open_saved
from functions.sampling.generation import generate
from functions.saved.checkpoint import load_model
from functions.saved.loading import load_denoiser
from functions.support.errors import CheckpointError
from functions.support.random_numbers import seed_of
from tests.conftest import call, refused
from tests.theirs import FEW, OTHER, random_unet, write_pipeline

UNET, SCHEDULE = "unet/config.json", "scheduler/scheduler_config.json"
V = FEW | dict(
    prediction_type="v_prediction",
    beta_schedule="squaredcos_cap_v2",
    variance_type="fixed_small_log",
    clip_sample=False,
)
GREY = OTHER | dict(in_channels=1, out_channels=1)
BETAS = [0.1, 0.9, 0.2, 0.4, 0.5]


def write_old(folder, unet, scheduler):
    """Write a pipeline as diffusers 0.1 did: in one folder, with other names in a pickle."""
    unet.save_config(folder)
    scheduler.save_pretrained(folder)
    change(folder / "scheduler_config.json", predict_epsilon=True, tensor_format="pt")
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    weights = unet.state_dict()
    for new, old in {"q": "query", "k": "key", "v": "value", "out.0": "proj_attn"}.items():
        weights = {name.replace(f"to_{new}.", f"{old}."): weights[name] for name in weights}
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    return folder


def write_training(folder, unet, scheduler):
    """Write a checkpoint as diffusers' training script does, with an EMA."""
    scheduler.save_pretrained(folder / "scheduler")
    checkpoint = folder / "checkpoint-500"
    unet.save_pretrained(checkpoint / "unet_ema")
    change(checkpoint / "unet_ema" / "config.json", decay=0.9999)
    return checkpoint


def change(path, **fields):
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rebuilt(folder, **fields):
    """Write another network, whose weights fit; return it."""
    unet = UNet2DModel(**OTHER | fields)
    unet.save_pretrained(folder)
    return unet


def their_images(unet, scheduler):
    """Return what the pipelines draw (2, H, W, C): by DDPM with all steps, by DDIM with 5."""
    images = []
    for pipeline, kind, options in (
        (DDPMPipeline, DDPMScheduler, {"num_inference_steps": len(scheduler.betas)}),
        (DDIMPipeline, DDIMScheduler, {"num_inference_steps": 5, "use_clipped_model_output": True}),
    ):
        loaded = pipeline(unet, kind.from_config(scheduler.config, timestep_spacing="trailing"))
        loaded.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed_of(3, "image", i)) for i in range(2)]
        images.append(loaded(2, generators, output_type="np", **options).images)
    return images


def our_images(path):
    """Return what sample.py draws of the same noise."""
    images = []
    for flags in ("--sampler ddpm", "--sampler ddim --steps 5"):
        pipeline = open_saved(path, f"{flags} --seed 3 --device cpu")
        x_0 = generate(pipeline, range(2))
        images.append((x_0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    return images


@pytest.mark.parametrize(
    ("write", "fields", "scheduler"),
    [
        (write_old, OTHER, DDPMScheduler(**FEW, variance_type="fixed_large")),
        (write_training, OTHER, DDIMScheduler(**FEW, beta_schedule="scaled_linear")),
        (write_training, GREY, DDPMScheduler(clip_sample_range=2, **V)),
        (write_pipeline, OTHER, DDPMScheduler(num_train_timesteps=5, trained_betas=BETAS)),
    ],
    ids=["old", "script", "grey v", "betas"],
)
def test_a_folder_draws_the_images_of_its_pipelines(write, fields, scheduler, tmp_path):
    unet = random_unet(fields)
    path = write(tmp_path / "theirs", unet, scheduler)
    if write == write_pipeline:
        # It may be the height and the width.
        change(path / UNET, sample_size=[16, 16])
    assert_close(our_images(path), their_images(unet, scheduler), rtol=0, atol=1e-4)


@pytest.fixture
def folder(their_folder, tmp_path):
    """Return a copy of `their_folder`."""
    return shutil.copytree(their_folder, tmp_path / "theirs")


@pytest.mark.slow
def test_ours_to_diffusers_and_back(trained, here):
    """Run and folder give the same images, and so do the pipelines of diffusers.

    Betas of the folder are in float32, and still it can guide the run.
    tests/functions/saved/test_checkpoint.py has an exported file.
    """
    # The betas are rescaled for this T.
    run = trained("--diffusion.timesteps-diff 25 --diffusion.epochs 1")
    call(sample, run, "--export faces")
    pipeline = DDPMPipeline.from_pretrained("faces")
    theirs = their_images(pipeline.unet, pipeline.scheduler)
    for path in (run, Path("faces")):
        assert_close(our_images(path), theirs, rtol=0, atol=1e-3)
    call(sample, run, "--guide faces --guidance 2 --sampler dpm++ --steps 4 --n 1 --device cpu")
    # Nobody else needs to know where the run lies on this disk.
    texts = [path.read_text() for path in Path("faces").rglob("*.json")]
    assert str(here.parent) not in "".join(texts)


def test_theirs_comes_back_from_a_file_and_from_a_folder(their_folder, tmp_path):
    """An exported folder holds what diffusers wrote, and so does a file of ours.

    The digest is that of weights, network and schedule.
    """
    file, again = tmp_path / "file.safetensors", tmp_path / "again"
    call(sample, their_folder, "--export", file)
    call(sample, file, "--export", again)
    assert load_model(again).digest == load_model(their_folder).digest


def test_what_cannot_be_exported_leaves_nothing_behind(their_folder, tmp_path):
    """tests/functions/sampling/test_enlarging.py has a model that diffusers does not have."""
    (tmp_path / "there").mkdir()
    for name, message in (
        ("out.pt", r"--export needs NAME\.safetensors"),
        ("there", "there exists"),
    ):
        with refused(message):
            call(sample, their_folder, "--export", tmp_path / name)
    assert [*tmp_path.iterdir()] == [tmp_path / "there"]


def test_what_only_a_folder_decides(folder, pictures, here, capsys):
    """A folder decides on the variance, on clipping of x_0, and on where samples go."""
    change(folder / SCHEDULE, variance_type="fixed_large", clip_sample=False)
    before = sorted(folder.rglob("*"))

    # The folder's variance is for all timesteps; with fewer steps it is the small one.
    for steps, variance in ((20, "large"), (5, "small")):
        call(sample, "theirs --n 1 --steps", steps)
        used = f"steps {steps}, spacing trailing, variance {variance}, temperature 1.0, clip_x_0 F"
        assert used in capsys.readouterr().out
    call(edit, "vary 0 theirs --steps 5 --depths 0.2")
    with refused("does not say which images it was trained on"):
        call(evaluate, "theirs")
    call(evaluate, "theirs --images 2 --t-stride 10 --data", pictures)
    # The folder does not say on which images its network was trained, so evaluate.py warns.
    assert "it was trained elsewhere" in capsys.readouterr().err

    # Results are not written into the folder, which is not ours.
    assert sorted(folder.rglob("*")) == before
    assert list(Path("evaluation").glob("theirs-bpd-*.json"))


def test_which_of_several_networks_and_schedules_is_read(folder):
    """A pipeline has one in unet/, and the script's checkpoint an EMA, raw weights, no schedule."""
    own = load_model(folder).weights["unet.conv_in.bias"]
    other = rebuilt(folder / "unet_ema")
    DDPMScheduler(30).save_pretrained(folder.parent / "scheduler")
    assert torch.equal(load_model(folder).weights["unet.conv_in.bias"], own)
    assert load_model(folder).scheduler.timesteps == 20
    (folder / "model_index.json").unlink()
    assert torch.equal(load_model(folder).weights["unet.conv_in.bias"], other.conv_in.bias)
    shutil.rmtree(folder / "scheduler")
    assert load_model(folder).scheduler.timesteps == 30


def refusal(folder):
    """Return what is said of a folder, which is one line."""
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert message.isprintable()
    return message


UNSUPPORTED = {
    # Latents, sizes that are no square, a learned variance, classes
    UNET: {
        "in_channels": 4,
        "sample_size": [16, 32],
        "out_channels": 6,
        "class_embed_type": "timestep",
        "num_class_embeds": 10,
    },
    SCHEDULE: {
        "prediction_type": "flow_prediction",
        "predict_epsilon": False,
        "variance_type": "learned_range",
        "thresholding": True,
        "clip_sample_range": 2,
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": False,
        "trained_betas": [0.1] * 19,
        # Diffusers does not know it.
        "my_trick": 1,
        "_class_name": "EDMEulerScheduler",
    },
    "model_index.json": {"_class_name": "LDMPipeline"},
}


@pytest.mark.parametrize("file", UNSUPPORTED)
def test_what_has_no_counterpart_is_refused_by_its_name(file, folder):
    before = (folder / file).read_text()
    for name, value in UNSUPPORTED[file].items():
        if file == UNET:
            rebuilt(folder / "unet", **{name: value})
        else:
            change(folder / file, **{name: value})
        words = {"_class_name": value, "trained_betas": "19 betas; they must be 20"}
        assert words.get(name, name) in refusal(folder)
        (folder / file).write_text(before)


def test_damaged_folders_are_refused_in_a_sentence(their_folder, tmp_path):
    file = "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(their_folder / file)
    fewer = {name: weights[name] for name in weights if name != "conv_out.bias"}
    weights["conv_in.bias"][3] = torch.nan
    for k, (damaged, damage, sentence) in enumerate(
        (
            (SCHEDULE, lambda path: change(path, num_train_timesteps="all"), ": diffusers: "),
            (SCHEDULE, lambda path: path.write_text("[]"), "cannot be read"),
            (file, lambda path: path.write_bytes(path.read_bytes()[:2000]), "cannot be read"),
            (file, partial(save_file, fewer), "the weights do not fit the network"),
            (file, partial(save_file, weights), "output at t = 0 has infinite values or NaN"),
            ("unet", partial(rebuilt, sample_size=15), "diffusers: Sizes of tensors must match"),
        )
    ):
        folder = shutil.copytree(their_folder, tmp_path / str(k))
        damage(folder / damaged)
        assert sentence in refusal(folder)


def test_a_door_without_its_extra_says_so(their_folder, tiny_run, tmp_path, monkeypatch):
    file = tmp_path / "file.safetensors"
    call(sample, their_folder, "--export", file)
    for module in ("diffusers_folder", "diffusers_network"):
        monkeypatch.setitem(sys.modules, f"extras.{module}", None)
    for flags, sentence in (
        ([their_folder], "a model of diffusers needs extras/diffusers_folder of this project"),
        ([file], "a network of diffusers needs extras/diffusers_network of this project, which is"),
        ([tiny_run, "--export", tmp_path / "folder"], "a model of diffusers needs extras/"),
    ):
        with refused(f"^{sentence}"):
            call(sample, *flags)


def test_a_name_is_taken_from_the_cache_of_diffusers(folder, here, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    repository = here / "cache" / "models--me--faces"
    shutil.copytree(folder, repository / "snapshots" / "0a1b")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0a1b")

    call(sample, "me/faces --n 1 --steps 2")
    assert "me/faces: no such path; diffusers takes it from its cache" in capsys.readouterr().out
    assert len([*Path("samples").glob("me--faces-*/**/grid.png")]) == 1
    with refused("me/others is no path, and diffusers cannot download it"):
        call(sample, "me/others")
    # A name in a folder that is there, or in that of runs, is a path.
    for path in ("theirs/unet2", "runs/nothing"):
        with refused(f"{path}: there is no such file", CheckpointError):
            call(sample, path)
