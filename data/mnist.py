"""Read MNIST's published files: two files of images, gzipped or not."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from data.sources import Member, Source, raise_user_error
from functions.support.errors import UserError

FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")

# A file begins with four big-endian 32-bit integers: a magic number, the number of images, and
# their height and width. One byte a pixel follows.
HEADER = 16
MAGIC = 2051
SIZE = 28
LARGEST_COUNT = 60_000


class Mnist(Source):
    """All images of MNIST as uint8 (28, 28, 1).

    Raises UserError when a file is missing, or its header and its size do not fit MNIST.
    """

    kind = "mnist"
    # Test ids start here even if training images are missing.
    first_test_id = LARGEST_COUNT

    def __init__(self, path: Path):
        super().__init__(path)
        parts = []
        for name in FILES:
            with raise_user_error(path):
                data = read_file(path, name)

            # A shorter file than the published one is accepted if its header says so.
            header = np.frombuffer(data[:HEADER].ljust(HEADER, b"\0"), ">u4")
            magic, count, *sides = header.tolist()
            fits = (magic, sides) == (MAGIC, [SIZE, SIZE]) and 0 < count <= LARGEST_COUNT
            if not fits or len(data) != HEADER + count * SIZE**2:
                raise UserError(
                    f"{path} is not MNIST: {name} is missing or damaged. Put {FILES[0]}.gz and "
                    f"{FILES[1]}.gz there, packed or unpacked."
                )
            self.members.append(Member(name, len(data), zlib.crc32(data)))
            parts.append(np.frombuffer(data, np.uint8, offset=HEADER).reshape(-1, SIZE, SIZE, 1))

        self.images = np.concatenate(parts)
        train_count, test_count = map(len, parts)
        test_ids = range(self.first_test_id, self.first_test_id + test_count)
        self.ids = [*range(train_count), *test_ids]

    def read(self, i: int) -> np.ndarray:
        """Return the i-th image."""
        return self.images[i]


def read_file(path: Path, name: str) -> bytes:
    """Read a file of a folder or its subfolders, unpacked if it is a .gz.

    Returns b"" for a missing file, and at most one byte more than the largest file has.
    """
    for pattern in (name, f"{name}.gz", f"*/{name}", f"*/{name}.gz"):
        # Some copies have a dot in the place of the second hyphen.
        for file in filter(Path.is_file, path.glob(pattern.replace("-idx", "[-.]idx"))):
            opener = gzip.open if file.suffix == ".gz" else open
            with opener(file, "rb") as stream:
                return stream.read(HEADER + LARGEST_COUNT * SIZE**2 + 1)
    return b""
