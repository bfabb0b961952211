"""Skip and count steps whose loss or gradients are not finite; too many in a row end the run."""

from pathlib import Path

import torch
from torch import Tensor

from functions.support.errors import UserError
from functions.support.run_folder import last_checkpoint

# The loss scale of float16 enlarges gradients, so below 1 it has collapsed. With other precisions
# it is always 1.
SMALLEST_SCALE = 1.0


class BadNumbers:
    """The counts of bad steps, kept on the device so that the host does not wait for it.

    `check` returns a flag for the `found_inf` of a fused Adam. If the flag is 1, Adam changes
    neither weights nor moments nor its step count. For each row of metrics the caller copies the
    scalars of `counts` to the host, and passes their values to `check_counts`.
    """

    def __init__(self, device: torch.device):
        # All attributes are tensors, which checkpoints store under the attributes' names.
        self.step = torch.tensor(0, device=device)
        self.skipped = torch.tensor(0, device=device)
        self.in_a_row = torch.tensor(0, device=device)
        self.longest = torch.tensor(0, device=device)
        # The last bad step: its number, its loss and its gradient norm.
        self.last = torch.zeros(3, device=device)

    def check(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return a float32 scalar: 1 if the loss or the gradient norm is not finite, else 0."""
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        self.step += 1
        self.skipped += bad
        # `bad` is 0 for a good step, which resets the count of bad steps in a row.
        self.in_a_row = (self.in_a_row + 1) * bad
        self.longest = torch.maximum(self.longest, self.in_a_row)
        this_step = torch.stack([self.step.float(), loss.float(), grad_norm.float()])
        self.last = torch.where(bad, this_step, self.last)
        return bad.float()

    def state(self) -> dict[str, int | list[float]]:
        """Return the numbers that a checkpoint stores."""
        return {name: tensor.tolist() for name, tensor in vars(self).items()}

    def load(self, state: dict[str, int | list[float]]) -> None:
        """Restore the numbers that `state` returned."""
        for name, tensor in vars(self).items():
            tensor.copy_(torch.tensor(state[name]))

    def counts(self, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
        """Return scalars on the device, for `check_counts`.

        They are the largest number of bad steps in a row since the last check, the number of steps
        skipped in the whole run, and the loss scale.
        """
        return {
            "longest": self.longest,
            "skipped": self.skipped,
            # Unlike `get_scale`, scaling a one does not wait for the device.
            "scale": scaler.scale(torch.ones_like(self.step)),
        }

    def check_counts(
        self, values: dict[str, float], limit: int, learning_rate: float, run: Path
    ) -> int:
        """Return the number of steps skipped in the whole run.

        `values` are those of `counts`, as numbers. Raises UserError if there were `limit` bad steps
        in a row since the last check, or if the loss scale of float16 has collapsed.
        """
        # Bad steps in a row may continue after this check, so `longest` restarts at their present
        # number, not at 0.
        self.longest = self.in_a_row.clone()
        if values["longest"] >= limit:
            fault = (
                f"{values['longest']:.0f} steps in a row had a loss or gradients that are not "
                "finite numbers"
            )
        elif values["scale"] < SMALLEST_SCALE:
            fault = (
                f"the loss scale of float16 has collapsed to {values['scale']:g}: "
                "gradients overflow at any scale"
            )
        else:
            return int(values["skipped"])
        step, loss, grad_norm = self.last.tolist()
        raise UserError(
            f"{fault}. The last bad step was {step:.0f} (loss {loss:.4g}, "
            f"gradient norm {grad_norm:.4g}, learning rate {learning_rate:.3g}). "
            "Bad steps changed no weights. Lower the learning rate, clip gradients, or train in "
            f"bfloat16 or float32. Last good checkpoint: {last_checkpoint(run)}"
        )
