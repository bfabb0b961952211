"""Flip images and rotate them by small angles, on their device and without visible artefacts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The mirrored margin is wide enough for rotations up to this angle.
MAX_DEGREES = 10.0

# The filter that doubles an image's resolution reads this many pixels on either side of a point.
TAPS = 8


def augment(x_0: Tensor, flip: Tensor, angle: Tensor | None = None) -> Tensor:
    """Flip and rotate each image of a batch.

    x_0 (B, C, H, W) is float32 in [-1, 1]. The result has the same shape and range. Where flip
    (B,) bool is true, left and right are exchanged exactly. angle (B,) is in degrees, positive
    counter-clockwise, or None for no rotation. At an angle of 0 an image stays exactly the same.
    Beyond MAX_DEGREES, corners may show repeated edge pixels.
    """
    x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
    if angle is None:
        return x_0

    # Interpolation rounds even at an angle of 0, so upright images bypass it.
    upright = (angle == 0)[:, None, None, None]
    return torch.where(upright, x_0, rotate(x_0, angle))


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate each image of x (B, C, H, W) about its centre by its angle (B,) in degrees.

    Rotation brings wedges from outside the image into view. At 3 degrees and 128 px they are at
    most 3.3 pixels wide. They are filled by mirroring the image at its edges.
    """
    height, width = x.shape[-2:]

    # One pixel's value is subtracted here and added back at the end. So a constant image is zero in
    # between, and stays exactly constant.
    origin = x[:, :, :1, :1]
    x = x - origin

    # The margin has room for the widest wedge and for 2 more pixels, which bicubic interpolation
    # reads.
    widest_wedge = max(height, width) / 2 * math.sin(math.radians(MAX_DEGREES))
    margin = math.ceil(widest_wedge) + 2

    # Mirroring fills the wedges with textures of the image. The alternatives are worse: a zoom that
    # hides the wedges would enlarge every face by 5%, and repeating the edge pixels would draw
    # streaks.
    #
    # Interpolation must not blur, because the network would learn the blur. With only bicubic
    # interpolation, photos at 128 px lose 10% of their gradient energy. If a windowed sinc of 16
    # taps first doubles the resolution, they lose 1.5%. The price is faint ringing near edges that
    # are sharper than those in photos.
    #
    # The width is doubled first, to (B, C, H + 2 (margin + TAPS), 2 (W + 2 margin)), and then the
    # height, to (B, C, 2 (H + 2 margin), 2 (W + 2 margin)).
    doubled = double_width(mirror(x, margin + TAPS))
    doubled = double_width(doubled.transpose(2, 3)).transpose(2, 3)

    # (x_out, y_out) is an output pixel, counted from the centre of the image.
    x_centre = (width - 1) / 2
    y_centre = (height - 1) / 2
    x_out = torch.arange(width, device=x.device) - x_centre
    y_out = torch.arange(height, device=x.device)[:, None] - y_centre

    # (x_in, y_in) is the same point in the input. The y axis points down, so these signs rotate
    # counter-clockwise.
    radians = torch.deg2rad(angle)[:, None, None]
    cos = radians.cos()
    sin = radians.sin()
    x_in = cos * x_out - sin * y_out  # (B, H, W)
    y_in = sin * x_out + cos * y_out

    # (x_doubled, y_doubled) is that point in the doubled image, counted from its first pixel.
    x_doubled = 2 * (x_in + x_centre + margin)
    y_doubled = 2 * (y_in + y_centre + margin)

    # In grid_sample's coordinates, -1 and 1 are the centres of the first and the last pixel.
    x_grid = x_doubled / (doubled.shape[-1] - 1) * 2 - 1
    y_grid = y_doubled / (doubled.shape[-2] - 1) * 2 - 1
    grid = torch.stack([x_grid, y_grid], dim=-1)

    # On Apple's GPUs grid_sample does not support bicubic interpolation, so the CPU does it.
    if x.device.type == "mps":
        doubled = doubled.cpu()
        grid = grid.cpu()
    rotated = F.grid_sample(
        doubled, grid, mode="bicubic", padding_mode="border", align_corners=True
    )

    # Interpolation overshoots at sharp edges, so the result is clamped.
    return (rotated.to(x.device) + origin).clamp(-1, 1)


def mirror(x: Tensor, margin: int) -> Tensor:
    """Extend x (B, C, H, W) by `margin` pixels on each side, mirrored at its edges.

    A margin wider than the image is filled by repeated mirroring.
    """
    for dim in (2, 3):
        size = x.shape[dim]

        # The extended image repeats every 2 * size pixels: it runs forwards, then backwards.
        position = torch.arange(-margin, size + margin, device=x.device) % (2 * size)
        x = x.index_select(dim, torch.minimum(position, 2 * size - 1 - position))
    return x


def double_width(x: Tensor) -> Tensor:
    """Double the width of x (..., W + 2 TAPS), dropping TAPS pixels at either end -> (..., 2 W).

    Each pixel is followed by the value half-way to the next pixel.
    """
    width = x.shape[-1] - 2 * TAPS

    # Sums of shifted images replace a convolution, because a GPU may run a convolution in TF32 or
    # bfloat16. A constant image would then not stay constant.
    halfway = 0
    for k, weight in enumerate(halfway_weights()):
        left = x.narrow(-1, TAPS - k, width)
        right = x.narrow(-1, TAPS + 1 + k, width)
        halfway += weight * (left + right)
    return torch.stack([x[..., TAPS:-TAPS], halfway], dim=-1).flatten(-2)


def halfway_weights() -> list[float]:
    """Return the weights of the pixels at 1/2, 3/2, ... from a point, by Lanczos' windowed sinc."""
    distance = torch.arange(TAPS, dtype=torch.float64) + 0.5
    weights = torch.sinc(distance) * torch.sinc(distance / TAPS)

    # Each weight is used for a pixel on either side of the point, and all of them sum to 1.
    return (weights / (2 * weights.sum())).tolist()


def rotation_limit(max_rotation: float, free_end: float, progress: float) -> float:
    """Return the largest rotation in degrees at `progress` (0 to 1) of a run."""
    # In the last part of a run, the fraction `free_end`, nothing is rotated, so that the model
    # unlearns the rotations.
    return max_rotation if progress < 1 - free_end else 0.0
