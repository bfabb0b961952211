"""What a network predicts, and how x_0 and eps follow from it.

A `Denoiser` is a network with its noise schedule and its objective. `predict` calls it, and returns
x_0 and eps, whatever the network predicts. Samplers take anything that has `scheduler` and
`predict`: a `Denoiser`, or what wraps one, such as functions/guidance.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature

import torch
from torch import Tensor, nn

from functions.noise_scheduler import NoiseScheduler, Timestep


@dataclass(frozen=True)
class Objective:
    """What a network predicts at (x_t, t): a linear function of x_0 and eps, shaped as x_t."""

    # (scheduler, x_0, t, noise) -> the tensor that the loss compares the network's output with.
    target: Callable[..., Tensor]
    # (scheduler, x_t, t, output) -> the x_0 and the eps that x_t and the output imply.
    from_output: Callable[..., tuple[Tensor, Tensor]]
    # The `prediction_type` of diffusers.
    diffusers: str


# The values of a config's `objective`. Only this table knows what they mean.
OBJECTIVES = {
    # Ho et al. 2020: the target is the noise (Eq. 14), and Eq. 15 gives x_0.
    "eps": Objective(
        target=lambda scheduler, x_0, t, noise: noise,
        from_output=lambda scheduler, x_t, t, eps: (scheduler.predict_x_0(x_t, t, eps), eps),
        diffusers="epsilon",
    ),
    # Salimans and Ho 2022, arXiv:2202.00512, Section 4:
    #     v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
    #     x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v
    "v": Objective(
        target=NoiseScheduler.v,
        from_output=NoiseScheduler.predict_from_v,
        diffusers="v_prediction",
    ),
}


def inputs_of(network: Callable[..., Tensor]) -> dict[str, Parameter]:
    """Return what a network takes beside x_t and t, by name.

    If its `forward` takes **inputs, they are those of its `embed(t, ...)`, such as a `UNet`'s.
    """
    call = network.forward if isinstance(network, nn.Module) else network
    _, _, *others = signature(call).parameters.values()
    if others and others[-1].kind == Parameter.VAR_KEYWORD:
        _, *embedded = signature(network.embed).parameters.values()
        others = [*others[:-1], *embedded]
    return {each.name: each for each in others}


def no_inputs_of(network: nn.Module) -> dict[str, float | Tensor]:
    """Return the value of each input that stands for none: the network's `no_inputs`, or {}."""
    return getattr(network, "no_inputs", {})


class Predictor(ABC):
    """What samplers need: a schedule, and the x_0 and eps at (x_t, t)."""

    scheduler: NoiseScheduler

    @abstractmethod
    def estimate(self, x_t: Tensor, t: Timestep) -> tuple[Tensor, Tensor]:
        """Return x_0 and eps at (x_t, t), without clipping: (B, C, H, W) each.

        A `Denoiser` calls its network, and its row of OBJECTIVES gives both: Eq. 15, or that of v.
        """

    def given(self, **inputs: Tensor) -> "Predictor":
        """Return the predictor with these inputs of its networks, such as labels. It has none."""
        if inputs:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(inputs)}")
        return self

    def predict(self, x_t: Tensor, t: Timestep, clip_x_0: bool = False) -> tuple[Tensor, Tensor]:
        """Return x_0 and eps at (x_t, t): (B, C, H, W) each.

        Args:
            x_t: (B, C, H, W).
            t: one timestep for the whole batch, or (B,) int64.
            clip_x_0: clip x_0 to the range of images, [-1, 1], and recompute eps from it, so that
                x_t still is what Eq. 4 makes of both.
        """
        x_0, eps = self.estimate(x_t, t)
        if clip_x_0:
            x_0 = x_0.clamp(-1, 1)
            eps = self.scheduler.predict_eps(x_t, t, x_0)
        return x_0, eps


@dataclass(frozen=True)
class Denoiser(Predictor):
    """A network with the schedule and the objective that it was trained with.

    `network` may also be a plain function (x_t (B, C, H, W), t (B,) int64) -> prediction.
    """

    network: nn.Module | Callable[[Tensor, Tensor], Tensor]
    scheduler: NoiseScheduler
    # A key of OBJECTIVES.
    objective: str = "eps"
    # The dtype of the network's matrix products and convolutions. Its weights are float32, or with
    # float64 float64.
    precision: torch.dtype = torch.float32
    # What the network gets beside x_t and t, such as labels, by the names of its arguments.
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the network's prediction at (x_t, t (B,)): (B, C, H, W), of the dtype of x_t.

        x_t and inputs of another dtype than the weights are converted for the network. Raises
        ValueError for an output of another shape than x_t.
        """
        dtype = torch.promote_types(self.precision, torch.float32)
        half = self.precision != dtype
        inputs = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in self.inputs.items()
        }
        # Autocast's cache of cast weights is off: no weight is used twice in a forward pass.
        with torch.autocast(x_t.device.type, self.precision, enabled=half, cache_enabled=False):
            output = self.network(x_t.to(dtype), t, **inputs).to(x_t.dtype)
        if output.shape != x_t.shape:
            # PyTorch would broadcast one channel to three.
            raise ValueError(
                f"the network's output is {(*output.shape,)}, for x_t of {(*x_t.shape,)}"
            )
        return output

    def given(self, **inputs: Tensor) -> "Denoiser":
        """Return the denoiser with these inputs of its network, (B, ...) or (1, ...) each."""
        return replace(self, inputs=self.inputs | inputs)

    def estimate(self, x_t: Tensor, t: Timestep) -> tuple[Tensor, Tensor]:
        t_batch = t
        if isinstance(t, int):
            t_batch = torch.full((len(x_t),), t, device=x_t.device)
        output = self(x_t, t_batch)
        return OBJECTIVES[self.objective].from_output(self.scheduler, x_t, t, output)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the network in eval mode within the context, and restore its modes afterwards."""
        # A part may have a mode of its own, such as a batch norm that is frozen.
        modes = {module: module.training for module in self.network.modules()}
        self.network.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
