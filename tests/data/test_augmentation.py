"""data/augmentation.py: rotation leaves no trace in corners, borders or fine detail."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.augmentation import MAX_DEGREES, augment


def no_flip(count):
    return torch.zeros(count, dtype=torch.bool)


def texture(count, size=64, cutoff=0.35, seed=0):
    """Random images whose detail ends at `cutoff` cycles per pixel, with the falling spectrum of photos, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    # Cut out of a larger torus, so that nothing repeats across the edges.
    frequency = torch.fft.fftfreq(4 * size)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
    gain = (radius < cutoff) / radius.clamp(min=1 / size)
    noise = torch.randn(count, 3, 4 * size, 4 * size, generator=generator)
    images = torch.fft.ifft2(torch.fft.fft2(noise) * gain).real[:, :, :size, :size]
    images = images - images.mean((2, 3), keepdim=True)
    return images / images.abs().amax((1, 2, 3), keepdim=True) * 0.9


def gradient_energy(x):
    return (x[..., 1:, 1:] - x[..., 1:, :-1]).square() + (x[..., 1:, 1:] - x[..., :-1, 1:]).square()


def border(size, width):
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[width:-width, width:-width] = False
    return mask


def test_flip_is_exact_and_per_image():
    x_0 = texture(3)
    flipped = augment(x_0, torch.tensor([True, False, True]))
    np.testing.assert_array_equal(flipped[0].numpy(), x_0[0].numpy()[:, :, ::-1])
    assert torch.equal(flipped[1], x_0[1])
    np.testing.assert_array_equal(flipped[2].numpy(), x_0[2].numpy()[:, :, ::-1])


def test_angle_0_leaves_every_bit():
    x_0 = texture(2)
    assert torch.equal(augment(x_0, no_flip(2), torch.tensor([0.0, 3.0]))[0], x_0[0])


def test_each_image_has_its_own_angle_whatever_its_batch():
    x_0 = texture(3)
    angle = torch.tensor([2.0, -1.0, 0.5])
    together = augment(x_0, torch.tensor([True, False, True]), angle)
    alone = torch.cat([augment(x_0[i : i + 1], torch.tensor([i != 1]), angle[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert (together[1] - x_0[1]).abs().max() > 0.02


@pytest.mark.parametrize("angle", [3.0, -3.0, MAX_DEGREES])
def test_a_constant_image_stays_constant(angle):
    constant = torch.linspace(-1, 1, 9)[:, None, None, None].expand(9, 3, 32, 32)
    rotated = augment(constant, no_flip(9), torch.full((9,), angle))
    assert (rotated - constant).abs().max() <= 1e-6


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("angle", [3.0, -3.0])
def test_a_bright_frame_stays_bright_all_round(size, angle):
    width = size // 16
    x_0 = torch.full((1, 3, size, size), -0.5)
    x_0[..., border(size, width)] = 0.9
    rotated = augment(x_0, no_flip(1), torch.tensor([angle]))
    # A sharp edge rings; of the step to the frame, no border pixel loses more than 15%. Black would lose 136%.
    assert rotated[..., border(size, 1)].min() > 0.9 - 0.15 * 1.4
    # And it isn't painted over more than the frame: the middle stays as dark as it was.
    inside = width + size // 16
    assert (rotated[..., inside:-inside, inside:-inside] + 0.5).abs().max() < 0.15


def test_border_statistics_change_as_the_interiors_do():
    x_0 = texture(64)
    angle = torch.linspace(-3, 3, 64)
    rotated = augment(x_0, no_flip(64), angle)
    for statistic in (gradient_energy, torch.square):
        before, after = statistic(x_0), statistic(rotated)
        at_border = border(64, 6)[-before.shape[-1] :, -before.shape[-1] :]
        ratio_border = after[..., at_border].mean() / before[..., at_border].mean()
        ratio_inside = after[..., ~at_border].mean() / before[..., ~at_border].mean()
        assert abs(ratio_border - ratio_inside) < 0.05
    # The way that this test exists to catch: black corners.
    zoo = [Image.fromarray(((im + 1) * 127.5).permute(1, 2, 0).numpy().astype(np.uint8)) for im in x_0]
    black = (
        torch.stack(
            [
                torch.from_numpy(np.array(im.rotate(float(a), Image.Resampling.BICUBIC))).permute(2, 0, 1)
                for im, a in zip(zoo, angle, strict=True)
            ]
        )
        / 127.5
        - 1
    )
    at_border = border(64, 6)[1:, 1:]
    assert gradient_energy(black)[..., at_border].mean() > 1.5 * gradient_energy(x_0)[..., at_border].mean()


def test_rotation_is_the_exact_one_of_a_known_function():
    # Waves of known frequency, up to 0.3 cycles per pixel, can be drawn already rotated.
    size, degrees = 64, 2.7
    position = np.arange(size) - (size - 1) / 2
    x, y = np.meshgrid(position, -position)  # y points up
    radians = np.deg2rad(degrees)
    x_before, y_before = np.cos(radians) * x + np.sin(radians) * y, -np.sin(radians) * x + np.cos(radians) * y

    def wave(x, y):
        image = sum(
            np.cos(2 * np.pi * (a * x + b * y) + c) for a, b, c in [(0.3, 0, 0), (0.1, 0.25, 1), (-0.2, 0.2, 2)]
        )
        return torch.from_numpy(np.stack([image, image, -image])[None] / 3).float()

    rotated = augment(wave(x, y), no_flip(1), torch.tensor([degrees]))
    error = (rotated - wave(x_before, y_before))[..., 12:-12, 12:-12]
    assert error.square().mean().sqrt() < 0.015  # bicubic without doubling: 0.023


@pytest.mark.parametrize("angle", [3.0, -3.0, MAX_DEGREES])
def test_the_same_as_pillow_given_the_image_and_its_mirrored_surroundings(angle):
    x_0 = texture(1, cutoff=0.1)  # smooth, so that Pillow's bicubic doesn't blur it
    surrounded = np.pad(x_0[0].numpy(), ((0, 0), (16, 16), (16, 16)), mode="symmetric")
    expected = np.stack([np.array(Image.fromarray(c).rotate(angle, Image.Resampling.BICUBIC)) for c in surrounded])
    rotated = augment(x_0, no_flip(1), torch.tensor([angle]))[0].numpy()
    assert np.abs(rotated - expected[:, 16:-16, 16:-16]).max() < 0.05  # turned the other way: 0.5


def test_fine_detail_is_kept():
    x_0 = texture(32, cutoff=0.5)
    rotated = augment(x_0, no_flip(32), torch.linspace(-3, 3, 32))
    inside = (..., slice(8, -8), slice(8, -8))
    ratio = gradient_energy(rotated)[inside].mean() / gradient_energy(x_0)[inside].mean()
    assert 0.96 < ratio < 1.03  # bicubic alone: 0.88


def test_values_stay_in_range_at_sharp_edges_and_sizes_may_be_odd_or_tiny():
    for shape in ((2, 3, 33, 47), (2, 3, 4, 4)):
        x_0 = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).float() * 2 - 1
        rotated = augment(x_0, no_flip(2), torch.tensor([3.0, -MAX_DEGREES]))
        assert rotated.shape == shape and rotated.abs().max() <= 1 and rotated.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_what_the_cpu_gives():
    x_0, angle = texture(4), torch.tensor([3.0, -2.0, 0.0, 1.0])
    flip = torch.tensor([True, False, True, False])
    on_gpu = augment(x_0.cuda(), flip.cuda(), angle.cuda())
    torch.testing.assert_close(on_gpu.cpu(), augment(x_0, flip, angle), atol=1e-4, rtol=0)
