"""What README and docs/ name in backticks is there: files, and tests."""

import re

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    tests = "\n".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))
    names = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    names |= set(re.findall(r"def (test_\w+)", tests))
    paths = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")]

    for quoted in re.findall(r"`([^`\n]+)`", page.read_text()):
        for file in re.findall(r"^[\w/]+\.py", quoted):
            # A page may leave out a folder that its sentence has named.
            assert any(f"/{path}".endswith(f"/{file}") for path in paths), file
        for name in re.findall(r"^test_\w+$", quoted):
            assert name in names, name
