"""data/augmentation.py: exact flips, and rotations with mirrored borders and little blur."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.augmentation import augment

FLIP = torch.tensor([True, False, True, False])


def rotate(x_0, angle):
    """Rotate each image by its own angle, without a flip."""
    no_flip = torch.zeros(len(x_0), dtype=torch.bool)
    return augment(x_0, no_flip, torch.as_tensor(angle))


def waves(count):
    """Return different smooth images (count, 1, 64, 64) in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    images = [torch.sin(0.2 * x + k) * torch.cos(0.3 * y - k) for k in range(count)]
    return torch.stack(images)[:, None]


def test_flips_and_angle_0_are_exact_and_each_image_has_its_own_draw():
    x_0 = waves(4)
    angle = torch.tensor([2.0, -1.0, 0.0, 0.0])

    # NumPy mirrors the images that are to be flipped.
    mirrored = x_0.numpy()[FLIP.numpy(), :, :, ::-1]
    flipped = x_0.clone()
    flipped[FLIP] = torch.from_numpy(mirrored.copy())
    assert torch.equal(augment(x_0, FLIP), flipped)

    # The last two angles are 0; the first two turn their images.
    rotated = augment(x_0, FLIP, angle)
    assert torch.equal(rotated[2:], flipped[2:])
    change = (rotated[:2] - flipped[:2]).abs()
    assert change.amax((1, 2, 3)).min() > 0.02

    # An image in a batch becomes what it becomes alone.
    alone = [rotate(flipped[i : i + 1], angle[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(rotated, torch.cat(alone), atol=1e-6, rtol=0)


@pytest.mark.parametrize("angle", [3.0, -10.0])
def test_the_same_as_pillow_given_the_image_and_its_mirrored_surroundings(angle):
    # The image is smooth, so that Pillow's bicubic interpolation doesn't blur it.
    x_0 = waves(1)
    expected = []
    for channel in x_0[0].numpy():
        # Pillow finds the image's mirrored surroundings in a margin of 16 pixels.
        surrounded = Image.fromarray(np.pad(channel, 16, mode="symmetric"))
        turned = surrounded.rotate(angle, Image.Resampling.BICUBIC)
        expected.append(np.array(turned)[16:-16, 16:-16])

    rotated = rotate(x_0, [angle])[0].numpy()
    error = np.abs(rotated - np.stack(expected))
    # An image that is turned the other way has an error of 0.5.
    assert error.max() < 0.05


@pytest.mark.parametrize("size", [33, 4])
def test_values_stay_in_range_at_sharp_edges_and_constant_images_stay_constant(size):
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 2, (2, 3, size, size), generator=generator).float() * 2 - 1

    rotated = rotate(x_0, [3.0, -10.0])

    assert rotated.abs().max() <= 1
    # Black borders would change it.
    constant = torch.full_like(x_0, 0.7)
    torch.testing.assert_close(rotate(constant, [3.0, -10.0]), constant)
