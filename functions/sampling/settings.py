"""The settings of sampling, for flags, recipes and manifests alike.

A recipe is a `SamplingConfig` as a TOML file, such as pretrained/people.toml. Its keys are the
names of the fields, with - or _, and paths are relative to the file. A given flag replaces the
recipe's field.
"""

import os
import tomllib
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from functions.samplers import SAMPLERS, VARIANCES
from functions.saved.run_folder import PlaceFlags, is_recipe, newest_run
from functions.support import processes
from functions.support.command_line import add_config_flags, add_flags, given_fields
from functions.support.device import DTYPES
from functions.support.errors import UserError, printable
from functions.support.files import check_file
from functions.support.settings import ConfigError, check_fields, choice, from_fields, setting
from functions.timesteps import SPACINGS

# The default weight w of a guide. Samples are garish from 3 on.
GUIDANCE = 1.5
# Another --sampler than the recipe's begins with these defaults.
OF_SAMPLER = {"steps": None, "spacing": None, "eta": None, "variance": None, "temperature": 1.0}


def describe_samplers() -> str:
    return "; ".join(f"{name} is {row.help}" for name, row in SAMPLERS.items()) + "."


@dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn.

    Raises ConfigError for an option that the sampler does not have.
    """

    # A run, a checkpoint, an exported file, or a diffusers folder or its name.
    model: str = setting(no_flag=True, no_pixels=True)
    # The number format that the network computes in. auto is that of the model's training, or
    # float32 if the device has no instructions for it.
    precision: str = choice("auto", *DTYPES)
    # How many images are sampled at a time. Default: 64, or 16 on a CPU.
    batch_size: int | None = setting(None, no_pixels=True)

    # The sampler.
    sampler: str = setting("ddpm", choices=SAMPLERS, details=describe_samplers)
    # The number of steps. Each makes one network call, or up to two with --guide. Default: one step
    # for each timestep; on the page of demo.py 20.
    steps: int | None = setting(None)
    # How the timesteps are spaced: trailing is even in t, logsnr is even in log-SNR where it
    # matters (docs/sampling.md). Default: the sampler's.
    spacing: str | None = setting(None, choices=SPACINGS)
    # How much noise each step adds, from 0 (none) to 1. Default: the sampler's.
    eta: float | None = setting(None, at_most=1)
    # The variance of ddpm's noise: small is the posterior variance; large is beta, which suits
    # sampling over all timesteps. Default: small, or over all timesteps the model's.
    variance: str | None = setting(None, choices=VARIANCES)
    # Multiply the noise of the later steps by this, from 0 to 1. With 0.6 more faces of ffhq-32 are
    # clear, with less detail (docs/sampling.md).
    temperature: float = setting(1.0, at_most=1)
    # Move each x_0 away from that of a worse model (docs/guidance.md): the run's own
    # snapshot or checkpoint of this STEP, or any other run, checkpoint or folder. Steps at middle
    # noise levels then make two network calls. Default: no.
    guide: int | str | None = setting(None, at_least=0, metavar="STEP|MODEL")
    # The weight of --guide. 1 is the model alone; a larger weight moves x_0 further away from that
    # of the guide. Default: 1.5.
    guidance: float | None = setting(None, at_least=-inf)
    # The labels to draw, of a model that was trained with labels. Image i gets the label i mod K of
    # these K.
    label: tuple[str, ...] = setting(())
    # Classifier-free guidance, instead of a guide: move each x_0 away from that without the label.
    # 1 is the model alone. Default: no.
    cfg: float | None = setting(None, at_least=-inf, metavar="W")
    # Then draw the details of each image at twice its size, by a model of the preset ffhq-details,
    # without guide and temperature. The flag can be repeated, also with the same model: each time
    # doubles the size. Default: no.
    enlarge: tuple[str, ...] = setting((), repeated=True, metavar="MODEL")

    def __post_init__(self) -> None:
        check_fields(self)
        own = SAMPLERS[self.sampler].options
        # Silently ignoring an option that the sampler does not have would mislead.
        if unknown := self.arguments.keys() - own.keys():
            flags = " and ".join(f"--{name}" for name in own)
            raise ConfigError(
                f"--{min(unknown)}: the options of --sampler {self.sampler} are {flags}"
            )
        adds_noise = "variance" in self.arguments or self.arguments.get("eta")
        if self.temperature != 1 and not adds_noise:
            raise ConfigError("--temperature scales the noise of steps, and these add none (--eta)")
        if self.guidance is not None and self.guide is None:
            raise ConfigError("--guidance needs a --guide")
        if self.cfg is not None and self.guide is not None:
            raise ConfigError(
                "--cfg and --guide exclude each other: the model without a label guides"
            )
        if self.cfg is not None and not self.label:
            raise ConfigError("--cfg needs a --label: the model without it guides")

    @property
    def arguments(self) -> dict[str, str | float]:
        """The spacing, and the options that not all samplers have, by name."""
        arguments = {"spacing": self.spacing, "variance": self.variance, "eta": self.eta}
        given = {option: value for option, value in arguments.items() if value is not None}
        return SAMPLERS[self.sampler].options | given

    @property
    def guide_weight(self) -> float:
        return GUIDANCE if self.guidance is None else self.guidance

    def override(self, given: dict) -> "SamplingConfig":
        """Return the settings with the given fields replaced, and without what these make void."""
        values = {}
        if given.get("sampler", self.sampler) != self.sampler:
            values |= OF_SAMPLER
        if given.get("eta") == 0:
            # Without noise, there is none that a temperature could scale.
            values |= {"temperature": 1.0}
        # An empty field of the page gives None.
        if given.get("cfg") is not None:
            values |= {"guide": None, "guidance": None}
        if "guide" in given:
            values |= {"cfg": None}
        return replace(self, **values | given)


def read_recipe(path: Path) -> SamplingConfig:
    """Read a recipe. Raises UserError for a file that is none, or whose parts do not exist."""
    check_file(path)
    try:
        # Editors on Windows may begin the file with a byte-order mark.
        values = tomllib.loads(path.read_text("utf-8-sig"))
        by_field = {key.replace("-", "_"): value for key, value in values.items()}
        if len(by_field) < len(values):
            raise ConfigError("a key is there with - and with _")
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
        enlarge=tuple(map(located, config.enlarge)),
    )


def settings_of(
    args: Namespace, name_prefix: str = "", taken: dict | None = None, **defaults: str
) -> SamplingConfig:
    """Return the settings that the flags of `add_sampling_flags` ask for.

    RUN, or without it the newest run whose name begins with `name_prefix`, is put into
    `args.checkpoint`. A given flag replaces the field of a recipe; without a recipe, that of
    `defaults`. What is `taken` replaces both, but no flag. Raises UserError for a recipe that
    cannot be used, ConfigError for flags that do not fit each other, and CheckpointError when there
    is no run.
    """
    args.checkpoint = args.checkpoint or processes.on_main(newest_run, args.runs, name_prefix)
    if is_recipe(args.checkpoint):
        config = read_recipe(args.checkpoint)
    else:
        config = SamplingConfig(model=str(args.checkpoint), **defaults)
    return replace(config, **taken or {}).override(given_fields(args, SamplingConfig))


@dataclass(frozen=True)
class SeedFlags(PlaceFlags):
    """The flags of a place, and that of the seed."""

    # The seed of the noise. The noise of image i depends only on the seed and i; another batch size
    # changes its pixels only by rounding.
    seed: int = setting(0, at_least=-inf)


def add_model_flags(parser: ArgumentParser, flags_class: type = PlaceFlags) -> None:
    """Add the flags that name the model and the device, and others that a class has."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="RUN",
        help="A run folder, a checkpoint, an exported file, or a diffusers folder or its name. "
        "Or a recipe (docs/sampling.md), of which evaluate.py and --export use the model alone. "
        "Default: the newest run, or pretrained/people.toml if there is none.",
    )
    add_flags(parser, flags_class)


def add_sampling_flags(parser: ArgumentParser, flags_class: type = SeedFlags) -> None:
    """Add the flags of sampling, which include the model flags, and others that a class has."""
    add_model_flags(parser, flags_class)
    add_config_flags(parser, SamplingConfig, "how images are sampled from noise")
