"""Read recipes: text files that name the parts of a drawing and its settings.

A recipe is a TOML file, such as pretrained/people.toml. `model` names what RUN names, and `enlarge`
is a list of what --enlarge names. All other keys are flags of sampling by their names, without the
dashes. Paths are relative to the file.
"""

import sys
import tomllib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from functions.sampling.options import add_sampling_flags
from functions.saved.loading import is_hub_name
from functions.saved.run_folder import is_recipe, newest_run
from functions.support import processes
from functions.support.command_line import Parser
from functions.support.errors import UserError, short
from functions.support.files import check_file

# The keys whose values are paths, among other things.
PARTS = ("model", "guide", "enlarge")
# These belong to a command, not to a way of drawing.
NO_KEYS = {"checkpoint", "runs", "device", "seed"}
# Another --sampler than the recipe's drops these, which are meant for that one.
OF_SAMPLER = {"steps", "spacing", "eta", "variance", "temperature"}
# The sampler of a recipe that names none.
DDPM = ["--sampler=ddpm"]


class RecipeParser(Parser):
    """A parser of the flags of sampling whose errors name the recipe that has them."""

    def __init__(self, path: Path):
        super().__init__(add_help=False)
        self.path = path
        add_sampling_flags(self)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.path}: {message}")


def parse_drawing(
    parser: ArgumentParser,
    words: Sequence[str] | None = None,
    name_prefix: str = "",
    wanted: Callable[[Namespace], set[str] | None] = lambda args: None,
) -> Namespace:
    """Parse a command line with flags of sampling, after those of its recipe if RUN is a recipe.

    The result's `checkpoint` is a model: of the recipe, or RUN, or without RUN that of the newest
    run whose name begins with `name_prefix`. So a given flag wins. Raises UserError for a recipe
    that cannot be used, and CheckpointError when there is no run.

    Args:
        words: the command line, by default the script's. A verb is the first of them.
        wanted: returns which keys of a recipe are used beside `model`; None means all.
    """
    words = sys.argv[1:] if words is None else [*words]
    args = parser.parse_args(words)
    path = args.checkpoint or processes.on_main(newest_run, args.runs, name_prefix)
    if is_recipe(path):
        path, flags = read_recipe(path)
        keys = wanted(args)
        unused = overridden(args, words, flags)
        if keys is not None:
            unused |= flags.keys() - keys
        kept = [word for key, values in flags.items() if key not in unused for word in values]
        place = 1 if hasattr(args, "verb") else 0
        args = parser.parse_args([*words[:place], *kept, *words[place:]])
    args.checkpoint = path
    return args


def overridden(args: Namespace, words: Sequence[str], flags: dict[str, list[str]]) -> set[str]:
    """Return which keys of a recipe, whose flags these are, the given words make void."""
    given = {word.partition("=")[0] for word in words}
    unused = set()
    if "--sampler" in given and [f"--sampler={args.sampler}"] != flags.get("sampler", DDPM):
        unused |= OF_SAMPLER
    if "--eta" in given and not args.eta:
        # Without noise, there is none that a temperature could scale.
        unused.add("temperature")
    if "--enlarge" in given:
        unused.add("enlarge")
    return unused


def model_of(path: Path) -> Path:
    """Return the path of a recipe's model, or the path itself."""
    return read_recipe(path)[0] if is_recipe(path) else path


def read_recipe(path: Path) -> tuple[Path, dict[str, list[str]]]:
    """Read a recipe: the path of its model, and by key the flags that say the rest of it.

    Raises UserError for a file that is no recipe, or whose parts do not exist.
    """
    check_file(path)
    try:
        # Editors on Windows may begin the file with a byte-order mark.
        recipe = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        hint = "TOML in UTF-8 is needed, with / and not \\ in paths"
        raise UserError(f"{path}: {short(error)}; {hint}") from error

    parser = RecipeParser(path)
    keys = {name.replace("_", "-") for name in vars(parser.parse_args([])).keys() - NO_KEYS}
    for key in recipe.keys() - keys - {"model"}:
        names = ", ".join(["model", *sorted(keys)])
        raise UserError(f"{path}: {short(key)!r} is no key of a recipe, which can have {names}")
    if "model" not in recipe:
        raise UserError(f"{path}: it names no model")
    values = {key: values_of(path, key, value) for key, value in recipe.items()}
    [model] = values.pop("model")
    flags = {key: [f"--{key}={value}" for value in each] for key, each in values.items()}
    # The flags' own parsing checks the values.
    parser.parse_args([flag for each in flags.values() for flag in each])
    return Path(model), flags


def values_of(path: Path, key: str, value: object) -> list[str]:
    """Return a key's value, or those of the list `enlarge`, as a command line has them."""
    kinds = (str,) if key in ("model", "enlarge") else (str, int, float)
    values = value if key == "enlarge" and isinstance(value, list) else [value]
    if (key == "enlarge" and values is not value) or any(
        type(each) not in kinds for each in values
    ):
        hint = ', which is a list, such as ["a.safetensors"]' if key == "enlarge" else ""
        raise UserError(f"{path}: {short(value)} cannot be {key}{hint}")
    return [located(path, key, str(each)) if key in PARTS else str(each) for each in values]


def located(path: Path, key: str, name: str) -> str:
    """Return the path of a part that a recipe names, or the name of what is no file."""
    there = path.parent / name
    if "\\" in name or not name.isprintable():
        raise UserError(f"{path}: {key} is {short(name)!r}; write / between folders, not \\")
    if name and there.exists():
        return str(there)
    # The guide may be a step, and a model may be on a hub.
    is_step = key == "guide" and name.isdecimal()
    if is_step or (is_hub_name(Path(name)) and not there.parent.exists()):
        return name
    raise UserError(f"{path}: {key} is {name!r}, and there is no {there}")
