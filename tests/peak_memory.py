"""The memory of this process, as Linux counts it."""

from collections.abc import Iterator
from contextlib import contextmanager

from functions.support.device import PROCESS_STATUS, RESET_PEAK, kilobytes


@contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    """Raise AssertionError when the block takes more memory than that at its peak.

    What was in use before does not count. Elsewhere than on Linux nothing is measured.
    """
    if not RESET_PEAK.exists():
        yield
        return

    before = kilobytes(PROCESS_STATUS, "VmRSS")
    RESET_PEAK.write_text("5")
    yield

    taken = (kilobytes(PROCESS_STATUS, "VmHWM") - before) / 1000
    assert taken < megabytes, f"it took {taken:.0f} MB"
