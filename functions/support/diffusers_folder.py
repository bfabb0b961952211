"""Folders of diffusers, read and written without it: the network, its weights and the schedule of a DDPM pipeline.

    model_index.json                            which pipeline
    unet/config.json                            the network
    unet/diffusion_pytorch_model.safetensors    its weights; or an index, and the files that it names
    scheduler/scheduler_config.json             T, betas, what the network predicts, how it is sampled from

The oldest published ones have all files in one folder. A config is read by what `their_network` and `their_schedule`
would write for it: a field that differs from that is refused.
"""

import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from functions.support.checkpoint import SavedModel, digest_of, load_weights
from functions.support.dialects import DIALECTS
from functions.support.errors import CheckpointError
from functions.support.files import (
    checksum,
    read_json,
    read_tensors,
    short,
    write_safetensors,
    write_text,
)

WEIGHTS, PICKLE = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
INDEX = f"{WEIGHTS}.index.json"
# Parts of the weights' names, ours: theirs, to be replaced in this order, or back in the other
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
# In diffusers; convolutions here
MATRICES = (".query.weight", ".key.weight", ".value.weight", ".out.weight")
# What our network is and has no field for; diffusers' defaults are the same
NETWORK = {
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
SCHEDULE = {
    "_class_name": "DDPMScheduler",
    "trained_betas": None,
    "thresholding": False,
    "clip_sample_range": 1,
    "rescale_betas_zero_snr": False,
}
# By our field: theirs, and our words: theirs; the first is the default of both
WORDS = {
    "beta_schedule": ("beta_schedule", {"linear": "linear", "cosine": "squaredcos_cap_v2"}),
    "objective": ("prediction_type", {"eps": "epsilon", "v": "v_prediction"}),
    "variance": ("variance_type", {"small": "fixed_small", "large": "fixed_large"}),
}
# Of no importance here: whence it comes, how others step, the numbers of what is off, and the state of an average
NOT_READ = (
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


def their_name(name: str) -> str:
    """What diffusers calls a weight of ours."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def our_name(name: str) -> str:
    """The inverse of `their_name`. Of the old names of attention's weights all but proj_attn are ours already."""
    for ours, theirs in reversed(NAMES.items()):
        name = name.replace(theirs, ours)
    return name.replace(".proj_attn.", ".out.")


def their_network(model: dict) -> dict:
    """The arguments of UNet -> the config of a UNet2DModel."""
    kinds = [
        "Attn" if level in model["transformer_layers"] else ""
        for level in range(len(model["dim_multiply"]))
    ]
    return (
        NETWORK
        | vars(DIALECTS[model.get("dialect", "ho")])
        | {
            "sample_size": model["image_size"],
            "norm_num_groups": model["norm_groups"],
            "dropout": model["dropout"],
            "block_out_channels": [
                model["base_dim"] * multiplier for multiplier in model["dim_multiply"]
            ],
            "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        }
    )


def our_network(config: dict, path: Path) -> dict:
    """The inverse of `their_network`. Raises CheckpointError for a network that is not one of ours."""
    config = (
        NETWORK | vars(DIALECTS["diffusers"]) | {"norm_num_groups": 32, "dropout": 0.0} | config
    )
    widths, kinds, size = (
        config.get(name) for name in ("block_out_channels", "down_block_types", "sample_size")
    )
    if not all(type(number) is int and number > 0 for number in [size, *(widths or [0])]):
        raise CheckpointError(
            f"{path}: sample_size must be an integer, and block_out_channels a list of such"
        )
    agreeing = lambda dialect: sum(
        config[name] == value for name, value in vars(DIALECTS[dialect]).items()
    )
    model = {
        "lowest_resolution_size": size >> (len(widths) - 1),
        "dim_multiply": [width // widths[0] for width in widths],
        "transformer_layers": [
            level for level in range(len(widths)) if kinds[level] == "AttnDownBlock2D"
        ],
        "base_dim": widths[0],
        "image_size": size,
        "channels": 3,
        "dropout": config["dropout"],
        "norm_groups": config["norm_num_groups"],
        "dialect": max(DIALECTS, key=agreeing),
    }
    refuse_others(config, their_network(model), path)
    return model


def their_schedule(diffusion: dict) -> dict:
    """A config's `diffusion` part -> the config of a DDPMScheduler. Rescaled betas are linear too, from other ends."""
    linear = diffusion.get("beta_schedule", "linear") == "linear"
    scale = 1000 / diffusion["timesteps_diff"] if linear and diffusion["rescale_betas"] else 1.0
    return SCHEDULE | {
        "timestep_spacing": "trailing",
        "num_train_timesteps": diffusion["timesteps_diff"],
        "clip_sample": diffusion.get("clip_x_0", True),
        "beta_start": scale * diffusion["beta_start"],
        "beta_end": scale * diffusion["beta_end"],
        **{
            theirs: words[diffusion.get(ours, next(iter(words)))]
            for ours, (theirs, words) in WORDS.items()
        },
    }


def our_schedule(config: dict, path: Path) -> dict:
    """The inverse of `their_schedule`; with `variance` and `clip_x_0`, which are for the sampler."""
    own, betas = {}, {"beta_start": 1e-4, "beta_end": 0.02}
    for ours, (theirs, words) in WORDS.items():
        own[ours] = next(
            (word for word in words if words[word] == config.get(theirs)), next(iter(words))
        )
    cosine = own["beta_schedule"] == "cosine"  # which has no use for the ends
    config = (
        {"num_train_timesteps": 1000, "clip_sample": True}
        | betas
        | config
        | (betas if cosine else {})
    )
    if config.get("_class_name") == "DDIMScheduler":  # has the same fields
        config["_class_name"] = "DDPMScheduler"
    T = config["num_train_timesteps"]
    diffusion = {
        "timesteps_diff": T,
        **{name: config[name] for name in betas},
        "rescale_betas": cosine or T == 1000,
        **own,
        "clip_x_0": config["clip_sample"] is not False,
    }
    refuse_others(config, their_schedule(diffusion), path)
    return diffusion


def refuse_others(config: dict, read: dict, path: Path) -> None:
    """Raise CheckpointError for a field of another value than is read."""
    some = {theirs: " or ".join(map(repr, words.values())) for theirs, words in WORDS.values()}
    some |= {"block_out_channels": "multiples of the first"}
    for name, value in config.items():
        if name not in NOT_READ and (name not in read or value != read[name]):
            what = (
                f"what is read is {some.get(name, repr(read[name]))}"
                if name in read
                else "no such field is read"
            )
            raise CheckpointError(f"{path}: {short(name)} is {short(repr(value))}; {what}")


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is meant to be one of diffusers."""
    return any(
        (folder / name).exists()
        for name in ("model_index.json", "unet", "unet_ema", WEIGHTS, INDEX, PICKLE)
    )


def load_model(path: Path) -> SavedModel:
    """The weights of a checkpoint or an exported file, by `load_weights`; or those of a folder of diffusers.

    The folder is that of a DDPM or DDIM pipeline, or its unet alone, for which the paper's schedule is assumed. Raises
    CheckpointError when a file is missing or damaged, or for what another network or pipeline would need.
    """
    if not path.is_dir():
        return load_weights(path)
    # A training of diffusers saves the average of the weights beside them
    unet = next(folder for folder in (path / "unet_ema", path / "unet", path) if folder.exists())
    beside = path / "scheduler", path.parent / "scheduler" if path.name == "unet" else path, path
    scheduler = next(folder for folder in beside if folder.exists()) / "scheduler_config.json"
    index, network = path / "model_index.json", unet / "config.json"
    kind = read_json(index).get("_class_name") if index.exists() else None
    if index.exists() and kind not in ("DDPMPipeline", "DDIMPipeline"):
        raise CheckpointError(
            f"{index}: _class_name is {short(repr(kind))}; what is read is DDPM- or DDIMPipeline"
        )
    alone = not index.exists() and not scheduler.exists()
    schedule = {} if alone else read_json(scheduler)
    assumed = (
        "no scheduler_config.json: the paper's schedule is assumed, T = 1000, linear betas, eps"
    )
    try:
        config = {
            "diffusion": our_schedule(schedule, scheduler),
            "model": our_network(read_json(network), network),
        }
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: its configs describe no model that is read: {short(error)}"
        ) from error
    weights = read_weights(unet)
    digest = digest_of(config, {name: checksum(tensor) for name, tensor in weights.items()})
    run = {
        "experiment": name_of(path),
        "step": 0,
        "total_steps": 0,
        "note": assumed if alone else "",
    }
    return SavedModel(path, weights, "diffusers", config, run, digest)


def name_of(folder: Path) -> str:
    """A folder's name; in a hub's cache, where folders are named by hashes, the model's."""
    # Not resolve, which follows the links that a hub's cache is made of
    folder = Path(os.path.abspath(folder))
    return (
        folder.parents[1].name.removeprefix("models--")
        if folder.parent.name == "snapshots"
        else folder.name
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in float32, under our names and in our shapes; each of theirs is one of them."""
    file_of, found = {}, {}
    if (folder / INDEX).exists():
        file_of = read_json(folder / INDEX).get("weight_map")
        files = file_of.values() if isinstance(file_of, dict) else []
        if not files or not all(
            re.fullmatch(r"[\w.-]{1,200}\.safetensors", str(file)) for file in files
        ):
            raise CheckpointError(
                f"{folder / INDEX}: its weight_map does not give each weight a file of this folder"
            )
    elif (folder / PICKLE).exists() and not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"{folder / PICKLE}: a pickle, which can hold code and is not read; with diffusers, "
            "DDPMPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) makes safetensors of it"
        )
    for path in [folder / file for file in sorted({*file_of.values()})] or [folder / WEIGHTS]:
        tensors = read_tensors(path)
        if file_of and tensors.keys() != {name for name in file_of if file_of[name] == path.name}:
            raise CheckpointError(f"{path}: its tensors are not those that {INDEX} names")
        for name, tensor in tensors.items():
            ours = our_name(name)
            if ours in found:
                raise CheckpointError(
                    f"{path}: {short(name)} is there twice, by an old and by a new name"
                )
            tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
            found[ours] = (
                tensor[..., None, None] if ours.endswith(MATRICES) and tensor.dim() == 2 else tensor
            )
    return found


def write_folder(saved: SavedModel, folder: Path) -> None:
    """Write a model as a DDPMPipeline's folder. Raises CheckpointError for a network that diffusers does not have."""
    model = {"dropout": 0.0, "norm_groups": 32, **saved.config["model"]}
    if model["dim_multiply"][0] != 1:
        reason = "diffusers' networks begin with as many channels as level 0 has"
        raise CheckpointError(
            f"{saved.path}: dim_multiply begins with {model['dim_multiply'][0]}; {reason}"
        )
    pipeline = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    schedule = their_schedule(saved.config["diffusion"])
    configs = {
        "model_index": pipeline,
        "unet/config": their_network(model),
        "scheduler/scheduler_config": schedule,
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{name}.json", json.dumps(config, indent=2))
    weights = {
        their_name(name): tensor.flatten(1) if name.endswith(MATRICES) else tensor
        for name, tensor in saved.weights.items()
    }
    write_safetensors(folder / "unet" / WEIGHTS, weights, {"format": "pt"})
