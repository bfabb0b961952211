"""Inpaint an image: resample the masked pixels so that they match the rest (RePaint).

After each step the known pixels, noised to the new level, replace those outside the mask. A single
pass leaves seams, because the masked pixels are computed before the noise of the known ones is
drawn. So each step is repeated: the state is noised back to the level before it.

RePaint is Lugmayr et al. 2022, arXiv:2201.09865. Its jumps back have length 10, for 250 steps.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from tqdm import tqdm

from data.batches import batches_of
from data.decode import fit_image, fit_mask, open_image_file, to_pixels
from data.pixels import to_model_range, to_uint8
from functions.sampling.generation import ImageSampler
from functions.sampling.options import SamplerOptions
from functions.support.errors import UserError

# Grey that fills the mask in the picture of the known pixels.
GREY = 128


def inpaint(
    image_sampler: ImageSampler, x_0: Tensor, mask: Tensor, resample: int, indices: Sequence[int]
) -> Tensor:
    """Inpaint by RePaint's Algorithm 1, with jumps of length 1: each step is done `resample` times.

    x_0 is (C, H, W) in [-1, 1], on the sampler's device. `mask`, (H, W) bool, is true where pixels
    are sampled. Returns one result for each index: (B, C, H, W). The sampler's options are those
    that `require_full_noise` lets pass.
    """
    scheduler = image_sampler.scheduler
    # A step leads from timestep t to s.
    steps = list(pairwise(image_sampler.times))
    noise = image_sampler.noise(indices, "inpainting")
    x = noise()
    for t, s in tqdm(steps, "inpainting", unit="step"):
        # The last step leads to x_0, and is not repeated.
        repeats = resample if s >= 0 else 1
        for repeat in range(repeats):
            # In all repeats but the first, q(x_t | x_s) takes the state back from s to t.
            if repeat > 0:
                beta = scheduler.step_beta(t, s)
                x = (1 - beta) ** 0.5 * x + beta**0.5 * noise()
            unknown = image_sampler.take_steps(x, [t, s], noise)
            # At s = -1, the clean image, this is x_0 itself.
            known = scheduler.q_sample(x_0, s, noise())
            x = torch.where(mask, unknown, known)
    return x


def require_full_noise(options: SamplerOptions) -> None:
    """Raise UserError for options with which steps add less noise than those of ddpm."""
    full = options.sampler == "ddpm" or (options.sampler, options.eta) == ("ddim", 1.0)
    if not full or options.temperature != 1:
        raise UserError(
            "inpaint needs --sampler ddpm, or ddim --eta 1, with --temperature 1: others add too "
            "little noise, or depend on earlier steps, which inpainting undoes"
        )


def read_with_mask(
    path: str, mask_path: str | None, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Read an image to be inpainted and its mask -> uint8 (S, S, C), and bool (S, S).

    The mask is true where its file is white or, without a file, where the image is transparent.
    Both are cropped and resized to `shape`, (C, S, S). Raises UserError for an unreadable image, a
    mask of another size than its image, or a mask that is true or false everywhere.
    """
    image = open_image_file(path)
    if mask_path:
        mask_image = open_image_file(mask_path)
    else:
        alpha = image.convert("RGBA").getchannel("A")
        mask_image = ImageOps.invert(alpha)

    if mask_image.size != image.size:
        raise UserError(
            f"{mask_path} has {mask_image.width}x{mask_image.height} pixels, its image "
            f"{image.width}x{image.height}; a mask must be as large as its image"
        )

    white = to_pixels(mask_image, 1)[..., 0] >= 128
    mask = fit_mask(white, shape[-1])
    if mask.all() or not mask.any():
        raise UserError(
            f"{mask_path or path}: everything or nothing would be inpainted in the middle square "
            "of the image, to which it is cropped; give a --mask that is partly white there, or "
            "erase a part there"
        )
    return fit_image(image, shape), mask


def inpaint_image(
    image_sampler: ImageSampler, image: np.ndarray, mask: np.ndarray, resample: int, count: int
) -> np.ndarray:
    """Inpaint a uint8 image (H, W, C) `count` times where the mask, bool (H, W), is true.

    Returns the image, its known pixels on grey, and the results: (2 + count, H, W, C).
    """
    device = image_sampler.device
    x_0 = to_model_range(image[None])[0].to(device)
    device_mask = torch.from_numpy(mask).to(device)
    results = [
        to_uint8(inpaint(image_sampler, x_0, device_mask, resample, indices))
        for indices in batches_of(range(count), image_sampler.batch_size)
    ]
    known = np.where(mask[..., None], np.uint8(GREY), image)
    return np.concatenate([[image, known], *results])
