"""The networks by name, and how each is built."""

from collections.abc import Callable
from functools import partial
from inspect import signature

from torch import nn

from config import ModelConfig
from functions.support.errors import door
from functions.support.settings import ConfigError
from models.details import DetailsUNet
from models.unet import UNet

# The fields of a `ModelConfig` that a `UNet` is built by.
UNET_FIELDS = [*signature(UNet).parameters]


def unet(config: ModelConfig, network_class: type[UNet] = UNet) -> UNet:
    """Build a `UNet`, or a subclass with the same arguments: the fields of these names."""
    return network_class(**{name: getattr(config, name) for name in UNET_FIELDS})


def diffusers(config: ModelConfig) -> nn.Module:
    with door("a network of diffusers"):
        from extras.diffusers_network import build
    return build(config.arguments)


# The values of a config's `network`: functions of a `ModelConfig` that build a network with random
# weights, f(x_t, t, **inputs). docs/extending.md says how one takes inputs of its own.
NETWORKS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "unet": unet,
    "details": partial(unet, network_class=DetailsUNet),
    "diffusers": diffusers,
}


def build_network(config: ModelConfig) -> nn.Module:
    """Build a network with random weights.

    Raises ConfigError for a name that is no row of NETWORKS, as that of a network that a run was
    given from Python may be; and UserError if a library is not installed.
    """
    if config.network not in NETWORKS:
        raise ConfigError(
            f"its network, {config.network!r:.100}, is none of models/networks.py; make it a row "
            "of NETWORKS there, or load and resume it from Python (docs/python.md)"
        )
    return NETWORKS[config.network](config)
