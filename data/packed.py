"""Decode and resize every image of a source once, into one NumPy file, and memory-map the file.

<name>-<S>px.packed.npy contains uint8 (N, S, S, 3), and <name>-<S>px-grey.packed.npy (N, S, S, 1).
The .json next to it is its record, with a hash of all that decides the pixels, and one of these.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.lib import format as npy
from tqdm import tqdm

from data.decode import BadImage, fit_square, open_image, to_pixels
from data.pixels import picture_of
from data.sources import Source
from functions.support.errors import CheckpointError, UserError, printable
from functions.support.files import read_json, replacing, sha256, write_text

# Increase this whenever the same files would give different pixels, or another record. Then all
# packs are made again.
FORMAT_VERSION = 4

# (C, S, S): the number of channels, and the side in pixels
Shape = tuple[int, int, int]

# So many prepared images are in memory at a time.
CHUNK = 1000


class ImageArray(Protocol):
    """Images uint8 (N, S, S, C), as NumPy's, HDF5's and Zarr's arrays are."""

    dtype: np.dtype
    shape: tuple[int, ...]

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Return the images with B indices, which rise: uint8 (B, S, S, C)."""


@dataclass(frozen=True)
class ImageSet:
    """The images of a data set, uint8 (N, S, S, C), and their N sorted ids (int or str)."""

    name: str
    # A pack's array is a memory map, and a part of it is not.
    images: ImageArray
    ids: list
    # Each image's name is that of its `Member`.
    names: list[str]
    # The rule of the split is that of its `Source`, and the sides are those of the members.
    rule: str
    sides: Sequence[str | None] = ()
    # This hash shows whether two sets have the same pixels. A part of a pack has the pack's hash.
    pixels_hash: str = ""
    # The summary counts the images, those that were left out, and other files.
    summary: str = ""
    # What the network gets beside x_t and t: (N, ...) by the names of its arguments.
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    # The names of the labels; the input `label` of an image is the index of one of them.
    label_names: list[str] = field(default_factory=list)


def open_packed(source: Source, shape: Shape, max_bad_images: int) -> ImageSet:
    """Map the packed file of a source's images in this shape, which is made if needed.

    It has all images that could be read when it was made, and stays so until a file of the source
    changes. Raises UserError when no image is usable, or more than max_bad_images are not, and
    OSError when an image cannot be read, or the file cannot be written.
    """
    channels, image_size, _ = shape
    # A pack's content depends on these, and on the names and stamps of the images.
    facts = [FORMAT_VERSION, image_size, channels]
    facts += [member[:2] for member in source.members.values()]
    key = sha256(json.dumps(facts))
    path = pack_path(source, shape)
    images, record = read_pack(path, key) or write_pack(path, key, source, shape)
    bad_images = record["bad_images"]
    if len(bad_images) > max_bad_images or not record["ids"]:
        first = ", ".join(f"{printable(name)} ({reason})" for name, reason in bad_images[:3])
        raise UserError(
            f"{source.path}: {len(bad_images)} of {len(source.members)} images are unusable, "
            f"{max_bad_images} allowed: {first}. {path}.json lists all; fix or remove them, or let "
            f"train.py leave them out: --diffusion.max-bad-images {len(bad_images)}. Deleting "
            f"{path} reads them again"
        )
    summary = record["summary"]
    # Other files may come and go, and the pack stays.
    if source.others:
        summary += f"; {source.others:,} other files"
    if bad_images:
        summary += f"; deleting {path} reads those left out again"
    members = [source.members[i] for i in record["ids"]]
    return ImageSet(
        name=path.name,
        images=images,
        ids=record["ids"],
        names=[member.name for member in members],
        rule=source.rule,
        sides=[member.side for member in members],
        pixels_hash=record["pixels_hash"],
        summary=summary,
    )


def pack_path(source: Source, shape: Shape) -> Path:
    """Return the path of a source's pack: with the data, or in a cache for read-only data."""
    channels, image_size, _ = shape
    path = source.path.resolve()

    # The name does not depend on the source's content, so a new pack replaces an outdated one.
    grey = "-grey" if channels == 1 else ""
    name = f"{path.name}-{image_size}px{grey}.packed.npy"
    # The pack of a folder is inside it, so that a moved folder keeps its pack.
    folder = path if path.is_dir() else path.parent
    if os.access(folder, os.W_OK):
        return folder / name

    # In the cache, a hash of the path distinguishes sources of the same name.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "ddpm-packed-images", sha256(ascii(path))[:8], name)


def read_pack(path: Path, key: str) -> tuple[np.memmap, dict] | None:
    """Map a pack, and read its record; None if one of them is missing, outdated or cut short.

    The pixels were hashed when they were written, and are not read again.
    """
    try:
        record = read_json(Path(f"{path}.json"))
        images = npy.open_memmap(path, "r")
    except (CheckpointError, FileNotFoundError, ValueError):
        return None
    return (images, record) if record.get("key") == key else None


def write_pack(path: Path, key: str, source: Source, shape: Shape) -> tuple[np.memmap, dict]:
    """Write the pixels of all usable images, and their record, and return what `read_pack` does.

    Of two processes that do so at once the last one's files stay. Prints a summary.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    record_path = Path(f"{path}.json")
    # A training that reads the old file keeps it, and nothing is wrong after a kill: without its
    # record a file is not used.
    with replacing(path) as temporary:
        record = {"key": key} | write_images(temporary, source, shape)
        record_path.unlink(missing_ok=True)
    write_text(record_path, json.dumps(record))
    print(record["summary"])
    return npy.open_memmap(path, "r"), record


def write_images(path: Path, source: Source, shape: Shape) -> dict:
    """Write the pixels of all usable images to a file, and return their record."""
    image_size = shape[1]
    ids = []
    bad_images = []
    smaller_count = 0
    # The path may be ".".
    name = source.path.absolute().name
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        write_header(file, 0, shape)
        images = map_images(source, shape)
        # A small set finishes within the delay and shows no progress bar.
        images = tqdm(images, f"Preparing {name}", len(source.members), unit="img", delay=1.0)
        for (image_id, member), result in zip(source.members.items(), images, strict=True):
            if isinstance(result, BadImage):
                bad_images.append([member.name, printable(result)])
                continue
            image, side = result
            file.write(image)
            digest.update(image)
            ids.append(image_id)
            smaller_count += side < image_size
        file.seek(0)
        write_header(file, len(ids), shape)
    smaller = f", {smaller_count:,} smaller than that" if smaller_count else ""
    return {
        "ids": ids,
        "pixels_hash": digest.hexdigest()[:16],
        "summary": f"{printable(name)}: {len(ids):,} images at {image_size}x{image_size}, "
        f"{len(bad_images):,} left out{smaller}",
        "bad_images": bad_images,
    }


def write_header(file: BinaryIO, count: int, shape: Shape) -> None:
    """Write NumPy's header for so many images. It has the same length for each count."""
    channels, image_size, _ = shape
    shape = (count, image_size, image_size, channels)
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def map_images(source: Source, shape: Shape) -> Iterator[tuple[np.ndarray, int] | BadImage]:
    """Yield each image, uint8 (S, S, C), and its shorter side, or the error of an unusable one.

    The order is that of source.members. Raises OSError when an image cannot be read.
    """

    def prepare(member):
        try:
            data = member.read()
            image = picture_of(data) if isinstance(data, np.ndarray) else open_image(data)
        except BadImage as error:
            return error
        except OSError as error:
            error.filename = error.filename or f"{source.path}: {member.name}"
            raise
        pixels = to_pixels(image, shape[0])
        return fit_square(pixels, shape[1]), min(pixels.shape[:2])

    # Threads are enough, because Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor() as executor:
        members = [*source.members.values()]
        for first in range(0, len(members), CHUNK):
            yield from executor.map(prepare, members[first : first + CHUNK])
