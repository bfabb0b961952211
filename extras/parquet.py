"""Read the images of parquet files, as Hugging Face's package `datasets` writes them."""

import json
import re
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

from data.decode import parsing
from data.sources import Member, stamp_of
from functions.support.errors import UserError

# The library reads a file in one thread at a time.
READING = Lock()


def list_parquet(path: Path, files: Sequence[Path]) -> list[Member]:
    """List the rows of parquet files, the shards of one set, which are or lie in `path`.

    Rows are numbered through all shards. Raises UserError without pyarrow, and for a file that is
    damaged or has no images.
    """
    members = []
    for file in files:
        folder = f"{file.relative_to(path).as_posix()}/" if file != path else ""
        for row in list_rows(file):
            members.append(row._replace(name=f"{folder}{len(members)}"))
    return members


def list_rows(path: Path) -> list[Member]:
    """List the rows of the one column of encoded images, as Hugging Face's `Image` stores them."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: python -m pip install pyarrow") from error
    # A file that is replaced from here on gets another stamp.
    stamp = stamp_of(path)
    with parsing(f"{path} cannot be read"):
        file = ParquetFile(path)
        paths = [column.path for column in file.schema]
    # Such a column is a struct of `bytes` and `path`. That of a list of images has a longer path.
    columns = [path for path in paths if re.fullmatch(r"[^.]+\.bytes", path)]
    if len(columns) != 1:
        raise UserError(f"{path} has {len(columns)} columns of encoded images, and must have one.")

    def read(i):
        with parsing("cannot be read"), READING:
            row = read_column(file, columns[0])[i].as_py()
        # A row may be empty, and a column of this name may hold something else.
        data = row and row["bytes"]
        return data if isinstance(data, bytes) else b""

    rows = range(file.metadata.num_rows)
    labels = labels_of(file, path) or [None for _ in rows]
    return [Member("", stamp, partial(read, i), label=labels[i]) for i in rows]


def labels_of(file: Any, path: Path) -> list[str | None]:
    """Return the labels of a `ParquetFile`, by the names of Hugging Face's metadata, if any."""
    schema = file.schema_arrow
    if "label" not in schema.names:
        return []
    with parsing(f"{path}: the labels cannot be read"):
        values = file.read(["label"]).column(0).to_pylist()
        feature = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    # Anything else on the way to the names means that there are none.
    for key in ("info", "features", "label", "names"):
        feature = feature.get(key) if isinstance(feature, dict) else None
    names = dict(enumerate(feature or []))
    # Hugging Face has -1 where there is no label. A list of several is none.
    return [
        str(names.get(value, value)) if isinstance(value, (int, str)) and value != -1 else None
        for value in values
    ]


# Only the newest columns are kept in memory, because a set may have many shards. There are two of
# them, because several threads may read the end of a shard and the start of the next one.
@lru_cache(maxsize=2)
def read_column(file: Any, column: str) -> Sequence:
    """Return a column of a `ParquetFile`."""
    return file.read([column]).column(0)
