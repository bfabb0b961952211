"""data/pixels.py: the two directions are exact inverses, and clamp and round as they say."""

import numpy as np
import torch

from data.pixels import to_model_range, to_uint8
from tests.data.packing import random_pixels


def test_all_256_values_survive_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    images = values.repeat(1, 1, 1, 3)
    assert torch.equal(to_uint8(to_model_range(images)), images)


def test_model_range_is_the_formula_in_channels_first_order():
    images = random_pixels(2, 5, 4, 3)
    expected = images.astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1

    x = to_model_range(torch.from_numpy(images))

    assert x.shape == (2, 3, 5, 4)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    np.testing.assert_allclose(x.numpy(), expected, atol=2e-7)
    assert x.min() >= -1
    assert x.max() <= 1


def test_to_uint8_clamps_and_rounds_to_nearest():
    levels = torch.tensor([-40.0, 0.4, 0.6, 99.49, 99.51, 254.6, 300.0])
    x = (levels / 127.5 - 1)[None, None, None, :].repeat(1, 3, 1, 1)
    before = x.clone()

    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 1, 99, 100, 255, 255]

    # The argument is left alone.
    assert torch.equal(x, before)
