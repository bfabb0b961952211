"""EMA, draws, validation, metrics and learning rate: each beside its definition."""

import hashlib
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import EXPERIMENTS, Experiment
from data.augmentation import augment
from data.batches import ImageFeeder
from data.datasets import load_images
from functions.denoiser import Denoiser
from functions.ema import update_ema
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from functions.saved.loading import load_denoiser
from functions.support.random_numbers import image_noise, seed_of
from functions.training.data import TrainingData
from functions.training.draws import training_draws
from functions.training.metrics import (
    COLUMNS,
    MetricsLog,
    TrainingWindow,
    plot_losses,
    read_metrics,
)
from functions.training.validation import validation_losses
from tests.conftest import CPU, HELD_OUT, LittleMemory, newest, normal


def test_the_noised_image_is_in_float32_whatever_the_network_computes_in():
    """In bfloat16 x_t would lose the noise at t = 0, and this network's eps would be wrong."""
    scheduler = NoiseScheduler(1000)
    x_0 = torch.rand(4, 3, 8, 8) * 2 - 1
    denoiser = Denoiser(lambda x_t, t: scheduler.predict_eps(x_t, t, x_0), scheduler)
    with torch.autocast("cpu", torch.bfloat16):
        losses = denoising_loss(denoiser, x_0, torch.arange(4), torch.randn_like(x_0))
    assert losses.max() < 1e-6


@pytest.mark.parametrize("ramp", [True, False])
def test_ema_is_the_weighted_sum_of_its_definition(ramp):
    decay = 0.3
    # The average begins as the initial weight.
    average = torch.tensor([1.0])
    expected = 1.0
    for step, value in enumerate([5.0, -2.0, 7.0, 3.0]):
        weight = torch.tensor([value])
        update_ema([average], [weight], step, decay, ramp)
        d = min(decay, (1 + step) / (10 + step)) if ramp else decay
        expected = d * expected + (1 - d) * value
        assert average.item() == pytest.approx(expected, rel=1e-6)
        # The weights themselves stay.
        assert weight.item() == value


def test_draws_depend_on_seed_and_step_alone():
    # Between the two draws of the same step there are draws of others.
    places = ((0, 7), (0, 6), (0, 8), (1, 7), (0, 7))
    draws = [training_draws(*place, 64, (3, 4, 4), 1000, CPU) for place in places]
    for first, *others, again in zip(*draws, strict=True):
        assert torch.equal(first, again)
        assert not any(torch.equal(first, other) for other in others)


def test_no_two_images_of_a_seed_have_the_same_noise():
    """PyTorch's generator for CPUs uses 32 bits of a seed, so these must differ."""
    seeds = {seed_of(0, "image", i) for i in range(50_000)}
    assert len(seeds) == 50_000
    assert max(seeds) < 2**32

    # This is the definition: the hash of seed and purpose, plus the index.
    start = int.from_bytes(hashlib.blake2b(b"3/image", digest_size=4).digest(), "little")
    expected = normal((start + 5) % 2**32, 3, 4, 4)
    assert torch.equal(image_noise(3, [5], (3, 4, 4), CPU, "image")()[0], expected)


def test_draws_have_their_distributions():
    """Means, variances and counts lie within 4 of their standard errors."""
    N = 20_000
    draws = training_draws(0, 0, N, (1, 2, 2), 10, CPU)
    counts = torch.bincount(draws.t, minlength=10)
    assert counts.shape == (10,)
    assert (counts - N / 10).abs().max() < 4 * math.sqrt(N * 0.1 * 0.9)
    assert draws.rotation.min() >= -1
    assert draws.rotation.max() < 1
    # The variance of a uniform number in [-1, 1) is 1/3.
    for values, mean, variance in (
        (draws.noise, 0, 1),
        (draws.noise.square(), 1, 2),
        (draws.flip.float(), 0.5, 0.25),
        (draws.rotation, 0, 1 / 3),
        (draws.condition_drop, 0.5, 1 / 12),
    ):
        assert abs(values.mean() - mean) < 4 * math.sqrt(variance / values.numel())


def test_validation_is_the_mean_over_fixed_triples_whatever_the_batch_size():
    """A network that predicts no noise at all has the mean square of the noise as its loss.

    Beside it is one of v. Its error of eps is alpha_bar times its loss, which is 1 or more.
    """
    images = torch.randint(256, (12, 4, 4, 3), dtype=torch.uint8)
    seen_t = []
    seen_indices = []

    def zero(x_t, t):
        seen_t.extend(t.tolist())
        return torch.zeros_like(x_t)

    def images_of(indices):
        seen_indices.extend(indices)
        return images[indices], {}

    def measure(**changes):
        """Return loss and error of eps on images 3, 5 and 9, of each network."""
        config = replace(EXPERIMENTS["faces"].diffusion, validation_samples=48, **changes)
        denoiser = Denoiser(LittleMemory(zero, 48), NoiseScheduler(960))
        of_v = replace(denoiser, objective="v")
        indices = np.array([3, 5, 9])
        return validation_losses([denoiser, of_v], images_of, indices, config)

    # The square of 48 * 48 standard normal numbers is 1 on average, with this standard error.
    whole = measure(batch_size=48, seed=0)
    (loss, eps_error, *_), (loss_of_v, eps_error_of_v, *_) = whole
    assert eps_error == loss == pytest.approx(1, abs=4 * math.sqrt(2 / (48 * 48)))
    assert 0 < eps_error_of_v < loss_of_v != loss

    # The t are the middles of 48 strata of 20 each, and all images count equally often.
    assert sorted(seen_t) == sorted([*range(10, 960, 20)] * 2)
    assert sorted(seen_indices) == [3] * 16 + [5] * 16 + [9] * 16
    np.testing.assert_allclose(measure(batch_size=7, seed=0), whole, rtol=1e-6)
    assert measure(batch_size=7, seed=1)[0][0] != loss


@pytest.mark.parametrize(
    "count, expected",
    [
        # The middles of the strata are 83, 250, 416, 583, 750 and 916.
        (6, [83, (250 + 416) / 2, 583, (750 + 916) / 2]),
        (1, [math.nan, math.nan, 500, math.nan]),
    ],
)
def test_the_loss_of_a_quarter_is_the_mean_of_its_triples(count, expected, monkeypatch):
    """The losses are made to be the t."""
    monkeypatch.setattr(
        "functions.training.validation.denoising_loss", lambda denoiser, x_0, t, eps: t.float()
    )
    config = replace(EXPERIMENTS["faces"].diffusion, validation_samples=count, batch_size=4)
    denoiser = Denoiser(LittleMemory(None, 0), NoiseScheduler(1000))
    gather = ImageFeeder(np.zeros((2, 4, 4, 3), np.uint8), CPU).gather
    [(*_, q0, q1, q2, q3)] = validation_losses([denoiser], gather, np.arange(2), config)
    assert [q0, q1, q2, q3] == pytest.approx(expected, nan_ok=True)


def test_a_run_validates_on_the_images_that_are_held_out(tiny_run, pictures):
    """They are 4 of the 50 pictures."""
    config = Experiment.from_dict(newest(tiny_run)["config"]).diffusion
    gather = ImageFeeder(load_images(pictures, 16).images, CPU).gather
    [(loss, _, *quarters)] = validation_losses(
        [load_denoiser(tiny_run)], gather, np.array(HELD_OUT), config
    )
    row = read_metrics(tiny_run / "metrics.csv")[-1]
    assert row["val_loss_ema"] == pytest.approx(loss, rel=1e-5)
    assert [row[f"val_loss_q{q}"] for q in range(4)] == pytest.approx(quarters, rel=1e-5)


@pytest.mark.slow
def test_metrics_go_to_csv_and_tensorboard_and_resume_cuts_what_is_done_again(tmp_path):
    """A row that a kill has cut short is left out, too."""
    path = tmp_path / "metrics.csv"
    log = MetricsLog(tmp_path)
    log.write(step=10, loss=1 / 10)
    log.write(step=20, loss=1 / 20, val_loss=0.5)
    log.write(step=30, loss=1 / 30, skipped_steps=0)
    log.close()

    whole = path.read_text()
    for cut in range(2, len(whole.splitlines()[-1]) + 1):
        path.write_text(whole[:-cut])
        assert [row["step"] for row in read_metrics(path)] == [10, 20]
    # An editor has dropped the last newline, and the row is whole.
    path.write_text(whole[:-1])
    MetricsLog(tmp_path, resume_step=30).close()
    assert path.read_text() == whole
    assert not [*tmp_path.glob("metrics-*.csv")]

    # TensorBoard reads files in the order of their names, which begin with the second of their
    # making.
    time.sleep(1.1)
    log = MetricsLog(tmp_path, resume_step=20)
    log.write(step=30, loss=0.25)
    log.close()

    rows = [(row["step"], row["loss"], row["val_loss"]) for row in read_metrics(path)]
    assert rows == [(10, 0.1, None), (20, 0.05, 0.5), (30, 0.25, None)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, round(event.value, 6)) for event in events.Scalars("loss")]
    assert losses == [(10, 0.1), (20, 0.05), (30, 0.25)]


@pytest.mark.parametrize("foreign", [b"15,1.5\n", b"15" + b"," * (len(COLUMNS) - 1) + b"\0\n"])
@pytest.mark.parametrize("header", ["", "old,"])
def test_metrics_of_other_columns_or_lines_are_moved_aside(foreign, header, tmp_path, capsys):
    """Their curves can be drawn all the same. A spreadsheet marks the start and ends its lines."""
    path = tmp_path / "metrics.csv"
    header = (header + ",".join(COLUMNS)).encode()
    row = b"10" + b"," * (header.count(b",") - 1) + b",0.25"
    damaged = b"\r\n".join([b"\xef\xbb\xbf" + header, row, foreign, row])
    path.write_bytes(damaged)
    assert [row["val_loss_q3"] for row in read_metrics(path)] == [0.25, 0.25]
    plot_losses(path, tmp_path / "losses.png")

    MetricsLog(tmp_path, resume_step=20).close()
    assert read_metrics(path) == []
    (aside,) = tmp_path.glob("metrics-*.csv")
    assert aside.read_bytes() == damaged
    assert str(aside) in capsys.readouterr().out


def test_the_window_averages_over_images_and_its_clock_can_stand_still(monkeypatch):
    """A step has two images, so a window's means are its sums by twice its good steps."""
    clock = [100.0]
    monkeypatch.setattr("functions.training.metrics.time.perf_counter", lambda: clock[0])
    window = TrainingWindow(CPU, images_per_step=2)

    def add(seconds, loss, skipped=0):
        """Add a step that took so long; its sum of the errors of eps is a quarter of the loss."""
        clock[0] += seconds
        window.add(torch.tensor([loss, loss / 4, 2]), torch.tensor(float(skipped)))

    def read():
        row = window.read(torch.tensor(0.5))
        assert row["grad_norm"] == 0.5
        return [row[name] for name in ("loss", "eps_error", "images_per_second", "skipped_steps")]

    add(2, 3.0)
    with window.paused():
        clock[0] += 50
    # A skipped step counts for the speed, but its loss does not count.
    add(0, math.nan, skipped=1)
    add(1, 6.0)
    # The training loop reads within a pause.
    with window.paused():
        assert read() == [9 / 4, 9 / 16, 2.0, 1]
        clock[0] += 9

    # There is no mean if all steps were skipped.
    add(1, math.inf, skipped=1)
    assert np.array_equal(read(), [math.nan, math.nan, 2.0, 2], equal_nan=True)
    # The steps skipped since the last good one
    add(1, math.inf, skipped=1)
    assert window.skipped.tolist() == [3, 2]
    add(1, 2.0)
    assert window.skipped.tolist() == [3, 0]


def test_learning_rate_decays_rotation_stops_for_the_last_tenth_and_labels_are_dropped():
    full = EXPERIMENTS["ffhq-full"].diffusion
    faces = EXPERIMENTS["faces"].diffusion
    # The first warms up over 5000 steps, and then its rate stays.
    rates = {0: 3e-5 / 5001, 2500: 3e-5 * 2501 / 5001, 5000: 3e-5, 10**6 - 1: 3e-5}
    assert {n: full.rate_of(n, 10**6) for n in rates} == pytest.approx(rates)

    # The second warms up, too, and has half a cosine.
    for step in (200, 500, 999):
        half_cosine = (1 + math.cos(math.pi * step / 1000)) / 2
        expected = pytest.approx(faces.learning_rate * half_cosine)
        assert faces.rate_of(step, 1000) == expected

    # Label 2 stands for none.
    facts = {"label_names": ["a", "b"]}
    data = SimpleNamespace(config=replace(full, condition_dropout=0.25), facts=facts)
    draws = training_draws(0, 0, 40, (3, 8, 8), 1000, CPU)
    labels = torch.arange(40) % 2
    for done, angle in ((0, 3), (0.899, 3), (0.9, 0), (0.999, 0)):
        expected = augment(draws.noise, draws.flip, angle * draws.rotation)
        x_0, inputs = TrainingData.augment(data, draws.noise, {"label": labels}, draws, done)
        assert torch.equal(x_0, expected)
        assert torch.equal(inputs["label"], labels.masked_fill(draws.condition_drop < 0.25, 2))
