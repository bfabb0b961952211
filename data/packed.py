"""The packed file: every image of a source decoded and resized once, as uint8 (N, S, S, 3), memory-mapped from then on.

Beside <name>-<S>px.packed lie its .json (what was left out, ids, and the key of what it was made from) and its .lock.
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
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from data.decode import BadImage, decode_rgb, fit_square
from data.sources import Source
from functions.support.errors import UserError
from functions.support.files import short, write_text, write_whole

# Raise it whenever the pixels made from the same files change: every pack is then made anew
FORMAT_VERSION = 1
LISTED_BAD_IMAGES = 20  # printed; the .json lists all


@dataclass(frozen=True)
class ImageSet:
    """Images of a data set: uint8 (N, S, S, 3), mostly memory-mapped, and their N ids (int or str), sorted."""

    name: str
    images: np.ndarray
    ids: list
    summary: str = ""  # one line: how many images, how many left out, enlarged or cropped
    path: Path | None = None  # the packed file
    bad_images: list | tuple = ()  # [name, reason] of each image left out

    def __len__(self) -> int:
        return len(self.ids)


def open_packed(source: Source, image_size: int, max_bad_images: int = 0) -> ImageSet:
    """Map the packed file of a source at image_size (pixels), which is made first if there is none or it is outdated.

    Processes that start at once are safe: one makes it, the others wait. Raises UserError when more than max_bad_images
    had to be left out (after listing them), when no image is usable, or when there is no room.
    """
    key, (beside, in_cache) = pack_key(source, image_size), pack_paths(source, image_size)
    pack = read_pack(beside, key, image_size) or read_pack(in_cache, key, image_size)
    if pack is None:
        target = beside if is_writable(beside.parent) else in_cache
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{target}.lock")
            try:
                held = lock.acquire(timeout=0)
            except Timeout:
                print(f"Another process is preparing {target}; waiting for it.", flush=True)
                held = lock.acquire()
            with held:
                pack = read_pack(target, key, image_size) or make_pack(
                    source, image_size, key, target
                )
        except OSError as error:
            what = f"{target}, {len(source.ids) * image_size**2 * 3 / 1e6:,.1f} MB of images,"
            raise UserError(
                f"{what} cannot be written ({error.strerror or error}). Make room there."
            ) from None
    if pack.bad_images and len(pack.bad_images) > max_bad_images:
        first = f"{short(pack.bad_images[0][0])} ({pack.bad_images[0][1]})"
        raise UserError(
            f"{source.path}: {len(pack.bad_images)} unusable image(s), {max_bad_images} allowed; the first is {first}. "
            f"{pack.path}.json lists all; mend or remove them, or allow as many."
        )
    return pack


def pack_key(source: Source, image_size: int) -> str:
    """Hash all that a pack is made from: format version, image size, and each file's name, size and stamp."""
    made_from = [FORMAT_VERSION, image_size, source.kind, source.members]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def pack_paths(source: Source, image_size: int) -> tuple[Path, Path]:
    """The two places of a source's pack: the data's folder and the user's cache folder, for data that is read-only.

    A name is the same for every state of a source, so that an outdated pack is replaced.
    """
    path, ending = source.path.resolve(), f"{image_size}px.packed"
    # Beside an archive, but inside a folder of images, so that the pack goes where the folder goes.
    data_folder = path if source.kind == "folder" else path.parent
    cache_folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-packed-images"
    )
    # The cache may hold two sources of one name
    origin = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return data_folder / f"{path.name}-{ending}", cache_folder / f"{path.name}-{origin}-{ending}"


def is_writable(folder: Path) -> bool:
    """Whether files can be made and locked in a folder: tried, since permissions don't tell all."""
    try:
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".packed") as probe,
            FileLock(Path(probe) / "lock"),
        ):
            return True
    except (OSError, NotImplementedError):
        return False


def read_pack(path: Path, key: str, image_size: int) -> ImageSet | None:
    """Map a packed file; None when it is missing, was made from something else or hasn't the size it should have."""
    try:
        record = json.loads(Path(f"{path}.json").read_text())
        shape = (len(record["ids"]), image_size, image_size, 3)
        if record["key"] != key or path.stat().st_size != math.prod(shape):
            return None
        images = np.memmap(path, np.uint8, "r", shape=shape)
        return ImageSet(
            path.name, images, record["ids"], record["summary"], path, record["bad_images"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_pack(source: Source, image_size: int, key: str, target: Path) -> ImageSet:
    """Write the packed file of a source and its record."""
    for left_by_a_kill in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        left_by_a_kill.unlink()
    ids, bad_images, altered = [], [], Counter()
    fit = lambda rgb: (fit_square(rgb, image_size), *rgb.shape[:2])

    def write_images(file: BinaryIO) -> None:
        # The delay keeps small sets, which take a moment, free of a progress bar.
        bar = {"desc": f"Preparing {source.path.name}", "unit": "img", "delay": 1.0}
        for i, result in enumerate(tqdm(map_images(source, fit), total=len(source.ids), **bar)):
            if isinstance(result, BadImage):
                bad_images.append([source.members[i].name, str(result)])
                continue
            pixels, height, width = result
            file.write(pixels.data)
            ids.append(source.ids[i])
            altered["not square, cropped to their centre"] += height != width
            altered[f"smaller than {image_size} px, enlarged"] += min(height, width) < image_size
        if not ids:
            first = f"{short(bad_images[0][0])} ({bad_images[0][1]})"
            raise UserError(
                f"{source.path}: not one of its images can be used; the first is {first}."
            )

    # A record must at no moment stand beside images that it wasn't made for.
    Path(f"{target}.json").unlink(missing_ok=True)
    write_whole(target, write_images)
    counts = f"{len(ids):,} images at {image_size}x{image_size}, {len(bad_images):,} left out"
    counts += "".join(f"; {count:,} {how}" for how, count in altered.items() if count)
    summary = f"{short(source.path.name)}: {counts}"
    record = {
        "key": key,
        "made_from": str(source.path.resolve()),
        "image_size": image_size,
        "summary": summary,
    }
    write_text(Path(f"{target}.json"), json.dumps({**record, "bad_images": bad_images, "ids": ids}))
    left_out = [
        f"  left out: {short(name)}: {reason}" for name, reason in bad_images[:LISTED_BAD_IMAGES]
    ]
    print("\n".join([summary, *source.notes, *left_out]), flush=True)
    return read_pack(target, key, image_size)


def map_images(source: Source, job: Callable[[np.ndarray], object]) -> Iterator[object | BadImage]:
    """Yield job(pixels) for every image in the order of source.ids, pixels being uint8 (H, W, 3) at its own size.

    An unusable image yields its BadImage instead. Threads decode, as Pillow works outside of Python's lock.
    """

    def process(data: bytes | np.ndarray | BadImage) -> object | BadImage:
        try:
            return (
                data
                if isinstance(data, BadImage)
                else job(decode_rgb(data) if isinstance(data, bytes) else data)
            )
        except BadImage as error:
            return error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata; what matters is a BadImage
        yield from map_ahead(
            process, map(source.read, range(len(source.ids))), threads=None, ahead=32
        )


def map_ahead(function: Callable, items: Iterable, threads: int | None, ahead: int) -> Iterator:
    """Yield function(item) in order, computed by threads while up to `ahead` items wait to be asked for."""
    waiting = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="images") as executor:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
