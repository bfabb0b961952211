"""Use diffusers, which is an option: only models of that library need its package."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from functions.support.errors import UserError
from functions.support.settings import ConfigError


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
