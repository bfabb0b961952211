"""The names that the project makes of others are also names on Windows."""

import re
from argparse import Namespace
from pathlib import PureWindowsPath

import pytest

from functions.sampling.editing import edited_path

# These characters, these endings and these names are forbidden: "Naming Files, Paths, and
# Namespaces" in Microsoft's documentation.
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]|[. ]$')
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9])\s*(\.|$)", re.IGNORECASE)
# Other systems allow these names of a picture.
ODD_NAMES = ["who?", 'a"b*c', "10:30 <1>", "C:\\faces|2", "con", "dot.", "space ", "\x1b\u202e"]


def is_legal(name):
    """Return whether Windows allows a file of this name, and reads the name as a single part."""
    forbidden = FORBIDDEN.search(name) or RESERVED.match(name)
    return not forbidden and PureWindowsPath("folder", name).parts == ("folder", name)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_results_of_a_picture_with_an_odd_name(name, tmp_path):
    args = Namespace(images=[f"folder/{name}.png"])
    path = edited_path(args, tmp_path, "variations")
    assert is_legal(path.name)
