"""Who may import whom.

The files of the mathematics lie directly in functions/ and import torch and each other alone.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MATHEMATICS = {
    "noise_scheduler",
    "losses",
    "ema",
    "timesteps",
    "prediction",
    "samplers",
    "likelihood",
}
# A folder of functions/ may import those with numbers up to its own.
ROOMS = {"training": 3, "evaluation": 3, "sampling": 2, "support": 0}

# No file of functions/ may import these.
ABOVE = ("models", "config", "train", "sample", "sampleFFHQ", "evaluate")


def imported(path: Path) -> set[str]:
    """Return all names that a file imports, anywhere in it: modules, and their members."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return modules | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


def test_directly_in_functions_there_is_the_mathematics_and_nothing_else():
    assert {path.stem for path in (ROOT / "functions").glob("*.py")} == MATHEMATICS


@pytest.mark.parametrize("name", sorted(MATHEMATICS))
def test_the_mathematics_imports_torch_and_itself_alone(name):
    for module in imported(ROOT / "functions" / f"{name}.py"):
        package, *rest = module.split(".")
        if package == "functions":
            assert rest[0] in MATHEMATICS
        else:
            assert package in {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "functions").glob("*/*.py")),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_imports_never_turn_round(path):
    for module in imported(path):
        package, *rest = module.split(".")
        assert package not in ABOVE, module
        # The range of pixel values is the only thing of data/ that functions/ know.
        assert package != "data" or rest[0] == "pixels", module
        if package == "functions" and rest[0] in ROOMS:
            assert ROOMS[rest[0]] <= ROOMS[path.parent.name], module
