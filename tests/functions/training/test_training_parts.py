"""Loss, EMA, draws, validation, metrics, learning rate: each against what it should be by definition."""

import copy
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.testing import assert_close

from config import EXPERIMENTS
from data.augmentation import rotation_limit
from functions.ema import update_ema
from functions.losses import noise_prediction_loss
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.support.processes import SINGLE_PROCESS
from functions.support.random_numbers import ImageNoise, seed_of, training_draws
from functions.training.metrics import MetricsLog, TrainingWindow, read_metrics
from functions.training.validation import validation_loss
from train import learning_rate


def test_loss_of_known_predictions():
    scheduler = NoiseScheduler(1000)
    x_0, noise, t = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    assert_close(noise_prediction_loss(lambda x, t: torch.zeros_like(x), scheduler, x_0, t, noise),
                 noise.square().mean(dim=(1, 2, 3)))  # fmt: skip
    knows_x_0 = lambda x_t, t: scheduler.predict_eps(x_t, t, x_0)
    losses = noise_prediction_loss(knows_x_0, scheduler, x_0, t, noise)
    assert losses.shape == (4,)
    assert losses.max() < 1e-6


def test_the_noised_image_is_float32_whatever_the_model_computes_in():
    seen = []

    def model(x_t, t):
        seen.append(x_t.dtype)
        return nn.functional.conv2d(x_t, torch.zeros(3, 3, 1, 1))  # bfloat16 under autocast

    x_0 = torch.zeros(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        losses = noise_prediction_loss(model, NoiseScheduler(1000), x_0, torch.tensor([0, 5]), torch.randn(2, 3, 4, 4))
    assert seen == [torch.float32]
    assert losses.dtype == torch.float32


def test_ema_is_the_weighted_sum_of_its_definition():
    model = nn.Linear(1, 1)
    model.weight.data.fill_(1.0)
    ema_model = copy.deepcopy(model)
    values, decay = [5.0, -2.0, 7.0, 3.0], 0.3
    expected = 1.0  # the initial weight
    for step, value in enumerate(values):
        model.weight.data.fill_(value)
        update_ema(ema_model, model, step, decay)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * value
        assert ema_model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == values[-1]


def test_draws_depend_on_seed_and_step_alone():
    def draw(seed, step):
        return training_draws(seed, step, 6, (3, 4, 4), 1000, "cpu")

    torch.manual_seed(1)
    first = draw(0, 7)
    torch.manual_seed(2)
    draw(0, 6)
    again = draw(0, 7)
    for name in ("t", "noise", "flip", "tilt"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.noise, draw(0, 8).noise)
    assert not torch.equal(first.noise, draw(1, 7).noise)


def test_draws_have_their_distributions():
    draws = training_draws(0, 0, 20_000, (1, 2, 2), 10, "cpu")
    counts = torch.bincount(draws.t, minlength=10)
    assert counts.shape == (10,)
    assert (counts - 2000).abs().max() < 4 * math.sqrt(20_000 * 0.1 * 0.9)
    n = draws.noise.numel()
    assert abs(draws.noise.mean()) < 4 / math.sqrt(n)
    assert abs(draws.noise.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(draws.flip.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(20_000)
    assert draws.tilt.min() >= -1
    assert draws.tilt.max() < 1
    assert abs(draws.tilt.mean()) < 4 / math.sqrt(3 * 20_000)


def test_seeds_are_stable_and_apart():
    assert seed_of(0, "training", 1) == seed_of(0, "training", 1)
    parts = [(seed, what, step) for seed in range(20) for what in ("training", "image") for step in range(50)]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert seed_of(1, 23) != seed_of(12, 3)
    assert all(0 <= seed_of(*p) < 2**63 for p in parts)


def test_an_images_noise_does_not_depend_on_its_batch():
    together = ImageNoise(3, range(5), (3, 4, 4))
    apart = [ImageNoise(3, [i], (3, 4, 4)) for i in range(5)]
    for _ in range(3):
        assert torch.equal(together.draw(), torch.cat([one.draw() for one in apart]))


def test_validation_is_the_mean_over_fixed_triples_whatever_the_batch_size():
    scheduler = NoiseScheduler(1000)
    images = torch.randint(256, (7, 4, 4, 3), dtype=torch.uint8)
    seen = []

    class Zero(nn.Module):
        def forward(self, x_t, t):
            seen.extend(t.tolist())
            return torch.zeros_like(x_t)

    def measure(batch_size, samples=50, seed=0):
        config = replace(EXPERIMENTS["faces"].diffusion, validation_samples=samples, batch_size=batch_size, seed=seed)
        return validation_loss(Denoiser(Zero(), scheduler), lambda indices: images[indices], np.arange(7), config,
                               SINGLE_PROCESS)  # fmt: skip

    loss = measure(50)
    assert loss == pytest.approx(1, abs=4 * math.sqrt(2 / (50 * 48)))  # the noise's own variance
    assert sorted(seen) == list(range(10, 1000, 20))  # the middle of each of 50 strata
    assert measure(8) == pytest.approx(loss, rel=1e-6)
    assert measure(8, seed=1) != loss


def test_validation_uses_every_image_equally_often():
    used = []

    def images_of(indices):
        used.extend(indices)
        return torch.zeros(len(indices), 4, 4, 3, dtype=torch.uint8)

    class Zero(nn.Module):
        def forward(self, x_t, t):
            return x_t

    config = replace(EXPERIMENTS["faces"].diffusion, validation_samples=12, batch_size=5)
    validation_loss(Denoiser(Zero(), NoiseScheduler(1000)), images_of, np.array([3, 5, 9]), config, SINGLE_PROCESS)
    assert sorted(used) == [3] * 4 + [5] * 4 + [9] * 4


def test_metrics_go_to_csv_and_tensorboard_and_resume_cuts_what_is_done_again(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (10, 20, 30):
        log.write(step=step, loss=1 / step, **({"val_loss": 0.5} if step == 20 else {}))
    log.tensorboard.close()
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which begin with the second
    log = MetricsLog(tmp_path, resume_step=20)
    log.write(step=30, loss=0.25)
    log.tensorboard.close()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert [row["loss"] for row in rows] == [0.1, 0.05, 0.25]
    assert [row["val_loss"] for row in rows] == [None, 0.5, None]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("loss")] == [(10, 0.1), (20, 0.05), (30, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("val_loss")] == [(20, 0.5)]


def test_the_window_averages_over_images_and_its_clock_can_stand_still(monkeypatch):
    now, counts, skipped = [100.0], torch.tensor(0.0), torch.tensor(1.0)
    monkeypatch.setattr("functions.training.metrics.time.perf_counter", lambda: now[0])
    window = TrainingWindow(torch.device("cpu"), 2)
    window.add(torch.tensor(3.0), counts)
    now[0] += 2
    with window.paused():
        now[0] += 50
    window.add(torch.tensor(math.nan), skipped)  # took its time, but its loss does not count
    window.add(torch.tensor(6.0), counts)
    now[0] += 1
    assert window.read() == {"loss": 9 / 4, "images_per_second": 2.0}
    window.add(torch.tensor(4.0), counts)
    now[0] += 0.5
    with window.paused():  # as the training loop reads it
        assert window.read() == {"loss": 2.0, "images_per_second": 4.0}
        now[0] += 9
    window.add(torch.tensor(2.0), counts)
    now[0] += 1
    resumed = TrainingWindow(torch.device("cpu"), 2)
    resumed.load(window.state())
    resumed.add(torch.tensor(7.0), counts)
    now[0] += 0.5
    assert resumed.read() == {"loss": 9 / 4, "images_per_second": 4.0}
    resumed.add(torch.tensor(math.inf), skipped)
    now[0] += 1
    assert math.isnan(resumed.read()["loss"])


def test_a_row_that_was_cut_short_by_a_power_cut_is_left_out(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (10, 20):
        log.write(step=step, loss=0.5, skipped_steps=0)
    log.tensorboard.close()
    whole = (tmp_path / "metrics.csv").read_text()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        (tmp_path / "metrics.csv").write_text(whole[:-cut])
        assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [10]


def test_learning_rate_warms_up_and_decays():
    full, faces = EXPERIMENTS["ffhq-full"].diffusion, EXPERIMENTS["faces"].diffusion
    rates = [learning_rate(full, step, 10**6) for step in (0, 2500, 5000, 10**6 - 1)]
    assert rates[0] == pytest.approx(3e-5 / 5001)
    assert rates[1] == pytest.approx(1.5e-5, rel=1e-3)
    assert rates[2:] == [3e-5, 3e-5]
    assert learning_rate(EXPERIMENTS["ffhq-run1"].diffusion, 0, 100) == 3e-5
    assert learning_rate(faces, 500, 1000) == pytest.approx(faces.learning_rate / 2)
    assert learning_rate(faces, 999, 1000) < 1e-4 * faces.learning_rate


def test_rotation_stops_for_the_last_tenth():
    full = EXPERIMENTS["ffhq-full"].diffusion
    limit = lambda step: rotation_limit(full.max_rotation, full.rotation_free_end, step / 1000)
    assert [limit(step) for step in (0, 500, 899, 900, 999)] == [3, 3, 3, 0, 0]
