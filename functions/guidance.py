"""Guide a model by a worse one, such as an earlier snapshot of its own training.

The guided x_0 lies on the line from the guide's x_0 through the model's x_0:

    x_0 = x_0(guide) + w (x_0(model) - x_0(guide))

With w > 1 it lies beyond the model's, further from the guide's. This helps if the guide makes the
same errors as the model, but larger ones: autoguidance (Karras et al. 2024, arXiv:2406.02507).
docs/guidance.md measures it. With the same model without its label as the guide it is
classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598).
"""

from dataclasses import dataclass, replace

from torch import Tensor

from functions.denoiser import Predictor
from functions.noise_scheduler import NoiseScheduler

# The log-SNR, log(alpha_bar / (1 - alpha_bar)), from which and up to which a guide is asked. At
# higher and at lower noise it helps little, so its calls there are saved (Kynkaanniemi et al. 2024,
# arXiv:2404.07724). docs/guidance.md measures this.
GUIDED_LOG_SNR = (-7.0, 6.0)


def asks_guide(scheduler: NoiseScheduler, t: int) -> bool:
    """Return whether a guide is asked at t."""
    lowest, highest = GUIDED_LOG_SNR
    return lowest <= scheduler.log_snr(t) <= highest


@dataclass(frozen=True)
class Guided(Predictor):
    """A model that moves away from a worse one, the guide, which has the same schedule."""

    model: Predictor
    guide: Predictor
    # w. At 1 the guide has no effect.
    weight: float

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.model.scheduler

    def given(self, **inputs: Tensor) -> "Guided":
        """Return both models with these inputs, as `Denoiser.given` does."""
        model, guide = (each.given(**inputs) for each in (self.model, self.guide))
        return replace(self, model=model, guide=guide)

    def estimate(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return the guided x_0 and its eps; t is one timestep for the whole batch."""
        x_0, eps = self.model.predict(x_t, t)
        if asks_guide(self.scheduler, t):
            # This form of the line is exact for w = 1. eps is linear in x_0, so the same mix of
            # both eps is the eps of the guided x_0.
            guide_x_0, guide_eps = self.guide.predict(x_t, t)
            x_0 = x_0 + (self.weight - 1) * (x_0 - guide_x_0)
            eps = eps + (self.weight - 1) * (eps - guide_eps)
        return x_0, eps
