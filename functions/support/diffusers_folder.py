"""Read and write diffusers folders without the package: a pipeline's network and schedule.

    model_index.json                            the class of the pipeline
    unet/config.json                            the network
    unet/diffusion_pytorch_model.safetensors    its weights
    scheduler/scheduler_config.json             T, betas, the network's objective, the sampler

The oldest published pipelines have all files in one folder. A config of diffusers is converted to
ours, and `diffusers_network` or `diffusers_schedule` converts ours back. If a field then differs
from the original, we cannot represent it and refuse it. Otherwise the samples would silently be
wrong.
"""

import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from functions.denoiser import OBJECTIVES
from functions.support.checkpoint import (
    SavedModel,
    cpu_copies,
    digest_of,
    model_digest,
    read_tensors,
    save_safetensors,
)
from functions.support.errors import CheckpointError
from functions.support.files import read_json, short, write_text
from models.blocks import DIALECTS

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"
# To convert our name of a weight to that of diffusers, its parts are replaced in this order. The
# opposite conversion uses the opposite order.
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
# These attention weights are matrices in diffusers, and 1 x 1 convolutions here.
MATRICES = (".query.weight", ".key.weight", ".value.weight", ".out.weight")
# Our network always has these values, which are also the defaults of diffusers. Only a grey network
# has other channels.
FIXED_NETWORK = {
    "_class_name": "UNet2DModel",
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# Our schedule always has these values, which are also the defaults of diffusers.
FIXED_SCHEDULE = {
    "_class_name": "DDPMScheduler",
    "trained_betas": None,
    "thresholding": False,
    "clip_sample_range": 1,
    "rescale_betas_zero_snr": False,
}
# These fields do not affect our images. They concern the origin of the model, the timesteps of
# diffusers' samplers, features that are turned off, and the moving average.
IGNORED_FIELDS = (
    "_diffusers_version",
    "_name_or_path",
    "tensor_format",
    "timestep_spacing",
    "timestep_values",
    "steps_offset",
    "set_alpha_to_one",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
)


def diffusers_name(name: str) -> str:
    """Return diffusers' name for one of our weights."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def our_name(name: str) -> str:
    """Return our name for one of diffusers' weights."""
    for ours, theirs in reversed(NAMES.items()):
        name = name.replace(theirs, ours)
    # Before 2023 diffusers had other names for attention weights. They are the same as ours, except
    # for this one.
    return name.replace(".proj_attn.", ".out.")


def diffusers_network(model: dict) -> dict:
    """Convert the arguments of UNet to the config of a UNet2DModel."""
    levels = range(len(model["dim_multiply"]))
    kinds = ["Attn" if level in model["transformer_layers"] else "" for level in levels]
    dialect = DIALECTS[model["dialect"]]
    return {
        **FIXED_NETWORK,
        **vars(dialect),
        "in_channels": model["channels"],
        "out_channels": model["channels"],
        "sample_size": model["image_size"],
        "norm_num_groups": model["norm_groups"],
        "dropout": model["dropout"],
        "block_out_channels": [
            model["base_dim"] * multiplier for multiplier in model["dim_multiply"]
        ],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
    }


def our_network(config: dict, path: Path) -> dict:
    """Convert the config of a UNet2DModel to the arguments of UNet.

    Raises CheckpointError, which names `path`, for a network that UNet does not support.
    """
    # A field that is missing has diffusers' default.
    defaults = FIXED_NETWORK | vars(DIALECTS["diffusers"]) | {"norm_num_groups": 32, "dropout": 0.0}
    config = defaults | config
    match config.get("sample_size"):
        # A list of two equal numbers, height and width, also means a square.
        case [height, width] if height == width:
            config["sample_size"] = height
    size = config.get("sample_size")
    widths = config.get("block_out_channels")
    kinds = config.get("down_block_types")
    # If there are no widths, the 0 makes this check fail.
    if not all(type(number) is int and number > 0 for number in [size, *(widths or [0])]):
        raise CheckpointError(
            f"{path}: sample_size must be an integer, or the same integer twice in a list, and "
            "block_out_channels a list of integers"
        )

    model = {
        "lowest_resolution_size": size >> (len(widths) - 1),
        "dim_multiply": [width // widths[0] for width in widths],
        "transformer_layers": [
            level for level, kind in enumerate(kinds) if kind == "AttnDownBlock2D"
        ],
        "base_dim": widths[0],
        "image_size": size,
        # `refuse_unsupported` refuses any number but 1 and 3.
        "channels": 1 if config["in_channels"] == 1 else 3,
        "dropout": config["dropout"],
        "norm_groups": config["norm_num_groups"],
        # This one field decides the dialect, and `refuse_unsupported` compares the other fields.
        "dialect": "diffusers" if config["flip_sin_to_cos"] else "ho",
    }
    refuse_unsupported(config, diffusers_network(model), path)
    return model


def diffusers_words() -> dict[str, tuple]:
    """Return, by the name of our field, its name in diffusers and a dict of its values.

    The dict maps our values to those of diffusers. Its first entry is the default of both.
    """
    objectives = {name: row.diffusers for name, row in OBJECTIVES.items() if row.diffusers}
    return {
        "beta_schedule": ("beta_schedule", {"linear": "linear", "cosine": "squaredcos_cap_v2"}),
        "objective": ("prediction_type", objectives),
        "variance": ("variance_type", {"small": "fixed_small", "large": "fixed_large"}),
    }


def diffusers_schedule(diffusion: dict) -> dict:
    """Convert a config's `diffusion` part to the config of a DDPMScheduler.

    Raises CheckpointError for an objective that diffusers does not have.
    """
    # Rescaling multiplies the first and the last of the linear betas.
    scale = 1.0
    if diffusion.get("beta_schedule", "linear") == "linear" and diffusion["rescale_betas"]:
        scale = 1000 / diffusion["timesteps_diff"]
    schedule = {
        **FIXED_SCHEDULE,
        "timestep_spacing": "trailing",
        "num_train_timesteps": diffusion["timesteps_diff"],
        "clip_sample": diffusion.get("clip_x_0", True),
        "beta_start": scale * diffusion["beta_start"],
        "beta_end": scale * diffusion["beta_end"],
    }
    for ours, (theirs, words) in diffusers_words().items():
        word = diffusion.get(ours, next(iter(words)))
        if word not in words:
            raise CheckpointError(
                f"{ours} is {word}, but diffusers has only {' and '.join(words)}; "
                "export to a file, whose name ends in .safetensors"
            )
        schedule[theirs] = words[word]
    return schedule


def our_schedule(config: dict, path: Path) -> dict:
    """Convert the config of a DDPMScheduler or DDIMScheduler to a config's `diffusion` part.

    That part also has `variance` and `clip_x_0`, which the sampler uses. Raises CheckpointError,
    which names `path`, for a schedule that NoiseScheduler does not support.
    """
    choices = {}
    for ours, (theirs, words) in diffusers_words().items():
        # A missing or unknown word becomes the default here. If it is unknown, `refuse_unsupported`
        # refuses it below.
        choices[ours] = next(iter(words))
        for word in words:
            if words[word] == config.get(theirs):
                choices[ours] = word

    betas = {"beta_start": 1e-4, "beta_end": 0.02}
    config = {"num_train_timesteps": 1000, "clip_sample": True} | betas | config
    cosine = choices["beta_schedule"] == "cosine"
    if cosine:
        # The cosine schedule does not use beta_start and beta_end, so they may have any values.
        config |= betas
    if config["clip_sample"] is False:
        # Without clipping, clip_sample_range is not used, so it may have any value.
        config |= {"clip_sample_range": FIXED_SCHEDULE["clip_sample_range"]}
    # The two schedulers have the same fields.
    if config.get("_class_name") == "DDIMScheduler":
        config["_class_name"] = "DDPMScheduler"

    T = config["num_train_timesteps"]
    diffusion = {
        "timesteps_diff": T,
        "beta_start": config["beta_start"],
        "beta_end": config["beta_end"],
        # With T = 1000 rescaling changes nothing. With another T the betas in the file are final.
        "rescale_betas": cosine or T == 1000,
        **choices,
        "clip_x_0": config["clip_sample"] is not False,
    }
    # Before `prediction_type` existed, predict_epsilon was True for eps and False for x_0.
    supported = diffusers_schedule(diffusion) | {"predict_epsilon": True}
    refuse_unsupported(config, supported, path)
    return diffusion


def refuse_unsupported(config: dict, supported: dict, path: Path) -> None:
    """Raise CheckpointError for an unknown field, or for a value that is not the supported one."""
    # Most fields have only one supported value. These fields have several.
    alternatives = {"in_channels": "1 or 3", "block_out_channels": "multiples of the first"}
    for theirs, words in diffusers_words().values():
        alternatives[theirs] = " or ".join(map(repr, words.values()))
    for name, value in config.items():
        if name in IGNORED_FIELDS or (name in supported and value == supported[name]):
            continue
        reason = "the field is unknown"
        if name in supported:
            reason = f"it must be {alternatives.get(name, repr(supported[name]))}"
        raise CheckpointError(f"{path}: {short(name)} is {short(repr(value))}; {reason}")


def is_diffusers_folder(folder: Path) -> bool:
    """Return whether a folder contains a file or a subfolder of a diffusers pipeline."""
    names = ("model_index.json", "unet", "unet_ema", WEIGHTS, PICKLE)
    return any((folder / name).exists() for name in names)


def load_folder(path: Path) -> SavedModel:
    """Load a diffusers folder.

    The folder is a DDPM or DDIM pipeline, a checkpoint of diffusers' training script, or a
    unet. For a unet without a scheduler, the paper's schedule is assumed. Raises CheckpointError
    when a file is missing or damaged, and for any other network or pipeline.
    """
    # Diffusers' training script saves the EMA weights in unet_ema.
    folders = (path / "unet_ema", path / "unet", path)
    unet = next(folder for folder in folders if folder.exists())
    index = path / "model_index.json"
    if index.exists():
        pipeline = read_json(index).get("_class_name")
        if pipeline not in ("DDPMPipeline", "DDIMPipeline"):
            raise CheckpointError(
                f"{index}: _class_name is {short(repr(pipeline))}; "
                "it must be DDPMPipeline or DDIMPipeline"
            )

    scheduler = find_scheduler(path)
    schedule = {}
    note = "no scheduler_config.json: the paper's schedule is assumed, T = 1000, linear betas, eps"
    if index.exists() or scheduler.exists():
        schedule = read_json(scheduler)
        note = ""

    network = unet / "config.json"
    try:
        config = {
            "diffusion": our_schedule(schedule, scheduler),
            "model": our_network(read_json(network), network),
        }
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        # The conversion raises one of these errors for a value of the wrong type.
        raise CheckpointError(
            f"{path}: its configs do not describe a supported model: {short(error)}"
        ) from error

    weights = read_weights(unet)
    facts = {"experiment": name_of(path), "step": 0, "total_steps": 0, "note": note}
    digest = model_digest(config, digest_of(weights))
    return SavedModel(path, weights, "diffusers", config, facts, digest)


def find_scheduler(path: Path) -> Path:
    """Return the path of a folder's scheduler_config.json, even if the folder has no such file."""
    # The oldest pipelines have the file next to the weights.
    folders = [path / "scheduler", path]
    # `path` may also be the `unet` of a pipeline or the `checkpoint-N` of a training, and
    # `scheduler` is next to either. The parent of a folder with another name is not searched,
    # because a scheduler found there may belong to another model.
    folder = Path(os.path.abspath(path))
    while re.fullmatch(r"unet|unet_ema|checkpoint-\d+", folder.name):
        folder = folder.parent
        folders.append(folder / "scheduler")

    files = [folder / "scheduler_config.json" for folder in folders]
    return next((file for file in files if file.exists()), files[0])


def name_of(folder: Path) -> str:
    """Return a folder's name, or the model's name if the folder is in a model hub's cache."""
    # Unlike `Path.resolve`, abspath does not follow the links in a hub's cache.
    folder = Path(os.path.abspath(folder))
    # In the cache, the folder's name is a hash.
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.removeprefix("models--")
    return folder.name


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights in float32, under our names and in our shapes.

    Raises CheckpointError when weights are missing, damaged, duplicated or in a pickle.
    """
    path = folder / WEIGHTS
    if (folder / PICKLE).exists() and not path.exists():
        raise CheckpointError(
            f"{folder / PICKLE}: this is a pickle, which is not read because it can contain code; "
            "in diffusers, DDPMPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) "
            "converts it to safetensors"
        )

    weights = {}
    for name, tensor in read_tensors(path).items():
        ours = our_name(name)
        if ours in weights:
            raise CheckpointError(
                f"{path}: {short(name)} appears twice, under an old and a new name"
            )
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        # A matrix becomes a convolution. `load_into` refuses any other shape.
        if ours.endswith(MATRICES) and tensor.dim() == 2:
            tensor = tensor[..., None, None]
        weights[ours] = tensor
    return weights


def write_folder(saved: SavedModel, folder: Path) -> None:
    """Write a model as a diffusers folder, a DDPMPipeline.

    Raises CheckpointError for a network or an objective that diffusers does not have.
    """
    # ModelConfig fills in the defaults of missing fields.
    model = vars(saved.model)
    if model["dim_multiply"][0] != 1:
        raise CheckpointError(
            f"{saved.path}: dim_multiply begins with {model['dim_multiply'][0]}, "
            "but in diffusers it must begin with 1"
        )
    configs = {
        "model_index": {
            "_class_name": "DDPMPipeline",
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", "DDPMScheduler"],
        },
        "unet/config": diffusers_network(model),
        "scheduler/scheduler_config": diffusers_schedule(saved.config["diffusion"]),
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{name}.json", json.dumps(config, indent=2))
    weights = {}
    for name, tensor in saved.weights.items():
        # The folders of diffusers have float32, and snapshots float16.
        matrix = name.endswith(MATRICES)
        weights[diffusers_name(name)] = (tensor.flatten(1) if matrix else tensor).float()
    save_safetensors(folder / "unet" / WEIGHTS, cpu_copies(weights), {"format": "pt"})
