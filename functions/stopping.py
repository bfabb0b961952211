"""Stopping a run: from outside by signals, between two steps, and when its numbers are lost."""

import math
import os
import signal
from pathlib import Path
from types import FrameType

from functions.run_folder import checkpoints_of

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


class TrainingError(RuntimeError):
    """A run that must not go on; the message says why and what to do."""


def stop_unless_finite(loss: float, step: int, learning_rate: float, run: Path) -> None:
    """`TrainingError` when the loss is infinite or not a number, before such weights replace a good checkpoint."""
    if math.isfinite(loss):
        return
    saved = checkpoints_of(run)
    raise TrainingError(
        f"the loss is {loss} near step {step} (learning rate {learning_rate:.3g}); the last checkpoint is "
        f"{saved[-1] if saved else 'not there yet'}: lower the learning rate, clip gradients, or train in float32"
    )
