"""Reading every image of a source once, with all cores where that pays."""

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from functions.support.errors import UserError

from .archives import ARCHIVE_ERRORS, METHODS, open_archive, open_member, printable, read_npy_header
from .decode import BadImage, decode_rgb
from .sources import Member, Source

# An FFHQ photo at 1024 px takes 1.3 MB; far above that it is not a photo, and unpacking it could exhaust the memory.
MAX_MEMBER_BYTES = 100 * 2**20

# Below this much to decode, starting worker processes (each imports the main script anew) takes longer than decoding.
IN_PROCESS_BYTES = 64 * 2**20


def map_images(source: Source, job: Callable[[np.ndarray], object]) -> Iterator[object | BadImage]:
    """Yields job(pixels) for every image in the order of source.ids, pixels being uint8 (H, W, 3) at its own size.

    An unusable image yields its BadImage instead. `job` must be picklable: it runs in worker processes when there is
    much to decode. Raises UserError when a worker is killed.
    """
    if source.kind == "npz":
        yield from (job(pixels) for pixels in _read_npz(source))
    elif decodable_bytes(source) < IN_PROCESS_BYTES or available_cores() == 1:
        with contextlib.ExitStack() as stack:
            read = _open_reader(source.path, source.kind, stack)
            yield from (_process(read, job, member) for member in source.members)
    else:
        yield from _map_in_processes(source, job)


def decodable_bytes(source: Source) -> int:
    """The size of what will be decoded, before it is: without members that claim to be larger than any image."""
    return sum(member.size for member in source.members if member.size <= MAX_MEMBER_BYTES)


def available_cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _map_in_processes(source: Source, job: Callable) -> Iterator[object | BadImage]:
    # Spawned, not forked: the caller may have started threads or CUDA, which a fork does not survive.
    executor = ProcessPoolExecutor(
        available_cores(), multiprocessing.get_context("spawn"), _start_worker, (source.path, source.kind, job)
    )
    try:
        yield from executor.map(_process_in_worker, source.members, chunksize=16)
    except BrokenProcessPool:
        raise UserError(f"A process that was decoding {source.path} died (out of memory?). Start again.") from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker(path: Path, kind: str, job: Callable) -> None:
    global _worker_read, _worker_job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_read = _open_reader(path, kind, contextlib.ExitStack())  # stays open as long as the process lives
    _worker_job = job


def _end_with_parent() -> None:
    # A parent that is killed cannot end its workers, and these would wait for work for ever.
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _process_in_worker(member: Member) -> object | BadImage:
    return _process(_worker_read, _worker_job, member)


def _process(read: Callable[[str], bytes], job: Callable, member: Member) -> object | BadImage:
    try:
        if member.size > MAX_MEMBER_BYTES:
            raise BadImage(f"larger than {MAX_MEMBER_BYTES // 2**20} MiB")
        return job(decode_rgb(read(member.name)))
    except BadImage as error:
        return error


def _open_reader(path: Path, kind: str, stack: contextlib.ExitStack) -> Callable[[str], bytes]:
    """A function from a member's name to its bytes, which raises BadImage; what it holds open is closed by `stack`."""
    if kind == "folder":

        def read(name: str) -> bytes:
            try:
                return (path / name).read_bytes()
            except OSError as error:
                raise BadImage(f"cannot be read ({error.strerror})") from None
    else:
        archive = stack.enter_context(open_archive(path))

        def read(name: str) -> bytes:
            try:
                info = archive.getinfo(name)
                if info.compress_type not in METHODS:
                    raise BadImage("packed by another method than deflate")
                with archive.open(info) as file:
                    # Bounded, for read() unpacks all there is before it cuts it to the size that the archive gives.
                    # Reaching that size checks the CRC.
                    return file.read(info.file_size + 1)
            except ARCHIVE_ERRORS as error:
                raise BadImage(f"cannot be unpacked ({printable(error)})") from None

    return read


def _read_npz(source: Source) -> Iterator[np.ndarray]:
    # Streamed image by image: the array of the full set at 1024 px would not fit into memory.
    with open_archive(source.path) as archive, open_member(archive, source.members[0].name, source.path) as file:
        (count, *shape), _, _ = read_npy_header(file, source.path)
        size = math.prod(shape)
        for _ in range(count):
            try:
                data = file.read(size)
            except ARCHIVE_ERRORS as error:
                raise UserError(f"{source.path} is damaged ({printable(error)}). Get or make it again.") from None
            if len(data) != size:
                raise UserError(f"{source.path} is cut short. Get or make it again.")
            yield np.frombuffer(data, np.uint8).reshape(shape)
