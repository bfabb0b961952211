"""Who may import whom: the mathematics lie directly in functions/ and know torch and each other alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MATHEMATICS = {"noise_scheduler", "losses", "ema", "timesteps", "prediction", "samplers", "likelihood"}
ROOMS = {"training": 3, "evaluation": 3, "sampling": 2, "support": 0}  # a room may import rooms of at most its number


def imported(path: Path) -> set[str]:
    """All modules that a file imports by name, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "functions" else {node.module}
            )
    return found


def test_directly_in_functions_there_is_the_mathematics_and_nothing_else():
    assert {path.stem for path in (ROOT / "functions").glob("*.py")} == MATHEMATICS


@pytest.mark.parametrize("name", sorted(MATHEMATICS))
def test_the_mathematics_imports_torch_and_itself_alone(name):
    own = {f"functions.{other}" for other in MATHEMATICS}
    for module in imported(ROOT / "functions" / f"{name}.py"):
        package = module.partition(".")[0]
        assert module in own or package == "torch" or package in sys.stdlib_module_names, module


@pytest.mark.parametrize(
    "path", sorted((ROOT / "functions").glob("*/*.py")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_imports_never_turn_round(path):
    for module in imported(path):
        assert not module.startswith(("models", "config", "train", "sample", "evaluate")), module
        assert not module.startswith("data") or module.startswith(("data.pixels", "dataclasses")), module
        package, _, rest = module.partition(".")
        room = rest.partition(".")[0]
        if package == "functions" and room in ROOMS:
            assert ROOMS[room] <= ROOMS[path.parent.name], module
