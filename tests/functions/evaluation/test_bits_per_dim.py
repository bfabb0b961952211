"""bits/dim against closed forms on Gaussian data and a true entropy; batches, processes and memory."""

import math

import numpy as np
import pytest
import torch

from functions.evaluation.bits_per_dim import BoundOptions, evenly, measure_bits_per_dim
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.support.processes import SINGLE_PROCESS
from tests.conftest import LittleMemory
from tests.functions.evaluation.parts import of_each_process
from tests.functions.known_denoisers import Gaussian, double, ideal_model

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
MU, S = 0.2, 0.3  # of the Gaussian data


def gaussian_images(count, size):
    return MU + S * torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def best_denoiser(scheduler, most=64**2):
    """The best for pixels that are N(MU, S^2); it has memory for so many images."""
    model = ideal_model(Gaussian(double(MU), double(S)), scheduler)
    return Denoiser(LittleMemory(model, most), scheduler)


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
    scheduler, x_0 = NoiseScheduler(40), gaussian_images(64, 8)
    options = BoundOptions(variance=variance, clip_x_0=False)
    result = measure_bits_per_dim(
        best_denoiser(scheduler), lambda i: x_0[i], np.arange(64), options
    )
    sampled = x_0.numel() ** -0.5 * 5 * math.sqrt(2)  # of a mean of squared normals
    np.testing.assert_allclose(
        result.terms.mean(axis=0)[1:], expected_terms(scheduler, variance)[1:], rtol=sampled
    )
    a = scheduler.alphas_cumprod.numpy()
    prior = 0.5 * (a[-1] * (S**2 + MU**2) + (1 - a[-1]) - 1 - math.log(1 - a[-1])) / math.log(2)
    assert result.prior.mean() == pytest.approx(prior, rel=sampled)
    error = S**2 * (1 - a) / (a * S**2 + 1 - a)
    np.testing.assert_allclose(result.mse_x_0.mean(axis=0), error, rtol=sampled)


SMOOTH = torch.exp(-((LEVELS - 0.1) ** 2) / (2 * 0.1**2))
FOUR = double([0.4] + [0] * 99 + [0.1, 0.2] + [0] * 153 + [0.3])  # normals describe it badly


@pytest.mark.parametrize(
    ("weights", "variance", "gap"),
    [(SMOOTH, "large", 0.3), (SMOOTH, "small", 1.0), (FOUR, "small", 1.0)],
)
def test_no_code_is_shorter_than_the_entropy(weights, variance, gap):
    """Up to gaps: the large variance is right for data as wide as noise, the small one for a point (Section 3.2)."""
    scheduler, p, levels = (
        NoiseScheduler(1000),
        weights[weights > 0] / weights.sum(),
        LEVELS[weights > 0],
    )

    def eps(x_t, t):
        a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        squares = (x_t[..., None] - a.sqrt()[..., None] * levels).square()
        x_0 = ((p.log() - squares / (2 * (1 - a[..., None]))).softmax(-1) * levels).sum(-1)
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()

    drawn = torch.multinomial(
        p, 16 * 48, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    x_0 = levels[drawn].view(16, 3, 4, 4).float()
    denoiser, options = (
        Denoiser(LittleMemory(eps, 64), scheduler),
        BoundOptions(t_stride=20, variance=variance),
    )
    result = measure_bits_per_dim(denoiser, lambda i: x_0[i], np.arange(16), options)
    entropy = -(p * p.log2()).sum().item()
    assert entropy - 3 * result.standard_error < result.total < entropy + gap
    assert result.total == pytest.approx(result.rate + result.distortion)


def test_strides_are_unbiased():
    """Over many images the sum is the full one within the error that is stated, which is larger for fewer t."""
    scheduler, x_0 = NoiseScheduler(100), gaussian_images(100, 4)
    measure = lambda options: measure_bits_per_dim(
        best_denoiser(scheduler), lambda i: x_0[i], np.arange(100), options
    )
    full, some = map(
        measure,
        (BoundOptions(1, batch_size=2048, clip_x_0=False), BoundOptions(10, clip_x_0=False)),
    )
    assert full.lengths.tolist() == [1] * 100 and len(some.lengths) < 30
    assert some.lengths.sum() == 100 and some.lengths[0] == 1 and some.lengths.max() == 10
    assert full.standard_error < some.standard_error < 10 * full.standard_error
    assert abs(some.total - full.total) < 4 * some.standard_error


HELD_OUT = np.arange(2, 10)


def small_measurement(indices=HELD_OUT, processes=SINGLE_PROCESS, most=64, **options):
    """Of some of ten images, by a network that has memory for so many."""
    scheduler = NoiseScheduler(40)
    x_0 = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    options = BoundOptions(**{"t_stride": 3, "batch_size": 8, **options})
    return measure_bits_per_dim(
        best_denoiser(scheduler, most), lambda i: x_0[i], indices, options, processes
    )


def test_a_term_depends_on_seed_image_and_t_alone_and_two_processes_get_the_numbers_of_one():
    all_images, again, others = small_measurement(), small_measurement(), small_measurement(seed=1)
    np.testing.assert_array_equal(all_images.terms, again.terms)
    assert (all_images.terms != others.terms).all()
    one = small_measurement(np.array([5]), batch_size=3)
    np.testing.assert_allclose(one.terms[0], all_images.terms[3], rtol=1e-12)
    assert math.isnan(one.standard_error) and one.facts()["standard_error"] is None
    half = small_measurement(evenly(HELD_OUT, 4))
    np.testing.assert_allclose(half.terms, all_images.terms[::2], rtol=1e-12)
    halved = small_measurement(most=3)  # batches of 8 that do not fit
    np.testing.assert_allclose(halved.terms, all_images.terms, rtol=1e-12)
    np.testing.assert_allclose(halved.mse_x_0, all_images.mse_x_0, rtol=1e-12)
    parts, terms = (
        of_each_process(2, lambda processes: small_measurement(processes=processes)),
        all_images.terms,
    )
    np.testing.assert_array_equal((parts[0] + parts[1])[1].view(terms.shape).numpy(), terms)
    assert all((part != 0).any(dim=0).sum() < terms.size for part in parts)


@pytest.mark.parametrize(
    ("indices", "variance", "message"), [([], "small", "0 images"), ([5], "middle", "'middle'")]
)
def test_no_images_and_unknown_variances_are_errors(indices, variance, message):
    with pytest.raises(ValueError, match=message):
        small_measurement(np.array(indices, int), variance=variance)
