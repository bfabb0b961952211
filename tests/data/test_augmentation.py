"""data/augmentation.py: rotation leaves no trace in corners, borders or fine detail."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.augmentation import MAX_DEGREES, augment

FLIP = torch.tensor([True, False, True, False])
NO_FLIP = torch.zeros(16, dtype=torch.bool)


def texture(count, size=64, cutoff=0.35):
    """Random images whose detail ends at `cutoff` cycles per pixel, with the falling spectrum of photos, in [-1, 1]."""
    # Cut out of a larger torus, so that nothing repeats across the edges.
    frequency = torch.fft.fftfreq(4 * size)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
    gain = (radius < cutoff) / radius.clamp(min=1 / size)
    noise = torch.randn(count, 3, 4 * size, 4 * size, generator=torch.Generator().manual_seed(0))
    images = torch.fft.ifft2(torch.fft.fft2(noise) * gain).real[:, :, :size, :size]
    images = images - images.mean((2, 3), keepdim=True)
    return images / images.abs().amax((1, 2, 3), keepdim=True) * 0.9


def test_flips_and_angle_0_are_exact_and_each_image_has_its_own_draw():
    x_0, angle = texture(4), torch.tensor([2.0, -1.0, 0.0, 0.0])
    by_hand = x_0.clone()
    by_hand[FLIP] = torch.from_numpy(x_0.numpy()[FLIP.numpy(), :, :, ::-1].copy())
    assert torch.equal(augment(x_0, FLIP), by_hand)
    turned = augment(x_0, FLIP, angle)
    assert torch.equal(turned[2:], by_hand[2:])
    assert (turned[:2] - by_hand[:2]).abs().amax((1, 2, 3)).min() > 0.02
    alone = torch.cat(
        [augment(by_hand[i : i + 1], NO_FLIP[:1], angle[i : i + 1]) for i in range(4)]
    )
    torch.testing.assert_close(turned, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("angle", [3.0, -3.0, MAX_DEGREES])
def test_a_constant_image_stays_constant(angle):
    constant = torch.linspace(-1, 1, 9)[:, None, None, None].repeat(1, 3, 32, 32)
    assert torch.equal(augment(constant, NO_FLIP[:9], torch.full((9,), angle)), constant)
    odd_corner = constant.clone()
    odd_corner[..., 0, 0] = 0  # the pixel that all are taken relative to
    rotated = augment(odd_corner, NO_FLIP[:9], torch.full((9,), angle))
    assert (rotated - constant)[..., 24:, 24:].abs().max() <= 1e-6


def test_rotation_is_the_exact_one_of_a_known_function():
    # Waves of known frequency, up to 0.3 cycles per pixel, can be drawn already rotated.
    size, degrees = 64, 2.7
    position = np.arange(size) - (size - 1) / 2
    x, y = np.meshgrid(position, -position)  # y points up
    radians = np.deg2rad(degrees)
    x_before, y_before = (
        np.cos(radians) * x + np.sin(radians) * y,
        -np.sin(radians) * x + np.cos(radians) * y,
    )

    def wave(x, y):
        waves = [(0.3, 0, 0), (0.1, 0.25, 1), (-0.2, 0.2, 2)]
        image = sum(np.cos(2 * np.pi * (a * x + b * y) + c) for a, b, c in waves)
        return torch.from_numpy(np.stack([image, image, -image])[None] / 3).float()

    rotated = augment(wave(x, y), NO_FLIP[:1], torch.tensor([degrees]))
    error = (rotated - wave(x_before, y_before))[..., 12:-12, 12:-12]
    assert error.square().mean().sqrt() < 0.015  # bicubic without doubling: 0.023


@pytest.mark.parametrize("angle", [3.0, -3.0, MAX_DEGREES])
def test_the_same_as_pillow_given_the_image_and_its_mirrored_surroundings(angle):
    x_0 = texture(1, cutoff=0.1)  # smooth, so that Pillow's bicubic doesn't blur it
    surrounded = np.pad(x_0[0].numpy(), ((0, 0), (16, 16), (16, 16)), mode="symmetric")
    expected = np.stack(
        [np.array(Image.fromarray(c).rotate(angle, Image.Resampling.BICUBIC)) for c in surrounded]
    )
    rotated = augment(x_0, NO_FLIP[:1], torch.tensor([angle]))[0].numpy()
    assert np.abs(rotated - expected[:, 16:-16, 16:-16]).max() < 0.05  # turned the other way: 0.5


def test_fine_detail_is_kept():
    energy = lambda x: (
        (x[..., 1:, 1:] - x[..., 1:, :-1]).square() + (x[..., 1:, 1:] - x[..., :-1, 1:]).square()
    )
    x_0 = texture(16, cutoff=0.5)
    rotated = augment(x_0, NO_FLIP, torch.linspace(-3, 3, 16))
    inside = (..., slice(8, -8), slice(8, -8))
    ratio = energy(rotated)[inside].mean() / energy(x_0)[inside].mean()
    assert 0.96 < ratio < 1.03  # bicubic alone: 0.88


@pytest.mark.parametrize("shape", [(2, 3, 33, 47), (2, 3, 4, 4)])
def test_values_stay_in_range_at_sharp_edges_and_sizes_may_be_odd_or_tiny(shape):
    x_0 = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    rotated = augment(x_0, NO_FLIP[:2], torch.tensor([3.0, -MAX_DEGREES]))
    assert rotated.shape == shape and rotated.abs().max() <= 1 and rotated.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_what_the_cpu_gives():
    x_0, angle = texture(4), torch.tensor([3.0, -2.0, 0.0, 1.0])
    on_gpu = augment(x_0.cuda(), FLIP.cuda(), angle.cuda())
    torch.testing.assert_close(on_gpu.cpu(), augment(x_0, FLIP, angle), atol=1e-4, rtol=0)
