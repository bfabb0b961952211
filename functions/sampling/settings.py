"""The settings of sampling, for flags, recipes and manifests alike.

A recipe is a `SamplingConfig` as a TOML file, such as pretrained/people.toml. Its keys are the
names of the fields, with - or _, and paths are relative to the file. The settings begin as those of
a recipe or, for a model, of the script; flags replace fields.
"""

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Literal

import torch

from config import ModelConfig
from functions.denoiser import inputs_of
from functions.samplers import SAMPLERS, VARIANCES
from functions.saved.checkpoint import Checkpoint
from functions.saved.run_folder import (
    RUNS,
    PlaceFlags,
    checkpoints_of,
    find_checkpoints,
    first_intact,
    is_recipe,
    runs_of,
)
from functions.support import processes
from functions.support.command_line import read_flags
from functions.support.device import DTYPES
from functions.support.errors import CheckpointError, UserError, printable
from functions.support.files import check_file
from functions.support.settings import ConfigError, check_fields, from_fields, row_of, setting
from functions.timesteps import SPACINGS
from models.networks import build_network

# This recipe comes with the repository, with its models beside it. It is used when there is no run.
PRETRAINED = Path(__file__).resolve().parents[2] / "pretrained" / "people.toml"
# The default weight w of a guide. Samples are garish from 3 on.
GUIDANCE = 1.5
# Options of samplers, as they are without flags: a sampler has defaults of its own.
OF_SAMPLER = {"spacing": None, "eta": None, "variance": None, "temperature": 1.0}


@dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn.

    Raises ConfigError for an option that the sampler does not have.
    """

    # A run, a checkpoint, an exported file, or a diffusers folder or its name.
    model: str = setting(no_flag=True)
    # The number format that the network computes in. auto is that of the model's training, or
    # float32 if the device has no instructions for it.
    precision: Literal["auto", *DTYPES] = "auto"
    # How many images are sampled at a time. None: 64, or 16 on a CPU.
    batch_size: int | None = None

    # ddpm is the paper's sampler, with fresh noise in every step; ddim is deterministic; dpm++ is
    # DPM-Solver++ 2M, good with 20 steps.
    sampler: str = "ddpm"
    # The number of steps. Each makes one network call, or up to two with --guide. None: one step
    # for each timestep.
    steps: int | None = None
    # How the timesteps are spaced: trailing is even in t, logsnr is even in log-SNR where it
    # matters (docs/sampling.md). None: the sampler's.
    spacing: Literal[*SPACINGS] | None = None
    # How much noise each step adds, from 0 (none) to 1. None: the sampler's.
    eta: float | None = setting(None, at_most=1)
    # The variance of ddpm's noise: small is the posterior variance; large is beta, which suits
    # sampling over all timesteps. None: small, or over all timesteps the model's.
    variance: Literal[*VARIANCES] | None = None
    # Multiply the noise of the later steps by this, from 0 to 1. With 0.6 more faces of ffhq-32 are
    # clear, with less detail (docs/sampling.md).
    temperature: float = setting(1.0, at_most=1)
    # Move each x_0 away from that of a worse model (docs/guidance.md): the run's own
    # snapshot or checkpoint of this STEP, or any other run, checkpoint or folder. Steps at middle
    # noise levels then make two network calls.
    guide: int | str | None = setting(None, at_least=0)
    # The weight of --guide. 1 is the model alone; a larger weight moves x_0 further away from that
    # of the guide. None: 1.5.
    guidance: float | None = setting(None, at_least=-inf)
    # The labels to draw, of a model that was trained with labels. Image i gets the label i mod K of
    # these K.
    label: tuple[str, ...] = ()
    # What else a network of one's own is given: an .npz file with an array of each input by its
    # name, (N, ...). Image i gets row i mod N.
    inputs: str | None = None
    # Classifier-free guidance, instead of a guide: move each x_0 away from that without the label
    # and the inputs. 1 is the model alone.
    cfg: float | None = setting(None, at_least=-inf)
    # Then draw the details of each image at twice its size, by a model of the preset ffhq-details,
    # without guide and temperature. Each model, also if it is the same, doubles the size once more.
    enlarge: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        own = row_of(SAMPLERS, "sampler", self.sampler).options
        # Silently ignoring an option that the sampler does not have would mislead.
        if unknown := self.arguments.keys() - own.keys():
            flags = " and ".join(f"--{name}" for name in own)
            remedy = " ".join(f"--{name} None" for name in sorted(unknown))
            raise ConfigError(
                f"--{min(unknown)}: the options of --sampler {self.sampler} are {flags}; "
                f"add {remedy}"
            )
        adds_noise = "variance" in self.arguments or self.arguments.get("eta")
        if self.temperature != 1 and not adds_noise:
            raise ConfigError(
                "--temperature scales the noise of steps, and these add none (--eta); add "
                "--temperature 1"
            )
        if self.guidance is not None and self.guide is None:
            raise ConfigError("--guidance needs a --guide; add one, or --guidance None")
        if self.cfg is not None and self.guide is not None:
            raise ConfigError(
                "--cfg and --guide exclude each other: the model without a label guides; add "
                "--cfg None or --guide None"
            )
        if self.cfg is not None and not self.label and not self.inputs:
            raise ConfigError(
                "--cfg needs a --label or --inputs: the model without these guides; add one, or "
                "--cfg None"
            )

    @property
    def arguments(self) -> dict[str, str | float]:
        """The spacing, and the options that not all samplers have, by name."""
        arguments = {"spacing": self.spacing, "variance": self.variance, "eta": self.eta}
        given = {option: value for option, value in arguments.items() if value is not None}
        return SAMPLERS[self.sampler].options | given

    @property
    def guide_weight(self) -> float:
        return GUIDANCE if self.guidance is None else self.guidance


def not_alone(run: Path) -> str:
    """Return why a run cannot be drawn without more than its name, or ""."""
    try:
        contents = first_intact(find_checkpoints(run), Checkpoint).contents
        # The network is built without memory for its weights.
        with torch.device("meta"):
            network = build_network(from_fields(ModelConfig, contents["config"]["model"]))
    except CheckpointError:
        # Whoever loads it says what is damaged.
        return ""
    except ConfigError as error:
        return str(error)
    needed = [name for name, each in inputs_of(network).items() if each.default is each.empty]
    return f"its network needs {', '.join(needed)}" if needed else ""


def newest_run(runs: Path, prefix: str = "") -> Path:
    """Return the newest run with a checkpoint that can be drawn alone; print which it passes over.

    If no run has one, return the recipe PRETRAINED, and print so; but not for a folder of runs that
    the user names. Then raise CheckpointError.
    """
    for run in reversed(runs_of(runs, prefix)):
        if checkpoints_of(run):
            if reason := not_alone(run):
                print(f"{run} is passed over: {reason}")
            else:
                return run
    target = f"run of an experiment {prefix}*" if prefix else "run"
    problem = f"{runs}: no {target} with a checkpoint here yet"
    if PRETRAINED.exists() and runs == RUNS:
        # Without a prefix, the preset that trains in minutes is meant.
        command = f"train.py {prefix}-64" if prefix else "train.py"
        print(
            f"{problem}; using pretrained/{PRETRAINED.name}, which comes with the repository "
            f"(train your own: python {command})"
        )
        return PRETRAINED
    raise CheckpointError(f"{problem}; train one first, or name a checkpoint")


def read_recipe(path: Path) -> SamplingConfig:
    """Read a recipe. Raises UserError for a file that is none, or whose parts do not exist."""
    check_file(path)
    try:
        # Editors on Windows may begin the file with a byte-order mark.
        values = tomllib.loads(path.read_text("utf-8-sig"))
        by_field = {key.replace("-", "_"): value for key, value in values.items()}
        config = from_fields(SamplingConfig, by_field)
    except ConfigError as error:
        raise UserError(f"{path}: {printable(error)}") from error
    # The second one is for brackets in brackets, a thousand deep.
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: {printable(error)}; TOML in UTF-8 is needed, with / and not \\ in paths"
        ) from error

    def located(name):
        """Return the path of a part, or a guide's step."""
        if not isinstance(name, str):
            return name
        # ~ is the home folder.
        part = path.parent / os.path.expanduser(name)
        if not part.exists():
            raise UserError(f"{path}: there is no {printable(part)}")
        return str(part)

    return replace(
        config,
        model=located(config.model),
        guide=located(config.guide),
        inputs=located(config.inputs),
        enlarge=tuple(map(located, config.enlarge)),
    )


def find_run(run: str | None, words: Sequence[str], name_prefix: str = "") -> Path:
    """Return the path RUN, or the newest run whose name begins with `name_prefix`.

    Raises CheckpointError when there is no run.
    """
    if run is not None:
        return Path(run)
    place = read_flags(PlaceFlags(), words, is_first_look=True)
    return processes.on_main(newest_run, place.runs, name_prefix)


def default_settings(run: Path, **defaults: str | int) -> SamplingConfig:
    """Return the settings with which flags begin: a recipe's, or the defaults for a model.

    Raises UserError for a recipe that cannot be used.
    """
    return read_recipe(run) if is_recipe(run) else SamplingConfig(model=str(run), **defaults)


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(PlaceFlags):
    """The flags of all that samples."""

    # The seed of the noise. The noise of image i depends only on the seed and i; another batch size
    # changes its pixels only by rounding.
    seed: int = setting(0, at_least=-inf)
    # How images are sampled from noise
    sampling: SamplingConfig = setting(flat=True)
