"""Steps whose loss or gradients are not finite numbers: found on the device, skipped, counted, and in the end fatal."""

from pathlib import Path

import torch
from torch import Tensor

from functions.support.errors import UserError
from functions.support.run_folder import last_checkpoint

# Of float16's losses: the scale is there to enlarge gradients; below 1 it has collapsed
SMALLEST_SCALE = 1.0


class BadNumbers:
    """Watches every step without making the host wait for the device.

    `check` gives the flag that a fused Adam takes as its `found_inf`: 1 makes it leave weights, moments and its count
    of steps as they are, so the next step starts as if this one had not been. Counts are kept on the device, and the
    host looks at them, by `numbers` and `read`, every some steps.
    """

    def __init__(self, device: torch.device):
        self.step, self.skipped, self.in_a_row, self.longest = (
            torch.tensor(0, device=device) for _ in range(4)
        )
        # Of the last bad step: its number, loss and gradient norm
        self.last = torch.zeros(3, device=device)

    def check(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """() float32: 1 if the step's loss () or the norm of its gradients () is not finite, else 0."""
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        self.step += 1
        self.skipped += bad
        self.in_a_row = (self.in_a_row + 1) * bad
        self.longest = torch.maximum(self.longest, self.in_a_row)
        self.last = torch.where(
            bad, torch.stack([self.step.float(), loss.float(), grad_norm.float()]), self.last
        )
        return bad.float()

    def state(self) -> dict[str, int | list[float]]:
        """Plain numbers for a checkpoint."""
        return {
            name: getattr(self, name).tolist()
            for name in ("step", "skipped", "in_a_row", "longest", "last")
        }

    def load(self, state: dict[str, int | list[float]]) -> None:
        """Go on from what `state` gave."""
        for name in ("step", "skipped", "in_a_row", "longest"):
            getattr(self, name).fill_(int(state[name]))
        self.last.copy_(torch.tensor([float(value) for value in state["last"]]))

    def numbers(self, scaler: torch.amp.GradScaler) -> Tensor:
        """(6,) float32 on the device: most in a row since `read`, skipped so far, `last`, and the scale of losses."""
        # Of one; unlike get_scale this does not wait
        scale = scaler.scale(torch.ones_like(self.last[0]))
        return torch.stack(
            [number.float() for number in (self.longest, self.skipped, *self.last, scale)]
        )

    def read(self, numbers: list[float], limit: int, learning_rate: float, run: Path) -> int:
        """How many steps have been skipped so far, from what `numbers` gives now.

        `UserError` when `limit` in a row were since the last `read`, or float16's loss scale has collapsed.
        """
        self.longest = self.in_a_row.clone()
        longest, skipped, step, loss, grad_norm, scale = numbers
        if longest >= limit:
            what = (
                f"{longest:.0f} steps in a row had a loss or gradients that are not finite numbers"
            )
        elif scale < SMALLEST_SCALE:  # without a scaler it is 1
            what = f"the loss scale of float16 has collapsed to {scale:g}: gradients overflow at any scale"
        else:
            return int(skipped)
        raise UserError(
            f"{what}; the last was step {step:.0f} (loss {loss:.4g}, gradient norm {grad_norm:.4g}, learning rate "
            f"{learning_rate:.3g}). They changed no weights. Lower the learning rate, clip gradients, or train in "
            f"bfloat16 or float32. Last good checkpoint: {last_checkpoint(run)}"
        )
