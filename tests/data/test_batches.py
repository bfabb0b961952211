"""data/batches.py: shuffling is a pure function; feeding keeps the order and surfaces errors.

It leaves no thread behind.
"""

import threading
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers
from numpy.testing import assert_array_equal, assert_equal

from data.batches import (
    FREE_MEMORY_FRACTION,
    ImageFeeder,
    epoch_order,
    indices_of_steps,
)
from functions.support import processes
from tests.conftest import CPU, refused
from tests.data.packing import random_pixels

IMAGES = random_pixels(50, 4, 4, 3)
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
    start %= 2 * steps
    settings = (np.arange(n) * 10, 3, effective_batch)

    # Two epochs are walked.
    walked = []
    for rank in range(count):
        here, everywhere = mock.Mock(return_value=rank), mock.Mock(return_value=count)
        with mock.patch.multiple(processes, rank=here, count=everywhere):
            share = processes.shard(effective_batch)
        assert effective_batch // count <= len(share) <= -(-effective_batch // count)
        indices = list(indices_of_steps(*settings, share, range(2 * steps)))
        walked.append(indices)
        resumed = indices_of_steps(*settings, share, range(start, 2 * steps))
        assert_equal(list(resumed), indices[start:])

    orders = [epoch_order(n, 3, epoch)[: steps * effective_batch] for epoch in range(2)]
    all_indices = np.concatenate([batch for step in zip(*walked, strict=True) for batch in step])
    assert_array_equal(all_indices, 10 * np.concatenate(orders))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keep", [True, False])
def test_batches_of_a_memory_map_come_in_order_as_copies(tmp_path, device, keep):
    IMAGES.tofile(tmp_path / "images")
    mapped = np.memmap(tmp_path / "images", np.uint8, "r", shape=IMAGES.shape)
    feeder = ImageFeeder(mapped, torch.device(device), {"number": np.arange(50)})
    feeder.resident = torch.tensor(mapped, device=device) if keep else None
    indices = [epoch_order(50, 0, epoch)[:7] for epoch in range(6)]
    for expected, (batch, inputs) in zip(indices, feeder.feed(iter(indices)), strict=True):
        assert batch.dtype == torch.uint8
        assert batch.device.type == inputs["number"].device.type == device
        assert_array_equal(inputs["number"].cpu(), expected)
        assert_array_equal(batch.cpu(), IMAGES[expected])
        # What is written to a batch reaches no other batch and no file.
        batch.zero_()
    assert_array_equal(mapped, IMAGES)


def test_one_batch_is_read_ahead_and_neither_leaving_early_nor_an_error_leaves_a_thread():
    asked = []
    # Feeds of other tests may have threads, too.
    before = {*threading.enumerate()}

    def feeding_threads():
        return {*threading.enumerate()} - before

    def indices():
        for i in range(3):
            asked.append(i)
            yield np.array([i])
        raise RuntimeError("from the caller's generator")

    # The caller takes one batch and leaves.
    feed = ImageFeeder(IMAGES, CPU).feed(indices())
    next(feed)
    assert asked == [0, 1]
    assert feeding_threads()
    feed.close()
    assert not feeding_threads()

    # The caller's generator breaks.
    with refused("from the caller", RuntimeError):
        list(ImageFeeder(IMAGES, CPU).feed(indices()))
    assert not feeding_threads()


def test_the_whole_set_stays_on_a_gpu_only_when_it_fits(monkeypatch):
    monkeypatch.setattr(torch, "tensor", lambda images, device: "resident")
    needed = IMAGES.nbytes / FREE_MEMORY_FRACTION
    # The GPU is pretended. Its free memory is a byte more or less than the set needs.
    for free, resident in ((needed + 1, "resident"), (needed - 1, None)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", mock.Mock(return_value=(free, 10**12)))
        assert ImageFeeder(IMAGES, torch.device("cuda")).resident == resident
