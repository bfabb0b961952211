"""Make flags from dataclasses, and print errors in one line, for all scripts."""

import ast
import csv
import inspect
import os
import re
import signal
import sys
import traceback
from argparse import (
    SUPPRESS,
    ArgumentParser,
    ArgumentTypeError,
    BooleanOptionalAction,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from functions.support.errors import UserError, printable
from functions.support.settings import TYPES, ConfigError, checked, types_of
from functions.support.start import interrupted

# argparse ends with this exit status, too.
EXIT_BAD_INPUT = 2
# Messages of PyTorch, then of cuBLAS and cuDNN.
OUT_OF_MEMORY = re.compile(
    "(can't|[Cc]annot) allocate memory|not enough memory|out of memory|ALLOC_FAILED|"
    "ALLOCATION_FAILED"
)
MEMORY_ADVICE = "use a smaller --batch-size, a smaller model or another device"


class Parser(ArgumentParser):
    """A parser that reports an error in one line, without the usage of some forty flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message} (see {self.prog} --help)\n")


def run_script(main: Callable[[], None], memory_advice: str = MEMORY_ADVICE) -> None:
    """Call `main`, and end with one line for an error that users can fix.

    Bugs keep their traceback. With DDPM_TRACEBACK=1 in the environment, all errors have one.
    """
    # No output ends the script: neither a closed one nor one without the characters.
    for name in ("stdout", "stderr"):
        # After `2>&-` the stream is None. The null device takes the free descriptor, which a file
        # of ours would otherwise get, and with it what libraries print.
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except Exception as error:
        sentence = str(error)
        if is_out_of_memory(error):
            sentence = f"out of memory ({printable(error)}): {memory_advice}"
        elif not isinstance(error, (UserError, ConfigError, OSError)):
            raise
        if os.environ.get("DDPM_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        # Shells use this status for Ctrl-C.
        sys.exit(130)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether PyTorch or Python failed to allocate memory."""
    if isinstance(error, RuntimeError):
        return OUT_OF_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError)


def add_config_flags(
    parser: ArgumentParser, config_class: type, title: str, prefix: str = ""
) -> None:
    """Add one flag for each field of a dataclass: `batch_size` becomes `--PREFIXbatch-size N`.

    A flag's help is the comment above the field, with the field's choices and its default. A flag
    that is not given has no entry in the parsed arguments. Without a prefix, that of a bool has no
    value.
    """
    group = parser.add_argument_group(title)
    comments = field_comments(config_class)
    for field in fields(config_class):
        marks = field.metadata
        if "no_flag" in marks:
            continue
        kinds, is_list = types_of(field)
        metavar = "|".join(TYPES[kind][1] for kind in kinds)
        if is_list:
            metavar = f"{metavar},{metavar},..."
        options = {
            "type": partial(parse_flag, field),
            "metavar": marks.get("metavar") or "|".join(map(str, marks.get("choices", [metavar]))),
        }
        if "repeated" in marks:
            options |= {"action": "append", "type": str}
        if kinds == [bool] and not prefix:
            options = {"action": BooleanOptionalAction}
        sentences = comments.get(field.name, "")
        if "details" in marks:
            sentences += f" {marks['details']()}"
        if field.default not in (MISSING, None, ()):
            sentences += f" Default: {field.default}."
        group.add_argument(
            f"--{prefix}{field.name.replace('_', '-')}",
            *marks.get("also", ()),
            dest=f"{prefix}{field.name}",
            default=SUPPRESS,
            # argparse treats a single % as the start of a placeholder.
            help=sentences.replace("%", "%%"),
            **options,
        )


def add_flags(parser: ArgumentParser, flags_class: type) -> None:
    """Add the flags of a script, the fields of a dataclass; those not given have their defaults."""
    add_config_flags(parser, flags_class, "what this script does")
    parser.set_defaults(**vars(flags_class()))


def parse_flag(field: Field, text: str) -> Any:
    """Parse the value of a field's flag, and check it.

    It is a Python literal, with or without capitals and brackets; names have commas between them,
    and quotes where they have commas. Raises ArgumentTypeError if it does not fit.
    """
    kinds, is_list = types_of(field)
    value = text
    if kinds == [Path]:
        return Path(text)
    if kinds != [str]:
        literal = f"[{text.strip('[]()')}]" if is_list else text.capitalize()
        # Anything else is a text.
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(literal)
    elif is_list:
        # A line break makes several rows, or an error.
        with suppress(csv.Error, ValueError):
            [value] = csv.reader([text], skipinitialspace=True)
        if not isinstance(value, list) or not value:
            raise ArgumentTypeError(f"{text!r} is not a list of names such as a,b")
    try:
        return checked(field, value)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from error


def field_comments(config_class: type) -> dict[str, str]:
    """Return the comment directly above each field of a dataclass, by the field's name."""
    source = "".join(inspect.getsource(each) for each in config_class.__mro__ if is_dataclass(each))
    matches = re.findall(r"^((?:    # .*\n)+)    (\w+): ", source, flags=re.MULTILINE)
    return {name: " ".join(comment.replace("#", "").split()) for comment, name in matches}


def given_fields(args: Namespace, *config_classes: type) -> dict:
    """Return the values of the fields of these dataclasses whose flags were given, by name."""
    names = {field.name for each in config_classes for field in fields(each)}
    given = {flag.rpartition(".")[2]: value for flag, value in vars(args).items()}
    return {name: given[name] for name in names & given.keys()}
