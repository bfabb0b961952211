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
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar

from functions.support.errors import UserError, printable
from functions.support.settings import ConfigError, limits_of, types_of
from functions.support.start import interrupted

Flags = TypeVar("Flags")
# argparse ends with this exit status, too.
EXIT_BAD_INPUT = 2
# Messages of PyTorch, then of cuBLAS and cuDNN.
OUT_OF_MEMORY = re.compile(
    "(can't|[Cc]annot) allocate memory|not enough memory|out of memory|ALLOC_FAILED|"
    "ALLOCATION_FAILED"
)
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
    if count > len(names) or (any(missing) and not asks_for_help(words)):
        before = shlex.join(words[:count]) or "nothing"
        raise UserError(f"before the flags must be {usage}, and there is {before}")
    return [*words[:count], *missing], [*words[count:]]


def asks_for_help(words: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(words)


class Parser(ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def read_flags(
    default: Flags, words: Sequence[str], usage: str = "", description: str = ""
) -> Flags:
    """Return the dataclass `default` with the fields that flags replace, or print help, and exit.

    A flag's help is the comment above its field. The fields of a field that is a dataclass are
    flags, too, such as --diffusion.epochs. Raises UserError for words that are none of these, and
    ConfigError for values that do not fit.
    """
    parser = Parser(
        prog=f"{Path(sys.argv[0]).name} {usage}".strip(),
        usage="%(prog)s [flags]",
        description=description,
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
    )
    flags = add_flags(parser, default)
    given, others = parser.parse_known_args(words)
    if others:
        # What is typed may lack --diffusion, so the last parts are compared.
        typed = others[0].partition("=")[0].split(".")[-1]
        close = get_close_matches(typed.lstrip("-"), flags, n=1)
        advice = f"; is {flags[close[0]]} meant?" if close else ""
        if not others[0].startswith("-"):
            advice = "; words come before all flags"
        parser.error(f"unrecognized: {shlex.join(others)}{advice}")
    return replaced(default, vars(given))


def first_look(default: Flags, words: Sequence[str]) -> Flags:
    """Return a dataclass as flags say, among others, on which the defaults of these depend."""
    parser = Parser(add_help=False, allow_abbrev=False)
    add_flags(parser, default)
    return replaced(default, vars(parser.parse_known_args(words)[0]))


def add_flags(parser: ArgumentParser, default: Any, prefix: str = "") -> dict[str, str]:
    """Add a flag for each field of a dataclass, and return them by the last parts of their names.

    A flag that is not given is not in what is parsed.
    """
    flags = {}
    source = "".join(
        inspect.getsource(each) for each in type(default).__mro__ if is_dataclass(each)
    )
    comments = re.findall(r"^((?:    # .*\n)+)    (\w+): ", source, flags=re.MULTILINE)
    helps = {name: " ".join(comment.replace("#", "").split()) for comment, name in comments}
    group = parser.add_argument_group(inspect.getdoc(type(default)).splitlines()[0].rstrip("."))
    for field in fields(default):
        value, marks = getattr(default, field.name), field.metadata
        if is_dataclass(value):
            inner = prefix if "flat" in marks else f"{prefix}{field.name}."
            flags |= add_flags(parser, value, inner)
        if is_dataclass(value) or "no_flag" in marks:
            continue
        kinds, choices, is_list = types_of(field)
        names = choices or [kind.__name__.upper() for kind in kinds if kind is not NoneType]
        options = {"type": value_in(kinds), "metavar": "|".join(map(str, names))}
        if is_list:
            options["nargs"] = "*"
        if bool in kinds:
            # Without a value, the flag is True.
            options |= {"nargs": "?", "const": True}
        shown = shlex.join(map(str, value)) or "none" if isinstance(value, tuple) else value
        if not choices and {int, float} & {*kinds}:
            shown = f"{shown}; {limits_of(field)[2]}"
        last = field.name.replace("_", "-")
        flags[last] = f"--{prefix}{last}"
        group.add_argument(
            flags[last],
            # A name of one letter has one dash, too.
            *[f"-{last}"] * (len(last) == 1),
            dest=f"{prefix}{field.name}",
            default=SUPPRESS,
            # argparse treats a single % as the start of a placeholder.
            help=f"{helps.get(field.name, '')} Default: {shown}.".replace("%", "%%"),
            **options,
        )
    return flags


def value_in(kinds: Sequence[type]) -> Callable[[str], Any]:
    """Return a function that converts a word to the first of these types that it fits, if any."""

    def convert(word: str) -> Any:
        if word == "None" and NoneType in kinds:
            return None
        if kinds == [bool]:
            return {"true": True, "false": False}.get(word.lower(), word)
        for kind in kinds:
            try:
                return kind(word)
            except (TypeError, ValueError):
                # The check of the field says what would fit.
                continue
        return word

    return convert


def replaced(default: Flags, given: dict[str, Any], prefix: str = "") -> Flags:
    """Return a dataclass with the fields that flags of `add_flags` have given."""
    changes = {}
    for field in fields(default):
        value = getattr(default, field.name)
        if is_dataclass(value):
            inner = prefix if "flat" in field.metadata else f"{prefix}{field.name}."
            changes[field.name] = replaced(value, given, inner)
        elif prefix + field.name in given:
            changes[field.name] = given[prefix + field.name]
    return replace(default, **changes)
