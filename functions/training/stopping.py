"""Stopping a run: by signals, between two steps; and errors that end it, with what to do."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from functions.support.errors import UserError
from functions.support.run_folder import last_checkpoint

# EX_TEMPFAIL of sysexits.h, "try again later": the run was saved and can be resumed
EXIT_STOPPED = 75
SAME_SIGNAL = 1.0
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]


class StopSignals:
    """While it is entered, SIGINT, SIGTERM and SIGUSR1 set `received` instead of ending the process.

    The training loop looks at it between steps, saves, and exits with EXIT_STOPPED. A second signal means that someone
    does not want to wait: the process ends at once, with 128 + its number as shells report it. Within SAME_SIGNAL
    seconds it is the same request on another way: schedulers signal all processes, and torchrun hands its own on.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.received_at = 0.0

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self.received_at > SAME_SIGNAL:
            os._exit(128 + number)
        if not self.received:
            self.received, self.received_at = signal.Signals(number).name, time.monotonic()


@contextmanager
def failed_writes_explained(run: Path) -> Iterator[None]:
    """Turn an error of the file system, a full disk above all, into a `UserError` that says what is safe."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run} cannot be written to: {error.strerror or error}. Last good checkpoint: {last_checkpoint(run)}. "
            f"When that is mended, go on with: python train.py --resume {run}"
        ) from error
