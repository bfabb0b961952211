"""What README and docs/ name in backticks or link to is there: files, headings and tests."""

import re

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


FOLDERS = ("benchmarks", "data", "figures", "functions", "models", "tests")
FILES = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
PATHS = [f"/{path.relative_to(ROOT).as_posix()}" for path in FILES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page):
    texts = [path.read_text() for path in FILES if path.name.startswith("test_")]
    names = {path.stem for path in FILES}
    names.update(re.findall(r"def (test_\w+)", "\n".join(texts)))

    for quoted in re.findall(r"`([^`\n]+)`", page.read_text()):
        for file in re.findall(r"^[\w/]+\.py", quoted):
            # A page may leave out a folder that its sentence has named.
            assert any(path.endswith(f"/{file}") for path in PATHS), file
        for name in re.findall(r"^test_\w+$", quoted):
            assert name in names, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_links_to_is_there(page):
    """A link leads to a file or a folder and, after a #, to a heading as GitHub names it."""
    for path, anchor in re.findall(r"\]\(([^):#]*)#?([^):]*)\)", page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            names = {
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            }
            assert anchor in names, f"{path}#{anchor}"
