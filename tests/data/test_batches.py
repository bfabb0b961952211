"""data/batches.py: shuffling is a pure function, batches are copies, and flips are exact."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers
from numpy.testing import assert_array_equal
from PIL import Image

from data.batches import augment, epoch_order, gather
from functions.support import processes
from functions.training.data import TrainingData
from tests.conftest import normal
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


def test_flips_and_angle_0_are_exact_and_other_angles_are_as_pillow_turns():
    # The images are smooth, so that Pillow's bicubic interpolation doesn't blur them.
    y, x = np.mgrid[:64, :64]
    expected = np.float32([np.sin(0.2 * x + k) * np.cos(0.3 * y - k) for k in range(4)])
    x_0 = torch.tensor(expected)[:, None]
    flip = torch.tensor([True, False, True, False])
    angle = torch.tensor([3.0, -10.0, 0.0, 0.0])

    # NumPy mirrors the images that are to be flipped.
    expected[::2] = expected[::2, :, ::-1].copy()
    assert_array_equal(augment(x_0, flip)[:, 0], expected)

    rotated = augment(x_0, flip, angle)[:, 0].numpy()
    assert_array_equal(rotated[2:], expected[2:])
    for i in range(2):
        # Pillow finds the image's mirrored surroundings in a margin of 16 pixels.
        surrounded = Image.fromarray(np.pad(expected[i], 16, mode="symmetric"))
        turned = np.array(surrounded.rotate(angle[i].item(), Image.Resampling.BICUBIC))
        # An image that is turned the other way has an error of 0.5.
        assert np.abs(rotated[i] - turned[16:-16, 16:-16]).max() < 0.05


def test_values_stay_in_range_at_sharp_edges():
    x_0 = normal(0, 2, 3, 33, 33).sign()
    flip = torch.tensor([False, False])
    assert augment(x_0, flip, torch.tensor([3.0, -10.0])).abs().max() <= 1
