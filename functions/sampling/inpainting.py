"""Inpainting: a part of an image made anew, to fit the rest (RePaint: Lugmayr et al. 2022, arXiv:2201.09865).

At each step the kept pixels are noised to the level that the others have by then, and put beside them. A single pass
leaves seams, since the new part was made before that noise was known. So a step is done several times: it is taken back
by noising, and done again from a state in which the new part has heard of the kept one.

Of RePaint's jumps, over 10 steps of 250 in the paper, only those of length 1 are here, which go with few steps.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_uint8
from functions.sampling.generation import BatchLimit, ImageSampler
from functions.sampling.interpolation import x_0_of
from functions.sampling.options import SamplerOptions
from functions.support.errors import UserError

GREY = 128  # what the picture shows where the image is not kept


def inpaint(
    image_sampler: ImageSampler, x_0: Tensor, anew: Tensor, resample: int, images: Sequence[int]
) -> Tensor:
    """RePaint's Algorithm 1, with jumps of length 1; a step is done `resample` times, the last, to x_0, once.

    x_0 is (C, H, W) in [-1, 1], on the sampler's device; `anew` is (H, W) bool, and all other pixels come back as they
    are. `images` are the numbers of the answers (B, C, H, W); each depends on the seed and its number alone. Raises
    UserError as `check_sampler`.
    """
    check_sampler(image_sampler.options)
    scheduler, times = image_sampler.scheduler, image_sampler.options.times(image_sampler.scheduler)
    noise = image_sampler.noise(images, "inpainting")
    x = noise.draw()
    for t, s in tqdm([*pairwise(times)], "inpainting", unit="step"):
        repeats = resample if s >= 0 else 1
        for repeat in range(1, repeats + 1):
            made = image_sampler.run(x, [t, s], noise.draw)
            kept = scheduler.q_sample(x_0.expand_as(x), s, noise.draw()) if s >= 0 else x_0
            x = torch.where(anew, made, kept)
            if repeat < repeats:  # back from s to t: q(x_t | x_s)
                beta = scheduler.step_beta(t, s)
                x = (1 - beta) ** 0.5 * x + beta**0.5 * noise.draw()
    return x


def check_sampler(options: SamplerOptions) -> None:
    """Raise UserError for a sampler without fresh noise, or one that looks back on steps that were taken back."""
    if options.sampler != "ddpm" and (options.sampler, options.eta) != ("ddim", 1.0):
        why = "others add too little noise, or lose their history when a step is taken back"
        raise UserError(f"--inpaint wants --sampler ddpm, or ddim --eta 1: {why}")


def inpaint_image(
    image_sampler: ImageSampler,
    image: np.ndarray,
    anew: np.ndarray,
    resample: int,
    count: int,
    limit: int,
) -> np.ndarray:
    """An image, uint8 (H, W, 3), what is kept of it, and its answers, made `limit` at a time: (2 + count, H, W, 3)."""
    device, x_0 = image_sampler.device, x_0_of(image_sampler, image)
    mask = torch.from_numpy(anew).to(device)
    calls = resample * (len(image_sampler.options.times(image_sampler.scheduler)) - 2) + 1
    print(
        f"inpainting {count} times, {calls:,} network calls each: {image_sampler.options}, a step {resample} times"
    )
    work = lambda some: to_uint8(inpaint(image_sampler, x_0, mask, resample, some)).cpu()
    answers = torch.cat(BatchLimit(device, limit).in_parts(work, range(count))).numpy()
    kept = np.where(anew[..., None], np.uint8(GREY), image)
    return np.concatenate([[image, kept], answers])
