"""Flips and small rotations of a batch, on its device, that leave no trace in the images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The mirrored margin is wide enough for this angle; a larger one would not be a small rotation.
MAX_DEGREES = 10.0

# The filter that doubles an image reads this many pixels on either side of a point.
TAPS = 8


def augment(x_0: Tensor, flip: Tensor, angle: Tensor | None = None) -> Tensor:
    """Mirror and rotate each image by its own draw.

    x_0 (B, 3, H, W) is float32 in [-1, 1]; the result has the same shape and range. Where flip
    (B,) bool is true, left and right are exchanged exactly. angle (B,) is in degrees, positive
    counter-clockwise, or None for no rotation. An angle of 0 leaves an image bit for bit as it
    was; beyond MAX_DEGREES edge pixels repeat.
    """
    x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
    if angle is None:
        return x_0

    # Interpolation rounds, even at an angle of 0, so those images bypass it.
    upright = (angle == 0)[:, None, None, None]
    return torch.where(upright, x_0, rotate(x_0, angle))


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate each image of x (B, 3, H, W) about its centre by its angle (B,) in degrees.

    A rotated frame shows wedges of the outside along its edges: at most 3.3 pixels at 3 degrees
    and 128 px. There the image continues mirrored at its edge.
    """
    height, width = x.shape[-2:]

    # Values are taken relative to one pixel: a constant image becomes zeros and comes back exactly.
    origin = x[:, :, :1, :1]
    x = x - origin

    # The margin holds the widest wedge and the 2 pixels that bicubic interpolation reads beyond it.
    widest_wedge = max(height, width) / 2 * math.sin(math.radians(MAX_DEGREES))
    margin = math.ceil(widest_wedge) + 2

    # The wedges show the image mirrored, so a constant image stays constant and the textures are
    # the image's own. The alternatives are worse: zooming in until no outside shows would enlarge
    # every face by 5%, and repeated edge pixels draw streaks.
    #
    # Interpolation must not blur, because the network learns what it sees. Bicubic interpolation
    # alone costs photos at 128 px 10% of their gradient energy. If it reads an image that a
    # windowed sinc of 16 taps has doubled, it costs 1.5%. The price is a faint ringing near edges
    # that are sharper than those of photos.
    #
    # The width is doubled first, (B, 3, H + 2 (margin + TAPS), 2 (W + 2 margin)), then the height,
    # (B, 3, 2 (H + 2 margin), 2 (W + 2 margin)).
    doubled = double_width(mirror(x, margin + TAPS))
    doubled = double_width(doubled.transpose(2, 3)).transpose(2, 3)

    # (x_out, y_out) is an output pixel, counted from the centre of the image.
    x_centre = (width - 1) / 2
    y_centre = (height - 1) / 2
    x_out = torch.arange(width, device=x.device) - x_centre
    y_out = torch.arange(height, device=x.device)[:, None] - y_centre

    # (x_in, y_in) is where it lies in the input. The y axis points down, so these signs turn
    # counter-clockwise.
    radians = torch.deg2rad(angle)[:, None, None]
    cos = radians.cos()
    sin = radians.sin()
    x_in = cos * x_out - sin * y_out  # (B, H, W)
    y_in = sin * x_out + cos * y_out

    # The doubled image has that point at (x_doubled, y_doubled), counted from its first pixel.
    x_doubled = 2 * (x_in + x_centre + margin)
    y_doubled = 2 * (y_in + y_centre + margin)

    # In grid_sample's coordinates, -1 and 1 are the centres of the first and the last pixel.
    x_grid = x_doubled / (doubled.shape[-1] - 1) * 2 - 1
    y_grid = y_doubled / (doubled.shape[-2] - 1) * 2 - 1
    grid = torch.stack([x_grid, y_grid], dim=-1)

    # On Apple's GPUs grid_sample refuses bicubic interpolation, so the CPU does it.
    if x.device.type == "mps":
        doubled = doubled.cpu()
        grid = grid.cpu()
    rotated = F.grid_sample(
        doubled, grid, mode="bicubic", padding_mode="border", align_corners=True
    )

    # Interpolation overshoots at sharp edges.
    return (rotated.to(x.device) + origin).clamp(-1, 1)


def mirror(x: Tensor, margin: int) -> Tensor:
    """Extend x (B, C, H, W) by `margin` pixels on each side, mirrored at its edges.

    A margin wider than the image is filled by mirroring again and again.
    """
    for dim in (2, 3):
        size = x.shape[dim]

        # The extended image repeats every 2 * size pixels: it runs forwards, then backwards.
        position = torch.arange(-margin, size + margin, device=x.device) % (2 * size)
        x = x.index_select(dim, torch.minimum(position, 2 * size - 1 - position))
    return x


def double_width(x: Tensor) -> Tensor:
    """Return x (..., W + 2 TAPS) at twice the resolution, without its outer pixels: (..., 2 W).

    Each pixel is followed by the point half-way to the next one.
    """
    width = x.shape[-1] - 2 * TAPS

    # Shifted images are summed instead of convolved: a convolution may run in TF32 or bfloat16 on
    # a GPU, and a constant image would not stay constant.
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

    # Each weight is used on both sides of the point, and all of these sum to 1.
    return (weights / (2 * weights.sum())).tolist()


def rotation_limit(max_rotation: float, free_end: float, progress: float) -> float:
    """Return the largest rotation in degrees at `progress` (0 to 1) of a run."""
    # The last part of a run, `free_end` of it, rotates nothing, so the model unlearns the tilt.
    return max_rotation if progress < 1 - free_end else 0.0
