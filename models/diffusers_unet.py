"""A network of diffusers, which is called as ours is."""

from torch import Tensor, nn


class DiffusersUNet(nn.Module):
    """A `UNet2DModel` of diffusers as f(x_t (B, C, H, W), t (B,) int64) -> (B, C, H, W)."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet
        size = unet.config.sample_size
        self.image_shape = (unet.config.in_channels, size, size)  # (C, H, W)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict what the network was trained for at x_t and t."""
        return self.unet(x_t, t).sample
