"""The packed file: every image of a source, decoded and resized once, as uint8 (N, S, S, 3).

It is memory-mapped from then on. Beside <name>-<S>px.packed lie its .json (what was left out, the
ids, and the key of what it was made from) and its .lock.
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

from data.decode import BadImage, decode_rgb, fit_square
from data.sources import Source
from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short, write_text, write_whole

Result = TypeVar("Result")

# This number must be raised whenever the same files give other pixels, so that every pack is
# made anew.
FORMAT_VERSION = 1

# So many bad images are printed; the .json lists all.
LISTED = 20


@dataclass(frozen=True)
class ImageSet:
    """Images of a data set, uint8 (N, S, S, 3), and their N ids (int or str), sorted."""

    name: str
    # These are memory-mapped, unless they were picked from a pack.
    images: np.ndarray
    ids: list
    # One line says how many images there are, and how many were left out, enlarged or cropped.
    summary: str = ""
    # The packed file lies here.
    path: Path | None = None
    # Each image that was left out has its [name, reason] here.
    bad_images: list | tuple = ()


def open_packed(source: Source, image_size: int, max_bad_images: int = 0) -> ImageSet:
    """Map the packed file of a source at image_size (pixels).

    It is made first if there is none or it is outdated. Raises UserError when more than
    max_bad_images had to be left out (after listing them), when no image is usable, or when there
    is no room.
    """
    key = pack_key(source, image_size)
    beside, in_cache = pack_paths(source, image_size)
    pack = read_pack(beside, key, image_size) or read_pack(in_cache, key, image_size)
    if pack is None:
        target = beside if is_writable(beside.parent) else in_cache
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with lock_or_wait(target):
                # If another process held the lock, it has made the pack meanwhile.
                pack = read_pack(target, key, image_size)
                pack = pack or make_pack(source, image_size, key, target)
        except OSError as error:
            raise UserError(
                f"{target}, {len(source.ids) * image_size**2 * 3 / 1e6:,.1f} MB of images, cannot "
                f"be written ({error.strerror or error}). Make room there."
            ) from None

    if pack.bad_images and len(pack.bad_images) > max_bad_images:
        name, reason = pack.bad_images[0]
        raise UserError(
            f"{source.path}: {len(pack.bad_images)} unusable image(s), {max_bad_images} allowed; "
            f"the first is {short(name)} ({reason}). {pack.path}.json lists all; mend or remove "
            "them, or allow as many."
        )
    return pack


def pack_key(source: Source, image_size: int) -> str:
    """Hash all that a pack is made from.

    That is the format version, the image size, and each file's name, size and stamp.
    """
    made_from = [FORMAT_VERSION, image_size, source.kind, source.members]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def pack_paths(source: Source, image_size: int) -> tuple[Path, Path]:
    """Return the two places of a source's pack: with the data, and in the user's cache folder.

    The cache is for data that is read-only.
    """
    path = source.path.resolve()

    # The name is the same for every state of a source, so that an outdated pack is replaced.
    ending = f"{image_size}px.packed"

    # A pack lies beside an archive, but inside a folder of images: it goes where the folder goes.
    data_folder = path if source.kind == "folder" else path.parent

    # The cache may hold the packs of two sources of one name.
    origin = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache_folder = caches / "ddpm-packed-images"
    return data_folder / f"{path.name}-{ending}", cache_folder / f"{path.name}-{origin}-{ending}"


def is_writable(folder: Path) -> bool:
    """Return whether files can be made and locked in a folder."""
    # Permissions don't tell all: the disk may be read-only or know no locks. So both are tried.
    try:
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".packed") as probe,
            FileLock(f"{probe}/lock"),
        ):
            return True
    except (OSError, NotImplementedError):
        return False


def read_pack(path: Path, key: str, image_size: int) -> ImageSet | None:
    """Map a packed file.

    Returns None when it is missing, was made from something else or has the wrong size.
    """
    try:
        record = json.loads(Path(f"{path}.json").read_text())
        ids = record["ids"]
        shape = (len(ids), image_size, image_size, 3)
        if record["key"] != key or path.stat().st_size != math.prod(shape):
            return None
        images = np.memmap(path, np.uint8, "r", shape=shape)
        return ImageSet(path.name, images, ids, record["summary"], path, record["bad_images"])
    except READ_ERRORS:
        return None


def lock_or_wait(target: Path) -> AcquireReturnProxy:
    """Lock a packed file against other processes that would make it; a `with` unlocks it."""
    lock = FileLock(f"{target}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is preparing {target}; waiting for it.", flush=True)
        return lock.acquire()


def make_pack(source: Source, image_size: int, key: str, target: Path) -> ImageSet:
    """Write the packed file of a source and its record, and print what was left out."""
    for left_by_a_kill in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        left_by_a_kill.unlink()
    ids = []
    bad_images = []
    altered = Counter()

    def fit(rgb):
        """Return an image's pixels at image_size, and its own height and width."""
        return fit_square(rgb, image_size), *rgb.shape[:2]

    def write_images(file):
        for i, result in enumerate(map_images(source, fit, f"Preparing {source.path.name}")):
            if isinstance(result, BadImage):
                bad_images.append([source.name_of(i), str(result)])
                continue
            pixels, height, width = result
            file.write(pixels.data)
            ids.append(source.ids[i])
            altered["not square, cropped to their centre"] += height != width
            altered[f"smaller than {image_size} px, enlarged"] += min(height, width) < image_size
        if not ids:
            name, reason = bad_images[0]
            raise UserError(
                f"{source.path}: not one of its images can be used; the first is {short(name)} "
                f"({reason})."
            )

    # A record must at no moment stand beside images that it wasn't made for.
    record_path = Path(f"{target}.json")
    record_path.unlink(missing_ok=True)
    write_whole(target, write_images)

    summary = f"{short(source.path.name)}: {len(ids):,} images at {image_size}x{image_size}, "
    summary += f"{len(bad_images):,} left out"
    for how, count in altered.items():
        if count:
            summary += f"; {count:,} {how}"
    record = {
        "key": key,
        "made_from": str(source.path.resolve()),
        "image_size": image_size,
        "summary": summary,
        "bad_images": bad_images,
        "ids": ids,
    }
    write_text(record_path, json.dumps(record))

    print(summary, *source.notes, sep="\n")
    for name, reason in bad_images[:LISTED]:
        print(f"  left out: {short(name)}: {reason}")
    return read_pack(target, key, image_size)


def map_images(
    source: Source, job: Callable[[np.ndarray], Result], title: str
) -> Iterator[Result | BadImage]:
    """Yield job(pixels) for every image in the order of source.ids, beside a progress bar.

    pixels is uint8 (H, W, 3), at the image's own size. An unusable image yields its BadImage
    instead. `title` stands before the bar.
    """

    def process(data):
        if isinstance(data, BadImage):
            return data
        try:
            if isinstance(data, bytes):
                data = decode_rgb(data)
            return job(data)
        except BadImage as error:
            return error

    # Threads are enough for decoding, because Pillow releases Python's lock meanwhile.
    count = len(source.ids)
    results = map_ahead(process, map(source.read, range(count)), threads=None, ahead=32)

    # Pillow warns of odd metadata; what matters becomes a BadImage. Closing waits for the threads,
    # so that they warn of nothing after a stop either.
    with warnings.catch_warnings(action="ignore"), closing(results):
        # The delay keeps small sets, which take a moment, free of a progress bar.
        yield from tqdm(results, title, count, unit="img", delay=1.0)


def map_ahead(
    function: Callable[..., Result], items: Iterable, threads: int | None, ahead: int
) -> Iterator[Result]:
    """Yield function(item) in order.

    Threads compute it, while up to `ahead` items wait to be asked for.
    """
    waiting = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="images") as executor:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
