"""data/sources.py: the images of every kind of set are found and ordered alike, and no others."""

import pytest

from data.sources import find_source
from tests.conftest import posix, refused
from tests.data.packing import IMAGES, PICTURE, TREE, write_folder, write_zip

NUMBERS = list(range(len(IMAGES)))
LAYOUTS = [f"thumbnails128x128/{TREE}", "img{number:08d}.JPG", "resized/{number}.bmp"]

# These lie in copies of FFHQ without being images of it. Three of them are hidden.
STRAYS = ("LICENSE.txt", "data.zip", "__MACOSX/3.png", ".git/4.png", "thumbnails128x128/._5.png")


@pytest.mark.parametrize("pattern", LAYOUTS)
@pytest.mark.parametrize("write, name", [(write_folder, "set"), (write_zip, "set.ZIP")])
def test_every_layout_is_numbered_alike(tmp_path, pattern, write, name):
    path = write(tmp_path / name, pattern=pattern, more=dict.fromkeys(STRAYS, PICTURE))
    source = find_source(path)
    assert list(source.members) == NUMBERS
    assert all(f"{number}." in source.members[number].name for number in NUMBERS)
    assert source.others == 2


@pytest.mark.parametrize(
    "names",
    [
        # One number comes twice, one has none, and there are two series.
        ["a/1.png", "a/10.png", "a/2.png", "b/1.png"],
        ["10.jpeg", "2.gif", "größe.png", "人.png"],
        ["cat_10.png", "cat_2.png", "dog_3.png"],
    ],
)
def test_names_without_one_series_of_numbers_are_sorted_and_kept_whole(tmp_path, names):
    write_folder(tmp_path, [], more=dict.fromkeys(reversed(names), PICTURE))
    assert list(find_source(tmp_path).members) == sorted(names)


@posix
def test_linked_folders_are_read_and_a_link_to_nothing_is_an_error(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    elsewhere = write_folder(tmp_path / "elsewhere", pattern=TREE)
    (root / "thumbnails").symlink_to(elsewhere)
    # With images read twice, the ids would be names.
    (elsewhere / "00003" / "up").symlink_to(elsewhere)
    # A folder is no image.
    (elsewhere / "00012.png").mkdir()
    assert list(find_source(root).members) == NUMBERS
    for name in ("00011.png", "set.zip"):
        link = tmp_path / name
        link.symlink_to("nowhere")
        with pytest.raises(FileNotFoundError, match=f"/{name}'"):
            find_source(link if name == "set.zip" else tmp_path)


def test_names_in_a_zip_are_no_paths_and_of_one_name_the_last_image_counts(tmp_path):
    files = {"t/": b"", "/etc/00000.png": b"zero", "../00002.png": b"two", "./1.png": b"one"}
    path = write_zip(tmp_path / "a.zip", [], more=files)
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(path, [], more={"./1.png": b"last"}, mode="a")
    found = {number: (each.name, each.read()) for number, each in find_source(path).members.items()}
    # A name that leads out of the zip is hidden; the others are read within it.
    assert found == {0: ("/etc/00000.png", b"zero"), 1: ("./1.png", b"last")}


def test_what_is_no_source_is_said_in_a_sentence(tmp_path):
    files = {"tars/a.tar": b"", "tars/b.zip": b"", "text.zip": b"", "text.tar.gz": b""}
    files |= {"both/a.png": PICTURE, "both/b.PARQUET": b""}
    write_folder(tmp_path, [], more=files)
    kinds = r"other files; a data set is a folder of images \(.png, .*, a zip of one, or .*tar must"
    for name, message in (
        ("tars", f"0 images, 0 parquet files and 2 {kinds}"),
        ("text.tar.gz", f"0 images, 0 parquet files and 1 {kinds}"),
        ("both", f"1 images, 1 parquet files and 0 {kinds}"),
        ("text.zip", r"cannot be read \(BadZipFile: "),
    ):
        with refused(rf"{name} (has )?{message}"):
            find_source(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="/missing'"):
        find_source(tmp_path / "missing")
