"""Models of diffusers: they are read as diffusers reads them, and written for it to read."""

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import evaluate
import sample
from config import ConfigError, ModelConfig, build_network
from functions.samplers import ddim_sample, ddpm_sample
from functions.sampling.export import export
from functions.saved import diffusers_folder
from functions.saved.checkpoint import load_weights
from functions.saved.diffusers_folder import REQUIRED, copy_weights, our_config, write_folder
from functions.saved.loading import load_denoiser, load_model, rebuild
from functions.saved.run_folder import find_checkpoints
from functions.support.errors import CheckpointError, UserError
from models.unet import UNet
from tests.conftest import CPU, SMALL_MODEL, call, refused
from tests.small_training import same

UNET, SCHEDULE = "unet/config.json", "scheduler/scheduler_config.json"
# These details are those of the paper's networks (Ho et al. 2020).
HO = dict(
    norm_eps=1e-6,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    attention_head_dim=None,
)


def blocks(size, widths, attention, groups=4):
    """Return the fields of a network with attention at one level."""
    kinds = ["DownBlock2D"] * len(widths)
    kinds[attention] = "AttnDownBlock2D"
    return dict(
        sample_size=size,
        block_out_channels=list(widths),
        down_block_types=kinds,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)],
        norm_num_groups=groups,
    )


SMALL = blocks(16, (16, 32), 1)
# The paper's networks for 32 and for 256 pixels have these levels; their width is 128.
CIFAR10 = blocks(32, (16, 32, 32, 32), 1) | HO
LARGE = blocks(64, (16, 16, 32, 32, 64, 64), 4) | HO
GREY = SMALL | dict(in_channels=1, out_channels=1)
V = dict(num_train_timesteps=50, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")


def network_of(fields):
    """Return a network of diffusers with random weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(**fields)
    for parameter in unet.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return unet


def write_pipeline(folder, unet, scheduler):
    """Write a pipeline as diffusers does today; return the path to read."""
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def write_old(folder, unet, scheduler):
    """Write a pipeline as diffusers 0.1 did: in one folder, with other names in a pickle."""
    unet.save_config(folder)
    scheduler.save_pretrained(folder)
    change(folder / "scheduler_config.json", predict_epsilon=True, tensor_format="pt")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    weights = unet.state_dict()
    for new, old in {"q": "query", "k": "key", "v": "value", "out.0": "proj_attn"}.items():
        weights = {name.replace(f"to_{new}.", f"{old}."): weights[name] for name in weights}
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    return folder


def write_training(folder, unet, scheduler):
    """Write a checkpoint as diffusers' training script does, with an EMA and raw weights."""
    scheduler.save_pretrained(folder / "scheduler")
    checkpoint = folder / "checkpoint-500"
    unet.save_pretrained(checkpoint / "unet_ema")
    change(checkpoint / "unet_ema" / "config.json", decay=0.9999)
    # The raw weights are not read.
    (checkpoint / "unet").mkdir()
    return checkpoint


def change(path, **fields):
    """Change fields of a JSON file."""
    changed = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(changed))


def same_images(saved, unet, scheduler):
    """Check that our samplers and the pipelines draw the same images with a saved model."""
    denoiser = rebuild(saved, CPU, torch.float32)
    diffusion = saved.config["diffusion"]
    variance = "fixed_" + diffusion.get("variance", "small")
    assert variance == scheduler.config.get("variance_type", "fixed_small")
    # With few steps, diffusers' large variance would add noise after the last of them.
    changes = {"timestep_spacing": "trailing", "variance_type": "fixed_small"}
    for sampler, pipeline, scheduler_class, options in (
        (ddpm_sample, DDPMPipeline, DDPMScheduler, {}),
        (ddim_sample, DDIMPipeline, DDIMScheduler, {"use_clipped_model_output": True}),
    ):
        generator = torch.Generator().manual_seed(3)
        loaded = pipeline(unet, scheduler_class.from_config(scheduler.config, **changes))
        expected = loaded(2, generator, num_inference_steps=5, output_type="np", **options).images

        # Ours draws the same noise in the same order.
        generator.manual_seed(3)

        def draw(*_, generator=generator):
            return torch.randn(2, *saved.model.image_shape, generator=generator)

        clip = diffusion.get("clip_x_0", True)
        images = sampler(denoiser, draw(), 5, clip_x_0=clip, step_noise=draw)
        images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)  # (B, H, W, C)
        assert_close(images.numpy(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("write", "fields", "scheduler"),
    [
        (write_old, CIFAR10, DDPMScheduler(variance_type="fixed_large")),
        (write_pipeline, LARGE, DDPMScheduler()),
        (write_pipeline, LARGE | {"sample_size": [64, 64]}, DDPMScheduler(clip_sample=False)),
        (write_training, SMALL, DDIMScheduler()),
        (write_training, SMALL, DDPMScheduler(**V)),
        (write_training, GREY, DDPMScheduler(clip_sample_range=2, clip_sample=False, **V)),
    ],
    ids=["cifar10", "celebahq", "bedroom", "ddim", "v", "grey v"],
)
def test_published_shapes_give_the_images_of_diffusers(write, fields, scheduler, tmp_path):
    unet = network_of(fields)
    path = write(tmp_path / "theirs", unet, scheduler)
    same_images(load_model(path), unet, scheduler)


@pytest.mark.slow
def test_ours_to_diffusers_and_back(tiny_run, tmp_path, monkeypatch):
    """Run, folder and exported file give the same images, and so do the pipelines of diffusers."""
    monkeypatch.chdir(tmp_path)
    exported = tmp_path / "faces"
    call(sample, tiny_run, "--export", exported)
    # The run's betas were rescaled for T = 100.
    pipeline = DDPMPipeline.from_pretrained(exported)
    original = load_weights(find_checkpoints(tiny_run)[0])
    same_images(original, pipeline.unet, pipeline.scheduler)
    assert same(original.weights, load_model(exported).weights)
    file = Path("a/new/folder/faces.safetensors")
    call(sample, tiny_run, "--export", file)
    assert load_weights(file).digest == original.digest

    card = (exported / "README.md").read_text()
    assert ModelCard(card).data.to_dict()["library_name"] == "diffusers"
    # Nobody else needs to know where the run lies on this disk.
    assert str(tmp_path.parent) not in card
    assert (exported / "samples.png").exists()
    # The code that the card shows runs as it is, and writes an image.
    exec("\n".join(line.strip() for line in card.splitlines() if line.startswith("    ")))
    assert Path("image.png").exists()


@pytest.mark.slow
def test_a_shift_of_the_log_snr_goes_to_diffusers_as_betas(tmp_path):
    saved = load_model(write_pipeline(tmp_path / "theirs", network_of(SMALL), DDPMScheduler(**V)))
    saved.config["diffusion"]["log_snr_shift"] = -1.386
    write_folder(saved, tmp_path / "ours")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "ours")
    same_images(saved, pipeline.unet, pipeline.scheduler)
    # Betas of a folder are not read.
    assert "the run has a log_snr_shift, so sample from the run" in refusal(tmp_path / "ours")


@pytest.mark.parametrize(("size", "used"), [(16, 16), (256, 64)])
def test_networks_are_compared_at_their_own_size_or_at_a_part_of_it(size, used, monkeypatch):
    sizes = []
    original = diffusers_folder.compute

    def compute(network, x_t):
        sizes.append(x_t.shape[-1])
        return original(network, x_t)

    monkeypatch.setattr(diffusers_folder, "compute", compute)
    model = ModelConfig(**SMALL_MODEL | {"image_size": size, "lowest_resolution_size": size // 2})
    theirs = UNet2DModel(**diffusers_folder.network_fields(model))
    copy_weights(theirs, build_network(model), model)
    assert {*sizes} == {used}


def test_another_network_than_ours_is_not_exported(folder, tmp_path, monkeypatch):
    class Other(UNet):
        pass

    saved = load_model(folder)
    monkeypatch.setattr(diffusers_folder, "build_network", lambda model: Other(**vars(model)))
    with refused("a diffusers folder can have .* a UNet with", CheckpointError):
        write_folder(saved, tmp_path / "out")


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a pipeline of diffusers, whose network has the paper's details."""
    return write_pipeline(tmp_path / "theirs", network_of(SMALL | HO), DDPMScheduler())


def test_what_cannot_be_exported_leaves_nothing_behind(folder, tmp_path):
    saved = load_model(folder)
    # Diffusers has no such network.
    saved.config["model"]["dim_multiply"] = [2, 2]
    for name, error, message in (
        ("out.pt", UserError, r"--export needs NAME\.safetensors"),
        ("theirs", UserError, "theirs exists"),
        ("out", CheckpointError, "a UNet with .* whose dim_multiply begins with 1;"),
    ):
        with refused(message, error):
            export(Mock(saved=saved), tmp_path / name)
    assert [*tmp_path.iterdir()] == [folder]


@pytest.mark.slow
def test_what_only_a_folder_decides(folder, tmp_path, monkeypatch, capsys):
    """A folder decides on the variance, on clipping of x_0, and on where samples go."""
    monkeypatch.chdir(tmp_path)
    changes = {"variance_type": "fixed_large", "clip_sample": False, "num_train_timesteps": 10}
    change(folder / SCHEDULE, beta_start=0.01, beta_end=0.4, **changes)
    before = sorted(folder.rglob("*"))

    # The folder's variance is for all timesteps; with fewer steps it is the small one.
    call(sample, "theirs --n 2")
    assert "steps all, spacing trailing, variance large, clip_x_0 False" in capsys.readouterr().out
    call(sample, "theirs --n 2 --steps 5")
    assert "variance small, clip_x_0 False" in capsys.readouterr().out
    with refused("does not say which images it was trained on"):
        call(evaluate, "theirs")
    call(evaluate, "theirs --data emoji_faces --images 2 --t-stride 20")
    # The folder does not say on which images its network was trained, so evaluate.py warns.
    assert "MAY NOT BE THE IMAGES" in capsys.readouterr().err

    # Results are not written into the folder, which is not ours.
    assert sorted(folder.rglob("*")) == before
    for name, count in (("*-*/theirs-*-seed0-n2/grid.png", 2), ("*-*/theirs-bpd-*.json", 1)):
        assert len([*Path("samples").glob(name)]) == count


@pytest.mark.slow
def test_another_network_in_the_folder_is_not_read(folder):
    """A pipeline has one network, in unet/, and the script's checkpoint an EMA and raw weights."""
    truth = load_model(folder).weights["conv_in.bias"]
    other = network_of(SMALL | HO)
    other.conv_in.bias.data.add_(1)
    for name in ("unet_old", "unet_ema"):
        other.save_pretrained(folder / name)
    assert torch.equal(load_model(folder).weights["conv_in.bias"], truth)
    (folder / "model_index.json").unlink()
    assert torch.equal(load_model(folder).weights["conv_in.bias"], truth + 1)


def test_a_schedule_in_the_folder_comes_before_that_of_a_neighbour(folder, tmp_path):
    flat = tmp_path / "flat"
    network_of(SMALL | HO).save_pretrained(flat)
    DDPMScheduler(beta_end=0.03).save_pretrained(tmp_path / "scheduler")
    assert load_model(flat).config["diffusion"]["beta_end"] == 0.03
    DDPMScheduler(beta_end=0.01).save_pretrained(flat)
    for path, beta_end in ((flat, 0.01), (folder, 0.02)):
        assert load_model(path).config["diffusion"]["beta_end"] == beta_end


# Networks or schedules with another value compute something else, or have other samplers.
REFUSED = [
    *REQUIRED,
    "norm_eps",
    "time_embedding_dim",
    "down_block_types",
    "up_block_types",
    "sample_size",
    "beta_schedule",
    "prediction_type",
    "variance_type",
    "clip_sample_range",
    "thresholding",
    "trained_betas",
]


@pytest.mark.parametrize("name", REFUSED)
def test_what_another_network_or_schedule_would_need_is_refused(name):
    fields = {**UNet2DModel(**SMALL | HO).config, **DDPMScheduler().config}
    our_config(fields, {})
    with refused(f"unsupported: {name}", ConfigError):
        our_config(fields | {name: "another"}, {})


def test_a_folder_is_refused_by_its_field(folder):
    # Diffusers does not know the first field.
    change(folder / SCHEDULE, my_trick=1)
    assert "unsupported: my_trick = 1" in refusal(folder)
    change(folder / SCHEDULE, _class_name="EDMEulerScheduler")
    assert "unsupported: EDMEulerScheduler" in refusal(folder)
    # The network of such a pipeline makes latents, which are no images.
    change(folder / "model_index.json", _class_name="LDMPipeline")
    assert "it is a LDMPipeline, and only DDPMPipeline and DDIMPipeline are read" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        (UNET, {"sample_size": []}),
        (UNET, {"time_embedding_type": "unknown"}),
        (UNET, {"block_out_channels": "wide"}),
        (SCHEDULE, {"beta_schedule": "squaredcos_cap_v2", "beta_start": None}),
        (SCHEDULE, {"num_train_timesteps": "all"}),
        (SCHEDULE, {"prediction_type": ["epsilon"]}),
    ],
)
def test_values_of_another_type_are_refused_in_a_sentence(file, fields, folder):
    change(folder / file, **fields)
    refusal(folder)


def test_a_schedule_that_is_no_object_is_refused_in_a_sentence(folder):
    (folder / SCHEDULE).write_text("[]")
    refusal(folder)


def test_the_comparison_of_the_networks_sees_another_epsilon():
    theirs = network_of(SMALL | HO | {"norm_eps": 1e-5})
    ours = UNet(16, 3, 8, (1, 2), (1,), 16, norm_groups=4)
    with refused("our network computes something else", ConfigError):
        copy_weights(theirs, ours, ModelConfig(**SMALL_MODEL))


def refusal(folder):
    """Return what is said of a folder, which is one line."""
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert message.isprintable()
    return message


def test_damaged_folders_are_refused_in_a_sentence(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][3] = torch.nan
    save_file(weights, file)
    assert "unet.conv_in.bias has infinite values or NaN" in refusal(folder)
    file.write_bytes(file.read_bytes()[:2000])
    refusal(folder)
    (folder / UNET).unlink()
    refusal(folder)
    shutil.rmtree(folder / "scheduler")
    refusal(folder)


def test_a_name_is_taken_from_the_cache_of_diffusers(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--me--faces"
    shutil.copytree(folder, repository / "snapshots" / "0a1b")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0a1b")

    call(sample, "me/faces --n 1 --steps 2")
    assert "me/faces: no such path; diffusers takes it from its cache" in capsys.readouterr().out
    assert len([*Path("samples").glob("me--faces-*/*me--faces-*-seed0-n1/grid.png")]) == 1
    with refused("me/others is no path, and diffusers cannot download it"):
        call(sample, "me/others")
    # A name in a folder that is there, or in that of runs, is a path.
    for path in ("theirs/unet2", "runs/nothing"):
        with refused(f"{path}: there is no such file", CheckpointError):
            call(sample, path)


def test_without_the_package_a_sentence_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with refused("install its package: pip install 'diffusers"):
        load_denoiser(folder)
