"""A training of details: pieces of photos, given at half their size."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import train
from config import EXPERIMENTS, ConfigError
from data.arrays import from_array
from data.pixels import to_model_range
from functions.denoiser import Denoiser
from functions.noise_scheduler import build_scheduler
from functions.super_resolution.details import STD, details
from functions.super_resolution.pieces import LOW_NOISE, NOISY_PARTS, NOISY_WHOLES, DetailsData
from functions.training.opening import open_run
from functions.training.recorder import sample_grid
from functions.training.validation import validation_losses
from tests.conftest import (
    CPU,
    DETAILS,
    call,
    during,
    normal,
    only_in,
    refused,
    shrunk,
    terminate,
    train_tiny,
    words,
)
from tests.kill import assert_same_run

SMALL = dict(
    image_size=32,
    dim_multiply=(1, 2),
    base_dim=8,
    norm_groups=2,
    batch_size=10,
    gradient_accumulation=4,
)


def data_of(**changes) -> DetailsData:
    """Return the data of a training of 200 random images, 40 of them in a step."""
    experiment = EXPERIMENTS["ffhq-details"].override(**SMALL | changes)
    size = experiment.model.image_size
    images = np.random.default_rng(0).integers(0, 256, (200, size, size, 3), np.uint8)
    return DetailsData(experiment, from_array("noise", images), CPU, {})


def test_what_is_noised_are_details_of_shrunk_images_or_of_parts_at_multiples_of_8():
    data = data_of(condition_dropout=0.0, use_augmentation=False)
    draws = data.draw(3)
    x_0 = to_model_range(data.batch(3)[0])
    noised, inputs = data.augment(x_0, {}, draws, 0.0)
    assert noised.shape == draws.noise.shape == (40, 3, 16, 16)
    assert 5 < draws.is_part.sum() < 25
    assert {*draws.corner.flatten().tolist()} == {0, 8, 16}
    pieces = shrunk(x_0).clamp(-1, 1)
    for i in draws.is_part.nonzero().flatten():
        row, column = draws.corner[i]
        pieces[i] = x_0[i, :, row : row + 16, column : column + 16]
    assert_close(noised, details(pieces) / STD, atol=1e-4, rtol=0)
    assert_close(details(draws.noise), draws.noise, atol=1e-5, rtol=0)
    # The network gets its half, with noise in half of the draws.
    noise = (inputs["low"] - shrunk(pieces)).std((1, 2, 3))
    assert_close(noise, draws.low_std, atol=0.01, rtol=0.2)
    assert 10 < (draws.low_std == 0).sum() < 30
    assert draws.low_std.max() <= LOW_NOISE


def test_flips_and_the_missing_small_image_are_as_the_draws_say():
    data = data_of()
    draws = data.draw(0)
    x_0 = normal(0, 40, 3, 32, 32).clamp(-1, 1)
    flipped = torch.where(draws.flip[:, None, None, None], x_0.flip(-1), x_0)
    pieces, inputs = data.augment(x_0, {}, draws, 0.0)
    upright = data_of(use_augmentation=False)
    assert torch.equal(pieces, upright.augment(flipped, {}, draws, 0.0)[0])
    dropped = inputs["low"].abs().sum((1, 2, 3)) == 0
    assert torch.equal(dropped, draws.low_drop < 0.1)
    assert 0 < dropped.sum() < 12


def test_noise_is_even_in_log_snr_and_more_often_large_for_whole_images():
    data = data_of()
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for is_part, share in (
        (True, NOISY_PARTS),
        (False, NOISY_WHOLES),
    ):
        log_snr = data.log_snr[data.times_at(u, torch.full(u.shape, is_part))]
        assert log_snr.min() >= -1.46 and log_snr.max() <= 6.52
        assert (log_snr < 1).float().mean() == pytest.approx(share, abs=0.01)
        # Within each interval the middle divides the draws in two.
        for low, high in ((-1.45, 1.0), (1.0, 6.5)):
            inside = log_snr[(log_snr > low) & (log_snr < high)]
            assert (inside < (low + high) / 2).float().mean() == pytest.approx(0.5, abs=0.02)


class Layer(torch.nn.Conv2d):
    """A network that looks at the noisy details alone."""

    def forward(self, x, t, low):
        return super().forward(x)


def test_a_validation_has_the_same_pieces_whatever_the_batch():
    network = Layer(3, 3, 3, padding=1)
    losses = []
    for batch_size in (10, 7):
        data = data_of(batch_size=batch_size)
        denoiser = Denoiser(network, build_scheduler(vars(data.config)), "v")
        losses.append(validation_losses({"": denoiser}, data))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, nan_ok=True)
    assert losses[0]["val_loss"] > 0.1


@pytest.mark.parametrize("changes", [{"image_size": 30}, {"labels": True}])
def test_other_sizes_and_labels_are_refused(changes):
    with refused("multiple of 4, without labels", ConfigError):
        data_of(**changes)


@pytest.mark.slow
def test_a_resumed_run_of_details_is_the_uninterrupted_one(details_run, pictures, tmp_path, capsys):
    with pytest.raises(SystemExit, match="75"), during(7, terminate):
        train_tiny(pictures, tmp_path, DETAILS)
    run = only_in(tmp_path)
    call(train, "--resume", run)
    assert f"sample from it: python edit.py enlarge FILE {run}" in capsys.readouterr().out
    assert_same_run(run, details_run)


def test_a_grid_shows_held_out_images_that_were_shrunk_to_a_quarter(
    details_run, pictures, tmp_path
):
    """So it shrinks to them, but for clipping, with the weights of --init."""
    flags = ["--init", details_run, "--runs", tmp_path, "--diffusion.dataset-name", pictures]
    with open_run(words("faces", *flags), "") as run:
        grid = sample_grid(run)
        images, _ = run.data.gather(run.data.split.val_indices)
    assert len(grid) == run.config.grid_images == 16
    quarter = shrunk(shrunk(to_model_range(images)))
    assert (shrunk(shrunk(grid[:4])) - quarter).abs().mean() < 0.05
    # Those that come again have other noise.
    assert 0.01 < (grid[:4] - grid[4:8]).abs().mean() < 0.5
