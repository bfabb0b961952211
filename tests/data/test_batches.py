"""data/batches.py: shuffling is a pure function, feeding keeps order, surfaces errors and leaves no thread."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import (
    FREE_MEMORY_FRACTION,
    ImageFeeder,
    epoch_order,
    forward_passes,
    micro_batches,
)
from functions.support.processes import Processes

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@settings(deadline=None, max_examples=40)
@given(n=st.integers(0, 400), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_an_epochs_order_is_a_permutation_and_a_pure_function(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    np.random.random()  # neither reads nor disturbs anyone's generator
    np.testing.assert_array_equal(order, epoch_order(n, seed, epoch))
    if n >= 20:
        others = [(seed, epoch + 1), (seed + 1, epoch)] + [(epoch, seed)] * (seed != epoch)
        assert all(order.tolist() != epoch_order(n, *other).tolist() for other in others)


def test_the_order_is_the_same_on_every_machine():
    # Fixed when it was written: a change here would reshuffle every run that is to be resumed.
    assert epoch_order(10, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert epoch_order(10, 1234, 7).tolist() == [0, 5, 7, 8, 1, 2, 9, 4, 3, 6]
    with pytest.raises(ValueError):
        epoch_order(5, -1, 0)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 60),
    effective_batch=st.integers(1, 12),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_micro_batches_walk_each_epoch_once_and_can_start_anywhere(
    n, effective_batch, batch_size, seed
):
    effective_batch = min(effective_batch, n)
    train_indices, steps_per_epoch = np.arange(n) * 10, n // effective_batch
    total = 2 * steps_per_epoch
    passes = forward_passes(range(effective_batch), batch_size)
    parts = list(micro_batches(train_indices, seed, effective_batch, passes, range(total)))
    parts_per_step = -(-effective_batch // batch_size)
    assert max(map(len, parts)) <= batch_size and len(parts) == total * parts_per_step
    for epoch in range(2):
        walked = np.concatenate(parts[epoch * len(parts) // 2 : (epoch + 1) * len(parts) // 2])
        assert len(set(walked.tolist())) == len(walked) == steps_per_epoch * effective_batch
        np.testing.assert_array_equal(walked, 10 * epoch_order(n, seed, epoch)[: len(walked)])
    resumed = list(
        micro_batches(train_indices, seed, effective_batch, passes, range(total // 2, total))
    )
    for part, expected in zip(resumed, parts[total // 2 * parts_per_step :], strict=True):
        np.testing.assert_array_equal(part, expected)


@settings(deadline=None, max_examples=40)
@given(effective_batch=st.integers(1, 40), batch_size=st.integers(1, 12), count=st.integers(1, 9))
def test_processes_and_passes_share_every_place_of_a_batch_once(effective_batch, batch_size, count):
    shares = [Processes(rank, count).own_range(effective_batch) for rank in range(count)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    passes = [places for share in shares for places in forward_passes(share, batch_size)]
    assert [i for places in passes for i in range(places.start, places.stop)] == list(
        range(effective_batch)
    )
    assert all(0 < places.stop - places.start <= batch_size for places in passes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keep", [True, False, None])
def test_batches_of_a_memory_map_come_in_order_as_copies(tmp_path, device, keep):
    IMAGES.tofile(tmp_path / "images")
    mapped = np.memmap(tmp_path / "images", np.uint8, "r", shape=IMAGES.shape)
    feeder = ImageFeeder(mapped, device, keep_on_device=keep)
    indices = [epoch_order(50, 0, epoch)[:7] for epoch in range(6)] + [
        np.array([3, 3]),
        np.array([], np.int64),
    ]
    for expected, batch in zip(indices, feeder.feed(iter(indices)), strict=True):
        assert batch.dtype == torch.uint8 and batch.device.type == device
        np.testing.assert_array_equal(batch.cpu().numpy(), IMAGES[expected])
        np.testing.assert_array_equal(feeder.gather(expected).cpu().numpy(), IMAGES[expected])
        batch.zero_()  # writing to it touches no other batch and no file
    np.testing.assert_array_equal(mapped, IMAGES)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("bad", [-1, 50])
def test_an_index_out_of_range_is_raised_at_its_batch(keep, bad):
    feed = ImageFeeder(IMAGES, "cpu", keep_on_device=keep).feed(
        [np.array([0]), np.array([1]), np.array([bad])]
    )
    assert [len(next(feed)) for _ in range(2)] == [1, 1]
    with pytest.raises(IndexError, match="out of range"):
        next(feed)


def test_one_batch_is_read_ahead_and_neither_leaving_early_nor_an_error_leaves_a_thread():
    feeding_threads = lambda: [
        thread for thread in threading.enumerate() if thread.name.startswith("images")
    ]
    asked = []

    def indices():
        for i in range(3):
            asked.append(i)
            yield np.array([i])
        raise RuntimeError("from the caller's generator")

    feed = ImageFeeder(IMAGES, "cpu").feed(indices())
    next(feed)
    assert asked == [0, 1] and feeding_threads()
    feed.close()
    assert not feeding_threads()
    with pytest.raises(RuntimeError, match="from the caller"):
        list(ImageFeeder(IMAGES, "cpu").feed(indices()))
    assert not feeding_threads()


@pytest.mark.parametrize(("more", "fits"), [(1, True), (-1, False)])
def test_the_whole_set_stays_on_a_gpu_only_when_it_fits(monkeypatch, more, fits):
    free = IMAGES.nbytes / FREE_MEMORY_FRACTION + more
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr(ImageFeeder, "copy_to_device", lambda self: "resident")
    assert (ImageFeeder(IMAGES, "cuda").resident is not None) == fits
    assert ImageFeeder(IMAGES, "cpu").resident is None
