"""bits/dim against closed forms on Gaussian data and a true entropy; batches, processes, memory and the figure."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from functions.evaluation import bits_per_dim
from functions.evaluation.bits_per_dim import BoundOptions, evenly, measure_bits_per_dim, strata_of
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.support.errors import UserError
from functions.support.processes import SINGLE_PROCESS, Processes

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
MU, S = 0.2, 0.3  # of the Gaussian data


class GaussianDenoiser(nn.Module):
    """The best eps for x_0 ~ N(MU, S^2 I): E[x_0 | x_t] is linear in x_t."""

    def __init__(self, scheduler):
        super().__init__()
        self.a = scheduler.alphas_cumprod

    def forward(self, x_t, t):
        a = self.a[t].view(-1, 1, 1, 1)
        x_t = x_t.double()
        x_0 = MU + S**2 * a.sqrt() / (a * S**2 + 1 - a) * (x_t - a.sqrt() * MU)
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()


class LevelsDenoiser(nn.Module):
    """The best eps for pixels that are independent and take a few levels with given probabilities."""

    def __init__(self, scheduler, levels, probabilities):
        super().__init__()
        self.a, self.levels, self.log_p = scheduler.alphas_cumprod, levels, probabilities.log()

    def forward(self, x_t, t):
        a = self.a[t].view(-1, 1, 1, 1)
        x_t = x_t.double()
        distance = (x_t[..., None] - a.sqrt()[..., None] * self.levels).square()
        x_0 = ((self.log_p - distance / (2 * (1 - a[..., None]))).softmax(-1) * self.levels).sum(-1)
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()


def expected_terms(scheduler, variance):
    """(T,) bits/dim of L_t, t >= 1, for the best denoiser of Gaussian data, worked out by hand with NumPy."""
    beta = scheduler.betas.numpy()
    a = np.cumprod(1 - beta)
    before = np.append(1.0, a[:-1])
    v_q = beta * (1 - before) / (1 - a)
    v_p = v_q if variance == "small" else beta
    error = S**2 * (1 - a) / (a * S**2 + 1 - a)  # of x_0 given x_t
    mean_gap = (np.sqrt(before) * beta / (1 - a)) ** 2 * error
    with np.errstate(divide="ignore", invalid="ignore"):
        return 0.5 * (np.log(v_p / v_q) + v_q / v_p - 1 + mean_gap / v_p) / math.log(2)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_terms_equal_the_closed_form_on_gaussian_data(variance):
    scheduler = NoiseScheduler(40)
    x_0 = (MU + S * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))).float()
    model, options = Denoiser(GaussianDenoiser(scheduler), scheduler), BoundOptions(variance=variance, clip_x_0=False)
    result = measure_bits_per_dim(model, lambda i: x_0[i], np.arange(64), options)
    expected = expected_terms(scheduler, variance)
    sampled = x_0.numel() ** -0.5 * 5 * math.sqrt(2)  # of a mean of squared normals
    np.testing.assert_allclose(result.terms.mean(axis=0)[1:], expected[1:], rtol=sampled)
    a = scheduler.alphas_cumprod[-1].item()
    prior = 0.5 * (a * (S**2 + MU**2) + (1 - a) - 1 - math.log(1 - a)) / math.log(2)
    assert result.prior.mean() == pytest.approx(prior, rel=sampled)
    a = scheduler.alphas_cumprod.numpy()
    error = S**2 * (1 - a) / (a * S**2 + 1 - a)
    np.testing.assert_allclose(result.mse_x_0.mean(axis=0), error, rtol=sampled)
    np.testing.assert_allclose(result.mse_eps.mean(axis=0), error * a / (1 - a), rtol=sampled)


SMOOTH = torch.from_numpy(np.exp(-((LEVELS.numpy() - 0.1) ** 2) / (2 * 0.1**2)))
FOUR = torch.zeros(256, dtype=torch.float64)
FOUR[[0, 100, 101, 255]] = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)


@pytest.mark.parametrize(
    "weights, variance, gap", [(SMOOTH, "large", 0.3), (SMOOTH, "small", 1.0), (FOUR, "small", 1.0)]
)
def test_no_code_is_shorter_than_the_entropy(weights, variance, gap):
    """Independent pixels with known probabilities, and the best denoiser.

    Of the two variances the large one is right for data as wide as noise, the small one for a point (Section 3.2), and
    normals describe four levels badly: hence the gaps.
    """
    scheduler, p = NoiseScheduler(1000), weights[weights > 0] / weights.sum()
    levels = LEVELS[weights > 0]
    drawn = torch.multinomial(p, 32 * 48, replacement=True, generator=torch.Generator().manual_seed(0))
    x_0 = levels[drawn].view(32, 3, 4, 4).float()
    model = Denoiser(LevelsDenoiser(scheduler, levels, p), scheduler)
    result = measure_bits_per_dim(model, lambda i: x_0[i], np.arange(32), BoundOptions(t_stride=20, variance=variance))
    entropy = -(p * p.log2()).sum().item()
    assert entropy - 3 * result.standard_error < result.total < entropy + gap
    assert result.total == pytest.approx(result.rate + result.distortion)


def test_strides_are_unbiased():
    """The mean over many seeds is the full sum, whose noise is averaged too; its error is the one that is stated."""
    scheduler = NoiseScheduler(100)
    x_0 = (MU + S * torch.randn(400, 3, 4, 4, generator=torch.Generator().manual_seed(0))).float()
    model = Denoiser(GaussianDenoiser(scheduler), scheduler)
    full, some = (
        measure_bits_per_dim(model, lambda i: x_0[i], np.arange(400), BoundOptions(stride, 4096, clip_x_0=False))
        for stride in (1, 20)
    )
    assert some.terms.shape[1] < 30
    assert full.standard_error < some.standard_error < 10 * full.standard_error
    assert abs(some.total - full.total) < 4 * some.standard_error


def test_strata_cover_every_t_once():
    for timesteps, stride in ((2, 1), (100, 7), (1000, 1), (1000, 50), (1000, 5000)):
        strata = strata_of(timesteps, stride)
        assert [t for stratum in strata for t in stratum] == list(range(timesteps))
        assert strata[0] == range(1) and max(map(len, strata)) <= stride
    assert len(strata_of(1000, 1)) == 1000


HELD_OUT = np.arange(2, 10)


def small_measurement(indices=HELD_OUT, seed=0, batch_size=8, processes=SINGLE_PROCESS, network=None):
    scheduler = NoiseScheduler(40)
    x_0 = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    model = Denoiser(network or GaussianDenoiser(scheduler), scheduler)
    return measure_bits_per_dim(model, lambda i: x_0[i], indices, BoundOptions(3, batch_size, seed), processes)


def test_a_term_depends_on_seed_image_and_t_alone():
    all_images, again, others = small_measurement(), small_measurement(), small_measurement(seed=1)
    np.testing.assert_array_equal(all_images.terms, again.terms)
    assert (all_images.terms != others.terms).all()
    one = small_measurement(np.array([5]), batch_size=3)
    np.testing.assert_allclose(one.terms[0], all_images.terms[3], rtol=1e-12)
    assert math.isnan(one.standard_error) and one.facts()["standard_error"] is None
    half = small_measurement(evenly(HELD_OUT, 4))
    np.testing.assert_allclose(half.terms, all_images.terms[::2], rtol=1e-12)


def test_what_does_not_fit_in_memory_is_halved_and_gives_the_same_terms(capsys):
    best, sizes = GaussianDenoiser(NoiseScheduler(40)), []

    class Small(nn.Module):
        """Has memory for so many images."""

        def __init__(self, most):
            super().__init__()
            self.most = most

        def forward(self, x_t, t):
            if len(x_t) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            sizes.append(len(x_t))
            return best(x_t, t)

    whole, halved = small_measurement(), small_measurement(network=Small(3))
    np.testing.assert_allclose(halved.terms, whole.terms, rtol=1e-12)
    np.testing.assert_allclose(halved.mse_eps, whole.mse_eps, rtol=1e-12)
    errors = capsys.readouterr().err
    assert "out of memory with 8 images at a time: going on with 4" in errors
    assert errors.count("going on with 2") == 1  # later batches are not tried whole
    assert sum(sizes) == whole.terms.size and max(sizes) == 2
    with pytest.raises(UserError, match="no memory for a single image at a time on cpu"):
        small_measurement(network=Small(0))


def test_two_processes_get_the_numbers_of_one():
    parts = []

    class Part(Processes):
        def sum_(self, tensor):
            parts.append(tensor)
            return tensor

    for rank in range(2):
        small_measurement(processes=Part(rank, 2))
    alone = small_measurement()
    np.testing.assert_array_equal((parts[0] + parts[1])[1].view(alone.terms.shape).numpy(), alone.terms)
    assert all((part != 0).any(dim=0).sum() < alone.terms.size for part in parts)


def test_no_images_and_unknown_variances_are_errors():
    with pytest.raises(ValueError, match="0 images"):
        small_measurement(np.arange(0))
    scheduler = NoiseScheduler(40)
    model = Denoiser(GaussianDenoiser(scheduler), scheduler)
    with pytest.raises(ValueError, match="'middle'"):
        measure_bits_per_dim(model, lambda i: torch.zeros(1, 3, 4, 4), np.arange(1), BoundOptions(variance="middle"))


def test_the_figure_shows_the_numbers(tmp_path, monkeypatch):
    result, figures = small_measurement(), []
    monkeypatch.setattr(bits_per_dim, "save_figure", lambda figure, path: figures.append(figure))
    bits_per_dim.plot_bits_per_dim(result, tmp_path / "bpd.png", "ten images")
    terms, rate, errors = figures[0].axes
    np.testing.assert_allclose(terms.lines[0].get_ydata(), result.terms.mean(axis=0))
    assert rate.lines[0].get_xdata()[0] == pytest.approx(result.rate)  # at the end of the way, all but L_0 is read
    np.testing.assert_allclose(rate.lines[0].get_ydata(), 127.5 * np.sqrt(result.mse_x_0.mean(axis=0)))
    np.testing.assert_allclose(errors.lines[0].get_ydata(), result.mse_eps.mean(axis=0))
    assert f"{result.total:.3f} bits/dim" in figures[0].get_suptitle()
    bits_per_dim.plt.close(figures[0])
