"""What is known of an image that is inpainted, at its own size and at half of it.

functions/super_resolution/enlarging.py keeps it in what it draws, and editing.py has the steps.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from functions.denoiser import Predictor
from functions.noise_scheduler import NoiseScheduler
from functions.super_resolution.details import shrinking


@dataclass(frozen=True)
class Known:
    """What is known of an image (C, H, W), for inpainting at its own size or a smaller one."""

    image: Tensor
    # Where it is unknown: (H, W) bool.
    mask: Tensor
    # From H to the size S at which it is used, (S, H), and back, (H, S); None for H itself.
    shrink: Tensor | None = None
    stretch: Tensor | None = None

    def halved(self) -> "Known":
        """Return the same for half the size, as Lanczos shrinks the image."""
        size = len(self.mask) if self.shrink is None else len(self.shrink)
        shrink = shrinking(size // 2).to(self.image)
        shrink = shrink if self.shrink is None else shrink @ self.shrink
        return replace(self, shrink=shrink, stretch=torch.linalg.pinv(shrink))

    def at_size(self) -> tuple[Tensor, Tensor]:
        """Return the image (C, S, S), and the mask (S, S) of pixels that depend on unknown ones."""
        if self.shrink is None:
            return self.image, self.mask
        shrink = self.shrink
        reach = (shrink != 0).to(shrink)
        return shrink @ self.image @ shrink.mT, reach @ self.mask.to(shrink) @ reach.mT > 0

    def put_into(self, images: Tensor) -> Tensor:
        """Return images (B, C, S, S) with what is known in them.

        Pixels that depend on known and unknown ones get the share of the known ones: the images are
        stretched, get the known pixels there, and are shrunk again.
        """
        if self.shrink is None:
            return torch.where(self.mask, images, self.image)
        large = torch.where(self.mask, self.stretch @ images @ self.stretch.mT, self.image)
        return self.shrink @ large @ self.shrink.mT


@dataclass(frozen=True)
class Keeping(Predictor):
    """A model whose x_0 has what is known of an image: (B, C, H, W)."""

    model: Predictor
    known: Known

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.model.scheduler

    def estimate(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return x_0 with the known pixels, and its eps."""
        x_0 = self.known.put_into(self.model.predict(x_t, t)[0])
        return x_0, self.scheduler.predict_eps(x_t, t, x_0)
