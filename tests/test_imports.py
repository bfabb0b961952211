"""Who may import whom.

The mathematics (functions/*.py) import torch and each other alone. Of the rooms (functions/*/),
support imports itself and the pixels alone, so it knows no preset and no network. The others import
the mathematics, `config`, `models` and no room after their own of support, saved, sampling and
evaluation; training imports support and saved. Whoever samples loads no data set. What is in
extras/ is imported within functions alone.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

MATHEMATICS = {f"functions.{path.stem}" for path in (ROOT / "functions").glob("*.py")}
# Of the project, the files of a folder import these alone.
SAVED = MATHEMATICS | {"config", "models", "functions.support", "functions.saved"}
SAMPLING = SAVED | {f"data.{name}" for name in ("batches", "decode", "labels", "pixels")}
SAMPLING |= {"functions.sampling"}
TRAINING = SAVED | {"data", "functions.training"}
MAY_IMPORT = {
    "config.py": {
        "functions.noise_scheduler",
        "functions.denoiser",
        "functions.optimizers",
        "functions.samplers",
        "functions.support.errors",
        "functions.support.optional",
        "functions.support.settings",
        "models",
    },
    "example.py": set(),
    "models": {"models"},
    # The flags are those of the script, prepare.py.
    "data": {
        "data",
        "extras",
        "functions.support.command_line",
        "functions.support.errors",
        "functions.support.files",
        "functions.support.settings",
    },
    "extras": {"data", "functions.support.errors"},
    "functions": MATHEMATICS,
    "functions/support": {"functions.support", "data.pixels"},
    "functions/saved": SAVED,
    "functions/sampling": SAMPLING,
    "functions/evaluation": SAMPLING | {"data", "functions.evaluation"},
    "functions/training": TRAINING,
    "sample.py": SAMPLING,
    "train.py": TRAINING,
}


def imported(path: Path, nodes: Callable = ast.walk) -> Iterator[str]:
    """Yield all names that a file imports, anywhere in it: modules, and their members."""
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (f"{module}{alias.name}" for alias in node.names)


def test_every_room_has_its_rule():
    rooms = {f"functions/{path.parent.name}" for path in (ROOT / "functions").glob("*/*.py")}
    assert rooms <= MAY_IMPORT.keys()


def test_the_mathematics_imports_torch_and_itself_alone():
    files = (ROOT / "functions").glob("*.py")
    packages = {name.split(".")[0] for file in files for name in imported(file)}
    assert packages - sys.stdlib_module_names == {"torch", "functions"}


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_never_turn_round(place):
    path = ROOT / place
    for file in [path] if path.is_file() else path.glob("*.py"):
        for module in imported(file):
            package = module.split(".")[0]
            of_project = (ROOT / package).is_dir() or (ROOT / f"{package}.py").is_file()
            allowed = any(f"{module}.".startswith(f"{name}.") for name in MAY_IMPORT[place])
            assert allowed or not of_project, f"{file} imports {module}"


def test_what_is_in_extras_is_behind_doors():
    rooms = ("*.py", "data/*.py", "models/*.py", "functions/**/*.py")
    for file in (file for room in rooms for file in ROOT.glob(room)):
        at_once = [*imported(file, ast.iter_child_nodes)]
        assert not any(name.startswith("extras") for name in at_once), file
