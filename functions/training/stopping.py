"""Stop a run between two steps after a signal, and explain a failed write that ends a run."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from functions.support.errors import UserError
from functions.support.run_folder import last_checkpoint

# Within this many seconds a second signal counts as the same request. Schedulers signal all
# processes, and torchrun passes the signal that it receives on to them.
SAME_SIGNAL = 1.0
# Windows has no SIGUSR1.
SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGUSR1")]


class StopSignals:
    """Set `received` on SIGINT, SIGTERM and SIGUSR1, which do not end the process in this context.

    `Recorder` reads `received` between steps, saves a checkpoint, and exits with EXIT_STOPPED.
    A second signal, more than SAME_SIGNAL seconds later, ends the process at once.
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
        elif time.monotonic() - self.received_at > SAME_SIGNAL:
            # A second signal asks for an end at once. Shells report such an end as 128 + the
            # signal's number.
            os._exit(128 + number)


@contextmanager
def failed_writes_explained(run: Path) -> Iterator[None]:
    """Turn an OSError, as of a full disk, into a UserError that names the last good checkpoint."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run} cannot be written to: {error.strerror or error}. "
            f"Last good checkpoint: {last_checkpoint(run)}. "
            f"When that is mended, go on with: python train.py --resume {run}"
        ) from error
