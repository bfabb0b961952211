"""Programs in processes of their own that start at once: forks of a server that has imported torch already."""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.conftest import ROOT

SERVER = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    SERVER.set_forkserver_preload(["tests.conftest"])
PATIENCE = 200  # seconds for what takes some, on a machine that has other work too


def train_script() -> None:
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


class Program(SERVER.Process):
    """train.py, or a function in its place, started with a command line; what it prints is collected in a file."""

    def __init__(
        self,
        output: Path,
        *arguments: object,
        act: Callable[[], None] = train_script,
        **environment: object,
    ):
        super().__init__(daemon=True)
        self.output, self.arguments, self.act, self.environment = (
            output,
            arguments,
            act,
            environment,
        )
        output.write_bytes(b"")
        self.start()

    def run(self) -> None:
        """In the new process: what a shell would do."""
        with open(self.output, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)
        os.environ.update((name, str(value)) for name, value in self.environment.items())
        torch.set_num_threads(1)
        sys.argv = ["train.py", *map(str, self.arguments)]
        self.act()

    @property
    def printed(self) -> str:
        return self.output.read_text()

    def wait(self) -> int:
        """Its exit status; -n where signal n has ended it."""
        self.join(PATIENCE)
        assert self.exitcode is not None, f"it has not ended: {self.printed}"
        return self.exitcode


def wait_until(reached: Callable[[], object], alive: Callable[[], bool]) -> None:
    """AssertionError when a process ends before it comes so far, or is late."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert alive(), "it has ended"
        assert time.monotonic() < deadline, "it is late"
        time.sleep(0.001)
