"""Inpainting: a part of an image made anew, to fit the rest (RePaint).

At each step the kept pixels are noised to the level that the others have by then, and put beside
them. A single pass leaves seams, since the new part was made before that noise was known. So a
step is repeated: it is taken back by noising, and done again from a state in which the new part
has heard of the kept one.

RePaint is Lugmayr et al. 2022, arXiv:2201.09865. Of its jumps, over 10 steps of 250 in the paper,
only those of length 1 are here: they go with few steps.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_uint8
from functions.sampling.generation import BatchLimit, ImageSampler
from functions.sampling.interpolation import source_to_x_0
from functions.sampling.options import SamplerOptions
from functions.support.errors import UserError

# The picture of what is kept is grey where the image is made anew.
GREY = 128


def inpaint(
    image_sampler: ImageSampler, x_0: Tensor, mask: Tensor, resample: int, indices: Sequence[int]
) -> Tensor:
    """Inpaint by RePaint's Algorithm 1, with jumps of length 1: each step is done `resample` times.

    x_0 is (C, H, W) in [-1, 1], on the sampler's device; `mask` is (H, W) bool, and all other
    pixels come back as they are. `indices` are those of the answers (B, C, H, W); each
    depends on the seed and its number alone. Raises UserError as `check_sampler`.
    """
    check_sampler(image_sampler.options)
    scheduler = image_sampler.scheduler
    # A step leads from timestep t to s.
    steps = list(pairwise(image_sampler.times))
    noise = image_sampler.noise(indices, "inpainting")
    x = noise.draw()
    for t, s in tqdm(steps, "inpainting", unit="step"):
        # The last step, to x_0, is done once: without noise there is nothing to take it back to.
        repeats = resample if s >= 0 else 1
        for repeat in range(1, repeats + 1):
            new = image_sampler.run(x, [t, s], noise.draw)
            kept = x_0
            if s >= 0:
                kept = scheduler.q_sample(x_0.expand_as(x), s, noise.draw())
            x = torch.where(mask, new, kept)
            # All repeats but the last are taken back from s to t, by q(x_t | x_s).
            if repeat < repeats:
                beta = scheduler.step_beta(t, s)
                x = (1 - beta) ** 0.5 * x + beta**0.5 * noise.draw()
    return x


def check_sampler(options: SamplerOptions) -> None:
    """Raise UserError for a sampler without fresh noise, or one that looks back on its steps."""
    if options.sampler != "ddpm" and (options.sampler, options.eta) != ("ddim", 1.0):
        why = "others add too little noise, or lose their history when a step is taken back"
        raise UserError(f"--inpaint wants --sampler ddpm, or ddim --eta 1: {why}")


def inpaint_image(
    image_sampler: ImageSampler,
    image: np.ndarray,
    mask: np.ndarray,
    resample: int,
    count: int,
) -> np.ndarray:
    """Inpaint an image uint8 (H, W, 3) `count` times, where the mask, bool (H, W), is true.

    Returns the image, what is kept of it, and the answers: (2 + count, H, W, 3).
    """
    device = image_sampler.device
    x_0 = source_to_x_0(image_sampler, image)
    device_mask = torch.from_numpy(mask).to(device)
    # Each step but the last is repeated, and there are as many steps as times less one.
    calls = resample * (len(image_sampler.times) - 2) + 1
    print(
        f"inpainting {count} times, {calls:,} network calls each: {image_sampler.options}, "
        f"a step {resample} times"
    )

    def work(indices):
        return to_uint8(inpaint(image_sampler, x_0, device_mask, resample, indices)).cpu()

    answers = BatchLimit(device, image_sampler.batch_size).in_parts(work, range(count))
    kept = np.where(mask[..., None], np.uint8(GREY), image)
    return np.concatenate([[image, kept], torch.cat(answers).numpy()])
