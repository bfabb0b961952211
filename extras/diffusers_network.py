"""A network of diffusers, which is called as ours is.

diffusers is an option: only models of that library need its package.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor, nn

from functions.support.errors import UserError
from functions.support.settings import ConfigError


def build(arguments: dict) -> "DiffusersUNet":
    """Build a `UNet2DModel` of these arguments with random weights.

    Raises ConfigError for what diffusers cannot build, and UserError when it is not installed.
    """
    diffusers = import_diffusers()
    with refusing_errors():
        return DiffusersUNet(diffusers.UNet2DModel(**arguments))


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
