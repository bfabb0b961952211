"""Read and write models of diffusers, through its package.

    model_index.json                            the class of the pipeline
    unet/                                       the network: its config and its weights
    scheduler/                                  T, betas, the network's objective, the sampler

The oldest published pipelines have all files in one folder. diffusers loads the network and the
scheduler, and our `UNet` gets the weights. Both networks and both schedules must compute the same.
A field that does not show in this comparison is refused by its name, because the samples of a model
that we do not support would silently be wrong.
"""

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from functions.denoiser import OBJECTIVES
from functions.noise_scheduler import NoiseScheduler
from functions.support.checkpoint import SavedModel, digest_of, model_digest
from functions.support.errors import CheckpointError, UserError
from functions.support.files import READ_ERRORS, short
from models.blocks import DIALECTS
from models.unet import UNet

# To convert our name of a weight to that of diffusers, its parts are replaced in this order.
NAMES = {
    "down.": "down_blocks.",
    "up.": "up_blocks.",
    ".blocks.": ".resnets.",
    "middle_block_1.": "mid_block.resnets.0.",
    "middle_attention.": "mid_block.attentions.0.",
    "middle_block_2.": "mid_block.resnets.1.",
    "downsample.": "downsamplers.0.",
    "upsample.": "upsamplers.0.",
    "norm_out.": "conv_norm_out.",
    "norm_1.": "norm1.",
    "conv_1.": "conv1.",
    "norm_2.": "norm2.",
    "conv_2.": "conv2.",
    "time_projection.": "time_emb_proj.",
    "shortcut.": "conv_shortcut.",
    ".norm.": ".group_norm.",
    "query.": "to_q.",
    "key.": "to_k.",
    "value.": "to_v.",
    ".out.": ".to_out.0.",
}
# Our name of each field of a schedule, and that of diffusers.
SCHEDULE = {
    "timesteps_diff": "num_train_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "beta_schedule": "beta_schedule",
    "objective": "prediction_type",
    "variance": "variance_type",
    "clip_x_0": "clip_sample",
}
# The arguments of NoiseScheduler, which are fields of a config.
BETAS = ("timesteps_diff", "beta_start", "beta_end", "rescale_betas", "beta_schedule")
# The blocks of a level without attention, and with it.
BLOCKS = ("DownBlock2D", "AttnDownBlock2D")


def import_diffusers() -> ModuleType:
    """Import diffusers. Raises UserError when it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "for models of diffusers, install its package: pip install 'diffusers>=0.30,<1'"
        ) from error
    return diffusers


def diffusers_name(name: str) -> str:
    """Return diffusers' name for one of our weights."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def diffusers_words() -> dict:
    """Return {our word: the word of diffusers, or None} for betas, variances and objectives."""
    return {
        "linear": "linear",
        "cosine": "squaredcos_cap_v2",
        "small": "fixed_small",
        "large": "fixed_large",
        **{name: row.diffusers for name, row in OBJECTIVES.items()},
    }


def load_folder(path: Path) -> SavedModel:
    """Load a diffusers folder.

    The folder is a DDPM or DDIM pipeline, a checkpoint of diffusers' training script, or the unet
    of either. Raises CheckpointError when diffusers cannot read it, and when our network or
    schedule would compute something else.
    """
    diffusers = import_diffusers()
    # Diffusers' training script writes checkpoint-N/unet_ema, and the schedule next to that folder.
    unet = next(place for place in (path / "unet_ema", path / "unet", path) if place.exists())
    places = [path / place for place in ("", "scheduler", "../scheduler", "../../scheduler")]
    places = [place for place in places if (place / "scheduler_config.json").exists()]
    try:
        network, loading = diffusers.UNet2DModel.from_pretrained(unet, output_loading_info=True)
        scheduler_class = diffusers.DDPMScheduler
        # Without such a file, the error of diffusers names the folder.
        schedule = scheduler_class.load_config([*places, path][0])
        _, unexpected, _ = scheduler_class.extract_init_dict(schedule)
        scheduler = scheduler_class.from_config(schedule)
        fields = {**network.config, **scheduler.config, **schedule}
        fields["mismatched weights"] = [name for names in loading.values() for name in names]
        config = our_config(fields)
        refuse_unsupported(fields, config, unexpected)
        betas = [config["diffusion"][field] for field in BETAS]
        # diffusers computes in float32.
        alphas_cumprod = NoiseScheduler(*betas).alphas_cumprod.float()
        if not torch.allclose(alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-3):
            raise ValueError("our alpha_bar is another than that of diffusers")
        weights = our_weights(config["model"], network)
    except (*READ_ERRORS, ArithmeticError) as error:
        # Files that are damaged, or describe what is impossible, raise errors of these types.
        raise CheckpointError(f"{path}: this model cannot be read: {short(error)}") from error

    # In a model hub's cache, the folder's name is a hash.
    parts = path.absolute().parts
    name = parts[-3] if "snapshots" in parts[-2:] else parts[-1]
    name = name.removeprefix("models--")
    facts = {"experiment": name, "step": 0, "total_steps": 0}
    digest = model_digest(config, digest_of(weights))
    return SavedModel(path, weights, "diffusers", config, facts, digest)


def our_config(fields: dict) -> dict:
    """Convert the configs of a UNet2DModel and a DDPMScheduler to ours."""
    # An unknown word becomes None.
    words = {theirs: ours for ours, theirs in diffusers_words().items()}
    # Linear betas in the file are final. For others, the field must have its default.
    diffusion = {"rescale_betas": fields["beta_schedule"] != "linear"}
    for ours, theirs in SCHEDULE.items():
        value = fields[theirs]
        diffusion[ours] = words.get(value) if isinstance(value, str) else value
    widths = fields["block_out_channels"]
    kinds = fields["down_block_types"]
    size = fields["sample_size"]
    # A list has the height and the width.
    side = size if isinstance(size, int) else size[0]
    model = {
        "lowest_resolution_size": side >> (len(widths) - 1),
        "dim_multiply": [width // widths[0] for width in widths],
        "transformer_layers": [level for level, kind in enumerate(kinds) if kind == BLOCKS[1]],
        "base_dim": widths[0],
        "image_size": side,
        "channels": fields["in_channels"],
        "dropout": fields["dropout"],
        "norm_groups": fields["norm_num_groups"],
        "dialect": "diffusers" if fields["flip_sin_to_cos"] else "ho",
    }
    return {"diffusion": diffusion, "model": model}


def refuse_unsupported(fields: dict, config: dict, unexpected: dict) -> None:
    """Raise ValueError for a field of diffusers that we cannot represent, or that it ignores.

    `config` is ours for these fields. `unexpected` are those that diffusers does not know.
    """
    diffusion = config["diffusion"]
    side = config["model"]["image_size"]
    faults = {
        "sample_size": fields["sample_size"] not in (side, [side, side]),
        "down_block_types": not set(fields["down_block_types"]) <= set(BLOCKS),
        # diffusers draws missing weights at random.
        "mismatched weights": fields["mismatched weights"],
        "_class_name": fields["_class_name"] not in ("DDPMScheduler", "DDIMScheduler"),
        "prediction_type": diffusion["objective"] is None,
        "variance_type": diffusion["variance"] is None,
        "beta_schedule": diffusion["beta_schedule"] is None,
        "thresholding": fields["thresholding"],
        "clip_sample_range": fields["clip_sample"] and fields["clip_sample_range"] != 1,
        **dict.fromkeys(unexpected, True),
        # The first schedulers had these fields.
        "tensor_format": False,
        "predict_epsilon": not fields.get("predict_epsilon", True),
    }
    for name, is_fault in faults.items():
        if is_fault:
            raise ValueError(f"unsupported: {name} = {fields[name]!r}")


@torch.no_grad()
def our_weights(model: dict, network: nn.Module) -> dict[str, Tensor]:
    """Return the network's weights under our names and in our shapes.

    Raises ValueError unless our network computes the same with them in float64. `network` is
    float64 afterwards.
    """
    # On the meta device no initial weights are drawn.
    with torch.device("meta"):
        ours = UNet(**model)
    theirs = network.state_dict()
    # Some of their matrices are our 1 x 1 convolutions.
    weights = {
        name: theirs[diffusers_name(name)].reshape(tensor.shape)
        for name, tensor in ours.state_dict().items()
    }
    ours.load_state_dict(weights, assign=True)

    side = min(ours.image_size, 64)
    x_t = torch.linspace(-2, 2, ours.channels * side**2).double().view(1, -1, side, side)
    # Both compute the time embedding in float32, whose rounding errors are small for a small t.
    t = torch.tensor([1])
    expected = network.double().eval()(x_t, t).sample
    error = (ours.double().eval()(x_t, t) - expected).norm() / expected.norm()
    if not error <= 1e-6:
        raise ValueError(f"our network computes something else, by a relative {error:.1g}")
    return weights


def diffusers_network(model: dict) -> dict:
    """Convert the arguments of UNet to the config of a UNet2DModel."""
    kinds = ["DownBlock2D" for _ in model["dim_multiply"]]
    for level in model["transformer_layers"]:
        kinds[level] = "AttnDownBlock2D"
    return {
        **vars(DIALECTS[model["dialect"]]),
        "in_channels": model["channels"],
        "out_channels": model["channels"],
        "sample_size": model["image_size"],
        "norm_num_groups": model["norm_groups"],
        "dropout": model["dropout"],
        "block_out_channels": [model["base_dim"] * factor for factor in model["dim_multiply"]],
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
    }


def write_folder(saved: SavedModel, folder: Path) -> None:
    """Write a model as a diffusers folder, a DDPMPipeline.

    Raises CheckpointError for a network or an objective that diffusers does not have.
    """
    diffusers = import_diffusers()
    words = diffusers_words()
    # Our own runs have no variance, and always clip.
    fields = {"variance": "small", "clip_x_0": True, **saved.config["diffusion"]}
    if fields["rescale_betas"]:
        for name in ("beta_start", "beta_end"):
            fields[name] *= 1000 / fields["timesteps_diff"]
    # Numbers are no words, and stay as they are.
    schedule = {theirs: words.get(fields[ours], fields[ours]) for ours, theirs in SCHEDULE.items()}
    # ModelConfig fills in the defaults of missing fields.
    model = vars(saved.model)
    if model["dim_multiply"][0] != 1 or schedule["prediction_type"] is None:
        raise CheckpointError(
            f"{saved.path}: diffusers has no model with objective {fields['objective']} and "
            f"dim_multiply {model['dim_multiply']}; export to a file, NAME.safetensors"
        )
    network = diffusers.UNet2DModel(**diffusers_network(model))
    theirs = network.state_dict()
    for name, tensor in saved.weights.items():
        target = theirs[diffusers_name(name)]
        target.copy_(tensor.reshape(target.shape))
    scheduler = diffusers.DDPMScheduler(timestep_spacing="trailing", **schedule)
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(folder)
