"""data/augmentation.py: exact flips, and rotations with mirrored borders and little blur."""

import numpy as np
import torch
from numpy.testing import assert_array_equal
from PIL import Image

from data.augmentation import augment
from tests.conftest import normal


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
