"""Which sampler with which options: the one place where they are chosen, for every script that draws images.

`SamplerOptions()` is the default everywhere: Algorithm 2 over all timesteps. Scripts add the flags, make the settings
once, and print them with whatever they print about the images.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Model, scaled_eps
from functions.samplers import (
    OnStep,
    StepNoise,
    ddim_sample,
    ddpm_sample,
    dpm_solver_sample,
    ipndm_sample,
)
from functions.support.command_line import fraction, positive
from functions.support.errors import UserError
from functions.timesteps import SPACINGS, sampling_times

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm_sample,
    "ddim": ddim_sample,
    "dpm++": dpm_solver_sample,
    "ipndm": ipndm_sample,
}
# The option that only some have, and its default. dpm++ takes fresh noise: the deterministic solvers all follow a young
# model's errors to the same speckled images (README), which noise lets later steps correct.
OWN_OPTION = {"ddpm": ("variance", "small"), "ddim": ("eta", 0.0), "dpm++": ("eta", 1.0)}
# The better on the `faces` model (figures/experiments.json). Feature distances at 10 and 20 calls: ddpm 6.9 and 4.9,
# not 7.8 and 6.2; dpm++ with noise 4.3 and 4.1, not 5.3 and 3.8. Errors at 20 calls, of 255: ddim 9.0, not 10.7; ipndm
# 2.9, not 6.7. Without noise "trailing" is better for dpm++ too.
SPACING = {"ddpm": "trailing", "ddim": "trailing", "dpm++": "logsnr", "ipndm": "trailing"}


@dataclass(frozen=True)
class SamplerOptions:
    """How images are made from noise; `functions.samplers` says what each option does."""

    sampler: str = "ddpm"
    steps: int | None = None  # network calls; None: all timesteps
    spacing: str | None = None  # None: the sampler's default, and so below
    eps_scale: float = 1.0
    variance: str | None = None  # of ddpm
    eta: float | None = None  # of ddim and dpm++

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"sampler is {self.sampler!r}; it can be {', '.join(SAMPLERS)}")
        own, default = OWN_OPTION.get(self.sampler, (None, None))
        for option in ("variance", "eta"):
            if option != own and getattr(self, option) is not None:  # ignoring it would mislead
                having = " and ".join(name for name, (has, _) in OWN_OPTION.items() if has == option)
                raise UserError(f"--{option} is an option of {having}, not of {self.sampler}")
        for name, value in {"spacing": SPACING[self.sampler], **({own: default} if own else {})}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # how a frozen dataclass sets itself up
        if not 1 <= self.eps_scale < math.inf:
            raise UserError(f"eps_scale is {self.eps_scale}; it can be 1 (leave eps as it is) or more")

    @staticmethod
    def from_args(args: argparse.Namespace) -> "SamplerOptions":
        """The settings that the flags of `add_sampler_flags` ask for.

        Raises:
            UserError: an option was given that the sampler does not have.
        """
        return SamplerOptions(args.sampler, args.steps, args.spacing, args.eps_scale, args.variance, args.eta)

    @property
    def own(self) -> dict[str, str | float]:
        """The option that only this sampler has, by name."""
        option, _ = OWN_OPTION.get(self.sampler, (None, None))
        return {option: getattr(self, option)} if option else {}

    def times(self, scheduler: NoiseScheduler, start: int | None = None) -> list[int]:
        """The timesteps that are visited, down to -1; with a `start` below T - 1, those of the whole way from there.

        So a part of the way is done in steps as long as those of the whole.

        Raises:
            UserError: the model does not have so many.
        """
        try:
            times = sampling_times(scheduler, self.steps, self.spacing)
        except ValueError as error:
            raise UserError(str(error)) from error
        return times if start is None else [start, *(t for t in times if t < start)]

    def sample(
        self,
        model: Model,
        scheduler: NoiseScheduler,
        x_T: Tensor,
        times: Sequence[int] | None = None,
        step_noise: StepNoise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """The sampler with its options: x_T, or the state at the first of `times`, -> x_0 (B, ...)."""
        return SAMPLERS[self.sampler](
            scaled_eps(model, self.eps_scale), scheduler, x_T, times or self.times(scheduler), **self.own,
            step_noise=step_noise, on_step=on_step,
        )  # fmt: skip

    def facts(self, timesteps: int) -> dict[str, str | int | float]:
        """All that decides the pixels, for a model with T = `timesteps`."""
        return {"sampler": self.sampler, "steps": self.steps or timesteps, "spacing": self.spacing,
                "eps_scale": self.eps_scale, **self.own}  # fmt: skip

    def __str__(self) -> str:
        """Such as "dpm++, 20 steps, logsnr, eta 1.0" or "ddpm, all steps, variance small"."""
        parts = [self.sampler, *([f"{self.steps} steps", self.spacing] if self.steps else ["all steps"])]
        parts += [f"{name} {value}" for name, value in self.own.items()]
        return ", ".join(parts + ([f"eps / {self.eps_scale:g}"] if self.eps_scale != 1 else []))

    @property
    def slug(self) -> str:
        """For names of files: what differs from the defaults, such as "dpmpp20-trailing"."""
        parts = [self.sampler.replace("+", "p") + str(self.steps or "")]
        parts += [self.spacing] if self.spacing != SPACING[self.sampler] else []
        option, default = OWN_OPTION.get(self.sampler, (None, None))
        if option and getattr(self, option) != default:
            parts.append(self.variance if option == "variance" else f"eta{self.eta:g}")
        return "-".join(parts + ([f"eps{self.eps_scale:g}"] if self.eps_scale != 1 else []))


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `SamplerOptions.from_args` reads."""
    default = SamplerOptions()
    group = parser.add_argument_group("how images are made from noise")
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default=default.sampler,
        help="ddpm: the paper's, fresh noise in every step; ddim; dpm++: DPM-Solver++ 2M; ipndm (ddpm)",
    )
    group.add_argument("--steps", type=positive, metavar="N", help="network calls; when left out, one a timestep")
    group.add_argument(
        "--spacing",
        choices=SPACINGS,
        help="of the steps: even in t, or in the logarithm of the signal-to-noise ratio; the default is the sampler's",
    )
    group.add_argument(
        "--eta", type=fraction, metavar="X", help="of ddim (0) and dpm++ (1): 0 is deterministic, 1 takes fresh noise"
    )
    group.add_argument(
        "--variance", choices=("small", "large"), help="of ddpm's noise; large is for all steps alone (small)"
    )
    group.add_argument(
        "--eps-scale",
        type=float,
        default=default.eps_scale,
        metavar="S",
        help="divide the predicted noise by S, such as 1.005 (1: leave it as it is)",
    )
