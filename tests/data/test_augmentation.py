"""data/augmentation.py: rotation leaves no trace in corners, borders or fine detail."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.augmentation import MAX_DEGREES, augment

FLIP = torch.tensor([True, False, True, False])


def rotate(x_0, angle):
    """Rotate each image by its own angle, without a flip."""
    no_flip = torch.zeros(len(x_0), dtype=torch.bool)
    return augment(x_0, no_flip, torch.as_tensor(angle))


def texture(count, size=64, cutoff=0.35):
    """Return random images (count, 3, size, size) in [-1, 1] with the falling spectrum of photos.

    Their detail ends at `cutoff` cycles per pixel.
    """
    # The images are cut out of a larger torus, so that nothing repeats across the edges.
    frequency = torch.fft.fftfreq(4 * size)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
    gain = (radius < cutoff) / radius.clamp(min=1 / size)

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, 4 * size, 4 * size, generator=generator)
    spectrum = torch.fft.fft2(noise) * gain
    images = torch.fft.ifft2(spectrum).real[:, :, :size, :size]

    images = images - images.mean((2, 3), keepdim=True)
    largest = images.abs().amax((1, 2, 3), keepdim=True)
    return images / largest * 0.9


def test_flips_and_angle_0_are_exact_and_each_image_has_its_own_draw():
    x_0 = texture(4)
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


@pytest.mark.parametrize("angle", [3.0, -3.0, MAX_DEGREES])
def test_a_constant_image_stays_constant(angle):
    constant = torch.linspace(-1, 1, 9)[:, None, None, None].repeat(1, 3, 32, 32)
    assert torch.equal(rotate(constant, [angle] * 9), constant)

    # All pixels are taken relative to this one. The pixels far from it must not change with it.
    odd_corner = constant.clone()
    odd_corner[..., 0, 0] = 0
    rotated = rotate(odd_corner, [angle] * 9)
    change = (rotated - constant)[..., 24:, 24:]
    assert change.abs().max() <= 1e-6


def waves(x, y):
    """Return an image (1, 3, H, W) of known waves, of up to 0.3 cycles per pixel."""
    image = 0
    for across, up, phase in [
        (0.3, 0, 0),
        (0.1, 0.25, 1),
        (-0.2, 0.2, 2),
    ]:
        image = image + np.cos(2 * np.pi * (across * x + up * y) + phase)
    channels = np.stack([image, image, -image])
    return torch.from_numpy(channels[None] / 3).float()


def test_rotation_is_the_exact_one_of_a_known_function():
    # Positions of 64 pixels are counted from the image's centre, and y points up.
    position = np.arange(64) - 31.5
    x, y = np.meshgrid(position, -position)

    # A function can be drawn already rotated: each pixel shows what was at another place before.
    degrees = 2.7
    cos = np.cos(np.deg2rad(degrees))
    sin = np.sin(np.deg2rad(degrees))
    x_before = cos * x + sin * y
    y_before = -sin * x + cos * y
    expected = waves(x_before, y_before)

    rotated = rotate(waves(x, y), [degrees])
    error = (rotated - expected)[..., 12:-12, 12:-12]
    # Bicubic interpolation of an image that was not doubled would have 0.023.
    assert error.square().mean().sqrt() < 0.015


@pytest.mark.parametrize("angle", [3.0, -3.0, MAX_DEGREES])
def test_the_same_as_pillow_given_the_image_and_its_mirrored_surroundings(angle):
    # The image is smooth, so that Pillow's bicubic interpolation doesn't blur it.
    x_0 = texture(1, cutoff=0.1)
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


def energy(images):
    """Return the mean of the squared differences to the neighbours on the left and above."""
    across = images[..., 1:, 1:] - images[..., 1:, :-1]
    down = images[..., 1:, 1:] - images[..., :-1, 1:]
    squares = across.square() + down.square()

    # Along the edges lies what the image is continued with.
    return squares[..., 8:-8, 8:-8].mean()


def test_fine_detail_is_kept():
    x_0 = texture(16, cutoff=0.5)
    rotated = rotate(x_0, torch.linspace(-3, 3, 16))

    # Bicubic interpolation alone would keep 0.88.
    assert 0.96 < energy(rotated) / energy(x_0) < 1.03


@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 33, 47),
        # The mirrored margin is wider than this image.
        (2, 3, 4, 4),
    ],
)
def test_values_stay_in_range_at_sharp_edges_and_sizes_may_be_odd_or_tiny(shape):
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 2, shape, generator=generator).float() * 2 - 1

    rotated = rotate(x_0, [3.0, -MAX_DEGREES])

    assert rotated.shape == shape
    assert rotated.abs().max() <= 1
    assert rotated.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_gives_what_the_cpu_gives():
    x_0 = texture(4)
    angle = torch.tensor([3.0, -2.0, 0.0, 1.0])

    on_cpu = augment(x_0, FLIP, angle)
    on_gpu = augment(x_0.cuda(), FLIP.cuda(), angle.cuda())

    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=0)
