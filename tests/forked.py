"""Programs in processes of their own, which start at once.

They are forks of a server that has imported torch already.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT, words

if os.name == "posix":
    SERVER = multiprocessing.get_context("forkserver")
    # A training imports the second one, which takes longer than all else in its start.
    SERVER.set_forkserver_preload(["tests.conftest", "torch._inductor"])
    # The server keeps the environment of its start, so it starts here and not in a test. Its
    # processes import this file, too, but have other names.
    if multiprocessing.current_process().name == "MainProcess":
        multiprocessing.forkserver.ensure_running()
else:
    # Windows has no fork, so each process imports everything itself.
    SERVER = multiprocessing.get_context("spawn")

# A wait may take so many seconds: a test takes some itself, and the machine has other work too.
PATIENCE = 200


def train_script() -> None:
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


class Program(SERVER.Process):
    """Start train.py, or a function in its place, with a command line.

    What it prints is collected in the file `output`; keywords are environment variables.
    """

    def __init__(
        self,
        output: Path,
        *arguments: object,
        act: Callable[[], None] = train_script,
        **environment: object,
    ):
        super().__init__(daemon=True)
        self.output = output
        self.arguments = arguments
        self.act = act
        self.environment = environment

        # The file is there from now on, so `printed` can be read before the process runs.
        output.write_bytes(b"")
        self.start()

    def run(self) -> None:
        """Do in the new process what a shell would do, then run the program."""
        with open(self.output, "ab") as file:
            # Output and errors of this process and of its children go to the file.
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)

        # Whoever started the tests in the background has let them ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Each line is there as soon as it is printed, also when the process is killed.
        sys.stdout.reconfigure(line_buffering=True)
        os.environ.update({name: str(value) for name, value in self.environment.items()})
        sys.argv = ["train.py", *words(*self.arguments)]
        self.act()

    @property
    def printed(self) -> str:
        return self.output.read_text()

    def wait(self) -> int:
        """Wait for the end and return the exit status, which is -n where signal n ended it."""
        self.join(PATIENCE)
        assert self.exitcode is not None, f"it has not ended: {self.printed}"
        return self.exitcode


def wait_until(reached: Callable[[], object], alive: Callable[[], bool]) -> None:
    """Wait until `reached` is true.

    Raises AssertionError when the process ends before, or is late.
    """
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert alive(), "it has ended"
        assert time.monotonic() < deadline, "it is late"
        time.sleep(0.001)
