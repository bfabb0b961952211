"""Every random number of a run, as a function of what it is for and never of what was drawn before it.

A run that draws from one long stream changes when it is resumed, split over processes, or cut into other micro-batches.
Here a generator is seeded afresh from (seed, purpose, step) or (seed, image), so there is no stream to keep.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

# To draw noise for a GPU: 64 images of 128 px take one thread 24 ms
THREADS = ThreadPoolExecutor(8)


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts, the same on every machine and in every Python."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator on `device`, seeded by `seed_of(*parts)`."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


@dataclass(frozen=True)
class StepDraws:
    """The randomness of one optimiser step, for its B images."""

    t: Tensor  # (B,) int64, uniform in 0 .. T-1
    noise: Tensor  # (B, C, H, W) float32, standard normal
    flip: Tensor  # (B,) bool, each True half the time
    tilt: Tensor  # (B,) float32, uniform in [-1, 1): the rotation, as a share of the largest
    normal: Tensor  # (B,) float32, standard normal: for t_sampling = "mixed"


def training_draws(
    seed: int,
    step: int,
    effective_batch: int,
    image_shape: Sequence[int],
    timesteps: int,
    device: torch.device | str,
) -> StepDraws:
    """Draw t and noise (Algorithm 1, lines 3 and 4) and the augmentation for a whole effective batch.

    Drawn whole and then cut, so that an image's draws depend on its place in it, and not on how it is cut into passes.
    """
    generator = generator_of(device, seed, "training", step)
    return StepDraws(
        t=torch.randint(timesteps, (effective_batch,), generator=generator, device=device),
        noise=torch.randn(effective_batch, *image_shape, generator=generator, device=device),
        flip=torch.rand(effective_batch, generator=generator, device=device) < 0.5,
        tilt=2 * torch.rand(effective_batch, generator=generator, device=device) - 1,
        normal=torch.randn(effective_batch, generator=generator, device=device),
    )


class ImageNoise:
    """Image i's noise is a function of (seed, i) and of how often it was drawn, whatever its batch.

    Drawn on the CPU, so that every device starts from the same x_T, and for CUDA by several threads into pinned memory,
    so that the copy waits for nothing: the next step's noise is drawn while the GPU computes this one.

    `images` are the numbers i of those in this batch, `shape` is (C, H, W), and other purposes have other noise.
    """

    def __init__(
        self,
        seed: int,
        images: Sequence[int],
        shape: tuple,
        device: torch.device | str = "cpu",
        purpose: str = "image",
    ):
        self.generators = [generator_of("cpu", seed, purpose, i) for i in images]
        self.shape, self.device = tuple(shape), torch.device(device)

    def draw(self) -> Tensor:
        """The next (B, C, H, W) of standard normal noise."""
        pinned = self.device.type == "cuda"
        noise = torch.empty(len(self.generators), *self.shape, pin_memory=pinned)
        draw = lambda row, generator: torch.randn(self.shape, generator=generator, out=row)
        drawn = (
            THREADS.map(draw, noise, self.generators)
            if pinned
            else map(draw, noise, self.generators)
        )
        list(drawn)  # waits
        return noise.to(self.device, non_blocking=pinned)
