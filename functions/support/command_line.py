"""What the scripts' command lines share: flags made from dataclasses, and errors as one line."""

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import NoReturn, get_type_hints

from functions.support.device import is_out_of_memory
from functions.support.errors import UserError
from functions.support.files import short

EXIT_BAD_INPUT = 2  # what argparse uses


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage of forty flags before it."""

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message} ({self.prog} --help lists what there is)\n")


@contextmanager
def plain_errors(*others: type[Exception]) -> Iterator[None]:
    """End the script with one line for what users can mend; bugs keep their traceback.

    `others` are errors beside `UserError` and the system's own, such as config.py's `ConfigError`.
    """
    try:
        yield
    except Exception as error:
        if (text := plain_sentence(error, *others)) is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # what shells report for Ctrl-C


def plain_sentence(error: Exception, *others: type[Exception]) -> str | None:
    """What a user reads of an error that users can mend; None for a bug."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (UserError, OSError, *others)):
        return str(error) or type(error).__name__
    if isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error):
        advice = (
            "take a smaller batch or model, or another device; other programs may hold memory too"
        )
        return f"out of memory ({short(error)}): {advice}"
    return None


def add_config_flags(parser: argparse.ArgumentParser, prefix: str, config_class: type) -> None:
    """One flag for each field of a dataclass: `batch_size` becomes `--PREFIX.batch-size N`.

    Its help is the comment above the field, with the field's default. Lists are written 1,2,4 and truth values true
    or false. A flag that is not given leaves nothing behind in the parsed arguments.
    """
    group = parser.add_argument_group(
        f"{config_class.__name__}, any field for this run only; defaults hold where config.py's experiment sets none"
    )
    kinds, comments = get_type_hints(config_class), field_comments(config_class)
    for field in fields(config_class):
        parse, metavar = FLAG_TYPES[kinds[field.name]]
        default = "" if field.default is MISSING else f" Default: {field.default}."
        group.add_argument(
            f"--{prefix}.{field.name.replace('_', '-')}",
            dest=f"{prefix}.{field.name}",
            type=parse,
            metavar=metavar,
            default=argparse.SUPPRESS,
            help=f"{comments[field.name]}{default}".replace("%", "%%"),
        )


def field_comments(config_class: type) -> dict[str, str]:
    """The comment on the lines right above each field of a dataclass."""
    source = inspect.getsource(config_class)
    explained = re.findall(r"^((?:    # .*\n)+)    (\w+): ", source, flags=re.MULTILINE)
    return {name: " ".join(comment.replace("#", "").split()) for comment, name in explained}


def given_fields(args: argparse.Namespace, prefix: str, config_class: type) -> dict:
    """The fields whose flags were given, ready for `dataclasses.replace`."""
    names = [field.name for field in fields(config_class)]
    return {
        name: getattr(args, f"{prefix}.{name}")
        for name in names
        if hasattr(args, f"{prefix}.{name}")
    }


def truth(text: str) -> bool:
    """A flag's type: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def integers(text: str) -> tuple[int, ...]:
    """A flag's type: integers with commas between. `ValueError`, which argparse reports, for anything else."""
    return tuple(int(part) for part in text.strip("[]() ").split(",") if part.strip())


def positive(text: str) -> int:
    """A flag's type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def fraction(text: str) -> float:
    """A flag's type: a number from 0 to 1. `ValueError`, which argparse reports, for what is no number."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return float(text)


FLAG_TYPES = {
    int: (int, "N"),
    float: (float, "X"),
    str: (str, "TEXT"),
    bool: (truth, "true|false"),
    tuple[int, ...]: (integers, "N,N,..."),
}
