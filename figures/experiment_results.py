"""The numbers of figures/experiments.py in one JSON file, which several measuring processes may fill at once."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from functions.support.files import write_whole

try:
    import fcntl
except ImportError:  # Windows: one process at a time there
    fcntl = None


class Results:
    """Values by a path of keys: `results.put(1.5, "arms", "T1000", "0", "raw", "distance")`, and `get` alike."""

    def __init__(self, path: Path):
        self.path = path

    def get(self, *keys: str) -> object:
        """The value, a dict of what lies below, or None."""
        value = self.all()
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def all(self) -> dict:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def put(self, value: object, *keys: str) -> None:
        """Set one value and write the file, whatever other processes have written meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            contents = below = self.all()
            for key in keys[:-1]:
                below = below.setdefault(key, {})
            below[keys[-1]] = rounded(value)
            write_whole(self.path, lambda file: file.write((json.dumps(contents, indent=1) + "\n").encode()))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if fcntl is None:
            yield
            return
        lock = self.path.with_name(f".{self.path.name}.lock.tmp")  # *.tmp is not committed
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def rounded(value: object) -> object:
    """Five digits: more would pretend to an accuracy that there is not."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
