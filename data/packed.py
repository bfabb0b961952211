"""The packed file: every image of a source decoded and resized once, as uint8 (N, S, S, 3), memory-mapped from then on.

Beside <name>-<S>px.packed lie .json (ids and the key of what it was made from), .report.txt (what was left out), .lock
and, while it is being made, .tmp; so `*.packed*` names everything that is ever written here.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from functions.support.errors import UserError

from .archives import printable
from .decode import BadImage, fit_square
from .disk import check_disk_space, file_lock, flush_folder, format_bytes, is_writable, write_atomically
from .reading import map_images
from .sources import Source

FORMAT_VERSION = 1  # raise it whenever the pixels made from the same files change: every pack is then made anew
LISTED_BAD_IMAGES = 20  # printed; the report file lists all


@dataclass(frozen=True)
class Pack:
    """An open packed file: images uint8 (N, S, S, 3), memory-mapped read-only, and their N ids in the same order."""

    images: np.ndarray
    ids: list
    path: Path
    summary: str  # one line: how many images, how many left out, enlarged or cropped
    bad_images: list  # [name, reason] of each image left out


def open_packed(source: Source, image_size: int, max_bad_images: int = 0, quiet: bool = False) -> Pack:
    """Maps the packed file of a source at image_size (pixels), which is made first if there is none or it is outdated.

    It lies in the data folder, or in the user's cache folder where that cannot be written. Processes that start at
    once are safe: one makes it, the others wait. Raises UserError when more than max_bad_images had to be left out
    (after listing all of them), when no image is usable, or when the disk is full or nowhere writable.
    """
    key = pack_key(source, image_size)
    places = [place / pack_name(source, image_size, place) for place in (data_folder(source), cache_folder())]
    pack = next(filter(None, (read_pack(path, key, image_size) for path in places)), None)
    if pack is None:
        target = next((path for path in places if is_writable(path.parent)), None)
        if target is None:
            raise UserError(
                f"Neither {places[0].parent} nor {places[1].parent} can be written, and the packed images "
                "must go somewhere. Set XDG_CACHE_HOME to a folder that can."
            )
        with file_lock(with_ending(target, ".lock"), quiet):
            pack = read_pack(target, key, image_size) or _make_pack(source, image_size, key, target, quiet)

    if len(pack.bad_images) > max_bad_images:
        name, reason = pack.bad_images[0]
        raise UserError(
            f"{source.path}: {len(pack.bad_images)} unusable image(s), {max_bad_images} allowed; the first is "
            f"{printable(name)} ({reason}). {with_ending(pack.path, '.report.txt')} lists all; mend or remove them, "
            "or allow as many."
        )
    return pack


def pack_key(source: Source, image_size: int) -> str:
    """A hash of all that a pack is made from: format version, image size, and each file's name, size and stamp."""
    made_from = [FORMAT_VERSION, image_size, source.kind, [[m.name, m.size, m.stamp] for m in source.members]]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


# --- where it lies -----------------------------------------------------------------------------------------------


def data_folder(source: Source) -> Path:
    """Beside an archive; inside a folder of images, so that the pack goes where the folder goes."""
    path = source.path.resolve()
    return path if source.kind == "folder" else path.parent


def cache_folder() -> Path:
    """Where packs go when the data folder is read-only."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-packed-images"


def pack_name(source: Source, image_size: int, folder: Path) -> str:
    """The same for every state of a source, so that an outdated pack is replaced, not kept beside the new one."""
    path = source.path.resolve()
    # The cache serves all data folders, so names there must tell two sources of one name apart.
    origin = "" if folder == data_folder(source) else "-" + hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return f"{path.name}{origin}-{image_size}px.packed"


def with_ending(path: Path, ending: str) -> Path:
    """FFHQ-128px.packed -> FFHQ-128px.packed.lock, and the like."""
    return path.with_name(path.name + ending)


# --- reading and making it ---------------------------------------------------------------------------------------


def read_pack(path: Path, key: str, image_size: int) -> Pack | None:
    """Maps a packed file; None when it is missing, was made from something else or hasn't the size it should have."""
    try:
        record = json.loads(with_ending(path, ".json").read_text())
        ids, summary, bad_images = record["ids"], record["summary"], record["bad_images"]
        shape = (len(ids), image_size, image_size, 3)
        if record["key"] != key or path.stat().st_size != int(np.prod(shape)):
            return None
        return Pack(np.memmap(path, np.uint8, "r", shape=shape), ids, path, summary, bad_images)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make_pack(source: Source, image_size: int, key: str, target: Path, quiet: bool) -> Pack:
    # Only the holder of the lock makes temporary files, so one that lies there was left by a killed process.
    temporary = with_ending(target, ".tmp")
    temporary.unlink(missing_ok=True)
    bytes_needed = len(source.ids) * image_size**2 * 3
    check_disk_space(target.parent, bytes_needed)
    try:
        kept, bad_images, enlarged, cropped = _write_images(source, image_size, temporary, quiet)
        summary = _summarise(source, image_size, len(kept), len(bad_images), enlarged, cropped)
        left_out = [f"left out: {printable(name)}: {reason}" for name, reason in bad_images]
        report = "\n".join([summary, *source.notes, *left_out])
        write_atomically(with_ending(target, ".report.txt"), report + "\n")
        if not quiet:
            _print_report(summary, source.notes, left_out)
        if not kept:
            raise UserError(
                f"{source.path}: not one of its {len(source.ids)} images can be used; the first is "
                f"{printable(bad_images[0][0])} ({bad_images[0][1]})."
            )
        # At no moment, not even after a power cut, does a key stand beside images that it wasn't made for.
        with_ending(target, ".json").unlink(missing_ok=True)
        flush_folder(target.parent)
        os.replace(temporary, target)
        flush_folder(target.parent)
        record = {
            "key": key,
            "made_from": str(source.path.resolve()),
            "image_size": image_size,
            "summary": summary,
            "bad_images": bad_images,
            "ids": kept,
        }
        write_atomically(with_ending(target, ".json"), json.dumps(record))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{target.parent} ran full while {source.path} was being prepared, which takes "
                f"{format_bytes(bytes_needed)}. Make room and start again."
            ) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return read_pack(target, key, image_size)


def _write_images(source: Source, image_size: int, path: Path, quiet: bool) -> tuple[list, list, int, int]:
    """Decodes all images into one file -> the ids kept, [name, reason] of the others, how many enlarged, cropped."""
    kept, bad_images, enlarged, cropped = [], [], 0, 0
    results = map_images(source, functools.partial(_fit, image_size=image_size))
    # The delay keeps small sets, which take a moment, free of a progress bar.
    progress = tqdm(total=len(source.ids), desc=f"Preparing {source.path.name}", unit="img", disable=quiet, delay=1.0)
    with progress, contextlib.closing(results), open(path, "wb") as file:
        for position, result in enumerate(results):
            progress.update()
            if isinstance(result, BadImage):
                bad_images.append([source.members[position].name, str(result)])
                continue
            pixels, was_enlarged, was_cropped = result
            file.write(pixels.data)
            kept.append(source.ids[position])
            enlarged += was_enlarged
            cropped += was_cropped
        file.flush()
        os.fsync(file.fileno())
    return kept, bad_images, enlarged, cropped


def _fit(rgb: np.ndarray, image_size: int) -> tuple[np.ndarray, bool, bool]:
    height, width = rgb.shape[:2]
    return fit_square(rgb, image_size), min(height, width) < image_size, height != width


def _summarise(source: Source, image_size: int, kept: int, bad: int, enlarged: int, cropped: int) -> str:
    parts = [f"{printable(source.path.name)}: {kept:,} images at {image_size}x{image_size}, {bad:,} left out"]
    if cropped:
        parts.append(f"{cropped:,} not square, cropped to their centre")
    if enlarged:
        parts.append(f"{enlarged:,} smaller than {image_size} px, enlarged")
    return "; ".join(parts)


def _print_report(summary: str, notes: tuple[str, ...], left_out: list[str]) -> None:
    lines = [summary, *notes, *(f"  {line}" for line in left_out[:LISTED_BAD_IMAGES])]
    if len(left_out) > LISTED_BAD_IMAGES:
        lines.append(f"  ... and {len(left_out) - LISTED_BAD_IMAGES} more")
    print("\n".join(lines), flush=True)
