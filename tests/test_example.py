"""example.py computes what the rest of the repository computes, and its command draws pictures."""

from unittest import mock

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import example
from functions.denoiser import Denoiser
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddpm_sample
from tests.conftest import ROOT, call, normal

SCHEDULER = NoiseScheduler(example.T)
# The page counts t as the paper does, from 1, and the repository from 0.
DENOISER = Denoiser(lambda x_t, t: guess(x_t, t + 1), SCHEDULER)


def guess(x_t, t):
    """Guess some noise in x_t at timesteps t (B,), as a network would."""
    return x_t * (0.9 + 0.1 * t.cos()).view(-1, 1, 1, 1)


def test_example_has_the_loss_of_the_repository():
    x_0 = normal(0, 5, 3, 4, 4)
    torch.manual_seed(3)
    loss = example.loss_of(guess, x_0)
    torch.manual_seed(3)
    t = torch.randint(example.T, (5,))
    losses = denoising_loss(DENOISER, x_0, t, torch.randn_like(x_0))
    assert_close(loss, losses["loss"].mean())


def test_example_samples_as_the_repository():
    x_T = normal(0, 2, 3, 4, 4)
    torch.manual_seed(3)
    samples = example.sample(guess, x_T)
    torch.manual_seed(3)
    assert_close(samples, ddpm_sample(DENOISER, x_T))


# The learning rate of the last step is nearly 0.
@mock.patch.multiple(example, STEPS=2, EMA_DECAY=0.7)
def test_example_averages_the_weights():
    model = torch.nn.Conv2d(3, 3, 1)
    model.forward = lambda x_t, t: model._conv_forward(x_t, model.weight, model.bias)
    before = model.weight.detach().clone()
    average, _ = example.train(model, normal(1, 10, 3, 8, 8))
    assert (model.weight - before).abs().min() > 1e-4
    assert_close(average.weight, 0.49 * before + 0.51 * model.weight, rtol=0, atol=1e-6)


@pytest.mark.slow
@mock.patch.multiple(example, STEPS=3, SIZE=8, DIMS=(8, 16), BATCH_SIZE=2, T=10)
def test_example_trains_on_a_folder_of_two_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").touch()
    Image.new("RGB", (30, 20), "white").save(folder / "a.JPG")
    # One is transparent, and so white, but for the left half of its middle.
    picture = Image.new("RGBA", (20, 60))
    picture.paste("black", (0, 20, 10, 40))
    picture.save(folder / "b.png")

    images = example.load_images(folder)
    assert images.shape == (4, 3, 8, 8)
    left_and_right = {(image[0, 4, 0].item(), image[2, 4, -1].item()) for image in images}
    assert left_and_right == {(1, 1), (-1, 1), (1, -1)}

    call(example, folder)
    # Six images of 8 pixels, three times as large, make a side.
    assert Image.open("example.png").size == (144, 144)
    names = {path.name for path in tmp_path.glob("*.*")}
    assert names == {"example.png", "example_loss.png"}
    assert names <= {*(ROOT / ".gitignore").read_text().split()}
