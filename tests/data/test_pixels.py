"""data/pixels.py: the two directions are exact inverses, and clamp and round as they say."""

import numpy as np
import torch

from data.pixels import to_model_range, to_uint8


def test_all_256_values_survive_the_round_trip():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    assert torch.equal(to_uint8(to_model_range(images)), images)


def test_model_range_is_the_formula_in_channels_first_order():
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    )
    x = to_model_range(images)
    expected = images.numpy().astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1
    assert x.shape == (2, 3, 5, 4) and x.dtype == torch.float32 and x.is_contiguous()
    np.testing.assert_allclose(x.numpy(), expected, atol=2e-7)
    assert x.min() >= -1 and x.max() <= 1


def test_to_uint8_clamps_rounds_to_nearest_and_leaves_its_argument_alone():
    levels = torch.tensor([-40.0, 0.4, 0.6, 99.49, 99.51, 254.6, 300.0])
    x = (levels / 127.5 - 1)[None, None, None, :].repeat(1, 3, 1, 1)
    before = x.clone()
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 1, 99, 100, 255, 255]
    assert torch.equal(x, before)
    assert to_uint8(torch.full((1, 3, 2, 2), 0.5, dtype=torch.bfloat16)).unique().item() == 191
