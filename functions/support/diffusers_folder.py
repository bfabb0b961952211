"""Folders of diffusers, read and written without it: network, weights and schedule of a pipeline.

    model_index.json                            which pipeline
    unet/config.json                            the network
    unet/diffusion_pytorch_model.safetensors    its weights; or an index, and the files it names
    scheduler/scheduler_config.json             T, betas, what the network predicts, how it is
                                                sampled from

The oldest published pipelines have all files in one folder. A config is read into ours, and
`their_network` and `their_schedule` write theirs again: a field that then differs is refused.
"""

import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from functions.prediction import OBJECTIVES
from functions.support.checkpoint import SavedModel, digest_of, load_weights
from functions.support.dialects import DIALECTS
from functions.support.errors import CheckpointError
from functions.support.files import (
    checksum,
    read_json,
    read_tensors,
    short,
    write_tensors,
    write_text,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"
INDEX = f"{WEIGHTS}.index.json"
# Our parts of the weights' names become theirs in this order, and theirs become ours in the
# opposite order.
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
# These weights of attention are matrices in diffusers, and convolutions of 1 x 1 here.
MATRICES = (".query.weight", ".key.weight", ".value.weight", ".out.weight")
# Our network is like this without a field that says so. diffusers' defaults are the same.
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
# This holds for our schedule in the same way.
SCHEDULE = {
    "_class_name": "DDPMScheduler",
    "trained_betas": None,
    "thresholding": False,
    "clip_sample_range": 1,
    "rescale_betas_zero_snr": False,
}
# These fields decide nothing here: they say where the model comes from, how others step, the
# numbers of what is switched off, and the state of an average.
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
    """Return what diffusers calls a weight of ours."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def our_name(name: str) -> str:
    """Return what a weight of diffusers is called here."""
    for ours, theirs in reversed(NAMES.items()):
        name = name.replace(theirs, ours)
    # Attention's weights had other names once. All but this one are the same as ours.
    return name.replace(".proj_attn.", ".out.")


def their_network(model: dict) -> dict:
    """Return the config of a UNet2DModel for the arguments of UNet."""
    levels = range(len(model["dim_multiply"]))
    kinds = ["Attn" if level in model["transformer_layers"] else "" for level in levels]
    dialect = DIALECTS[model["dialect"]]
    return {
        **NETWORK,
        **vars(dialect),
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
    """Return the arguments of UNet for the config of a UNet2DModel.

    Raises CheckpointError, with `path` in it, for a network that is not one of ours.
    """
    # A field that is missing has diffusers' default.
    defaults = NETWORK | vars(DIALECTS["diffusers"]) | {"norm_num_groups": 32, "dropout": 0.0}
    config = defaults | config
    match config.get("sample_size"):
        # A square may also be given by its height and its width.
        case [height, width] if height == width:
            config["sample_size"] = height
    size = config.get("sample_size")
    widths = config.get("block_out_channels")
    kinds = config.get("down_block_types")
    # Without widths there is a 0 in their place, which is refused.
    numbers = [size, *(widths or [0])]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise CheckpointError(
            f"{path}: sample_size must be an integer, or twice the same in a list, and "
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
        "channels": 3,
        "dropout": config["dropout"],
        "norm_groups": config["norm_num_groups"],
        # One detail tells the dialect, and `refuse_others` compares the other details with it.
        "dialect": "diffusers" if config["flip_sin_to_cos"] else "ho",
    }
    refuse_others(config, their_network(model), path)
    return model


def their_words() -> dict[str, tuple]:
    """Return, for each of our fields, their name for it and their word for each of ours.

    The first word is the default of both.
    """
    objectives = {name: row.diffusers for name, row in OBJECTIVES.items() if row.diffusers}
    return {
        "beta_schedule": ("beta_schedule", {"linear": "linear", "cosine": "squaredcos_cap_v2"}),
        "objective": ("prediction_type", objectives),
        "variance": ("variance_type", {"small": "fixed_small", "large": "fixed_large"}),
    }


def their_schedule(diffusion: dict) -> dict:
    """Return the config of a DDPMScheduler for a config's `diffusion` part.

    Raises CheckpointError for an objective that diffusers does not have.
    """
    # Rescaled linear betas are linear, too, between other ends.
    scale = 1.0
    if diffusion.get("beta_schedule", "linear") == "linear" and diffusion["rescale_betas"]:
        scale = 1000 / diffusion["timesteps_diff"]
    schedule = {
        **SCHEDULE,
        "timestep_spacing": "trailing",
        "num_train_timesteps": diffusion["timesteps_diff"],
        "clip_sample": diffusion.get("clip_x_0", True),
        "beta_start": scale * diffusion["beta_start"],
        "beta_end": scale * diffusion["beta_end"],
    }
    for ours, (theirs, words) in their_words().items():
        word = diffusion.get(ours, next(iter(words)))
        if word not in words:
            raise CheckpointError(
                f"{ours} is {word}, but diffusers has {' and '.join(words)} alone; "
                "export a file, which ends in .safetensors"
            )
        schedule[theirs] = words[word]
    return schedule


def our_schedule(config: dict, path: Path) -> dict:
    """Return a config's `diffusion` part for the config of a DDPMScheduler or DDIMScheduler.

    It has `variance` and `clip_x_0`, too, which are for the sampler. Raises CheckpointError, with
    `path` in it, for a schedule that is not one of ours.
    """
    choices = {}
    for ours, (theirs, words) in their_words().items():
        # A missing or unknown word counts as the default here. `refuse_others` below refuses the
        # unknown one.
        choices[ours] = next(iter(words))
        for word in words:
            if words[word] == config.get(theirs):
                choices[ours] = word

    betas = {"beta_start": 1e-4, "beta_end": 0.02}
    config = {"num_train_timesteps": 1000, "clip_sample": True} | betas | config
    cosine = choices["beta_schedule"] == "cosine"
    if cosine:
        # The cosine schedule has no use for the ends, so they may be any.
        config |= betas
    if config["clip_sample"] is False:
        # What is not clipped has no range, so it may be any.
        config |= {"clip_sample_range": SCHEDULE["clip_sample_range"]}
    # The two schedulers have the same fields.
    if config.get("_class_name") == "DDIMScheduler":
        config["_class_name"] = "DDPMScheduler"

    T = config["num_train_timesteps"]
    diffusion = {
        "timesteps_diff": T,
        "beta_start": config["beta_start"],
        "beta_end": config["beta_end"],
        # With T = 1000 rescaling changes nothing. With another T the ends are final as they stand.
        "rescale_betas": cosine or T == 1000,
        **choices,
        "clip_x_0": config["clip_sample"] is not False,
    }
    # This was the field for eps before `prediction_type`; False meant x_0. It is never written.
    read = their_schedule(diffusion) | {"predict_epsilon": True}
    refuse_others(config, read, path)
    return diffusion


def refuse_others(config: dict, read: dict, path: Path) -> None:
    """Raise CheckpointError for a field of another value than is read."""
    # Most fields are read with one value alone. These are read with several.
    several = {"block_out_channels": "multiples of the first"}
    for theirs, words in their_words().values():
        several[theirs] = " or ".join(map(repr, words.values()))
    for name, value in config.items():
        if name in NOT_READ or (name in read and value == read[name]):
            continue
        reason = "no such field is read"
        if name in read:
            reason = f"what is read is {several.get(name, repr(read[name]))}"
        raise CheckpointError(f"{path}: {short(name)} is {short(repr(value))}; {reason}")


def is_diffusers(folder: Path) -> bool:
    """Return whether a folder is meant to be one of diffusers."""
    names = ("model_index.json", "unet", "unet_ema", WEIGHTS, INDEX, PICKLE)
    return any((folder / name).exists() for name in names)


def load_model(path: Path) -> SavedModel:
    """Load a checkpoint or an exported file, as `load_weights` does, or a folder of diffusers.

    The folder is that of a DDPM or DDIM pipeline, a checkpoint of diffusers' training script, or
    a unet. Where `find_scheduler` finds none for it, the paper's schedule is assumed. Raises
    CheckpointError when a file is missing or damaged, or for what another network or pipeline
    would need.
    """
    if not path.is_dir():
        return load_weights(path)
    # A training of diffusers saves the average of the weights beside them.
    folders = (path / "unet_ema", path / "unet", path)
    unet = next(folder for folder in folders if folder.exists())
    index = path / "model_index.json"
    if index.exists():
        kind = read_json(index).get("_class_name")
        if kind not in ("DDPMPipeline", "DDIMPipeline"):
            raise CheckpointError(
                f"{index}: _class_name is {short(repr(kind))}; "
                "what is read is DDPM- or DDIMPipeline"
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
        # A value of another type than is meant fails somewhere on its way.
        raise CheckpointError(
            f"{path}: its configs describe no model that is read: {short(error)}"
        ) from error

    weights = read_weights(unet)
    checksums = {name: checksum(tensor) for name, tensor in weights.items()}
    run = {"experiment": name_of(path), "step": 0, "total_steps": 0, "note": note}
    return SavedModel(path, weights, "diffusers", config, run, digest_of(config, checksums))


def find_scheduler(path: Path) -> Path:
    """Return the scheduler_config.json of a folder; a path without a file if it has none."""
    # The oldest pipelines have it beside the weights.
    folders = [path / "scheduler", path]
    # The unet of a pipeline has the scheduler beside it, and the checkpoints of a training have
    # it beside them. A folder of another name may be any model's, so its parent says nothing.
    folder = Path(os.path.abspath(path))
    while re.fullmatch(r"unet|unet_ema|checkpoint-\d+", folder.name):
        folder = folder.parent
        folders.append(folder / "scheduler")

    files = [folder / "scheduler_config.json" for folder in folders]
    return next((file for file in files if file.exists()), files[0])


def name_of(folder: Path) -> str:
    """Return a folder's name; in a hub's cache, where hashes name folders, the model's name."""
    # `Path.resolve` would follow the links that a hub's cache is made of.
    folder = Path(os.path.abspath(folder))
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.removeprefix("models--")
    return folder.name


def read_index(path: Path) -> dict[str, str]:
    """Return the file of each weight by its name. Raises CheckpointError for a malformed index."""
    file_of = read_json(path).get("weight_map")
    files = file_of.values() if isinstance(file_of, dict) else []
    # A name without a slash leads to no other folder.
    proper = [re.fullmatch(r"[\w.-]{1,200}\.safetensors", str(file)) for file in files]
    if not proper or not all(proper):
        raise CheckpointError(
            f"{path}: its weight_map does not give each weight a file of this folder"
        )
    return file_of


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights in float32, under our names and in our shapes.

    Raises CheckpointError when they are missing, damaged, twice there or in a pickle.
    """
    file_of = {}
    if (folder / INDEX).exists():
        file_of = read_index(folder / INDEX)
    elif (folder / PICKLE).exists() and not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"{folder / PICKLE}: a pickle, which can hold code and is not read; with diffusers, "
            "DDPMPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) makes safetensors "
            "of it"
        )

    weights = {}
    # Without an index all weights are in one file.
    for file in sorted(set(file_of.values())) or [WEIGHTS]:
        path = folder / file
        tensors = read_tensors(path)
        names = {name for name in file_of if file_of[name] == file}
        if file_of and tensors.keys() != names:
            raise CheckpointError(f"{path}: its tensors are not those that {INDEX} names")
        for name, tensor in tensors.items():
            ours = our_name(name)
            if ours in weights:
                raise CheckpointError(
                    f"{path}: {short(name)} is there twice, by an old and by a new name"
                )
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor = tensor.float()
            # A matrix becomes a convolution. `load_into` refuses a weight that is neither.
            if ours.endswith(MATRICES) and tensor.dim() == 2:
                tensor = tensor[..., None, None]
            weights[ours] = tensor
    return weights


def write_folder(saved: SavedModel, folder: Path) -> None:
    """Write a model as the folder of a DDPMPipeline.

    Raises CheckpointError for a network or an objective that diffusers does not have.
    """
    # A config may lack fields, and then their defaults hold.
    model = vars(saved.model)
    if model["dim_multiply"][0] != 1:
        raise CheckpointError(
            f"{saved.path}: dim_multiply begins with {model['dim_multiply'][0]}; "
            "diffusers' networks begin with as many channels as level 0 has"
        )
    configs = {
        "model_index": {
            "_class_name": "DDPMPipeline",
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", "DDPMScheduler"],
        },
        "unet/config": their_network(model),
        "scheduler/scheduler_config": their_schedule(saved.config["diffusion"]),
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{name}.json", json.dumps(config, indent=2))
    weights = {}
    for name, tensor in saved.weights.items():
        weights[their_name(name)] = tensor.flatten(1) if name.endswith(MATRICES) else tensor
    write_tensors(folder / "unet" / WEIGHTS, weights, None, file_format="pt")
