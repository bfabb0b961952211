"""CIFAR-10 in its published binary version: six files of records, or the .tar.gz that they come in."""

import tarfile
import zlib
from pathlib import Path

import numpy as np

from data.sources import MAX_FILE_BYTES, Member, Source, one_sentence
from functions.support.errors import UserError

FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the planes of red, green and blue
FIRST_OF_TEST = 50_000  # the test images' ids begin here


class Cifar10(Source):
    """All its images, uint8 (32, 32, 3). Raises UserError when a file is missing or does not end with a record."""

    kind = "cifar10"

    def __init__(self, path: Path):
        super().__init__(path)
        with one_sentence(path):
            found = read_files(path)
        for name in FILES:
            if len(found.get(name, "")) not in range(RECORD, 10_000 * RECORD + 1, RECORD):
                raise UserError(
                    f"{path} is not CIFAR-10: {name} is missing or damaged. Put its binary version there, "
                    "cifar-10-binary.tar.gz (170 MB), packed or unpacked."
                )
        self.members = [Member(name, len(found[name]), zlib.crc32(found[name])) for name in FILES]
        records = [np.frombuffer(found[name], np.uint8).reshape(-1, RECORD) for name in FILES]
        self.images = np.concatenate(records)[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        test = len(records[-1])
        self.ids = [*range(len(self.images) - test), *range(FIRST_OF_TEST, FIRST_OF_TEST + test)]

    def read(self, i: int) -> np.ndarray:
        return self.images[i]


def read_files(path: Path) -> dict[str, bytes]:
    """Those of FILES that lie in a folder, in a folder in it, or in an archive in it."""
    unpacked = [file for name in FILES for file in (*path.glob(name), *path.glob(f"*/{name}"))]
    unpacked = [
        file for file in unpacked if file.is_file() and file.stat().st_size <= MAX_FILE_BYTES
    ]
    found = {file.name: file.read_bytes() for file in unpacked}
    for archive in filter(Path.is_file, path.glob("*.tar.gz")):
        with tarfile.open(archive) as tar:
            for file in tar:
                name = Path(file.name).name
                if name in FILES and file.isfile() and file.size <= MAX_FILE_BYTES:
                    found[name] = tar.extractfile(file).read()
    return found
