"""A folder of many single images, 00000.png and on: made by several processes, and finished when it was interrupted.

samples.json    the manifest, written first: all that decides the images' pixels. A folder holds images of one kind.
00000.png       image 0, and so on; renamed into place, so that each is whole or not there
.lock           held by the process that makes them
"""

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from functions.support.errors import UserError
from functions.support.files import write_whole
from functions.support.pictures import save_image
from functions.support.run_folder import locked

MANIFEST = "samples.json"
IMAGE_NAME = re.compile(r"(\d{5,})\.png")
PATIENCE = 2 * 60 * 60  # seconds without a new image, after which the other processes are taken to have ended


def image_path(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.png"


def existing(folder: Path) -> set[int]:
    """The numbers of the images that are there."""
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    numbers = (int(match[1]) for match in map(IMAGE_NAME.fullmatch, names) if match)
    return {i for i in numbers if image_path(folder, i).name in names}


def check_manifest(folder: Path, facts: dict) -> bool:
    """Whether the folder has a manifest; `UserError` when its images were made otherwise than `facts` say."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return False
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST}: damaged, so nobody knows what images these are; delete it") from error
    found = found if isinstance(found, dict) else {}
    differing = [name for name in {**facts, **found} if found.get(name) != facts.get(name)]
    if differing:
        what = "; ".join(f"{name} was {found.get(name)}, is now {facts.get(name)}" for name in differing)
        raise UserError(f"{folder} holds images made otherwise ({what}); take another --out")
    return True


@contextmanager
def open_folder(folder: Path, facts: dict) -> Iterator[None]:
    """Make the folder, or go on with it, and hold it for this process; for the main one of several.

    Raises:
        UserError: its images are others than `facts` say, or nothing says what they are.
        CheckpointError: another process makes images in it.
    """
    if not check_manifest(folder, facts) and existing(folder):
        name = image_path(folder, min(existing(folder))).name
        raise UserError(f"{folder} holds {name} but no {MANIFEST} to say what made it; take another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "making images", leftovers=".*.png.[0-9]*.tmp"):
        text = json.dumps(facts, indent=2)
        if not check_manifest(folder, facts):
            write_whole(folder / MANIFEST, lambda file: file.write(text.encode()))
        yield


class ImageWriter:
    """Writes a batch of images in threads, while the next one is drawn; never more than one waits."""

    def __init__(self, folder: Path):
        self.folder, self.pool, self.waiting = folder, ThreadPoolExecutor(4), list[Future]()

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self.finish()

    def write(self, numbers: Sequence[int], images: np.ndarray) -> None:
        """Begin to write those of a batch that are not there yet; the batch before is on the disk then."""
        self.finish()
        paths = [image_path(self.folder, i) for i in numbers]
        self.waiting = [
            self.pool.submit(save_image, image, path)
            for path, image in zip(paths, images, strict=True) if not path.exists()
        ]  # fmt: skip

    def finish(self) -> None:
        """Wait for what was begun; raises the error that it met."""
        for future in self.waiting:
            future.result()
        self.waiting = []


def wait_for_all(folder: Path, n: int) -> None:
    """Until images 0 .. n-1 are there: the other processes write theirs.

    Raises:
        UserError: for very long nothing has come.
    """
    missing, since = set(range(n)) - existing(folder), time.monotonic()
    while missing:
        time.sleep(0.3)
        still = missing - existing(folder)
        if len(still) < len(missing):
            since = time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise UserError(f"{folder}: {len(still)} images do not come; start the same command again")
        missing = still
