"""Which sampler with which options: the one place where they are chosen, for every script that samples images.

`SamplerOptions()` is the default everywhere: Algorithm 2 over all timesteps. The samplers are in functions/samplers.py.
"""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddim_sample, ddpm_sample, dpm_solver_sample, ipndm_sample
from functions.support.command_line import fraction, positive
from functions.support.device import DTYPES
from functions.support.errors import UserError
from functions.timesteps import SPACINGS, sampling_times

SAMPLERS = {
    "ddpm": ddpm_sample,
    "ddim": ddim_sample,
    "dpm++": dpm_solver_sample,
    "ipndm": ipndm_sample,
}
# The options that only some have, with their defaults. dpm++ takes fresh noise, which lets later steps correct the
# errors of earlier ones: with 20 calls its distance is the lowest with every objective (docs/whole-before-detail.md).
OWN_OPTIONS = {
    "ddpm": {"variance": "small"},
    "ddim": {"eta": 0.0},
    "dpm++": {"eta": 1.0},
    "ipndm": {},
}
# The better with a network of `faces-v` (table in docs/whole-before-detail.md)
SPACING = {"ddpm": "trailing", "ddim": "trailing", "dpm++": "logsnr", "ipndm": "trailing"}


@dataclass(frozen=True)
class SamplerOptions:
    """How images are sampled (see functions/samplers.py); `UserError` for an option that the sampler does not have."""

    sampler: str = "ddpm"
    steps: int | None = None  # network calls; None: all timesteps
    spacing: str | None = None  # None: the sampler's default, and so below
    variance: str | None = None  # of ddpm
    eta: float | None = None  # of ddim and dpm++
    # "data", "own" or another data set: see functions/sampling/calibration.py
    calibrate: str | None = None
    clip_x_0: bool = True  # no flag: False is for a few models of others

    def __post_init__(self) -> None:
        own = OWN_OPTIONS[self.sampler]
        for option in ("variance", "eta"):
            if option not in own and getattr(self, option) is not None:  # ignoring it would mislead
                having = " and ".join(
                    name for name, options in OWN_OPTIONS.items() if option in options
                )
                raise UserError(f"--{option} is an option of {having}, not of {self.sampler}")
        for option, default in {"spacing": SPACING[self.sampler], **own}.items():
            if getattr(self, option) is None:
                object.__setattr__(self, option, default)  # how a frozen dataclass sets itself up
        # "--calibrate RUN" takes RUN for its value
        if self.calibrate and Path(self.calibrate, "checkpoints").exists():
            raise UserError(
                f"--calibrate {self.calibrate}: that is a run, not data; write the run before the flag"
            )

    @staticmethod
    def from_args(args: argparse.Namespace, diffusion: dict | None = None) -> "SamplerOptions":
        """The options that the flags of `add_sampling_flags` ask for, for a model with this config.

        A folder of diffusers has its own variance, which holds for all timesteps alone, and may forbid clipping.
        """
        diffusion = diffusion or {}
        given = {
            field.name: getattr(args, field.name)
            for field in fields(SamplerOptions)
            if field.name in args
        }
        if args.sampler == "ddpm" and args.steps in (None, diffusion.get("timesteps_diff")):
            given["variance"] = given.get("variance") or diffusion.get("variance")
        return SamplerOptions(**given, clip_x_0=diffusion.get("clip_x_0", True))

    @property
    def own(self) -> dict[str, str | float]:
        """The option that only some samplers have, by name."""
        return {option: getattr(self, option) for option in OWN_OPTIONS[self.sampler]}

    def times(self, scheduler: NoiseScheduler, start: int | None = None) -> list[int]:
        """The timesteps that are visited, down to -1; with a `start` below T - 1, those of the whole way from there.

        So the steps from there are as long as those of the whole way. `UserError` if the model does not have so many.
        """
        try:
            times = sampling_times(scheduler, self.steps, self.spacing)
        except ValueError as error:
            raise UserError(str(error)) from error
        return times if start is None else [start, *(t for t in times if t < start)]

    def facts(self, timesteps: int) -> dict[str, str | int | float]:
        """All that decides the pixels, for a model with T = `timesteps`."""
        steps = self.steps or timesteps
        clip = {} if self.clip_x_0 else {"clip_x_0": False}
        return dict(
            sampler=self.sampler,
            steps=steps,
            spacing=self.spacing,
            **self.own,
            **self.calibration,
            **clip,
        )

    @property
    def calibration(self) -> dict[str, str]:
        """What it is fitted to, by name, as a path is nobody's business; nothing without one."""
        return {"calibrate": Path(self.calibrate).name} if self.calibrate else {}

    def __str__(self) -> str:
        """Such as "dpm++, 20 steps, logsnr, eta 1.0" or "ddpm, all steps, variance small"."""
        words = [
            self.sampler,
            *([f"{self.steps} steps", self.spacing] if self.steps else ["all steps"]),
        ]
        words += [f"{option} {value}" for option, value in self.own.items()]
        words += [f"calibrated on {Path(self.calibrate).name}"] if self.calibrate else []
        words += [] if self.clip_x_0 else ["x_0 not clipped"]
        return ", ".join(words)

    @property
    def slug(self) -> str:
        """For names of files: what differs from the defaults, such as "dpmpp20-trailing"."""
        words = [self.sampler.replace("+", "p") + str(self.steps or "")]
        words += [self.spacing] if self.spacing != SPACING[self.sampler] else []
        changed = {o: v for o, v in self.own.items() if v != OWN_OPTIONS[self.sampler][o]}
        words += [
            value if option == "variance" else f"eta{value:g}" for option, value in changed.items()
        ]
        words += [f"calibrated-{Path(self.calibrate).stem}"] if self.calibrate else []
        return "-".join(words)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all scripts that sample images: which model, and on what."""
    add = parser.add_argument
    checkpoint = "a run folder, a checkpoint, an exported file or a folder of diffusers (default: the newest run)"
    add("checkpoint", nargs="?", type=Path, metavar="RUN", help=checkpoint)
    add(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="where run folders are (default: runs)",
    )
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:N or mps (default: auto)",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that sample.py and evaluate.py share: those, and how images are sampled."""
    add_model_flags(parser)
    add = parser.add_argument
    precision = (
        "what the network computes in; auto: the fastest that the hardware has (default: float32)"
    )
    add("--precision", default="float32", choices=("auto", *DTYPES), help=precision)
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="image i depends on the seed and i alone (default: 0)",
    )
    add(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images at a time; fewer if need be (default: 64)",
    )
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where files go (default: a folder in that of the run)",
    )

    add = parser.add_argument_group("how images are sampled from noise").add_argument
    sampler = (
        "ddpm: the paper's, with fresh noise in every step; ddim: deterministic; dpm++: DPM-Solver++ 2M, good with 20 "
        "steps; ipndm: deterministic, of the highest order (default: ddpm)"
    )
    add("--sampler", choices=SAMPLERS, default="ddpm", help=sampler)
    add(
        "--steps",
        type=positive,
        metavar="N",
        help="network calls for an image (default: one for each timestep)",
    )
    spacing = "trailing, even in t; logsnr, even in log-SNR (default: logsnr for dpm++, trailing for the others)"
    add("--spacing", choices=SPACINGS, help=spacing)
    eta = "fresh noise of ddim and dpm++: from 0, none, to 1 (default: 0 for ddim, 1 for dpm++)"
    add("--eta", type=fraction, metavar="X", help=eta)
    variance = "of ddpm's noise: small, the posterior's; large, beta, for all timesteps alone (default: the model's)"
    add("--variance", choices=("small", "large"), help=variance)
    calibrate = (
        "correct what the network does not know at high t (docs/whole-before-detail.md): fitted to the training "
        "images, to those of another data set, or to the model's own samples; a minute or two, once (default: no)"
    )
    add("--calibrate", nargs="?", const="data", metavar="DATA|own", help=calibrate)
