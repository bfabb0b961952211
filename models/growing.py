"""Grow a U-Net: the network of small images becomes the inner levels of one for twice the size.

A new level is put in front, and begins as a passage: on the way down the mean of 2 x 2 pixels, on
the way up a copy of each pixel to 2 x 2. So where there is little noise, before its first step the
grown network does about what the small one does with the image at half the size. With more noise
its inner levels see the right SNR, but a state that is smaller than they know, down to by half, and
v is a combination of other coefficients. Training mends this, and adds the details. The idea is
that of "Progressive growing of GANs" (Karras et al. 2018, arXiv:1710.10196).
"""

import torch
from torch import Tensor

from models.unet import UNet

# The mean of 2 x 2 pixels keeps the image, and a quarter of the variance of its noise. So at each t
# the grown network must get an SNR that is lower by a factor of 4: after the mean it is that for
# which the small network was trained. This is 2 log(1 / 2), the shift of "Simple diffusion" for
# twice the size (Hoogeboom et al. 2023, arXiv:2301.11093, Section 3).
LOG_SNR_SHIFT = -1.386


def grown_arguments(small: dict) -> dict:
    """Return the arguments of `UNet` for a network that grows out of one with `small` ones.

    Raises ValueError when the small one's first level is wider than its first layer: the new level
    lies between the two, so all three have the same width.
    """
    first, *_ = small["dim_multiply"]
    if first != 1:
        raise ValueError(f"only a network whose dim_multiply begins with 1 grows, not with {first}")
    return small | {
        "image_size": 2 * small["image_size"],
        "dim_multiply": (first, *small["dim_multiply"]),
        "transformer_layers": tuple(level + 1 for level in small["transformer_layers"]),
    }


@torch.no_grad()
def grown_weights(small: dict[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """Return the weights with which a grown network begins, from those of the small one.

    `network` is the grown one as it was built. Its new residual blocks keep their random weights;
    they add nothing at first, because their last layers are zero. First convolution, time
    embedding, last norm and last convolution are the small network's.
    """
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for name, tensor in small.items():
        # `down` counts levels from the full resolution, and `up` from the lowest.
        if name.startswith("down."):
            _, level, rest = name.split(".", 2)
            name = f"down.{int(level) + 1}.{rest}"
        weights[name] = tensor

    kernel = weights["down.0.downsample.conv.weight"].zero_()
    identity = torch.eye(len(kernel), device=kernel.device)
    kernel[:, :, :2, :2] = identity[:, :, None, None] / 4

    # `Upsample` repeats each pixel, and its convolution copies it.
    last = len(network.up) - 1
    weights[f"up.{last - 1}.upsample.conv.weight"].zero_()[:, :, 1, 1] = identity

    # A block on the way up sees what comes from below, then the skip connection. Its shortcut
    # begins with the first alone. The weights of the second get gradients from the first step on.
    for block in range(len(network.up[last]["blocks"])):
        shortcut = weights[f"up.{last}.blocks.{block}.shortcut.weight"].zero_()
        shortcut[:, : len(identity), 0, 0] = identity
    return weights
