"""data/augmentation.py: exact flips, and rotations with mirrored borders and little blur."""

import numpy as np
import torch
from PIL import Image

from data.augmentation import augment


def test_flips_and_angle_0_are_exact_and_other_angles_are_as_pillow_turns():
    # The images are smooth, so that Pillow's bicubic interpolation doesn't blur them.
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    waves = [torch.sin(0.2 * x + k) * torch.cos(0.3 * y - k) for k in range(4)]
    x_0 = torch.stack(waves)[:, None]
    flip = torch.tensor([True, False, True, False])
    angle = torch.tensor([3.0, -10.0, 0.0, 0.0])

    # NumPy mirrors the images that are to be flipped.
    mirrored = x_0.numpy()[flip.numpy(), :, :, ::-1]
    flipped = x_0.clone()
    flipped[flip] = torch.from_numpy(mirrored.copy())
    assert torch.equal(augment(x_0, flip), flipped)

    rotated = augment(x_0, flip, angle)
    assert torch.equal(rotated[2:], flipped[2:])
    for i in range(2):
        # Pillow finds the image's mirrored surroundings in a margin of 16 pixels.
        surrounded = Image.fromarray(np.pad(flipped[i, 0].numpy(), 16, mode="symmetric"))
        turned = np.array(surrounded.rotate(angle[i].item(), Image.Resampling.BICUBIC))
        # An image that is turned the other way has an error of 0.5.
        assert np.abs(rotated[i, 0].numpy() - turned[16:-16, 16:-16]).max() < 0.05


def test_values_stay_in_range_at_sharp_edges_and_constant_images_stay_constant():
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 2, (2, 3, 33, 33), generator=generator).float() * 2 - 1
    no_flip = torch.tensor([False, False])
    angle = torch.tensor([3.0, -10.0])

    assert augment(x_0, no_flip, angle).abs().max() <= 1
    # Black borders would change it.
    constant = torch.full_like(x_0, 0.7)
    torch.testing.assert_close(augment(constant, no_flip, angle), constant)
