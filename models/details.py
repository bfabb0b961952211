"""The network that is given an image at half the size, and draws its details."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.unet import UNet


class DetailsUNet(UNet):
    """A U-Net that works at half the size of the images, which can be of any even size.

    2 x 2 pixels of x_t become the channels of one pixel (`pixel_unshuffle`). Those of
    the small image are put beside them. So it costs a quarter of a network at full size. x_t are
    noisy details of functions/super_resolution/details.py, divided by their standard deviation.

    The arguments are those of `UNet`, but each level has half the size that it has there.
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        channels, *_ = self.image_shape
        # Four pixels of the details, and one of the small image
        self.conv_in = nn.Conv2d(5 * channels, self.conv_in.out_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(self.conv_out.in_channels, 4 * channels, 3, padding=1)
        self.reset_parameters()

    def forward(self, x_t: Tensor, t: Tensor, low: Tensor) -> Tensor:
        """Predict the noise, or v, in details x_t (B, channels, H, W) at timesteps t (B,).

        `low` is the image at half the size, (B, channels, H/2, W/2), or zeros if it is unknown.
        """
        h = torch.cat([F.pixel_unshuffle(x_t, 2), low], dim=1)  # (B, 5 channels, H/2, W/2)
        # Each level but the first halves the size once more, so it is padded for that.
        height, width = h.shape[2:]
        multiple = 2 ** (len(self.down) - 1)
        h = F.pad(h, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        h = super().forward(h, t)
        return F.pixel_shuffle(h[..., :height, :width], 2)
