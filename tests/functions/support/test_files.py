"""functions/support/files.py: locks, whatever the disk is like."""

import errno
from unittest.mock import Mock

import pytest

from functions.training.resuming import locked
from tests.conftest import posix


@posix
def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    unlocked = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=unlocked))
    with locked(tmp_path):
        said = f"warning: {tmp_path} is on a disk without locks; do not start another process in it"
        assert said in capsys.readouterr().err
    # Where nothing can be written, there is no lock, either.
    unlocked.errno = errno.EROFS
    with pytest.raises(OSError, match="No locks"), locked(tmp_path):
        pass
