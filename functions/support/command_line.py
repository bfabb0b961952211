"""Read flags as the fields of dataclasses, and print errors in one line, for all scripts.

What comes before the flags is split off first (`split_words`), because it decides their defaults:
those of a preset, a checkpoint or a recipe.
"""

import inspect
import os
import re
import shlex
import signal
import sys
import traceback
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar

from functions.support.errors import UserError, printable
from functions.support.settings import ConfigError, limits_of, types_of
from functions.support.start import interrupted

Flags = TypeVar("Flags")
# argparse ends with this exit status, too.
EXIT_BAD_INPUT = 2
HELP = {"-h", "--help"}
# Messages of PyTorch, then of cuBLAS and cuDNN.
OUT_OF_MEMORY = re.compile(
    "(can't|[Cc]annot) allocate memory|not enough memory|out of memory|ALLOC_FAILED|"
    "ALLOCATION_FAILED"
)
# What these words mean where a value of their type fits
WORDS = {"None": None, "true": True, "True": True, "false": False, "False": False}
MEMORY_ADVICE = "use a smaller --batch-size, a smaller model or picture, or another device"


@dataclass
class NoFlags:
    """No flags but --help."""


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


def split_words(usage: str, words: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """Split a command line into the words before all flags, and the flags.

    `usage` names the former, in brackets if they may be missing; those that are get None. Raises
    UserError for more or fewer words, unless help is asked for.
    """
    names = usage.split()
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    missing = [None if name.startswith("[") else name for name in names[count:]]
    if count > len(names) or (any(missing) and HELP.isdisjoint(words)):
        before = shlex.join(words[:count]) or "nothing"
        raise UserError(f"before the flags must be {usage}, and there is {before}")
    return [*words[:count], *missing], [*words[count:]]


class Parser(ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def read_flags(
    default: Flags,
    words: Sequence[str],
    usage: str = "",
    description: str = "",
    is_first_look: bool = False,
) -> Flags:
    """Return the dataclass `default` with the fields that flags replace, or print help, and exit.

    A flag's help is the comment above its field. The fields of a field that is a dataclass are
    flags, too, such as --diffusion.epochs. A first look passes over --help and flags that are none
    of these, whose defaults may depend on it. Raises UserError for words that are none of these,
    and ConfigError for values that do not fit.
    """
    parser = Parser(
        prog=f"{Path(sys.argv[0]).name} {usage}".strip(),
        usage="%(prog)s [flags]",
        description=description,
        allow_abbrev=False,
        add_help=not is_first_look,
        formatter_class=RawDescriptionHelpFormatter,
    )
    given = Namespace()
    make = add_flags(parser, given, default)
    _, others = parser.parse_known_args(words, given)
    if others and not is_first_look:
        # What is typed may lack --diffusion, so the last parts are compared.
        names = {name.split(".")[-1]: name for name in vars(given)}
        typed = others[0].partition("=")[0].split(".")[-1]
        close = get_close_matches(typed.lstrip("-"), names, n=1)
        advice = f"; is --{names[close[0]]} meant?" if close else ""
        if not others[0].startswith("-"):
            advice = "; words come before all flags"
        parser.error(f"unrecognized: {shlex.join(others)}{advice}")
    return make()


def add_flags(
    parser: ArgumentParser, given: Namespace, default: Any, prefix: str = ""
) -> Callable[[], Any]:
    """Add a flag for each field of a dataclass, and its value to `given`, where parsing changes it.

    Return a function that makes the dataclass of what is given.
    """
    makers = {}
    source = "".join(map(inspect.getsource, filter(is_dataclass, type(default).__mro__)))
    group = parser.add_argument_group(inspect.getdoc(type(default)).splitlines()[0].rstrip("."))
    for field in fields(default):
        value, name = getattr(default, field.name), prefix + field.name.replace("_", "-")
        if is_dataclass(value):
            inner = prefix if "flat" in field.metadata else f"{name}."
            makers[field.name] = add_flags(parser, given, value, inner)
        elif "no_flag" not in field.metadata:
            # With a value here, argparse has no default, which it would convert if it is text.
            setattr(given, name, value)
            makers[field.name] = partial(getattr, given, name)
            comment = re.findall(rf"(?m)^((?:    # .*\n)+)    {field.name}: ", source)[:1]
            options = options_of(field, value, "".join(comment))
            # A name of one letter has one dash, too.
            group.add_argument(f"--{name}", *[f"-{name}"] * (len(name) == 1), dest=name, **options)
    return lambda: replace(default, **{name: make() for name, make in makers.items()})


def options_of(field: Field, value: Any, comment: str) -> dict[str, Any]:
    """Return the options of argparse for a field with this value and this comment above it."""
    kinds, choices, is_list = types_of(field)
    names = choices or [kind.__name__.upper() for kind in kinds if kind is not NoneType]
    shown = shlex.join(map(str, value)) or "none" if isinstance(value, tuple) else value
    if not choices and {int, float} & {*kinds}:
        shown = f"{shown}; {limits_of(field)[2]}"
    # Without a value, a flag that may be True is True.
    more = {"nargs": "?", "const": True} if bool in kinds else {}
    return {
        "type": partial(converted, kinds),
        "metavar": "|".join(map(str, names)),
        # argparse treats a single % as the start of a placeholder.
        "help": f"{comment.replace('#', '')} Default: {shown}.".replace("%", "%%"),
        **({"nargs": "*"} if is_list else more),
    }


def converted(kinds: Sequence[type], word: str) -> Any:
    """Return a word as the first of these types that it fits, or as it is."""
    if word in WORDS and type(WORDS[word]) in kinds:
        return WORDS[word]
    for kind in kinds:
        # The check of the field says what would fit.
        with suppress(TypeError, ValueError):
            if kind is not bool:
                return kind(word)
    return word
