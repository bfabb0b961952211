"""The U-Net as plainly as it can be written, from PyTorch's layers and autograd: what the fast paths must equal."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import ResidualBlock, Upsample
from models.unet import UNet


def plain_block(block: ResidualBlock, time_embedding: Tensor, x: Tensor) -> Tensor:
    h = block.conv_1(F.silu(block.norm_1(x)))
    h = h + block.time_projection(F.silu(time_embedding))[:, :, None, None]
    h = block.conv_2(F.dropout(F.silu(block.norm_2(h)), block.settings.dropout, block.training))
    return (block.shortcut(x) if block.shortcut else x) + h


def plain_upsample(upsample: Upsample, x: Tensor) -> Tensor:
    return upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PlainUNet(nn.Module):
    """The same parameters under the same names, called plainly."""

    def __init__(self, net: UNet):
        super().__init__()
        self.net, self.channels, self.image_size = net, net.channels, net.image_size

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        net = self.net
        time_embedding = net.time_embedding(t)
        h = net.conv_in(x_t)
        skips = [h]
        for stage in net.down:
            for block, attention in zip(stage["blocks"], stage["attentions"], strict=True):
                h = attention(plain_block(block, time_embedding, h))
                skips.append(h)
            if "downsample" in stage:
                h = stage["downsample"](h)
                skips.append(h)
        h = net.middle_attention(plain_block(net.middle_block_1, time_embedding, h))
        h = plain_block(net.middle_block_2, time_embedding, h)
        for stage in net.up:
            for block, attention in zip(stage["blocks"], stage["attentions"], strict=True):
                h = attention(plain_block(block, time_embedding, torch.cat([h, skips.pop()], dim=1)))
            if "upsample" in stage:
                h = plain_upsample(stage["upsample"], h)
        return net.conv_out(F.silu(net.norm_out(h)))
