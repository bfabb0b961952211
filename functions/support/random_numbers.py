"""Every random number of a run, as a function of what it is for and never of what was drawn before.

A run that draws from one long stream changes when it is resumed, split over processes, or cut into
other micro-batches. Here a generator is seeded afresh from (seed, purpose, step) or (seed, image),
so there is no stream to keep.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

# These threads draw noise for a GPU. One thread would take 24 ms for 64 images of 128 px.
THREADS = ThreadPoolExecutor(8)


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts, the same on every machine and Python."""
    text = "/".join(map(str, parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """Return a generator on `device`, seeded by `seed_of(*parts)`."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


@dataclass(frozen=True)
class StepDraws:
    """Hold the randomness of one optimiser step, for its B images."""

    t: Tensor  # (B,) int64, uniform in 0 .. T-1
    noise: Tensor  # (B, C, H, W) float32, standard normal
    flip: Tensor  # (B,) bool, each True half the time
    # (B,) float32, uniform in [-1, 1). This is the rotation, as a share of the largest.
    rotation: Tensor
    # (B,) float32, standard normal. t_sampling = "mixed" uses it.
    normal: Tensor


def training_draws(
    seed: int,
    step: int,
    effective_batch: int,
    image_shape: Sequence[int],
    timesteps: int,
    device: torch.device | str,
) -> StepDraws:
    """Draw t and noise (Algorithm 1, lines 3 and 4) and the augmentation for an effective batch."""
    # All is drawn whole and cut later. So an image's draws depend on its place in the effective
    # batch, and not on how that is cut into passes.
    generator = generator_of(device, seed, "training", step)

    # These five come in this order from one stream, so another draw among them would change every
    # run. A new field has a generator of its own:
    # generator_of(device, seed, "training", step, NAME).
    options = {"generator": generator, "device": device}
    return StepDraws(
        t=torch.randint(timesteps, (effective_batch,), **options),
        noise=torch.randn(effective_batch, *image_shape, **options),
        flip=torch.rand(effective_batch, **options) < 0.5,
        rotation=2 * torch.rand(effective_batch, **options) - 1,
        normal=torch.randn(effective_batch, **options),
    )


class ImageNoise:
    """Draw noise for the images of a batch.

    Image i's noise is a function of (seed, i) and of how often it was drawn, whatever its batch.
    `indices` are the numbers i of those in this batch, `shape` is (C, H, W), and other purposes
    have other noise.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple,
        device: torch.device | str = "cpu",
        purpose: str = "image",
    ):
        # The CPU draws for every device, so that all start from the same x_T.
        self.generators = [generator_of("cpu", seed, purpose, i) for i in indices]
        self.shape = shape
        self.device = torch.device(device)

    def draw(self) -> Tensor:
        """Return the next (B, C, H, W) of standard normal noise."""
        # The copy from pinned memory waits for nothing, so the next step's noise is drawn while
        # the GPU computes this one.
        pinned = self.device.type == "cuda"
        noise = torch.empty(len(self.generators), *self.shape, pin_memory=pinned)

        def fill(row, generator):
            row.normal_(generator=generator)

        # Several threads draw for a GPU, which would wait for one. The list waits for all of them.
        draw_all = THREADS.map if pinned else map
        list(draw_all(fill, noise, self.generators))
        return noise.to(self.device, non_blocking=pinned)
