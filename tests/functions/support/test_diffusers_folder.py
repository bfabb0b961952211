"""Folders of diffusers: read as diffusers reads them, written for it to read, and refused in a sentence otherwise."""

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
from functions.sampling.generation import ImageSampler, generate, rebuild
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import load_weights
from functions.support.diffusers_folder import INDEX, WEIGHTS, load_model
from functions.support.errors import UserError
from functions.support.run_folder import find_checkpoints
from models.unet import UNet
from tests.conftest import CPU, call
from tests.spoilt_files import same

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
# As published: https://arxiv.org/abs/2006.11239's networks in diffusers 0.0.4 and 0.1.1, all files in one folder
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
    """A pipeline with details as the paper's."""
    DDPMPipeline(random_weights(UNet2DModel(**SMALL, **HO)), DDPMScheduler()).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def folder(tmp_path):
    return save_theirs(tmp_path / "theirs")


def change(path, **fields):
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def with_old_names(weights):
    """As the first diffusers called attention's weights."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in weights.items()}
    return weights


def open_in_diffusers(folder, capfd):
    """Their pipeline; anything that it says is a failure."""
    capfd.readouterr()
    disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = DDPMPipeline.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")
    return pipeline


def same_output(denoiser, unet, size=16):
    x_t, t = torch.randn(2, 3, size, size), torch.tensor([7, 999])
    with torch.no_grad():
        assert_close(denoiser(x_t, t), unet(x_t, t).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "multipliers", "attention", "parameters", "variance", "unet_in", "scheduler_in"),
    [
        (32, (1, 2, 2, 2), 1, 35_746_307, "large", "", ""),
        (32, (1, 2, 2, 2), 1, 35_746_307, "large", "unet", "scheduler"),
        (256, (1, 1, 2, 2, 4, 4), 4, 113_673_219, "small", "", ""),
    ],
)
def test_the_published_models(
    size, multipliers, attention, parameters, variance, unet_in, scheduler_in, tmp_path
):
    """CIFAR-10's; CelebA-HQ's, church's, cat's and bedroom's; random weights, flat ones with the old names."""
    kinds = ["Attn" * (level == attention) for level in range(len(multipliers))]
    config = PUBLISHED | {
        "sample_size": size,
        "block_out_channels": [128 * multiplier for multiplier in multipliers],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
    }
    unet = random_weights(UNet2DModel.from_config(config))
    schedule = OLD_SCHEDULE | {"variance_type": f"fixed_{variance}"}
    for name, fields in (
        ("model_index.json", {"_class_name": "DDPMPipeline"}),
        (f"{unet_in}/config.json", config),
        (f"{scheduler_in}/scheduler_config.json", schedule),
    ):
        (tmp_path / name.strip("/")).parent.mkdir(exist_ok=True)
        (tmp_path / name.strip("/")).write_text(json.dumps(fields))
    save_file(
        unet.state_dict() if unet_in else with_old_names(unet.state_dict()),
        tmp_path / unet_in / WEIGHTS,
    )
    saved = load_model(find_checkpoints(tmp_path)[0])
    assert sum(tensor.numel() for tensor in saved.weights.values()) == parameters
    assert (
        saved.config["model"]["dialect"] == "ho"
        and saved.config["diffusion"]["variance"] == variance
    )
    denoiser = rebuild(UNet, saved, CPU)
    assert torch.equal(denoiser.scheduler.alphas_cumprod, NoiseScheduler(1000).alphas_cumprod)
    same_output(denoiser, unet, min(size, 64))


@pytest.mark.parametrize("details", [HO, {}], ids=["ho", "diffusers"])
def test_diffusers_to_ours_and_back_is_bit_identical(details, tmp_path, capfd):
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )
    theirs = DDPMPipeline(random_weights(UNet2DModel(**SMALL, **details)), scheduler)
    theirs.save_pretrained(tmp_path / "theirs")
    call(sample.main, tmp_path / "theirs", "--export", tmp_path / "ours")
    again = open_in_diffusers(tmp_path / "ours", capfd)
    not_read = {"_diffusers_version", "timestep_spacing", "_name_or_path", "_use_default_values"}
    for part in ("unet", "scheduler"):
        own, others = (
            json.loads(json.dumps(dict(getattr(p, part).config))) for p in (again, theirs)
        )
        assert {name for name in own if own[name] != others.get(name)} <= not_read, part
        assert others.keys() - own.keys() <= not_read, part
    assert same(theirs.unet.state_dict(), again.unet.state_dict())
    same_output(rebuild(UNet, load_model(tmp_path / "theirs"), CPU), again.unet)


def test_ours_to_diffusers_and_back_gives_the_same_images(tiny_run, tmp_path, monkeypatch, capfd):
    """From betas for T = 100, which are rescaled: the folder says their ends."""
    call(sample.main, tiny_run, "--export", tmp_path / "faces")
    pipeline = open_in_diffusers(tmp_path / "faces", capfd)
    assert_close(pipeline.scheduler.betas.double(), NoiseScheduler(100).betas, rtol=1e-6, atol=0)
    assert same(
        load_weights(find_checkpoints(tiny_run)[0]).weights, load_model(tmp_path / "faces").weights
    )
    flags = ["--n", 4, "--steps", 5, "--sampler", "ddim", "--individual"]
    call(sample.main, tiny_run, "--export", tmp_path / "faces.safetensors")
    for model, name in (
        (tiny_run, "a"),
        (tmp_path / "faces", "b"),
        (tmp_path / "faces.safetensors", "c"),
    ):
        call(sample.main, model, *flags, "--out", tmp_path / name)
    for name in (*(f"{i:05d}.png" for i in range(4)), "grid.png"):
        assert len({(tmp_path / folder / name).read_bytes() for folder in "abc"}) == 1
    card = (tmp_path / "faces" / "README.md").read_text()
    front_matter = ModelCard(card).data.to_dict()
    assert front_matter["datasets"] == ["pictures0"] and front_matter["library_name"] == "diffusers"
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in card.splitlines() if line.startswith("    ")))
    assert (
        str(tmp_path.parent) not in card
        and Path("faces/samples.png").exists()
        and Path("image.png").exists()
    )
    before = (tmp_path / "faces" / "README.md").stat().st_mtime_ns
    with pytest.raises(UserError, match="faces exists"):
        call(sample.main, tiny_run, "--export", tmp_path / "faces")
    assert (tmp_path / "faces" / "README.md").stat().st_mtime_ns == before


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("sampler", "pipeline", "options"),
    [
        (ddpm_sample, DDPMPipeline, {}),
        (ddim_sample, DDIMPipeline, {"use_clipped_model_output": True}),
    ],
)
def test_our_samplers_and_their_pipelines_draw_the_same_images(
    sampler, pipeline, options, prediction, folder
):
    change(
        folder / "scheduler" / "scheduler_config.json",
        prediction_type=prediction,
        timestep_spacing="trailing",
    )
    loaded, generator = pipeline.from_pretrained(folder), torch.Generator().manual_seed(3)
    theirs = loaded(2, generator, num_inference_steps=20, output_type="np", **options).images
    generator = torch.Generator().manual_seed(3)
    draw = lambda *_: torch.randn(2, 3, 16, 16, generator=generator)
    denoiser = rebuild(UNet, load_model(folder), CPU)
    ours = sampler(denoiser, denoiser.scheduler, draw(), 20, step_noise=draw)
    assert_close((ours / 2 + 0.5).permute(0, 2, 3, 1).numpy(), theirs, rtol=0, atol=1e-4)


def test_what_only_a_folder_decides(folder, tmp_path, monkeypatch, capsys):
    """Its variance, for all timesteps alone; whether x_0 is clipped; where samples go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "IMAGES", 8)
    change(
        folder / "scheduler" / "scheduler_config.json",
        variance_type="fixed_large",
        clip_sample=False,
        num_train_timesteps=10,
        beta_start=0.01,
        beta_end=0.4,
    )
    before = sorted(folder.rglob("*"))
    for flags, said in (
        ((), "all steps, variance large, x_0 not clipped"),
        (("--steps", 5), "variance small, x_0 not"),
    ):
        call(sample.main, "theirs", "--n", 2, *flags)
        assert said in capsys.readouterr().out
    call(evaluate.main, "theirs", "--data", "emoji_faces", "--metrics", "bands", "--images", 2)
    call(sample.main, "theirs", "--n", 2, "--sampler", "ddim", "--calibrate", "own", "--strip")
    call(
        sample.main,
        "theirs",
        "--interpolate",
        0,
        1,
        "--depths",
        "1",
        "--variations",
        0,
        "--out",
        "between",
    )
    assert len([*Path("between").glob("*.png")]) == 2
    saved = load_model(folder)
    denoiser, cut = rebuild(UNet, saved, CPU), []
    for clip in (True, False):
        sampler = ImageSampler(
            denoiser, SamplerOptions("ddim", 5, clip_x_0=clip), saved.image_shape, 0, CPU
        )
        cut.append(bool(generate(sampler, range(2), 2).images.max() <= 1))
    assert cut == [True, False]
    assert "NOBODY KNOWS" in capsys.readouterr().err and sorted(folder.rglob("*")) == before
    made = (
        "ddpm-large-seed0/grid.png",
        "ddpm5-seed0/grid.png",
        "bands-*.json",
        "ddim-calibrated-own-seed0/strip.png",
    )
    for name in made:
        assert len([*Path("samples").glob(f"theirs-*/theirs-{name}")]) == 1
    assert Path("samples/theirs-calibration-own.safetensors").exists()


def test_a_unet_alone_linked_in_shards_and_in_half_precision(folder, tmp_path):
    whole, weights = load_model(folder), load_file(folder / "unet" / WEIGHTS)
    alone = tmp_path / "models--me--faces" / "snapshots" / "0a1b"  # as in a hub's cache
    alone.mkdir(parents=True)
    for name in ("config.json", WEIGHTS):
        (alone / name).symlink_to(folder / "unet" / name)
    linked = load_model(alone)
    assert linked.digest == whole.digest and linked.name == "me--faces"
    assert "the paper's schedule is assumed" in str(linked)
    # Of their training script
    shutil.copytree(folder / "unet", tmp_path / "checkpoint-500" / "unet_ema")
    change(
        tmp_path / "checkpoint-500" / "unet_ema" / "config.json",
        decay=0.9999,
        optimization_step=500,
    )
    (tmp_path / "checkpoint-500" / "unet").mkdir()
    assert (
        load_model(tmp_path / "checkpoint-500").digest
        == load_model(folder / "unet").digest
        == whole.digest
    )
    (alone / WEIGHTS).unlink()
    save_file({name: tensor.half() for name, tensor in weights.items()}, alone / WEIGHTS)
    assert_close(load_model(alone).weights, whole.weights, rtol=1e-3, atol=1e-6)
    shards = {"a.safetensors": sorted(weights)[:20], "b.safetensors": sorted(weights)[20:]}
    for name, part in shards.items():
        save_file({key: weights[key] for key in part}, folder / "unet" / name)
    file_of = {key: name for name, part in shards.items() for key in part}
    (folder / "unet" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    (folder / "unet" / WEIGHTS).unlink()
    assert load_model(folder).digest == whole.digest
