"""data/batches.py: shuffling is a pure function, and batches are copies on their device."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers
from numpy.testing import assert_array_equal

from data.batches import epoch_order, gather
from functions.support import processes
from functions.training.data import TrainingData
from tests.data.packing import IMAGES

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def test_the_order_is_the_same_on_every_machine():
    # These orders were fixed when the test was written. A change here would reshuffle every run
    # that is to be resumed.
    assert epoch_order(10, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert epoch_order(10, 1234, 7).tolist() == [0, 5, 7, 8, 1, 2, 9, 4, 3, 6]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    n=integers(1, 60),
    effective_batch=integers(1, 12),
    count=integers(1, 9),
    start=integers(0, 119),
)
@pytest.mark.slow
def test_processes_share_each_step_of_an_epoch_and_can_start_anywhere(
    n, effective_batch, count, start
):
    effective_batch = min(effective_batch, n)
    steps = n // effective_batch
    # Two epochs are walked.
    way = range(2 * steps)
    data = SimpleNamespace(
        config=SimpleNamespace(seed=3, effective_batch=effective_batch),
        split=SimpleNamespace(train_indices=np.arange(n) * 10),
        steps_per_epoch=steps,
        gather=lambda indices: indices,
    )
    walked = []
    for rank in range(count):
        here, everywhere = mock.Mock(return_value=rank), mock.Mock(return_value=count)
        with mock.patch.multiple(processes, rank=here, count=everywhere):
            data.share = processes.shard(effective_batch)
        assert effective_batch // count <= len(data.share) <= -(-effective_batch // count)
        indices = [TrainingData.batch(data, step) for step in way]
        walked.append(indices)
        step = start % len(way)
        assert_array_equal(TrainingData.batch(data, step), indices[step])

    orders = [epoch_order(n, 3, epoch)[: steps * effective_batch] for epoch in range(2)]
    all_indices = np.concatenate([batch for step in zip(*walked, strict=True) for batch in step])
    assert_array_equal(all_indices, 10 * np.concatenate(orders))


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_a_memory_map_is_a_copy_in_order(tmp_path, device):
    IMAGES.tofile(tmp_path / "images")
    mapped = np.memmap(tmp_path / "images", np.uint8, "r", shape=IMAGES.shape)
    indices = epoch_order(10, 0, 0)[:7]
    batch, inputs = gather(mapped, {"number": np.arange(10)}, torch.device(device), indices)
    assert batch.dtype == torch.uint8
    assert batch.device.type == inputs["number"].device.type == device
    assert_array_equal(inputs["number"].cpu(), indices)
    assert_array_equal(batch.cpu(), IMAGES[indices])
    # What is written to a batch does not reach the file.
    batch.zero_()
    assert_array_equal(mapped, IMAGES)
