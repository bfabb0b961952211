"""Stop a run between two steps after a signal, and explain a failed write that ends a run."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from functions.support.errors import WRITE_ERRORS, UserError
from functions.training.resuming import last_checkpoint

# A second signal within this many seconds counts as the same request. Schedulers signal every
# process, and torchrun forwards its own signal too, so one request can arrive twice.
SAME_REQUEST_SECONDS = 1.0
# A terminal that is closed sends SIGHUP. Windows has neither it nor SIGUSR1.
SIGNAL_NAMES = ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1")
SIGNALS = [number for number in signal.Signals if number.name in SIGNAL_NAMES]


class StopSignals(ExitStack):
    """A context in which a signal sets `received`, which `Recorder` reads between two steps.

    A second signal, more than SAME_REQUEST_SECONDS later, ends the process immediately. An output
    that has lost its reader, as in `train.py | head`, sets `received`, too.
    """

    # The name of the first signal, and the time at which it came.
    received: str | None = None
    received_at = 0.0

    def __enter__(self) -> "StopSignals":
        # nohup lets a process ignore SIGHUP, which then stays ignored. A script's background jobs
        # ignore SIGINT, but whoever sends that to one of them means it.
        for number in SIGNALS:
            previous = signal.getsignal(number)
            if (number.name, previous) != ("SIGHUP", signal.SIG_IGN):
                signal.signal(number, self.handle)
                self.callback(signal.signal, number, previous)
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            self.enter_context(redirect(Output(stream, self)))
        return self

    def handle(self, number: int, *_: Any) -> None:
        """Remember the first signal; end the process at a second one."""
        if not self.received:
            # The time is set first, since another signal may arrive between these two lines.
            self.received_at = time.monotonic()
            self.received = signal.Signals(number).name
        elif time.monotonic() - self.received_at > SAME_REQUEST_SECONDS:
            # A second signal means: exit immediately, with a shell's status for a signal, which is
            # 128 + its number.
            os._exit(128 + number)


class Output:
    """A stream that asks the run to stop when its reader is gone, and from then on goes nowhere."""

    def __init__(self, stream: TextIO, signals: StopSignals):
        self.stream = stream
        self.signals = signals

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Write a text, or let everything from now on go nowhere."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            # Python flushes the stream again when it ends, so its file must be one that works.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            self.signals.received = self.signals.received or "the loss of its output"


@contextmanager
def explain_failed_writes(run: Path, how_to_resume: str) -> Iterator[None]:
    """Turn an OSError of the disk, but no other, into a UserError with the last checkpoint."""
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        checkpoint = last_checkpoint(run)
        advice = "There is no checkpoint yet"
        if checkpoint:
            advice = (
                f"Last good checkpoint: {checkpoint}. "
                f"Once you have fixed this, continue with: {how_to_resume}"
            )
        raise UserError(
            f"{error.filename or run} cannot be written to: {error.strerror or error}. {advice}"
        ) from error
