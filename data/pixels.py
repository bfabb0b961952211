"""Convert pixel values between uint8 0..255, as in files, and float32 -1..1, as in the model.

Images have C = 3 channels, RGB, or one, grey. On all 256 values, `to_uint8` is the inverse of
`to_model_range`.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_model_range(images_uint8: Tensor | np.ndarray) -> Tensor:
    """Map uint8 images (B, H, W, C) to contiguous float32 (B, C, H, W) in [-1, 1]."""
    # The copy to contiguous memory comes before the cast, because bytes need only a quarter of the
    # memory of floats.
    x = torch.as_tensor(images_uint8).permute(0, 3, 1, 2).contiguous()
    return x.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(x: Tensor) -> np.ndarray:
    """Map images (B, C, H, W) of any float type, on any device, to uint8 (B, H, W, C).

    Values are rounded to the nearest level, and values outside [-1, 1] are clamped.
    """
    levels = (x.to(torch.float32) + 1.0).mul_(127.5).round_().clamp_(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def picture_of(pixels: np.ndarray) -> Image.Image:
    """Return a Pillow image of uint8 pixels: RGB for (H, W, 3), grey for (H, W, 1) or (H, W)."""
    # Pillow has no third dimension for grey.
    if pixels.shape[2:] == (1,):
        pixels = pixels[..., 0]
    return Image.fromarray(pixels)
