"""Read CIFAR-10's binary version: six files of records, or the .tar.gz that contains them."""

import tarfile
import zlib
from pathlib import Path

import numpy as np

from data.sources import MAX_FILE_BYTES, Member, Source, raise_user_error
from functions.support.errors import UserError

FILES = (
    "data_batch_1.bin",
    "data_batch_2.bin",
    "data_batch_3.bin",
    "data_batch_4.bin",
    "data_batch_5.bin",
    "test_batch.bin",
)

# A record is a label of one byte, followed by the red, the green and the blue plane.
RECORD = 1 + 3 * 32 * 32


class Cifar10(Source):
    """All images of CIFAR-10 as uint8 (32, 32, 3).

    Raises UserError when a file is missing or is not a whole number of records.
    """

    kind = "cifar10"
    # Test ids start here even if training images are missing.
    first_test_id = 50_000

    def __init__(self, path: Path):
        super().__init__(path)
        with raise_user_error(path):
            files = read_files(path)

        # A published file has 10,000 records. A shorter one is accepted if it has only whole
        # records.
        sizes = range(RECORD, 10_000 * RECORD + 1, RECORD)
        records = []
        for name in FILES:
            data = files.get(name, b"")
            if len(data) not in sizes:
                raise UserError(
                    f"{path} is not CIFAR-10: {name} is missing or damaged. Put CIFAR-10's binary "
                    "version there: cifar-10-binary.tar.gz (170 MB), packed or unpacked."
                )
            self.members.append(Member(name, len(data), zlib.crc32(data)))
            records.append(np.frombuffer(data, np.uint8).reshape(-1, RECORD))

        # The label is dropped, and the three colour planes become the last dimension.
        planes = np.concatenate(records)[:, 1:].reshape(-1, 3, 32, 32)
        self.images = planes.transpose(0, 2, 3, 1)

        test_count = len(records[-1])
        train_count = len(self.images) - test_count
        test_ids = range(self.first_test_id, self.first_test_id + test_count)
        self.ids = [*range(train_count), *test_ids]

    def read(self, i: int) -> np.ndarray:
        """Return the i-th image."""
        return self.images[i]


def read_files(path: Path) -> dict[str, bytes]:
    """Read the files named in FILES from a folder, its subfolders and the archives in it.

    Returns their bytes by name. Files that are missing or too large are left out.
    """
    files = {}
    for name in FILES:
        for file in (*path.glob(name), *path.glob(f"*/{name}")):
            if file.is_file() and file.stat().st_size <= MAX_FILE_BYTES:
                files[name] = file.read_bytes()

    for archive in filter(Path.is_file, path.glob("*.tar.gz")):
        with tarfile.open(archive) as tar:
            for file in tar:
                # The files may be in any folder of the archive.
                name = Path(file.name).name
                if name in FILES and file.isfile() and file.size <= MAX_FILE_BYTES:
                    files[name] = tar.extractfile(file).read()
    return files
