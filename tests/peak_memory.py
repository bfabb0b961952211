"""The memory of this process, as Linux counts it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROCESS = Path("/proc/self")


@contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    """Raise AssertionError when the block takes more memory than that at its peak.

    What was in use before does not count. Elsewhere than on Linux nothing is measured.
    """
    if not (PROCESS / "clear_refs").exists():
        yield
        return

    before = kilobytes("VmRSS")
    # A 5 resets the peak, VmHWM, to what is in use now.
    (PROCESS / "clear_refs").write_text("5")
    yield

    taken = (kilobytes("VmHWM") - before) / 1000
    assert taken < megabytes, f"it took {taken:.0f} MB"


def kilobytes(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    return int(line.split()[1])
