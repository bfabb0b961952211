"""Folders of diffusers: they are read as diffusers reads them, and written for it to read.

test_hostile_folders.py has those that are refused.
"""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils.logging import disable_progress_bar
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import evaluate
import sample
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddim_sample, ddpm_sample
from functions.sampling import calibration
from functions.sampling.generation import ImageSampler, generate
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import load_weights
from functions.support.diffusers_folder import WEIGHTS
from functions.support.errors import UserError
from functions.support.loading import load_denoiser, load_model, rebuild
from functions.support.run_folder import find_checkpoints
from tests.conftest import CPU, call
from tests.spoilt_files import same

UNET, SCHEDULE = "unet/config.json", "scheduler/scheduler_config.json"
# These details are those of the paper's networks (Ho et al. 2020).
HO = dict(
    norm_eps=1e-6,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    attention_head_dim=None,
)
SMALL = dict(
    sample_size=16,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
)
# The paper's networks (https://arxiv.org/abs/2006.11239) were published with these fields, by
# diffusers 0.0.4 and 0.1.1, with all files in one folder.
PUBLISHED = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "center_input_sample": False,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
    **HO,
}
OLD_SCHEDULE = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}


def random_weights(unet):
    torch.manual_seed(0)
    for parameter in unet.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return unet


def save_theirs(folder):
    """Save a pipeline of diffusers whose network has the paper's details; return its folder."""
    unet = random_weights(UNet2DModel(**SMALL, **HO))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save_theirs(tmp_path / "theirs")


def change(path, **fields):
    """Change fields of a JSON file."""
    changed = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(changed))


def with_old_names(weights):
    """Call attention's weights as the first diffusers called them."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in weights.items()}
    return weights


def open_in_diffusers(folder, capfd):
    """Return diffusers' pipeline; anything that diffusers says is a failure."""
    # What earlier calls printed is dropped first.
    capfd.readouterr()
    disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = DDPMPipeline.from_pretrained(folder)

    assert capfd.readouterr() == ("", "")
    return pipeline


def same_output(denoiser, unet, size=16):
    x_t = torch.randn(2, unet.config.in_channels, size, size)
    t = torch.tensor([7, 999])
    with torch.no_grad():
        assert_close(denoiser(x_t, t), unet(x_t, t).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_published_model_of_cifar_10(tmp_path):
    """All its files are in one folder. Its weights are random here, and have the old names."""
    config = PUBLISHED | {
        "sample_size": 32,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    }
    schedule = OLD_SCHEDULE | {"variance_type": "fixed_large"}
    contents = {
        "model_index.json": {"_class_name": "DDPMPipeline"},
        "config.json": config,
        "scheduler_config.json": schedule,
    }
    for name, fields in contents.items():
        (tmp_path / name).write_text(json.dumps(fields))

    unet = random_weights(UNet2DModel.from_config(config))
    save_file(with_old_names(unet.state_dict()), tmp_path / WEIGHTS)

    saved = load_model(find_checkpoints(tmp_path)[0])
    assert sum(tensor.numel() for tensor in saved.weights.values()) == 35_746_307
    assert saved.config["model"]["dialect"] == "ho"
    assert saved.config["diffusion"]["variance"] == "large"
    denoiser = rebuild(saved, CPU)
    assert torch.equal(denoiser.scheduler.alphas_cumprod, NoiseScheduler(1000).alphas_cumprod)
    same_output(denoiser, unet, 32)


def fields_of(component):
    """Return the config of a network or a scheduler as JSON has it, without tuples."""
    return json.loads(json.dumps(dict(component.config)))


GREY = {"in_channels": 1, "out_channels": 1}


@pytest.mark.parametrize("details", [HO, {}, GREY], ids=["ho", "diffusers", "grey"])
def test_diffusers_to_ours_and_back_is_bit_identical(details, tmp_path, capfd):
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )
    theirs = DDPMPipeline(random_weights(UNet2DModel(**SMALL, **details)), scheduler)
    theirs.save_pretrained(tmp_path / "theirs")

    call(sample.main, tmp_path / "theirs", "--export", tmp_path / "ours")
    again = open_in_diffusers(tmp_path / "ours", capfd)

    # We neither read nor write these fields.
    not_read = {"_diffusers_version", "timestep_spacing", "_name_or_path", "_use_default_values"}
    for part in ("unet", "scheduler"):
        before = fields_of(getattr(theirs, part))
        after = fields_of(getattr(again, part))
        assert {name for name in after if after[name] != before.get(name)} <= not_read, part
        assert before.keys() - after.keys() <= not_read, part

    assert same(theirs.unet.state_dict(), again.unet.state_dict())
    same_output(load_denoiser(tmp_path / "theirs"), again.unet)


@pytest.mark.slow
def test_ours_to_diffusers_and_back_gives_the_same_images(tiny_run, tmp_path, monkeypatch, capfd):
    exported = tmp_path / "faces"
    call(sample.main, tiny_run, "--export", exported)

    # The run's betas were rescaled for T = 100, so the folder says the first and the last.
    pipeline = open_in_diffusers(exported, capfd)
    assert_close(pipeline.scheduler.betas.double(), NoiseScheduler(100).betas, rtol=1e-6, atol=0)
    original = load_weights(find_checkpoints(tiny_run)[0])
    assert same(original.weights, load_model(exported).weights)

    # The run, the folder and an exported file give the same images.
    file = tmp_path / "faces.safetensors"
    call(sample.main, tiny_run, "--export", file)
    flags = ["--n", 4, "--steps", 5, "--sampler", "ddim", "--individual"]
    for model, out in ((tiny_run, "a"), (exported, "b"), (file, "c")):
        call(sample.main, model, *flags, "--out", tmp_path / out)
    for name in ("grid.png", "00000.png", "00001.png", "00002.png", "00003.png"):
        assert len({(tmp_path / out / name).read_bytes() for out in "abc"}) == 1

    card = (exported / "README.md").read_text()
    front_matter = ModelCard(card).data.to_dict()
    assert front_matter["datasets"] == ["pictures0"]
    assert front_matter["library_name"] == "diffusers"
    # Nobody else needs to know where the run lies on this disk.
    assert str(tmp_path.parent) not in card
    assert (exported / "samples.png").exists()

    # The code that the card shows runs as it is, and writes an image.
    code = [line.strip() for line in card.splitlines() if line.startswith("    ")]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(code))
    assert Path("image.png").exists()

    # A second export does not touch what is there.
    before = (exported / "README.md").stat().st_mtime_ns
    with pytest.raises(UserError, match="faces exists"):
        call(sample.main, tiny_run, "--export", exported)
    assert (exported / "README.md").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        (SCHEDULE, {"prediction_type": "v_prediction"}),
        # diffusers 0.8 wrote this field into every schedule.
        (SCHEDULE, {"predict_epsilon": True}),
        (SCHEDULE, {"clip_sample": False, "clip_sample_range": 2.0}),
        (UNET, {"sample_size": [16, 16]}),
    ],
)
@pytest.mark.parametrize(
    ("sampler", "pipeline", "options"),
    [
        (ddpm_sample, DDPMPipeline, {}),
        (ddim_sample, DDIMPipeline, {"use_clipped_model_output": True}),
    ],
)
def test_our_samplers_and_their_pipelines_draw_the_same_images(
    sampler, pipeline, options, part, fields, folder
):
    change(folder / SCHEDULE, timestep_spacing="trailing")
    change(folder / part, **fields)
    loaded = pipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    theirs = loaded(2, generator, num_inference_steps=20, output_type="np", **options).images

    # Ours draws the same noise in the same order.
    generator.manual_seed(3)

    def draw(*_):
        return torch.randn(2, 3, 16, 16, generator=generator)

    saved = load_model(folder)
    clip = saved.config["diffusion"]["clip_x_0"]
    denoiser = rebuild(saved, CPU)
    ours = sampler(denoiser, draw(), 20, clip_x_0=clip, step_noise=draw)
    images = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)  # (B, H, W, C)
    assert_close(images.numpy(), theirs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_what_only_a_folder_decides(folder, tmp_path, monkeypatch, capsys):
    """A folder decides on the variance, on clipping of x_0, and on where samples go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "IMAGE_COUNT", 8)
    change(
        folder / SCHEDULE,
        variance_type="fixed_large",
        clip_sample=False,
        num_train_timesteps=10,
        beta_start=0.01,
        beta_end=0.4,
    )
    before = sorted(folder.rglob("*"))

    # The folder's variance is for all timesteps; with fewer steps it is the small one.
    call(sample.main, "theirs", "--n", 2)
    assert "all steps, variance large, x_0 not clipped" in capsys.readouterr().out
    call(sample.main, "theirs", "--n", 2, "--steps", 5)
    assert "variance small, x_0 not" in capsys.readouterr().out

    with pytest.raises(
        UserError, match="does not say which images it was trained on; name a data set"
    ):
        call(sample.main, "theirs", "--n", 2, "--calibrate")
    call(evaluate.main, "theirs", "--data", "emoji_faces", "--images", 2, "--t-stride", 20)
    # The folder does not say on which images its network was trained, so evaluate.py warns.
    assert "IT IS UNKNOWN" in capsys.readouterr().err

    call(sample.main, "theirs", "--n", 2, "--sampler", "ddim", "--calibrate", "own", "--strip")

    # Images leave the range [-1, 1] where x_0 is not clipped.
    saved = load_model(folder)
    denoiser = rebuild(saved, CPU)
    for clip in (True, False):
        options = SamplerOptions("ddim", 5, clip_x_0=clip)
        sampler = ImageSampler(denoiser, options, saved.model.image_shape, 0, CPU)
        images = generate(sampler, range(2)).images
        assert (images.max() <= 1) == clip

    # Results are not written into the folder, which is not ours.
    assert sorted(folder.rglob("*")) == before
    results = (
        "ddpm-variance-large-float32-seed0/grid.png",
        "ddpm5-float32-seed0/grid.png",
        "bpd-*.json",
        "ddim-calibrated-own-float32-seed0/strip.png",
    )
    for name in results:
        assert len([*Path("samples").glob(f"theirs-*/theirs-{name}")]) == 1
    assert len([*Path("samples").glob("theirs-calibration-*.safetensors")]) == 1


@pytest.mark.parametrize("part", ["", "unet_ema"])
def test_a_checkpoint_of_their_training_has_its_parents_schedule(part, folder, monkeypatch):
    """Their training script saves OUTPUT/checkpoint-500/unet_ema and OUTPUT/scheduler."""
    change(folder / SCHEDULE, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    checkpoint = folder / "checkpoint-500"
    shutil.copytree(folder / "unet", checkpoint / "unet_ema")
    change(checkpoint / "unet_ema" / "config.json", decay=0.9999, optimization_step=500)
    # The raw weights are not read.
    (checkpoint / "unet").mkdir()

    # A path may also be relative, and then it need not name the parent.
    monkeypatch.chdir(checkpoint)
    for path in (checkpoint / part, Path(part)):
        saved = load_model(path)
        assert saved.digest == load_model(folder).digest
        assert "assumed" not in str(saved)
        denoiser = rebuild(saved, CPU)
        assert denoiser.objective == "v"
        theirs = DDPMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod
        assert_close(denoiser.scheduler.alphas_cumprod.float(), theirs, rtol=1e-4, atol=1e-8)

    # A folder of another name may hold any other model.
    other = checkpoint.rename(folder / "other")
    assert "the paper's schedule is assumed" in str(load_model(other))


def test_a_unet_alone_linked_and_in_half_precision(folder, tmp_path):
    whole = load_model(folder)
    unet = folder / "unet"
    weights = load_file(unet / WEIGHTS)

    # A hub's cache names folders by hashes, and links files.
    alone = tmp_path / "models--me--faces" / "snapshots" / "0a1b"
    alone.mkdir(parents=True)
    for name in ("config.json", WEIGHTS):
        (alone / name).symlink_to(unet / name)
    linked = load_model(alone)
    assert linked.digest == whole.digest
    assert linked.name == "me--faces"
    assert "the paper's schedule is assumed" in str(linked)

    assert load_model(unet).digest == whole.digest

    # Weights in half precision are read as float32.
    (alone / WEIGHTS).unlink()
    save_file({name: tensor.half() for name, tensor in weights.items()}, alone / WEIGHTS)
    assert_close(load_model(alone).weights, whole.weights, rtol=1e-3, atol=1e-6)
