"""Read and write models of diffusers, through its package.

    model_index.json                            the class of the pipeline
    unet/                                       the network: its config and its weights
    scheduler/                                  T, betas, the network's objective, the sampler

The oldest published pipelines have all files in one folder. The network stays one of diffusers
(diffusers_network.py). Betas and objective become ours. A field of the
scheduler that has no counterpart here is refused by its name.
"""

import os
import re
import shutil
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor

from config import DiffusionConfig, ModelConfig
from extras.diffusers_network import (
    DiffusersUNet,
    import_diffusers,
    refusing_errors,
)
from functions.denoiser import OBJECTIVES
from functions.saved.checkpoint import SavedModel, copy_tensors, digest_of, model_digest
from functions.saved.run_folder import RUN_NAME, RUNS
from functions.support.errors import CheckpointError, UserError, printable
from functions.support.files import check_file, read_json
from functions.support.settings import ConfigError, from_fields
from models.networks import build_network
from models.unet import BLOCKS_DOWN

# The objectives and the variances by diffusers' words.
PREDICTIONS = {row.diffusers: name for name, row in OBJECTIVES.items()}
VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}
# The values that fields of a scheduler and of a network may have. The first versions had
# predict_epsilon and tensor_format.
SUPPORTED = {
    "prediction_type": [*PREDICTIONS],
    "variance_type": [*VARIANCES],
    "thresholding": [False],
    "rescale_betas_zero_snr": [False],
    "set_alpha_to_one": [True],
    "predict_epsilon": [True],
    "tensor_format": ["pt"],
    "in_channels": [3, 1],
    "sample_size": range(1, 2**14),
    "class_embed_type": [None],
    "num_class_embeds": [None],
}
# What replaces what in a name of our `UNet`, one after the other, to make it that of diffusers.
NAMES = {
    r"^(down|up)\.": r"\1_blocks.",
    r"\.blocks\.": ".resnets.",
    r"^middle_block_1": "mid_block.resnets.0",
    r"^middle_block_2": "mid_block.resnets.1",
    r"^middle_attention": "mid_block.attentions.0",
    r"(norm|conv)_(\d)": r"\1\2",
    r"time_projection": "time_emb_proj",
    r"shortcut": "conv_shortcut",
    r"\.(down|up)sample\.": r".\1samplers.0.",
    r"\.norm\.": ".group_norm.",
    r"\.(q)uery\.|\.(k)ey\.|\.(v)alue\.": r".to_\1\2\3.",
    r"\.out\.": ".to_out.0.",
    r"^norm_out": "conv_norm_out",
}
# Other pipelines, such as those of latents, sample something else with the same network.
PIPELINES = ("DDPMPipeline", "DDIMPipeline")


def load_folder(path: Path) -> SavedModel:
    """Load a model from a folder, or by its name on a model hub from the cache of diffusers.

    Raises CheckpointError for a folder that is missing, that cannot be read, or that we cannot
    sample from; and UserError for a model that is not in the cache and cannot be downloaded.
    """
    if not path.is_dir() and not is_hub_name(path):
        check_file(path)
    # A network is in the folder itself, or in a subfolder.
    if path.is_dir() and not [*path.glob("unet*"), *path.glob("diffusion_pytorch_model*")]:
        raise CheckpointError(
            f"{path}: no checkpoint in this folder (a run folder has them in checkpoints/)"
        )
    folder = path if path.is_dir() else downloaded(path)
    try:
        return read_folder(folder)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: this model cannot be read: {printable(error)}") from error


def is_hub_name(path: Path) -> bool:
    """Return whether a path that does not exist can be a name such as google/ddpm-cifar10-32.

    A path in a folder that exists, or in that of runs, is no such name.
    """
    is_path = path.parent.exists() or path.parent == RUNS
    return len(path.parts) == 2 and not is_path and not RUN_NAME.fullmatch(path.name)


def downloaded(name: Path) -> Path:
    """Return the folder in diffusers' cache of a name on a model hub."""
    diffusers = import_diffusers()
    print(f"{name}: no such path; diffusers takes it from its cache, or downloads it", flush=True)
    try:
        return Path(diffusers.DiffusionPipeline.download(name.as_posix()))
    except Exception as error:
        # Without a network, the libraries below diffusers raise errors of many types.
        raise UserError(
            f"{name} is no path, and diffusers cannot download it: "
            f"{type(error).__name__}: {printable(error)}"
        ) from error


def read_folder(path: Path) -> SavedModel:
    """Read a folder: a DDPM or DDIM pipeline, or a checkpoint of diffusers' training script.

    Raises ConfigError for what diffusers cannot read, and for what we do not have.
    """
    diffusers = import_diffusers()
    unet_folder, scheduler_folder = parts_of(path)
    with refusing_errors():
        # With it, diffusers asks for one more package.
        unet, loading = diffusers.UNet2DModel.from_pretrained(
            unet_folder, output_loading_info=True, low_cpu_mem_usage=False
        )
        schedule = diffusers.DDPMScheduler.load_config(scheduler_folder)
    # Its config may have other entries, such as the decay of an EMA.
    arguments = {name: unet.config[name] for name in signature(type(unet)).parameters}
    size = arguments["sample_size"]
    # A pair is the height and the width.
    if isinstance(size, (list, tuple)) and len({*size}) == 1:
        arguments["sample_size"] = size[0]
    check_supported(arguments, SUPPORTED | {"out_channels": [arguments["in_channels"]]})
    model = {
        "image_size": arguments["sample_size"],
        "channels": arguments["in_channels"],
        "network": "diffusers",
        "arguments": arguments,
    }
    config = {"diffusion": our_schedule(schedule), "model": model}
    # diffusers draws missing weights at random.
    if any(loading.values()):
        raise ConfigError(f"the weights do not fit the network: {loading}")
    network = DiffusersUNet(unet.float())
    # Such files have no checksum, and diffusers builds networks that do not run, such as for sizes
    # that levels do not halve, or that take the logarithm of t = 0.
    with refusing_errors(), torch.no_grad():
        output = network(
            torch.zeros(1, *from_fields(ModelConfig, model).image_shape), torch.tensor([0])
        )
    if not output.isfinite().all():
        raise ConfigError("the network's output at t = 0 has infinite values or NaN")

    # In a model hub's cache, the folder's name is a hash.
    parts = path.absolute().parts
    name = parts[-3] if parts[-2] == "snapshots" else parts[-1]
    provenance = {"experiment": name.removeprefix("models--"), "step": 0, "total_steps": 0}
    weights = network.state_dict()
    digest = model_digest(config, digest_of(weights))
    return SavedModel(path, weights, "diffusers", config, provenance, digest)


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


def our_schedule(schedule: dict) -> dict:
    """Return the fields of a `DiffusionConfig` of a scheduler's config, and how it samples.

    Raises ConfigError for another scheduler, and for a field that has no counterpart.
    """
    name = schedule.get("_class_name") if isinstance(schedule, dict) else None
    if name not in ("DDPMScheduler", "DDIMScheduler"):
        raise ConfigError(f"unsupported: {name}")
    with refusing_errors():
        scheduler = import_diffusers().DDPMScheduler.from_config(schedule)
        _, unexpected, _ = scheduler.extract_init_dict(schedule)
    fields = scheduler.config
    supported = {name: [None] for name in unexpected}
    if fields["clip_sample"]:
        supported["clip_sample_range"] = [1]
    check_supported(fields, supported | SUPPORTED)
    return {
        "timesteps_diff": fields["num_train_timesteps"],
        # These are final, whatever they were computed from.
        "betas": scheduler.betas.tolist(),
        "objective": PREDICTIONS[fields["prediction_type"]],
        "variance": VARIANCES[fields["variance_type"]],
        "clip_x_0": bool(fields["clip_sample"]),
    }


def check_supported(fields: dict, supported: dict) -> None:
    """Raise ConfigError for a field that has another value than those that are supported."""
    for name, values in supported.items():
        if name in fields and fields[name] not in values:
            raise ConfigError(f"unsupported: {name} = {fields[name]!r:.100}")


def write_folder(saved: SavedModel, folder: Path) -> None:
    """Write a model as a DDPMPipeline, to a new folder.

    Raises CheckpointError for what diffusers does not have.
    """
    diffusers = import_diffusers()
    diffusion = saved.config["diffusion"]
    objective = diffusion.get("objective", DiffusionConfig.objective)
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=saved.scheduler.timesteps,
        # They take precedence over all words for a schedule.
        trained_betas=saved.scheduler.betas.tolist(),
        prediction_type=OBJECTIVES[objective].diffusers,
        variance_type=f"fixed_{diffusion.get('variance', 'small')}",
        clip_sample=diffusion.get("clip_x_0", True),
        timestep_spacing="trailing",
    )
    try:
        if saved.model.network not in ("unet", "diffusers"):
            raise ConfigError(f"its network is {saved.model.network!r}")
        if saved.label_names:
            raise ConfigError("it was trained with labels")
        network = build_network(saved.model)
        copy_tensors(saved.weights, network.state_dict(), saved.path)
        if saved.model.network == "unet":
            with refusing_errors():
                unet = diffusers.UNet2DModel(**network_fields(saved.model))
            unet.load_state_dict(renamed(network.state_dict(), unet.state_dict()))
            network = DiffusersUNet(unet)
    except ConfigError as error:
        raise CheckpointError(
            f"{saved.path}: diffusers has no such model ({printable(error)}); export it to a file, "
            "NAME.safetensors"
        ) from error
    # The folder is filled under a temporary name, so that it is complete as soon as it exists.
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        diffusers.DDPMPipeline(network.unet.float(), scheduler).save_pretrained(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def network_fields(model: ModelConfig) -> dict:
    """Return the arguments of a UNet2DModel of our architecture."""
    kinds = ["DownBlock2D" for _ in model.dim_multiply]
    for level in model.transformer_layers:
        kinds[level] = "AttnDownBlock2D"
    return {
        "in_channels": model.channels,
        "out_channels": model.channels,
        "sample_size": model.image_size,
        "norm_num_groups": model.norm_groups,
        "dropout": model.dropout,
        "layers_per_block": BLOCKS_DOWN,
        "block_out_channels": list(model.dims),
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        # The paper's network differs in these from the defaults of diffusers.
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "attention_head_dim": None,
    }


def renamed(weights: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of our `UNet` by the names of `theirs`, those of a UNet2DModel."""
    result = {}
    for name, weight in weights.items():
        for ours, other in NAMES.items():
            name = re.sub(ours, other, name)
        # Some of our 1 x 1 convolutions are matrices of diffusers.
        result[name] = weight.reshape(theirs[name].shape)
    return result
