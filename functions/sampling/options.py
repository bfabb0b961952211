"""The sampler options, which all scripts set by the same flags.

`SamplerOptions()` is the default of sample.py: Algorithm 2 over all timesteps.
"""

import csv
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

from functions.enlarging import ENLARGING_STEPS
from functions.samplers import SAMPLERS, VARIANCES
from functions.saved.run_folder import RUNS
from functions.support.command_line import finite, fraction, positive
from functions.support.device import DTYPES
from functions.support.errors import UserError
from functions.timesteps import SPACINGS

# The default weight w of a guide. Samples are garish from 3 on.
GUIDANCE = 1.5


@dataclass(frozen=True)
class SamplerOptions:
    """How images are sampled.

    None means the sampler's default. Raises UserError for an option that the sampler does not have.
    """

    sampler: str = "ddpm"
    # The number of steps. None means one step per timestep.
    steps: int | None = None
    # `arguments` replaces None by the sampler's default.
    spacing: str | None = None
    variance: str | None = None
    eta: float | None = None
    # This multiplies the noise of steps above COOLED_LOG_SNR (functions/sampling/generation.py).
    temperature: float = 1.0
    # The guide is a worse model, given as a step or a path (`find_guide`), and the guidance is its
    # weight w (functions/guidance.py), by default GUIDANCE. `guided` replaces the step or the path
    # by the digest of the guide's weights.
    guide: str | None = None
    guidance: float | None = None
    # The names of labels, of which image i gets number i mod K, and the weight of classifier-free
    # guidance.
    label: tuple[str, ...] = ()
    cfg: float | None = None
    # Those of the models that enlarge the images. `enlarged` sets them.
    enlarger_digests: tuple[str, ...] = ()
    # This has no flag. It is False for a few models from diffusers folders.
    clip_x_0: bool = True

    def __post_init__(self) -> None:
        own = SAMPLERS[self.sampler].options
        # Silently ignoring an option that the sampler does not have would mislead.
        for option in self.arguments:
            if option not in own:
                flags = " and ".join(f"--{name}" for name in own)
                raise UserError(f"--{option}: the options of --sampler {self.sampler} are {flags}")
        # No comparison with nan is true.
        if not 0 <= self.temperature <= 1:
            raise UserError(f"temperature is {self.temperature:g}; it must be from 0 to 1")
        adds_noise = "variance" in self.arguments or self.arguments.get("eta")
        if self.temperature != 1 and not adds_noise:
            raise UserError("--temperature scales the noise of steps, and these add none (--eta)")
        if self.guidance is not None and not self.guide:
            raise UserError("--guidance needs a --guide")
        if self.cfg is not None and self.guide:
            raise UserError("--cfg and --guide exclude each other: the model without label guides")

    @property
    def arguments(self) -> dict[str, str | float]:
        """Return the spacing, and the options that not all samplers have, by name."""
        arguments = {"spacing": self.spacing, "variance": self.variance, "eta": self.eta}
        given = {option: value for option, value in arguments.items() if value is not None}
        return SAMPLERS[self.sampler].options | given

    @property
    def guide_weight(self) -> float:
        return GUIDANCE if self.guidance is None else self.guidance

    @property
    def settings(self) -> dict[str, str | int | float]:
        """Return the options that determine the pixels, with the names of their flags."""
        settings = {"sampler": self.sampler, "steps": self.steps or "all", **self.arguments}
        if self.temperature != 1:
            settings["temperature"] = self.temperature
        if self.guide:
            settings["guide"] = self.guide
            settings["guidance"] = self.guide_weight
        if self.label:
            settings["label"] = [*self.label]
        if self.cfg is not None:
            settings["cfg"] = self.cfg
        if self.enlarger_digests:
            settings["enlargers"] = "+".join(self.enlarger_digests)
        if not self.clip_x_0:
            settings["clip_x_0"] = False
        return settings

    def __str__(self) -> str:
        """Return a text such as "sampler dpm++, steps 20, spacing logsnr, eta 1.0"."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())


def label_list(text: str) -> tuple[str, ...]:
    """Parse a flag's value: names with commas between them, and quotes where names have some."""
    return tuple(next(csv.reader([text], skipinitialspace=True)))


def add_place_flags(parser: ArgumentParser) -> None:
    """Add the flags that name the folder of all runs and the device."""
    parser.add_argument(
        "--runs",
        type=Path,
        default=RUNS,
        help="The folder with all run folders. Default: %(default)s.",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps. Default: %(default)s."
    )


def add_model_flags(parser: ArgumentParser) -> None:
    """Add the flags that name the model and the device."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="RUN",
        help="A run folder, a checkpoint, an exported file, or a diffusers folder or its name. "
        "Or a recipe (docs/sampling.md), of which evaluate.py and --export use the model alone. "
        "Default: the newest run, or pretrained/people.toml if there is none.",
    )
    add_place_flags(parser)


def add_out_flag(parser: ArgumentParser) -> None:
    """Add the flag that names the folder of what a script writes."""
    parser.add_argument(
        "--out",
        type=Path,
        help="The folder for the written files. Default: a folder in the run folder.",
    )


def add_sampling_flags(parser: ArgumentParser) -> None:
    """Add the flags of sampling, which include the model flags."""
    add_model_flags(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="The seed of the noise. The noise of image i depends only on the seed and i; another "
        "batch size changes its pixels only by rounding. Default: %(default)s.",
    )
    add_drawing_flags(parser)


def add_drawing_flags(parser: ArgumentParser) -> None:
    """Add the flags of sampling that a recipe can have, too."""
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", *DTYPES),
        help="The number format that the network computes in. auto is that of the model's "
        "training, or float32 if the device has no instructions for it. Default: %(default)s.",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        help="How many images are sampled at a time. Default: 64, or 16 on a CPU.",
    )

    group = parser.add_argument_group("how images are sampled from noise")
    samplers = [f"{name} is {row.help}" for name, row in SAMPLERS.items()]
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="ddpm",
        help="; ".join(samplers) + ". Default: %(default)s.",
    )
    group.add_argument(
        "--steps",
        type=positive,
        help="The number of steps. Each makes one network call, or up to two with --guide. "
        "Default: one step for each timestep; on the page of demo.py 20.",
    )
    group.add_argument(
        "--spacing",
        choices=SPACINGS,
        help="How the timesteps are spaced: trailing is even in t, logsnr is even in log-SNR where "
        "it matters (docs/sampling.md). Default: the sampler's.",
    )
    group.add_argument(
        "--guide",
        metavar="STEP|MODEL",
        help="Move each x_0 away from that of a worse model (docs/better-than-the-model.md). The "
        "worse model is the run's own snapshot or checkpoint nearest to STEP (of an exported "
        "NAME.safetensors: NAME-guide.safetensors beside it, if it is of this step), or any other "
        "run, checkpoint or folder. Steps at middle noise levels then make two network calls. "
        "Default: no.",
    )
    group.add_argument(
        "--guidance",
        type=finite,
        help="The weight of --guide. 1 is the model alone; a larger weight moves x_0 further away "
        f"from that of the guide. Default: {GUIDANCE}.",
    )
    group.add_argument(
        "--label",
        type=label_list,
        default=(),
        metavar="NAME,NAME,...",
        help="The labels to draw, of a model that was trained with labels. Image i gets the label "
        "i mod K of these K. Default: no label.",
    )
    group.add_argument(
        "--cfg",
        type=finite,
        metavar="W",
        help="Classifier-free guidance, instead of a guide: move each x_0 away from that without "
        "the label. 1 is the model alone. Default: no.",
    )
    group.add_argument(
        "--eta",
        type=fraction,
        help="How much noise each step adds, from 0 (none) to 1. Default: the sampler's.",
    )
    group.add_argument(
        "--temperature",
        type=fraction,
        default=1.0,
        help="Multiply the noise of the later steps by this, from 0 to 1. With 0.6 more faces of "
        "ffhq-32 are clear, with less detail (docs/sampling.md). Default: %(default)s.",
    )
    group.add_argument(
        "--variance",
        choices=VARIANCES,
        help="The variance of ddpm's noise: small is the posterior variance; large is beta, which "
        "suits sampling over all timesteps. Default: small, or over all timesteps the model's.",
    )
    group.add_argument(
        "--enlarge",
        action="append",
        default=[],
        type=Path,
        metavar="MODEL",
        help="Then draw the details of each image at twice its size, by a model of that size, in "
        f"{ENLARGING_STEPS} steps, without guide and temperature. The flag can be repeated: each "
        "model doubles the size. Default: no.",
    )
