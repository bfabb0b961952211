"""Decode and resize every image of a source once, into one packed file, and memory-map the file.

<name>-<S>px.packed contains uint8 (N, S, S, 3), and <name>-<S>px-grey.packed (N, S, S, 1). Next to
it are a .lock and a .json with the ids, the images left out, a hash of the pixels, and the key
(`pack_key`).
"""

import glob
import hashlib
import json
import math
import os
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout
from tqdm import tqdm

from data.decode import BadImage, decode, fit_square
from data.sources import Source
from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short, write_atomically, write_text

Result = TypeVar("Result")

# Increase this whenever the same files would give different pixels. Then all packs are made again.
FORMAT_VERSION = 1

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
    # See `Source.first_test_id`.
    first_test_id: int | None = None


def open_packed(source: Source, image_size: int, max_bad_images: int = 0) -> ImageSet:
    """Map the packed file of a source at image_size (pixels).

    A missing or outdated file is made first, and the images left out are printed. Raises UserError
    when no image is usable, when the disk is full, or when more than max_bad_images were left out.
    """
    key = pack_key(source, image_size)
    with_data, in_cache = pack_paths(source, image_size)
    shape = (image_size, image_size, source.channels)
    pack = read_pack(with_data, key, shape) or read_pack(in_cache, key, shape)
    if pack is None:
        target = with_data if is_writable(with_data.parent) else in_cache
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with lock_or_wait(target):
                # While this process waited, the one that held the lock may have made the pack.
                pack = read_pack(target, key, shape)
                pack = pack or make_pack(source, image_size, key, target)
        except OSError as error:
            advice = "Make room there"
            if target == in_cache:
                advice += ", or set XDG_CACHE_HOME to a folder that can be written"
            raise UserError(
                f"{target}, {len(source.ids) * math.prod(shape) / 1e6:,.1f} MB of images, cannot "
                f"be written ({error.strerror or error}). {advice}."
            ) from None

    if pack.bad_images and len(pack.bad_images) > max_bad_images:
        name, reason = pack.bad_images[0]
        raise UserError(
            f"{source.path}: {len(pack.bad_images)} unusable image(s), {max_bad_images} allowed; "
            f"the first is {short(name)} ({reason}). {pack.path}.json lists all; fix or remove "
            "them, or allow that many."
        )
    return pack


def pack_key(source: Source, image_size: int) -> str:
    """Return a hash of everything that a pack's content depends on.

    This is the format version, the image size, the kind of source, each member's name, size and
    stamp, and the number of channels.
    """
    facts = [FORMAT_VERSION, image_size, source.kind, source.members]
    # Keys for RGB lack the number of channels, so that earlier versions can read these packs.
    if source.channels != 3:
        facts.append(source.channels)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def pack_paths(source: Source, image_size: int) -> tuple[Path, Path]:
    """Return two paths for a source's pack: with the data, and in a cache for read-only data."""
    path = source.path.resolve()

    # The name does not depend on the source's content, so a new pack replaces an outdated one.
    grey = "-grey" if source.channels == 1 else ""
    suffix = f"{image_size}px{grey}.packed"
    data_folder = path if source.holds_pack else path.parent

    # In the cache, a hash of the path distinguishes sources of the same name.
    path_hash = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    in_cache = cache_folder() / "ddpm-packed-images" / f"{path.name}-{path_hash}-{suffix}"
    return data_folder / f"{path.name}-{suffix}", in_cache


def cache_folder() -> Path:
    """Return the user's cache folder, or a temporary one if the user has no home folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache:
        return Path(cache)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        # In a container, the user may be a number without a name. The folder's name contains this
        # number, so that users do not get each other's folders.
        return Path(tempfile.gettempdir(), f"cache-{os.getuid()}")


def is_writable(folder: Path) -> bool:
    """Return whether files can be created and locked in a folder."""
    # Permissions do not show that a disk is read-only or has no locks, so this locks a file.
    try:
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".packed") as probe,
            FileLock(f"{probe}/lock"),
        ):
            return True
    except (OSError, NotImplementedError):
        return False


def read_pack(path: Path, key: str, image_shape: tuple[int, int, int]) -> ImageSet | None:
    """Map a packed file of images of this shape (S, S, C).

    Returns None when the file is missing, has another key or has the wrong size, or when an earlier
    version made it, which computed no hash of the pixels.
    """
    try:
        record = json.loads(Path(f"{path}.json").read_text())
        ids = record["ids"]
        shape = (len(ids), *image_shape)
        if record["key"] != key or path.stat().st_size != math.prod(shape):
            return None
        images = np.memmap(path, np.uint8, "r", shape=shape)
        return ImageSet(
            path.name,
            images,
            ids,
            record["pixels_hash"],
            record["summary"],
            path,
            record["bad_images"],
        )
    except READ_ERRORS:
        return None


def lock_or_wait(target: Path) -> AcquireReturnProxy:
    """Lock a packed file, so that only one process makes it. Leaving the `with` unlocks it."""
    lock = FileLock(f"{target}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is preparing {target}; waiting for it.", flush=True)
        return lock.acquire()


def make_pack(source: Source, image_size: int, key: str, target: Path) -> ImageSet:
    """Write the packed file of a source and its record, and print what was left out."""
    # A process that was killed may have left its temporary file.
    for temporary in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        temporary.unlink()
    ids = []
    bad_images = []
    changes = Counter()
    digest = hashlib.sha256()

    def fit(pixels):
        """Return an image's pixels at image_size, and its original height and width."""
        return fit_square(pixels, image_size), *pixels.shape[:2]

    def write_images(file):
        for i, result in enumerate(map_images(source, fit, f"Preparing {source.path.name}")):
            if isinstance(result, BadImage):
                bad_images.append([source.name_of(i), str(result)])
                continue
            pixels, height, width = result
            file.write(pixels.data)
            digest.update(pixels.data)
            ids.append(source.ids[i])
            changes["not square, cropped to their centre"] += height != width
            changes[f"smaller than {image_size} px, enlarged"] += min(height, width) < image_size
        if not ids:
            name, reason = bad_images[0]
            raise UserError(
                f"{source.path}: none of its images can be used; the first is {short(name)} "
                f"({reason})."
            )

    # The old record is deleted first, so that it never describes the new images.
    record_path = Path(f"{target}.json")
    record_path.unlink(missing_ok=True)
    write_atomically(target, write_images)

    summary = f"{short(source.path.name)}: {len(ids):,} images at {image_size}x{image_size}, "
    summary += f"{len(bad_images):,} left out"
    for change, count in changes.items():
        if count:
            summary += f"; {count:,} {change}"
    record = {
        "key": key,
        "made_from": str(source.path.resolve()),
        "image_size": image_size,
        "summary": summary,
        "bad_images": bad_images,
        "pixels_hash": digest.hexdigest()[:16],
        "ids": ids,
    }
    write_text(record_path, json.dumps(record))

    print(summary, *source.notes, sep="\n")
    for name, reason in bad_images[:LISTED]:
        print(f"  left out: {short(name)}: {reason}")
    return read_pack(target, key, (image_size, image_size, source.channels))


def map_images(
    source: Source, job: Callable[[np.ndarray], Result], title: str
) -> Iterator[Result | BadImage]:
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
    count = len(source.ids)
    results = map_ahead(process, map(source.read, range(count)), threads=None, ahead=32)

    # Pillow's warnings about odd metadata are ignored, because an image with a real fault becomes a
    # BadImage. closing() waits for the threads, so none of them warns after an early stop.
    with warnings.catch_warnings(action="ignore"), closing(results):
        # A small set finishes within the delay and shows no progress bar.
        yield from tqdm(results, title, count, unit="img", delay=1.0)


def map_ahead(
    function: Callable[..., Result], items: Iterable, threads: int | None, ahead: int
) -> Iterator[Result]:
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
