"""Labels of parquet files that are damaged, or not as Hugging Face writes them."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from data.datasets import load_images
from tests.conftest import refused


def write(path, pictures, metadata):
    image = {"bytes": (pictures / "00000.png").read_bytes(), "path": None}
    table = pa.table({"image": [image] * 3, "label": [7, 0, 7]})
    parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), path)
    return str(path)


@pytest.mark.parametrize(
    "metadata",
    [[], None, {"info": 5}, {"info": {"features": 5}}]
    + [{"info": {"features": {"label": {"names": names}}}} for names in (5, None)],
)
def test_without_names_labels_are_numbers(metadata, pictures, tmp_path):
    path = write(tmp_path / "a.parquet", pictures, json.dumps(metadata))
    assert load_images(path, 8, inputs=["label"]).label_names == ("0", "7")


@pytest.mark.parametrize("metadata", ["{", b"\xff", 100_000 * "["])
def test_metadata_that_are_no_json_are_named(metadata, pictures, tmp_path):
    path = write(tmp_path / "a.parquet", pictures, metadata)
    with refused("a.parquet: the labels cannot be read"):
        load_images(path, 8, inputs=["label"])
