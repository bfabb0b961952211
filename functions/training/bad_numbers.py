"""Steps whose loss or gradients are not finite numbers: skipped, counted, and in the end fatal."""

from pathlib import Path

import torch
from torch import Tensor

from functions.support.errors import UserError
from functions.support.run_folder import last_checkpoint

# The scale of float16's losses is there to enlarge gradients. Below 1 it has collapsed.
# Without a scaler it is always 1.
SMALLEST_SCALE = 1.0


class BadNumbers:
    """Finds and counts bad steps on the device, without making the host wait for it.

    `check` gives the flag that a fused Adam takes as its `found_inf`. A flag of 1 makes it leave
    weights, moments and its count of steps as they are, so the next step starts as if this one
    had not been. Now and then the host looks at them, by `counts` and `read`.
    """

    def __init__(self, device: torch.device):
        # All attributes are tensors, and go into checkpoints by their names.
        self.step = torch.tensor(0, device=device)
        self.skipped = torch.tensor(0, device=device)
        self.in_a_row = torch.tensor(0, device=device)
        self.longest = torch.tensor(0, device=device)
        # These are the number, the loss and the gradient norm of the last bad step.
        self.last = torch.zeros(3, device=device)

    def check(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return () float32: 1 if the loss () or the gradient norm () is not finite, else 0."""
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        self.step += 1
        self.skipped += bad
        # A good step sets the row back to 0, since `bad` is then 0.
        self.in_a_row = (self.in_a_row + 1) * bad
        self.longest = torch.maximum(self.longest, self.in_a_row)
        this_step = torch.stack([self.step.float(), loss.float(), grad_norm.float()])
        self.last = torch.where(bad, this_step, self.last)
        return bad.float()

    def state(self) -> dict[str, int | list[float]]:
        """Return plain numbers for a checkpoint."""
        return {name: tensor.tolist() for name, tensor in vars(self).items()}

    def load(self, state: dict[str, int | list[float]]) -> None:
        """Go on from what `state` gave."""
        for name, tensor in vars(self).items():
            tensor.copy_(torch.tensor(state[name]))

    def counts(self, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
        """Return scalars on the device, for `read`.

        They are the most bad steps in a row since the last `read`, all that were skipped so far,
        and the scale of losses.
        """
        return {
            "longest": self.longest,
            "skipped": self.skipped,
            # Scaling a one gives the scale without the wait that get_scale has.
            "scale": scaler.scale(torch.ones_like(self.step)),
        }

    def read(self, numbers: dict[str, float], limit: int, learning_rate: float, run: Path) -> int:
        """Return how many steps have been skipped so far, from what `counts` gives now.

        Raises UserError when `limit` bad steps in a row came since the last `read`, or when the
        loss scale of float16 has collapsed.
        """
        # A row of bad steps that is not over yet goes on counting.
        self.longest = self.in_a_row.clone()
        if numbers["longest"] >= limit:
            fault = (
                f"{numbers['longest']:.0f} steps in a row had a loss or gradients that are not "
                "finite numbers"
            )
        elif numbers["scale"] < SMALLEST_SCALE:
            fault = (
                f"the loss scale of float16 has collapsed to {numbers['scale']:g}: "
                "gradients overflow at any scale"
            )
        else:
            return int(numbers["skipped"])
        step, loss, grad_norm = self.last.tolist()
        raise UserError(
            f"{fault}; the last was step {step:.0f} (loss {loss:.4g}, "
            f"gradient norm {grad_norm:.4g}, learning rate {learning_rate:.3g}). "
            "They changed no weights. Lower the learning rate, clip gradients, or train in "
            f"bfloat16 or float32. Last good checkpoint: {last_checkpoint(run)}"
        )
