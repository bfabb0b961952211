"""Which sampler with which options: the one place where they are chosen, for every script.

`SamplerOptions()` is the default everywhere: Algorithm 2 over all timesteps. The samplers and their
defaults are in functions/samplers.py.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from functions.noise_scheduler import NoiseScheduler
from functions.samplers import SAMPLERS, VARIANCES, half_log_snr
from functions.support.command_line import fraction, positive
from functions.support.device import DTYPES
from functions.support.errors import UserError
from functions.timesteps import SPACINGS, sampling_times


@dataclass(frozen=True)
class SamplerOptions:
    """How images are sampled (see functions/samplers.py).

    None stands for the sampler's default. Raises UserError for an option that the sampler does
    not have.
    """

    sampler: str = "ddpm"
    # How many network calls an image takes; None stands for one at each timestep.
    steps: int | None = None
    spacing: str | None = None
    # After `__post_init__` None stands for an option that the sampler does not have.
    variance: str | None = None
    eta: float | None = None
    # "data", "own" or another data set: functions/sampling/calibration.py has what they mean.
    calibrate: str | None = None
    # It has no flag: False is for a few models of others.
    clip_x_0: bool = True

    def __post_init__(self) -> None:
        defaults = SAMPLERS[self.sampler].options
        for option in ("spacing", "variance", "eta"):
            if getattr(self, option) is None:
                # A frozen dataclass sets itself up in this way.
                object.__setattr__(self, option, defaults.get(option))
            elif option not in defaults:
                # An option that the sampler lacks is refused: to ignore it would mislead.
                having = " and ".join(
                    name for name, row in SAMPLERS.items() if option in row.options
                )
                raise UserError(f"--{option} is an option of {having}, not of {self.sampler}")
        # "--calibrate RUN" takes RUN for its value.
        if self.calibrate and Path(self.calibrate, "checkpoints").exists():
            raise UserError(
                f"--calibrate {self.calibrate}: that is a run, not data; "
                "write the run before the flag"
            )

    @staticmethod
    def from_args(args: argparse.Namespace, diffusion: dict) -> "SamplerOptions":
        """Return the options that the flags of `add_sampling_flags` ask for.

        `diffusion` is the config of the model that they are for; it is empty before one is known.
        """
        known = SamplerOptions.__annotations__
        given = {name: value for name, value in vars(args).items() if name in known}
        # A folder of diffusers has its own variance, which holds for all timesteps alone, and may
        # forbid clipping.
        if args.sampler == "ddpm" and args.steps in (None, diffusion.get("timesteps_diff")):
            given["variance"] = given.get("variance") or diffusion.get("variance")
        return SamplerOptions(**given, clip_x_0=diffusion.get("clip_x_0", True))

    @property
    def chosen(self) -> dict[str, str | float]:
        """Return the spacing, and the options that other samplers lack, by name."""
        return {option: getattr(self, option) for option in SAMPLERS[self.sampler].options}

    def times(self, scheduler: NoiseScheduler, start: int | None = None) -> list[int]:
        """Return the timesteps that are visited, down to -1.

        With a `start` below T - 1 they are those of the whole way from there, so that the steps
        are as long; dpm++ leaves out the first of them if it is too near. Raises UserError when
        the model does not have so many.
        """
        try:
            times = sampling_times(scheduler, self.steps, self.spacing)
        except ValueError as error:
            raise UserError(str(error)) from error
        # The whole way stays as it is, and so do the images of a seed.
        if start is None or start == times[0]:
            return times

        times = [start, *(t for t in times if t < start)]
        # In its second step DPM-Solver++ 2M adds 1 / (2 r) times the difference of two predictions,
        # where r is the first step over the second, in log-SNR. From just above a timestep of the
        # grid r is near 0, and the factor would be up to 266, which magnifies what the first step's
        # noise changed. So the two steps become one where the factor would be above 1. The last
        # call is always made: the step that follows it is of order 1.
        if self.sampler == "dpm++" and len(times) > 3:
            first, second, third = (half_log_snr(scheduler.alpha_bar(t)) for t in times[:3])
            if second - first < (third - second) / 2:
                del times[1]
        return times

    def facts(self, timesteps: int) -> dict[str, str | int | float]:
        """Return all that decides the pixels, for a model with T = `timesteps`."""
        facts = {
            "sampler": self.sampler,
            "steps": self.steps or timesteps,
            **self.chosen,
            **self.calibration,
        }
        if not self.clip_x_0:
            facts["clip_x_0"] = False
        return facts

    @property
    def calibration(self) -> dict[str, str]:
        """Return what the calibration is fitted to; nothing without one."""
        # A path may tell of its owner, so only the name of the data is published.
        return {"calibrate": Path(self.calibrate).name} if self.calibrate else {}

    def __str__(self) -> str:
        """Return a text such as "dpm++, 20 steps, logsnr, eta 1.0" or "ddpm, all steps, ..."."""
        words = [self.sampler]
        words += [f"{self.steps} steps", self.spacing] if self.steps else ["all steps"]
        own = [option for option in self.chosen if option != "spacing"]
        words += [f"{option} {getattr(self, option)}" for option in own]
        if self.calibrate:
            words += [f"calibrated on {Path(self.calibrate).name}"]
        if not self.clip_x_0:
            words += ["x_0 not clipped"]
        return ", ".join(words)

    @property
    def short_name(self) -> str:
        """Name what differs from the defaults, for names of files, such as "dpmpp20-trailing"."""
        words = [self.sampler.replace("+", "p") + str(self.steps or "")]
        for option, value in self.chosen.items():
            if value != SAMPLERS[self.sampler].options[option]:
                words += [f"eta{value:g}" if option == "eta" else value]
        if self.calibrate:
            words += [f"calibrated-{Path(self.calibrate).stem}"]
        return "-".join(words)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all scripts that sample images: which model, and on what."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="RUN",
        help="A run folder, a checkpoint, an exported file or a folder of diffusers. "
        "Default: the newest run.",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default="runs",
        metavar="FOLDER",
        help="Where run folders are. Default: %(default)s.",
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:N or mps. Default: %(default)s.",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that sample.py and evaluate.py share: those, and how images are sampled."""
    add_model_flags(parser)
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("auto", *DTYPES),
        help="What the network computes in; auto takes the fastest that the hardware has. "
        "Default: %(default)s.",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="The noise of image i depends on the seed and i alone; with another batch size its "
        "pixels agree up to rounding. Default: %(default)s.",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="How many images are sampled at a time; fewer if need be. Default: %(default)s.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="Where files go. Default: a folder in that of the run.",
    )

    group = parser.add_argument_group("how images are sampled from noise")
    # Each sampler is followed by its options, as they are when no flag sets them.
    samplers = []
    for name, row in SAMPLERS.items():
        defaults = ", ".join(f"{option} {value}" for option, value in row.options.items())
        samplers += [f"{name} is {row.help} ({defaults})"]
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="ddpm",
        help="; ".join(samplers) + ". Default: %(default)s.",
    )
    group.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="How many network calls an image takes. Default: one for each timestep.",
    )
    group.add_argument(
        "--spacing",
        choices=SPACINGS,
        help="Which timesteps are visited: trailing, even in t; logsnr, even in log-SNR. "
        "Default: the sampler's.",
    )
    group.add_argument(
        "--eta",
        type=fraction,
        metavar="X",
        help="How much fresh noise is added: from 0, none, to 1. Default: the sampler's.",
    )
    group.add_argument(
        "--variance",
        choices=VARIANCES,
        help="The variance of ddpm's noise: small is the posterior's; large is beta, for all "
        "timesteps alone. Default: the model's.",
    )
    group.add_argument(
        "--calibrate",
        nargs="?",
        const="data",
        metavar="DATA|own",
        help="Correct what the network does not know at high t (docs/whole-before-detail.md): "
        "fitted to the training images, to those of another data set, or to the model's own "
        "samples. It takes a minute or two, once. Default: no.",
    )
