"""Read and write models of diffusers, through its package.

    model_index.json                            the class of the pipeline
    unet/                                       the network: its config and its weights
    scheduler/                                  T, betas, the network's objective, the sampler

The oldest published pipelines have all files in one folder. diffusers loads the network and the
scheduler, and our `UNet` gets the weights. Both networks and both schedules must compute the same.
A field that does not show in this comparison is refused by its name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from config import ConfigError, ModelConfig, build_network
from functions.denoiser import OBJECTIVES
from functions.noise_scheduler import PAPER_TIMESTEPS
from functions.saved.checkpoint import (
    SavedModel,
    copy_tensors,
    digest_of,
    model_digest,
)
from functions.support.errors import CheckpointError, UserError, printable
from functions.support.files import read_json
from models.blocks import DIALECTS
from models.unet import BLOCKS_DOWN, UNet

# The words of diffusers for our betas, variances and objectives.
WORDS = {
    "linear": "linear",
    "cosine": "squaredcos_cap_v2",
    "small": "fixed_small",
    "large": "fixed_large",
    **{name: row.diffusers for name, row in OBJECTIVES.items()},
}

# What a network that is exported may have beside our defaults: these fields of `ModelConfig`.
EXPORTED = (
    "lowest_resolution_size",
    "dim_multiply",
    "transformer_layers",
    "base_dim",
    "image_size",
    "channels",
    "dropout",
    "norm_groups",
    "dialect",
)
# diffusers builds networks and schedules of whatever a JSON file says, and raises these errors.
LIBRARY_ERRORS = (
    SafetensorError,
    OSError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Other pipelines, such as those of latents, sample something else with the same network.
PIPELINES = ("DDPMPipeline", "DDIMPipeline")
# These fields of a UNet2DModel or a DDPMScheduler have the only values that we support. Older
# versions of diffusers lack some of them.
REQUIRED = {
    "act_fn": "silu",
    "add_attention": True,
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_type": "conv",
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "upsample_type": "conv",
    "rescale_betas_zero_snr": False,
    # The first schedulers had these two.
    "tensor_format": "pt",
    "predict_epsilon": True,
}


def import_diffusers() -> ModuleType:
    """Import diffusers. Raises UserError when it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "for models of diffusers, install its package: pip install 'diffusers>=0.30,<1'"
        ) from error
    return diffusers


def load_folder(path: Path) -> SavedModel:
    """Load a folder: a DDPM or DDIM pipeline, or a checkpoint of diffusers' training script.

    Raises CheckpointError for a folder that diffusers cannot read, or whose network or schedule
    would compute something else than ours.
    """
    try:
        return read_folder(path)
    except ConfigError as error:
        raise CheckpointError(f"{path}: this model cannot be read: {printable(error)}") from error


def read_folder(path: Path) -> SavedModel:
    """Read a folder as `load_folder` does. Raises ConfigError for what we do not have."""
    diffusers = import_diffusers()
    unet, scheduler_folder = parts_of(path)
    with refusing_damage():
        network, loading = diffusers.UNet2DModel.from_pretrained(unet, output_loading_info=True)
        schedule = diffusers.DDPMScheduler.load_config(scheduler_folder)
    name = schedule.get("_class_name") if isinstance(schedule, dict) else None
    if name not in ("DDPMScheduler", "DDIMScheduler"):
        raise ConfigError(f"unsupported: {name}")
    with refusing_damage():
        scheduler = diffusers.DDPMScheduler.from_config(schedule)
        _, unexpected, _ = scheduler.extract_init_dict(schedule)
    config = our_config({**network.config, **scheduler.config}, unexpected)
    # diffusers draws missing weights at random.
    if any(loading.values()):
        raise ConfigError(f"the weights do not fit the network: {loading}")
    for name, weight in network.named_parameters():
        if not weight.isfinite().all():
            raise ConfigError(f"unet.{name} has infinite values or NaN")
    model = ModelConfig(**config["model"])
    ours = build_network(model)
    copy_weights(network, ours, model)

    # In a model hub's cache, the folder's name is a hash.
    parts = path.absolute().parts
    name = parts[-3] if parts[-2] == "snapshots" else parts[-1]
    provenance = {"experiment": name.removeprefix("models--"), "step": 0, "total_steps": 0}
    weights = ours.float().state_dict()
    digest = model_digest(config, digest_of(weights))
    saved = SavedModel(path, weights, "diffusers", config, provenance, digest)
    # diffusers computes in float32.
    alphas_cumprod = saved.scheduler.alphas_cumprod.float()
    if not torch.allclose(alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-3):
        raise ConfigError("our alpha_bar is another than that of diffusers")
    return saved


@contextmanager
def refusing_damage() -> Iterator[None]:
    """Turn an error of diffusers in the context into a ConfigError."""
    try:
        yield
    except LIBRARY_ERRORS as error:
        raise ConfigError(str(error)) from error


def parts_of(path: Path) -> tuple[Path, Path]:
    """Return the folders of network and schedule. Raises ConfigError for another pipeline."""
    unets = [path / "unet"]
    index = path / "model_index.json"
    if index.exists():
        pipeline = read_json(index).get("_class_name")
        if pipeline not in PIPELINES:
            raise ConfigError(f"it is a {pipeline}, and only {' and '.join(PIPELINES)} are read")
    else:
        # Diffusers' training script writes checkpoint-N/unet_ema, and no index.
        unets.insert(0, path / "unet_ema")
    # The script writes the schedule beside checkpoint-N.
    schedules = [path / "scheduler", path, path.absolute().parent / "scheduler"]
    written = [folder for folder in schedules if (folder / "scheduler_config.json").exists()]
    return next(filter(Path.is_dir, unets), path), next(iter(written), path)


def our_config(fields: dict, unexpected: dict) -> dict:
    """Convert the fields of a UNet2DModel and a DDPMScheduler to our config.

    `unexpected` are those that diffusers ignores. Raises ConfigError for what we do not have.
    """
    if fields["trained_betas"] is not None:
        raise ConfigError(
            "unsupported: trained_betas, a list of betas; if --export wrote this folder, the run "
            "has a log_snr_shift, so sample from the run, or export it to NAME.safetensors"
        )
    size = fields["sample_size"]
    # A list has the height and the width.
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int):
        raise ConfigError(f"unsupported: sample_size = {size}")
    for name in ("beta_start", "beta_end"):
        if type(fields[name]) not in (int, float):
            raise ConfigError(f"unsupported: {name} = {fields[name]}")
    widths = fields["block_out_channels"]
    kinds = fields["down_block_types"]
    model = {
        "lowest_resolution_size": size >> (len(widths) - 1),
        "dim_multiply": [width // widths[0] for width in widths],
        "transformer_layers": [i for i, kind in enumerate(kinds) if kind == "AttnDownBlock2D"],
        "base_dim": widths[0],
        "image_size": size,
        "channels": fields["in_channels"],
        "dropout": fields["dropout"],
        "norm_groups": fields["norm_num_groups"],
        "dialect": "diffusers" if fields["flip_sin_to_cos"] else "ho",
    }
    # An unknown word becomes None.
    words = {theirs: ours for ours, theirs in WORDS.items()}
    diffusion = {
        # Linear betas in the file are final. For others, the field must have its default.
        "rescale_betas": fields["beta_schedule"] != "linear",
        "timesteps_diff": fields["num_train_timesteps"],
        "beta_start": fields["beta_start"],
        "beta_end": fields["beta_end"],
        "beta_schedule": words.get(str(fields["beta_schedule"])),
        "objective": words.get(str(fields["prediction_type"])),
        "variance": words.get(str(fields["variance_type"])),
        "clip_x_0": fields["clip_sample"],
    }
    supported = {
        **dict.fromkeys(unexpected),
        **REQUIRED,
        **network_fields(ModelConfig(**model)),
        **schedule_fields(diffusion),
        # This may be the list of the height and the width.
        "sample_size": fields["sample_size"],
    }
    if fields["clip_sample"]:
        supported["clip_sample_range"] = 1
    if fields.get("time_embedding_dim"):
        supported["time_embedding_dim"] = 4 * widths[0]
    for name, value in supported.items():
        if fields.get(name, value) != value:
            raise ConfigError(f"unsupported: {name} = {fields[name]!r}")
    return {"diffusion": diffusion, "model": model}


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module, model: ModelConfig) -> None:
    """Copy the weights from a UNet2DModel to our `UNet` of a config, or the other way round.

    They are paired in the order in which both networks use them. Raises ConfigError unless both
    then compute the same. Both are in float64 afterwards.
    """
    # Of a large image a part is enough, such that the bottleneck has two pixels.
    size = min(model.image_size, max(64, 2 ** len(model.dims)))
    x_t = torch.randn(1, model.channels, size, size, dtype=torch.float64)
    expected, weights = compute(source.double().eval(), x_t)
    _, copies = compute(target.double().eval(), x_t)
    if [weight.numel() for weight in weights] != [copy.numel() for copy in copies]:
        raise ConfigError("our network has other weights")
    for weight, copy in zip(weights, copies, strict=True):
        # Some matrices of diffusers are our 1 x 1 convolutions.
        copy.copy_(weight.reshape(copy.shape))
    output, _ = compute(target, x_t)
    error = (output - expected).norm() / expected.norm()
    if not error <= 1e-6:
        raise ConfigError(f"our network computes something else, by a relative {error:.1g}")


def compute(network: nn.Module, x_t: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return a network's output (B, C, H, W), and its weights in the order of their use."""
    weights = []

    def on_call(layer, inputs, output):
        weights.extend(layer.parameters(recurse=False))

    # Both compute the time embedding in float32, whose rounding errors are small for a small t.
    with register_module_forward_hook(on_call):
        output = network(x_t, torch.tensor([1]))
    # The network of diffusers returns a dataclass.
    return getattr(output, "sample", output), weights


def network_fields(model: ModelConfig) -> dict:
    """Return the fields of the UNet2DModel of our architecture."""
    kinds = ["DownBlock2D" for _ in model.dim_multiply]
    for level in model.transformer_layers:
        kinds[level] = "AttnDownBlock2D"
    return {
        **vars(DIALECTS[model.dialect]),
        "in_channels": model.channels,
        "out_channels": model.channels,
        "sample_size": model.image_size,
        "norm_num_groups": model.norm_groups,
        "dropout": model.dropout,
        "layers_per_block": BLOCKS_DOWN,
        "block_out_channels": list(model.dims),
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
    }


def schedule_fields(diffusion: dict) -> dict:
    """Return the fields of the DDPMScheduler of our config. An unknown word becomes None."""
    # Our own runs have no variance, and always clip.
    ours = {"variance": "small", "clip_x_0": True, **diffusion}
    rescaled = ours["rescale_betas"] and ours["beta_schedule"] == "linear"
    scale = PAPER_TIMESTEPS / ours["timesteps_diff"] if rescaled else 1
    return {
        "num_train_timesteps": ours["timesteps_diff"],
        "beta_start": scale * ours["beta_start"],
        "beta_end": scale * ours["beta_end"],
        "beta_schedule": WORDS.get(ours["beta_schedule"]),
        "prediction_type": WORDS.get(ours["objective"]),
        "variance_type": WORDS.get(ours["variance"]),
        "clip_sample": ours["clip_x_0"],
        "thresholding": False,
    }


def write_folder(saved: SavedModel, folder: Path) -> None:
    """Write a model as a DDPMPipeline. Raises CheckpointError for what diffusers does not have."""
    diffusers = import_diffusers()
    model = saved.model
    ours = build_network(model)
    schedule = schedule_fields(saved.config["diffusion"])
    # A field that somebody adds is none of them.
    others = {
        each.name
        for each in fields(ModelConfig)
        if each.name not in EXPORTED and getattr(model, each.name) != each.default
    }
    if type(ours) is not UNet or others or model.dim_multiply[0] != 1 or None in schedule.values():
        raise CheckpointError(
            f"{saved.path}: a diffusers folder can have linear or cosine betas, the objective eps "
            f"or v, and a UNet with {', '.join(EXPORTED)}, whose dim_multiply begins with 1; for "
            "others, export to a file, NAME.safetensors"
        )
    if saved.scheduler.log_snr_shift:
        # These take precedence over the other fields. diffusers has no word for a shift.
        schedule["trained_betas"] = saved.scheduler.betas.tolist()
    copy_tensors(saved.weights, ours.state_dict(), saved.path)
    network = diffusers.UNet2DModel(**network_fields(model))
    copy_weights(ours, network, model)
    scheduler = diffusers.DDPMScheduler(timestep_spacing="trailing", **schedule)
    diffusers.DDPMPipeline(network.float(), scheduler).save_pretrained(folder)
