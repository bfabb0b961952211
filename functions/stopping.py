"""Stopping a run from outside: by signals, between two steps."""

import os
import signal
from pathlib import Path
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h, "try again later": the run was saved and can be resumed
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """While it is entered, SIGINT, SIGTERM and SIGUSR1 set `received` instead of ending the process.

    The training loop looks at it between steps, saves, and exits with EXIT_STOPPED. A second signal means that someone
    does not want to wait: the process ends at once, with 128 + its number as shells report it.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.previous: dict = {}

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = signal.Signals(number).name

    def farewell(self, run: Path) -> int:
        """Say that the run was saved and how it goes on; returns the exit code."""
        print(f"stopped by {self.received}, saved; go on with: python train.py --resume {run}")
        return EXIT_STOPPED
