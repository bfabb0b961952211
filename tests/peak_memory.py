"""The memory of this process, as Linux counts it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROCESS = Path("/proc/self")


@contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    """AssertionError when what is done within takes more, at its peak, beside what was held; only on Linux."""
    if not (PROCESS / "clear_refs").exists():
        yield
        return
    before = kilobytes("VmRSS")
    (PROCESS / "clear_refs").write_text("5")  # VmHWM begins anew
    yield
    taken = (kilobytes("VmHWM") - before) / 1000
    assert taken < megabytes, f"it took {taken:.0f} MB"


def kilobytes(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
