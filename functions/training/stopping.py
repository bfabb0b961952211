"""Stop a run between two steps after a signal, and explain a failed write that ends a run."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from functions.saved.run_folder import last_checkpoint
from functions.support.errors import UserError

# A second signal within this many seconds counts as the same request. Schedulers signal every
# process, and torchrun forwards its own signal too, so one request can arrive twice.
SAME_REQUEST_SECONDS = 1.0
# Windows has no SIGUSR1.
SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGUSR1")]


class StopSignals:
    """A context in which SIGINT, SIGTERM and SIGUSR1 set `received` instead of ending the process.

    `Recorder` reads `received` between steps and saves a checkpoint; train.py then ends.
    A second signal, more than SAME_REQUEST_SECONDS later, ends the process immediately.
    """

    # The name of the first signal, and the time at which it came.
    received: str | None = None
    received_at = 0.0

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; end the process at a second one."""
        if not self.received:
            # The time is set first, since another signal may arrive between these two lines.
            self.received_at = time.monotonic()
            self.received = signal.Signals(number).name
        elif time.monotonic() - self.received_at > SAME_REQUEST_SECONDS:
            # A second signal means: exit immediately, with a shell's status for a signal, which is
            # 128 + its number.
            os._exit(128 + number)


@contextmanager
def explain_failed_writes(run: Path) -> Iterator[None]:
    """Turn an OSError, such as from a full disk, into a UserError with the last good checkpoint."""
    try:
        yield
    except BrokenPipeError:
        # Nobody reads what the training prints, as in `train.py | head`. The disk is not at fault.
        raise
    except OSError as error:
        checkpoint = last_checkpoint(run)
        advice = "There is no checkpoint yet"
        if checkpoint:
            advice = (
                f"Last good checkpoint: {checkpoint}. "
                f"Once you have fixed this, continue with: python train.py --resume {run}"
            )
        raise UserError(
            f"{run} cannot be written to: {error.strerror or error}. {advice}"
        ) from error
