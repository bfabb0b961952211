"""Inpaint an image: sample the pixels of a mask so that they fit the others (RePaint).

After each step the known pixels, which are outside the mask, are noised to the step's noise level
and inserted into the state. A single pass leaves seams, because the step denoises the mask's pixels
before this noise is drawn. So each step is repeated: the state is noised back to the level before
the step, and the network then sees both parts together.

RePaint is Lugmayr et al. 2022, arXiv:2201.09865. The paper jumps back by 10 steps of 250. Here all
jumps have length 1, which suits fewer steps.
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

# The picture of the known pixels has this grey in the mask.
GREY = 128


def inpaint(
    image_sampler: ImageSampler, x_0: Tensor, mask: Tensor, resample: int, indices: Sequence[int]
) -> Tensor:
    """Inpaint by RePaint's Algorithm 1, with jumps of length 1: each step is done `resample` times.

    x_0 is (C, H, W) in [-1, 1], on the sampler's device. `mask`, (H, W) bool, is true where pixels
    are sampled; the others do not change. Returns one answer for each index: (B, C, H, W). An
    answer depends on the seed and its index alone. Raises UserError as `check_sampler` does.
    """
    check_sampler(image_sampler.options)
    scheduler = image_sampler.scheduler
    # A step leads from timestep t to s.
    steps = list(pairwise(image_sampler.times))
    noise = image_sampler.noise(indices, "inpainting")
    x = noise.draw()
    for t, s in tqdm(steps, "inpainting", unit="step"):
        # The last step leads to x_0, and is done once.
        repeats = resample if s >= 0 else 1
        for repeat in range(1, repeats + 1):
            unknown = image_sampler.take_steps(x, [t, s], noise.draw)
            known = x_0
            if s >= 0:
                known = scheduler.q_sample(x_0.expand_as(x), s, noise.draw())
            x = torch.where(mask, unknown, known)
            # After all repeats but the last, q(x_t | x_s) takes the state back from s to t.
            if repeat < repeats:
                beta = scheduler.step_beta(t, s)
                x = (1 - beta) ** 0.5 * x + beta**0.5 * noise.draw()
    return x


def check_sampler(options: SamplerOptions) -> None:
    """Raise UserError for a sampler that adds too little noise, or one that uses earlier steps."""
    if options.sampler != "ddpm" and (options.sampler, options.eta) != ("ddim", 1.0):
        raise UserError(
            "--inpaint wants --sampler ddpm, or ddim --eta 1: others add too little noise, or lose "
            "their history when a step is taken back"
        )


def inpaint_image(
    image_sampler: ImageSampler,
    image: np.ndarray,
    mask: np.ndarray,
    resample: int,
    count: int,
) -> np.ndarray:
    """Inpaint an image uint8 (H, W, 3) `count` times, where the mask, bool (H, W), is true.

    Returns the image, its known pixels on grey, and the answers: (2 + count, H, W, 3).
    """
    device = image_sampler.device
    x_0 = source_to_x_0(image_sampler, image)
    device_mask = torch.from_numpy(mask).to(device)
    # Each step but the last is repeated.
    calls = resample * (image_sampler.network_calls - 1) + 1
    print(
        f"inpainting {count} times, {calls:,} network calls each: {image_sampler.options}, "
        f"a step {resample} times"
    )

    def work(indices):
        return to_uint8(inpaint(image_sampler, x_0, device_mask, resample, indices)).cpu()

    answers = BatchLimit(device, image_sampler.batch_size).in_parts(work, range(count))
    known = np.where(mask[..., None], np.uint8(GREY), image)
    return np.concatenate([[image, known], torch.cat(answers).numpy()])
