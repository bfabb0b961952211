"""The memory of this process, as Linux counts it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from functions.support.device import first_value

# The first file has this process's current and peak memory. Writing "5" to the second resets the
# peak.
PROCESS_STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")


@contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    """Raise AssertionError when the block takes more memory than that at its peak.

    What was in use before does not count. Elsewhere than on Linux nothing is measured.
    """
    if not RESET_PEAK.exists():
        yield
        return

    before = kilobytes("VmRSS")
    RESET_PEAK.write_text("5")
    yield

    taken = (kilobytes("VmHWM") - before) / 1000
    assert taken < megabytes, f"it took {taken:.0f} MB"


def kilobytes(name: str) -> int:
    """Return a value in kB from PROCESS_STATUS."""
    return int(first_value(PROCESS_STATUS, name).removesuffix(" kB"))
