"""Who may import whom.

The mathematics (functions/*.py) import torch and each other alone. Of the rooms (functions/*/),
support imports itself and the pixels alone, so it knows no preset and no network. The others import
the mathematics, `config`, `models` and no room after their own of support, saved, sampling and
evaluation; training imports support and saved. Whoever samples loads no data set.

The core is what train.py and sample.py import outside of functions, directly or through others. It
opens extras/ by doors alone, which are imports within functions.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

MATHEMATICS = {f"functions.{path.stem}" for path in (ROOT / "functions").glob("*.py")}
# Of the project, the files of a folder import these alone.
SAVED = MATHEMATICS | {"config", "models", "extras", "functions.support", "functions.saved"}
SAMPLING = SAVED | {f"data.{name}" for name in ("batches", "decode", "labels", "pictures")}
SAMPLING |= {"data.pixels", "functions.sampling", "functions.super_resolution"}
TRAINING = SAVED | {"data", "functions.training", "functions.super_resolution"}
MAY_IMPORT = {
    "config.py": {"functions.support.settings"},
    "example.py": set(),
    # A network is built by its config.
    "models": {"models", "config", "extras", "functions.support"},
    # The flags are those of the script, prepare.py.
    "data": {
        "data",
        "extras",
        "functions.support.command_line",
        "functions.support.errors",
        "functions.support.files",
        "functions.support.settings",
    },
    "extras": TRAINING,
    "functions": MATHEMATICS,
    "functions/super_resolution": TRAINING,
    "functions/support": {"functions.support", "data.pixels"},
    "functions/saved": SAVED,
    "functions/sampling": SAMPLING,
    "functions/evaluation": SAMPLING | {"data", "functions.evaluation"},
    "functions/training": TRAINING,
    "sample.py": SAMPLING,
    "train.py": TRAINING,
}
# These import the core, and it imports none of them.
OUTSIDE = (
    "edit.py",
    "evaluate.py",
    "demo.py",
    "data/arrays",
    "data/pictures",
    "functions/evaluation",
    "functions/sampling/editing",
    "functions/sampling/strips",
)
MOST_DOORS = 4


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield all names that these nodes import: modules, and their members."""
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (f"{module}{alias.name}" for alias in node.names)


def outside_of_functions(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the statements that an import of a file, or its start, executes."""
    for node in tree.body:
        yield from ast.walk(node) if isinstance(node, ast.If) else [node]


def files_of(names: Iterable[str]) -> set[str]:
    """Return the project's files of these names, in which a member is one of its module."""
    paths = {part.replace(".", "/") for name in names for part in (name, name.rpartition(".")[0])}
    return {f"{path}.py" for path in paths if (ROOT / f"{path}.py").is_file()}


def core() -> set[str]:
    """Return the files that train.py and sample.py import outside of functions."""
    found = set()
    todo = {"train.py", "sample.py"}
    while todo:
        file = todo.pop()
        found.add(file)
        todo |= files_of(imported(outside_of_functions(parsed(ROOT / file)))) - found
    return found


def test_the_core_opens_extras_by_a_few_doors_and_nothing_else():
    files = core()
    assert not [file for file in files if file.startswith(("extras", *OUTSIDE))]
    doors = {
        (file, door)
        for file in files
        for door in files_of(imported(ast.walk(parsed(ROOT / file)))) - files
    }
    # The training of one kind of network is opened by its runs alone.
    doors -= {("functions/training/run.py", "functions/super_resolution/pieces.py")}
    assert {door.partition("/")[0] for _, door in doors} == {"extras"}
    assert len(doors) <= MOST_DOORS


def test_every_room_has_its_rule():
    rooms = {f"functions/{path.parent.name}" for path in (ROOT / "functions").glob("*/*.py")}
    assert rooms <= MAY_IMPORT.keys()


def test_the_mathematics_imports_torch_and_itself_alone():
    files = (ROOT / "functions").glob("*.py")
    packages = {name.split(".")[0] for file in files for name in imported(ast.walk(parsed(file)))}
    assert packages - sys.stdlib_module_names == {"torch", "functions"}


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_never_turn_round(place):
    path = ROOT / place
    for file in [path] if path.is_file() else path.glob("*.py"):
        for module in imported(ast.walk(parsed(file))):
            package = module.split(".")[0]
            of_project = (ROOT / package).is_dir() or (ROOT / f"{package}.py").is_file()
            allowed = any(f"{module}.".startswith(f"{name}.") for name in MAY_IMPORT[place])
            assert allowed or not of_project, f"{file} imports {module}"
