"""Read and write files of tensors: checkpoints, snapshots and exported models.

A file is a .safetensors file as the library's `save_file` writes it. Reading it runs no code from
it. The tensors belong to parts, and PART.NAME is the name of a tensor. A checkpoint has the parts
`model`, `ema` (if the run has an EMA) and `optimizer`; a model to sample from has only `model` or
`ema`. The metadata are:

format      the version of this format
contents    a JSON text with plain values; for checkpoints and models those of
            `TrainingRun.contents`. Its `digests` have the SHA-256 of each part, because a flipped
            bit could silently become a wrong weight.
sha256      the SHA-256 of `contents`
"""

import errno
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import ModelConfig
from functions.noise_scheduler import NoiseScheduler, build_scheduler
from functions.saved.run_folder import find_checkpoints, first_intact
from functions.support import processes
from functions.support.errors import CheckpointError, door, printable
from functions.support.files import check_file, parse_json, replacing, sha256
from functions.support.settings import from_fields

FORMAT = "ddpm-faces checkpoint 4"
# Tensors by their names.
Tensors = dict[str, Tensor]


def write_tensors(path: Path, parts: dict[str, Tensors], contents: dict) -> None:
    """Write parts of tensors, on any device and of any memory layout, with plain values.

    After an error, such as OSError for a full disk, the old file is unchanged.
    """
    copies = {}
    digests = {}
    for part, tensors in parts.items():
        # `save_file` needs contiguous tensors that share no memory, as tied weights do. They are
        # copied on the CPU, because a GPU may be full.
        copied = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        digests[part] = digest_of(copied)
        for name, tensor in copied.items():
            copies[f"{part}.{name}"] = tensor
    text = json.dumps({**contents, "digests": digests})
    metadata = {"format": FORMAT, "contents": text, "sha256": sha256(text)}
    with replacing(path) as temporary:
        # Here the system says so if the folder is not there.
        temporary.touch()
        try:
            save_file(copies, temporary, metadata)
        except SafetensorError as error:
            # The library turns the system's error, such as that of a full disk, into its own.
            raise OSError(errno.EIO, str(error)) from error
        # `save_file` lets only the owner read its file.
        temporary.chmod(0o644)


def digest_of(tensors: Tensors) -> str:
    """Return a SHA-256 of names, dtypes, shapes and bytes of contiguous tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Checkpoint:
    """A checkpoint or a model. Opening it reads and checks `contents`, but no tensor.

    Raises CheckpointError for a file that is missing, damaged, or of another format; and
    OSError or MemoryError for one that cannot be read now.
    """

    def __init__(self, path: Path):
        self.path = path
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
        text = metadata.get("contents", "")
        file_format = metadata.get("format")
        if file_format != FORMAT:
            raise unreadable(path, f"its format is {file_format!r}")
        if metadata.get("sha256") != sha256(text):
            raise unreadable(path, "it has a wrong checksum")
        # What has a right checksum is as a run wrote it, so values are not looked at.
        self.contents = parse_json(path, text)
        self.digests = self.contents.pop("digests", {})

    def tensors(self, part: str) -> Tensors:
        """Read the tensors of a part, to the CPU, by their names without the part's name.

        Raises CheckpointError for a part that is missing or damaged.
        """
        prefix = f"{part}."
        with open_safetensors(self.path) as file:
            tensors = {
                name.removeprefix(prefix): file.get_tensor(name)
                for name in list(file.keys())
                if name.startswith(prefix)
            }
        if digest_of(tensors) != self.digests.get(part):
            raise CheckpointError(f"{self.path}: {part} is missing or damaged")
        return tensors


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """Open a safetensors file. An error of the library in the context becomes a CheckpointError."""
    # A link may lead to a disk that is away now.
    if not path.is_symlink():
        check_file(path)
    # The library would call a file of another user missing.
    path.open("rb").close()
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, reason: object) -> CheckpointError:
    """Return the error about a file that nothing can be read from."""
    return CheckpointError(
        f"{path}: the file is truncated, damaged or not a checkpoint of this version: "
        f"{printable(reason)}"
    )


@dataclass(frozen=True)
class SavedModel:
    """The part of a checkpoint or an exported file that sampling needs."""

    path: Path
    # Snapshots have float16, and so has a file exported from one.
    weights: Tensors
    # "EMA", "raw" if the run has no EMA, or "diffusers" if they come from a diffusers folder.
    kind: str
    # {"diffusion": {...}, "model": {...}}
    config: dict
    # The `run` part of the file. It has at least the keys experiment, step and total_steps, which
    # is 0 if the total is unknown.
    provenance: dict
    # A hash of config and weights. A file that is exported has that of its checkpoint or snapshot.
    digest: str

    @property
    def model(self) -> ModelConfig:
        """Return the fields of the network. Raises ConfigError if they do not fit."""
        return from_fields(ModelConfig, self.config["model"])

    @property
    def scheduler(self) -> NoiseScheduler:
        """Return the noise schedule. Raises ValueError if it does not fit."""
        return build_scheduler(self.config["diffusion"])

    @property
    def label_names(self) -> list[str]:
        """Return the names of the labels that the model knows."""
        return self.provenance.get("label_names", [])

    @property
    def name(self) -> str:
        """Return the model's name, for the names of its results."""
        return self.provenance["experiment"] if self.path.is_dir() else self.path.stem

    def __str__(self) -> str:
        step, total = self.provenance["step"], self.provenance["total_steps"]
        steps = f" after {step:,} of {total:,} steps" if total else ""
        return f"{self.kind} weights{steps}, hash {self.digest[:16]}"


def verify_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, and compare every part with its checksum."""
    file = Checkpoint(path)
    for part in file.digests:
        file.tensors(part)
    return file


def load_model(path: Path) -> SavedModel:
    """Load a model in all processes; of a run, that of the newest intact checkpoint.

    Other paths are those of a file or a diffusers folder, or a name on a model hub. Raises
    CheckpointError for a model that cannot be read, or that we cannot sample from.
    """
    # Rank 0 finds an intact one, and every process loads it.
    intact = processes.on_main(lambda: first_intact(find_checkpoints(path), read_model).path)
    return read_model(intact)


def read_model(path: Path) -> SavedModel:
    """Read a checkpoint, an exported file, or a diffusers folder."""
    if path.is_file() or path.suffix == ".safetensors":
        return load_weights(path)
    return diffusers_folder().load_folder(path)


def diffusers_folder() -> ModuleType:
    """Return the module that reads and writes models of diffusers. Raises UserError without it."""
    with door("a model of diffusers"):
        import extras.diffusers_folder as module
    return module


def load_weights(path: Path) -> SavedModel:
    """Read the EMA weights of a checkpoint or an exported file, or the raw ones if it has no EMA.

    No other tensors are read. Raises CheckpointError for weights that are damaged.
    """
    file = Checkpoint(path)
    part, kind = ("ema", "EMA") if "ema" in file.digests else ("model", "raw")
    weights = file.tensors(part)
    config = file.contents["config"]
    digest = model_digest(config, file.digests[part])
    return SavedModel(path, weights, kind, config, file.contents["run"], digest)


def model_digest(config: dict, weights_digest: str) -> str:
    """Return the identity of a model: a hash of its config and of the digest of its weights."""
    return sha256(json.dumps([config, weights_digest], sort_keys=True))


@torch.no_grad()
def copy_tensors(saved: Tensors, tensors: Tensors, path: Path) -> None:
    """Copy the saved tensors of the file `path` into tensors, whose dtype and layout stay.

    Raises CheckpointError if names or shapes differ.
    """
    mismatches = sorted(saved.keys() ^ tensors.keys())
    if mismatches:
        raise CheckpointError(
            f"{path}: {len(mismatches)} tensors are missing or unknown, "
            f"such as {printable(mismatches[0])!r}"
        )
    for name, tensor in tensors.items():
        if saved[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(saved[name].shape)}; the model has {tuple(tensor.shape)}"
            )
        tensor.copy_(saved[name])
