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

from functions.sampling.options import add_drawing_flags
from functions.saved.loading import is_hub_name
from functions.saved.run_folder import is_recipe, newest_run
from functions.support import processes
from functions.support.command_line import Parser
from functions.support.errors import UserError, short
from functions.support.files import check_file

# The keys whose values are paths, among other things.
PARTS = ("model", "guide", "enlarge")
# Another --sampler than the recipe's drops these, which are meant for that one.
OF_SAMPLER = {"steps", "spacing", "eta", "variance", "temperature"}


class RecipeParser(Parser):
    """A parser of the words of a recipe, whose errors name the file."""

    def __init__(self, path: Path):
        super().__init__(add_help=False)
        self.path = path
        self.add_argument("--model", required=True, type=Path)
        add_drawing_flags(self)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.path}: {short(message)}")


def parse_drawing(
    parser: ArgumentParser,
    words: Sequence[str] | None = None,
    name_prefix: str = "",
    keeps: Callable[[Namespace, str], bool] = lambda args, key: True,
) -> Namespace:
    """Parse a command line with flags of sampling, after those of its recipe if RUN is a recipe.

    The result's `checkpoint` is a model: of the recipe, or RUN, or without RUN that of the newest
    run whose name begins with `name_prefix`. So a given flag wins. Raises UserError for a recipe
    that cannot be used, and CheckpointError when there is no run.

    Args:
        words: the command line, by default the script's. A verb is the first of them.
        keeps: (flags, key) -> whether this key of a recipe is used, beside `model`.
    """
    words = sys.argv[1:] if words is None else [*words]
    args = parser.parse_args(words)
    path = args.checkpoint or processes.on_main(newest_run, args.runs, name_prefix)
    if is_recipe(path):
        recipe, flags = read_recipe(path)
        path = recipe.model
        unused = overridden(args, words, recipe)
        used = [key for key in flags if key not in unused and keeps(args, key)]
        kept = [word for key in used for word in flags[key]]
        place = 1 if hasattr(args, "verb") else 0
        args = parser.parse_args([*words[:place], *kept, *words[place:]])
    args.checkpoint = path
    return args


def overridden(args: Namespace, words: Sequence[str], recipe: Namespace) -> set[str]:
    """Return which keys of a recipe the given words make void, beside those that they replace."""
    given = {word.partition("=")[0] for word in words}
    unused = set()
    if "--sampler" in given and args.sampler != recipe.sampler:
        unused |= OF_SAMPLER
    if "--eta" in given and not args.eta:
        # Without noise, there is none that a temperature could scale.
        unused.add("temperature")
    if "--cfg" in given:
        unused |= {"guide", "guidance"}
    if "--guide" in given:
        unused.add("cfg")
    if "--enlarge" in given:
        unused.add("enlarge")
    return unused


def model_of(path: Path) -> Path:
    """Return the path of a recipe's model, or the path itself."""
    return read_recipe(path)[0].model if is_recipe(path) else path


def read_recipe(path: Path) -> tuple[Namespace, dict[str, list[str]]]:
    """Read a recipe: its values, as parsed, and the flags of each key but `model`.

    Raises UserError for a file that is no recipe, or whose parts do not exist.
    """
    check_file(path)
    try:
        # Editors on Windows may begin the file with a byte-order mark.
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        hint = "TOML in UTF-8 is needed, with / and not \\ in paths"
        raise UserError(f"{path}: {short(error)}; {hint}") from error
    flags = {}
    for key, value in values.items():
        flags[key] = []
        for each in value if key == "enlarge" and isinstance(value, list) else [value]:
            if type(each) not in (str, int, float):
                raise UserError(f"{path}: {key} cannot be {short(each)}")
            word = located(path, key, str(each)) if key in PARTS else each
            flags[key].append(f"--{key}={word}")
    # The flags' own parsing checks names and values.
    recipe = RecipeParser(path).parse_args([word for words in flags.values() for word in words])
    for key, value in values.items():
        parsed = getattr(recipe, key.replace("-", "_"))
        if isinstance(value, str) and isinstance(parsed, (int, float)):
            raise UserError(f"{path}: {key} cannot be the text {short(value)!r}; write a number")
    del flags["model"]
    # The page of demo.py has another default.
    flags.setdefault("sampler", [f"--sampler={recipe.sampler}"])
    return recipe, flags


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
