"""What TensorBoard shows of a run, read back from its event files."""

import io

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from functions.training.metrics import COLUMNS, read_metrics


def test_tensorboard_has_the_curves_the_grids_and_the_config(tiny_run):
    events = EventAccumulator(str(tiny_run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    rows = read_metrics(tiny_run / "metrics.csv")
    for column in set(COLUMNS) - {"step"}:
        logged = [(row["step"], row[column]) for row in rows if row[column] is not None]
        seen = [(event.step, event.value) for event in events.Scalars(column)] if logged else []
        np.testing.assert_allclose(seen, logged, rtol=1e-5)
    grids = sorted((tiny_run / "samples").glob("*.png"))
    for grid, event in zip(grids, events.Images("samples"), strict=True):
        assert grid.stem == f"step-{event.step:08d}"
        assert np.array_equal(Image.open(grid), Image.open(io.BytesIO(event.encoded_image_string)))
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert (tiny_run / "config.json").read_text() in text
