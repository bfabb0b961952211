"""What the scripts' command lines share: flags made from dataclasses, and errors as one line."""

import argparse
import inspect
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import NoReturn

from config import ConfigError
from functions.support.device import is_device_failure, is_out_of_memory
from functions.support.errors import EXIT_STOPPED, UserError
from functions.support.files import short

# argparse uses this exit status, too.
EXIT_BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """Parse arguments; report an error in one line, without the usage of forty flags before it."""

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message} ({self.prog} --help lists what there is)\n")


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the script with one line for an error that users can mend; bugs keep their traceback."""
    try:
        yield
    except Exception as error:
        sentence = plain_sentence(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        # The loop of docs/survival.md resumes after a GPU's failure, and stops for bad input.
        sys.exit(EXIT_STOPPED if is_device_failure(error) else EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        # torchrun sends a second signal, which would interrupt this.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("interrupted", file=sys.stderr)
        # Shells report this status for Ctrl-C.
        sys.exit(130)


def plain_sentence(error: Exception) -> str | None:
    """Return what a user reads of an error that users can mend; None for a bug."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (UserError, ConfigError, OSError)):
        return str(error) or type(error).__name__
    if is_out_of_memory(error):
        return (
            f"out of memory ({short(error)}): take a smaller batch or model, or another device; "
            "other programs may hold memory too"
        )
    if is_device_failure(error):
        return f"the GPU failed ({short(error)}): try again; train.py goes on with --resume"
    return None


def add_config_flags(parser: argparse.ArgumentParser, prefix: str, config_class: type) -> None:
    """Add one flag for each field of a dataclass: `batch_size` becomes `--PREFIX.batch-size N`.

    A flag's help is the comment above the field, with the field's default. Lists are written
    1,2,4 and truth values true or false. A field whose own name misleads has a "flag" in its
    metadata, a truer name; its own goes on working, without help. Both at once are an error.
    Raises UserError for a field without a comment.
    """
    group = parser.add_argument_group(
        f"{config_class.__name__}, any field for this run only; "
        "defaults hold where config.py's experiment sets none"
    )
    comments = field_comments(config_class)
    for field in fields(config_class):
        parse, metavar = FLAG_TYPES[field.type]
        sentences = comments.get(field.name)
        if sentences is None:
            raise UserError(
                f"{config_class.__name__}: {field.name} has no comment; "
                "write one on the lines above it, which is its flag's help"
            )
        if field.default is not MISSING:
            sentences += f" Default: {field.default}."
        shown = field.metadata.get("flag", field.name)
        either = group.add_mutually_exclusive_group()
        for name in {shown, field.name}:
            either.add_argument(
                f"--{prefix}.{name.replace('_', '-')}",
                dest=f"{prefix}.{field.name}",
                type=parse,
                metavar=metavar,
                # A flag that is not given leaves nothing behind in the parsed arguments.
                default=argparse.SUPPRESS,
                # argparse would take a single % for the start of a placeholder.
                help=sentences.replace("%", "%%") if name == shown else argparse.SUPPRESS,
            )


def field_comments(config_class: type) -> dict[str, str]:
    """Return the comment on the lines right above each field of a dataclass."""
    source = inspect.getsource(config_class)
    commented = re.findall(r"^((?:    # .*\n)+)    (\w+): ", source, flags=re.MULTILINE)
    return {name: " ".join(comment.replace("#", "").split()) for comment, name in commented}


def given_fields(args: argparse.Namespace, prefix: str) -> dict:
    """Return the fields whose flags were given, ready for `dataclasses.replace`."""
    start = f"{prefix}."
    flags = vars(args)
    return {flag.removeprefix(start): flags[flag] for flag in flags if flag.startswith(start)}


def truth(text: str) -> bool:
    """Parse a flag's value: true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def integers(text: str) -> tuple[int, ...]:
    """Parse a flag's value: integers with commas between.

    Raises `ValueError`, which argparse reports, for anything else.
    """
    return tuple(map(int, items(text)))


def numbers(text: str) -> tuple[float, ...]:
    """Parse a flag's value: numbers with commas between.

    Raises `ValueError`, which argparse reports, for anything else.
    """
    return tuple(map(float, items(text)))


def items(text: str) -> list[str]:
    """Return what stands between the commas of a flag's value, which may have brackets."""
    return [item for item in text.strip("[]() ").split(",") if item.strip()]


def positive(text: str) -> int:
    """Parse a flag's value: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def fraction(text: str) -> float:
    """Parse a flag's value: a number from 0 to 1.

    Raises `ValueError`, which argparse reports, for what is no number.
    """
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return float(text)


# How a flag is read and what its help shows as its value, by the type of its field.
FLAG_TYPES = {
    int: (int, "N"),
    float: (float, "X"),
    str: (str, "TEXT"),
    bool: (truth, "true|false"),
    tuple[int, ...]: (integers, "N,N,..."),
    tuple[float, ...]: (numbers, "X,X,..."),
}
