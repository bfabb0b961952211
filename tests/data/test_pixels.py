"""data/pixels.py: the two directions are exact inverses, and clamp and round as they say."""

import numpy as np
import torch

from data.pixels import to_model_range, to_uint8


def test_model_range_is_the_formula_in_channels_first_order_and_has_an_exact_inverse():
    # All 256 values are here, and each axis has another length.
    images = np.arange(2 * 8 * 16 * 3, dtype=np.uint16).astype(np.uint8).reshape(2, 8, 16, 3)
    x = to_model_range(images)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    np.testing.assert_allclose(x, images.transpose(0, 3, 1, 2) / 127.5 - 1, atol=2e-7)
    assert x.abs().max() == 1
    assert np.array_equal(to_uint8(x), images)


def test_to_uint8_clamps_and_rounds_to_nearest_and_leaves_its_argument_alone():
    levels = torch.tensor([-40.0, 0.4, 0.6, 99.49, 99.51, 254.6, 300.0])
    x = levels[None, None, None] / 127.5 - 1
    before = x.clone()
    assert to_uint8(x).flatten().tolist() == [0, 0, 1, 99, 100, 255, 255]
    assert torch.equal(x, before)
