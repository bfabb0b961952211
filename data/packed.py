"""Decode and resize every image of a source once, into one packed file, and memory-map the file.

<name>-<S>px.packed contains uint8 (N, S, S, 3), and <name>-<S>px-grey.packed (N, S, S, 1). Next to
it are a .lock and a .json with the ids, the images left out, a hash of the pixels, and the key
(`pack_key`).
"""

import hashlib
import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from data.decode import BadImage, decode, fit_square
from data.sources import Source, Unreadable, read_member
from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, sha256, short, write_atomically, write_text

# Increase this whenever the same files would give different pixels. Then all packs are made again.
FORMAT_VERSION = 2

# At most this many bad images are printed. The .json lists all of them.
LISTED = 20


@dataclass(frozen=True)
class ImageSet:
    """The images of a data set, uint8 (N, S, S, C), and their N sorted ids (int or str)."""

    name: str
    # The array is a memory map, unless the set is only a part of a pack.
    images: np.ndarray
    ids: list
    # This hash shows whether two sets have the same pixels. A part of a pack has the pack's hash.
    pixels_hash: str = ""
    # The summary counts the images, and those that were left out, enlarged or cropped.
    summary: str = ""
    # This is the path of the packed file.
    path: Path | None = None
    # There is one [name, reason] for each image that was left out.
    bad_images: list | tuple = ()
    # The last images are this number of the set's own test images.
    test_count: int = 0


def open_packed(source: Source, image_size: int, max_bad_images: int = 0) -> ImageSet:
    """Map the packed file of a source at image_size (pixels).

    A missing or outdated file is made first, and the images left out are printed. Raises UserError
    when no image is usable, when the file cannot be written, for example to a full disk, or when
    more than max_bad_images were left out.
    """
    key = pack_key(source, image_size)
    targets = pack_paths(source, image_size)
    with_data, in_cache = (read_pack(target, key, source) for target in targets)
    pack = with_data or in_cache
    failure = "none of its images can be used"
    for target in targets:
        try:
            pack = pack or make_or_wait(source, image_size, key, target)
            break
        except (OSError, NotImplementedError) as error:
            # The data may be on a read-only disk, or on one without locks, or another user may own
            # the lock. Then the cache is tried.
            failure = f"{error}; make room, or set XDG_CACHE_HOME to a folder that can be written"
    if pack is None:
        raise UserError(f"{source.path} cannot be prepared: {failure}.")

    bad_count = len(pack.bad_images)
    if bad_count > max_bad_images:
        name, reason = pack.bad_images[0]
        raise UserError(
            f"{source.path}: {bad_count} unusable image(s), {max_bad_images} allowed; the first is "
            f"{short(name)} ({reason}). {pack.path}.json lists all; fix or remove them, or allow "
            "that many."
        )
    return pack


def pack_key(source: Source, image_size: int) -> str:
    """Return a hash of everything that a pack's content depends on.

    This is the format version, the image size, the number of channels, and each member's name and
    stamp.
    """
    facts = [FORMAT_VERSION, image_size, source.channels]
    facts += [member[:2] for member in source.members]
    return sha256(json.dumps(facts))


def pack_paths(source: Source, image_size: int) -> list[Path]:
    """Return two paths for a source's pack: with the data, and in a cache for read-only data."""
    path = source.path.resolve()

    # The name does not depend on the source's content, so a new pack replaces an outdated one.
    grey = "-grey" if source.channels == 1 else ""
    name = f"{path.name}-{image_size}px{grey}.packed"
    # The pack of a folder is inside it, so that a moved folder keeps its pack.
    data_folder = path if path.is_dir() else path.parent

    # In the cache, a hash of the path distinguishes sources of the same name.
    path_hash = sha256(ascii(path))[:8]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [data_folder / name, Path(cache, "ddpm-packed-images", path_hash, name)]


def read_pack(path: Path, key: str | None, source: Source) -> ImageSet | None:
    """Map a packed file. Returns None when it is missing, or has another key or the wrong size."""
    try:
        record = json.loads(Path(f"{path}.json").read_text())
        if record.pop("key") != key:
            return None
        shape = record.pop("shape")
        images = np.memmap(path, np.uint8, "r", shape=tuple(shape))
        return ImageSet(path.name, images, path=path, test_count=source.test_count, **record)
    except READ_ERRORS:
        return None


def make_or_wait(source: Source, image_size: int, key: str, target: Path) -> ImageSet | None:
    """Make a pack and print what was left out, or wait until another process has made it.

    Returns None when no image is usable. Raises OSError when nothing can be written there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        pack = read_pack(target, key, source)
        if pack:
            return pack

        # A process that was killed may have left its temporary file.
        for temporary in target.parent.glob(f".{target.name}.*.tmp"):
            temporary.unlink()
        # The old record is deleted first, so that it never describes the new images.
        record_path = Path(f"{target}.json")
        record_path.unlink(missing_ok=True)
        record = {"key": key}
        write_atomically(target, partial(write_images, source, image_size, record))
        write_text(record_path, json.dumps(record))

        print(record["summary"])
        for name, reason in record["bad_images"][:LISTED]:
            print(f"  left out: {short(name)}: {reason}")
        return read_pack(target, record["key"], source)


def write_images(source: Source, image_size: int, record: dict, file: BinaryIO) -> None:
    """Write the pixels of all usable images, and add what `read_pack` needs to the record."""
    ids = []
    sizes = []
    bad_images = []
    digest = hashlib.sha256()

    def fit(pixels):
        sizes.append(pixels.shape[:2])
        return fit_square(pixels, image_size)

    results = map_images(source, fit, f"Preparing {source.path.name}")
    for member, image_id, pixels in zip(source.members, source.ids, results, strict=True):
        if isinstance(pixels, BadImage):
            bad_images.append([member.name, str(pixels)])
            # A pack without a key is not used again, because the image may be readable later.
            if isinstance(pixels, Unreadable):
                record["key"] = None
        else:
            file.write(pixels)
            digest.update(pixels)
            ids.append(image_id)
    enlarged = sum(min(size) < image_size for size in sizes)
    record["summary"] = (
        f"{short(source.path.name)}: {len(ids):,} images at {image_size}x{image_size}, "
        f"{len(bad_images):,} left out, {enlarged:,} enlarged"
    )
    record["shape"] = [len(ids), image_size, image_size, source.channels]
    record["bad_images"] = bad_images
    record["pixels_hash"] = digest.hexdigest()[:16]
    record["ids"] = ids


def map_images(source: Source, job: Callable[[np.ndarray], Any], title: str) -> Iterator[Any]:
    """Yield job(pixels) for every image in the order of source.ids, and show a progress bar.

    pixels is uint8 (H, W, source.channels), at the image's original size. An unusable image yields
    its BadImage instead. `title` is the text before the bar.
    """

    def process(data):
        if isinstance(data, BadImage):
            return data
        try:
            return job(decode(data, source.channels))
        except BadImage as error:
            return error

    # Threads are enough, because Pillow releases the GIL while it decodes.
    data = map(read_member, source.members)
    results = map_ahead(process, data, threads=None, ahead=32)

    # Pillow's warnings about odd metadata are ignored, because an image with a real fault becomes a
    # BadImage.
    with warnings.catch_warnings(action="ignore"):
        # A small set finishes within the delay and shows no progress bar.
        yield from tqdm(results, title, len(source.ids), unit="img", delay=1.0)


def map_ahead(
    function: Callable[..., Any], items: Iterable, threads: int | None, ahead: int
) -> Iterator:
    """Yield function(item) for each item, in order.

    Threads compute up to `ahead` results before the caller asks for them.
    """
    futures = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="images") as executor:
        for item in items:
            futures.append(executor.submit(function, item))
            if len(futures) > ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
