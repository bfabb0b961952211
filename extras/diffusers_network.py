"""A network of diffusers: its config, and the network, which is called as ours is.

diffusers is an option: only models of that library need its package.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from config import NetworkConfig
from functions.support.errors import UserError
from functions.support.settings import ConfigError, setting


@dataclass(frozen=True)
class DiffusersNetwork(NetworkConfig):
    """A network of diffusers, which that library builds (docs/diffusers-models.md)."""

    # The arguments of its `UNet2DModel`.
    unet_2d_model: dict = setting(no_flag=True)

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return self.unet_2d_model["sample_size"]

    @property
    def channels(self) -> int:
        """Colour channels."""
        return self.unet_2d_model["in_channels"]

    def build(self) -> nn.Module:
        """Build it with random weights.

        Raises ConfigError for what diffusers cannot build, and UserError when it is not installed.
        """
        diffusers = import_diffusers()
        with refusing_errors():
            unet = diffusers.UNet2DModel(**self.unet_2d_model)
        return DiffusersUNet(unet)


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


def import_diffusers() -> ModuleType:
    """Import diffusers. Raises UserError when it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "for models of diffusers, install its package: pip install 'diffusers>=0.30,<1'"
        ) from error
    return diffusers


@contextmanager
def refusing_errors() -> Iterator[None]:
    """Turn an error of diffusers in the context into a ConfigError."""
    try:
        yield
    except Exception as error:
        # diffusers builds whatever a JSON file says, and has errors of many types.
        raise ConfigError(f"diffusers: {error}") from error
