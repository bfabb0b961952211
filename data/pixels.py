"""Pixel values on their two sides: uint8 0..255 in files and caches, float -1..1 in the model.

The two functions are each other's inverse on all 256 values.
"""

import torch


def to_model_range(images_uint8: torch.Tensor) -> torch.Tensor:
    """uint8 images (B, H, W, 3) in 0..255 -> float32 (B, 3, H, W), contiguous, in [-1, 1], on the same device."""
    # Permuted while still bytes, so that the copy which makes it contiguous moves a quarter of the memory.
    x = images_uint8.permute(0, 3, 1, 2).contiguous().to(torch.float32)
    return x.div_(127.5).sub_(1.0)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1], any float type -> uint8 (B, H, W, 3) on the same device.

    Values outside [-1, 1] are clamped, the rest rounded to the nearest level.
    """
    levels = (x.to(torch.float32) + 1.0).mul_(127.5).round_().clamp_(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
