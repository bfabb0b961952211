"""Loss, EMA, draws, validation, metrics, learning rate: each against what it should be by definition."""

import copy
import io
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import EXPERIMENTS
from data.augmentation import rotation_limit
from functions.ema import update_ema
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.support.processes import SINGLE_PROCESS
from functions.support.random_numbers import generator_of, seed_of, training_draws
from functions.training.metrics import (
    COLUMNS,
    MetricsLog,
    TrainingWindow,
    plot_losses,
    read_metrics,
)
from functions.training.validation import validation_losses
from tests.conftest import LittleMemory
from train import learning_rate


def test_loss_of_known_predictions():
    """The noised image is made in float32, whatever the model computes in."""
    scheduler = NoiseScheduler(1000)
    x_0, noise, t = (
        torch.rand(4, 3, 8, 8) * 2 - 1,
        torch.randn(4, 3, 8, 8),
        torch.tensor([0, 10, 500, 999]),
    )
    half = lambda x_t, t: torch.zeros_like(x_t, dtype=torch.bfloat16)
    torch.testing.assert_close(
        denoising_loss(half, scheduler, x_0, t, noise), noise.square().mean(dim=(1, 2, 3))
    )
    knows_x_0 = lambda x_t, t: scheduler.predict_eps(x_t, t, x_0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = denoising_loss(knows_x_0, scheduler, x_0, t, noise)
    assert losses.shape == (4,) and losses.max() < 1e-6  # at t = 0 bfloat16 would lose the noise


@pytest.mark.parametrize("ramp", [True, False])
def test_ema_is_the_weighted_sum_of_its_definition(ramp):
    model = torch.nn.Linear(1, 1)
    model.weight.data.fill_(1.0)
    ema_model = copy.deepcopy(model)
    values, decay = [5.0, -2.0, 7.0, 3.0], 0.3
    expected = 1.0  # the initial weight
    for step, value in enumerate(values):
        model.weight.data.fill_(value)
        update_ema(ema_model, model, step, decay, ramp)
        d = min(decay, (1 + step) / (10 + step)) if ramp else decay
        expected = d * expected + (1 - d) * value
        assert ema_model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == values[-1]


def test_draws_depend_on_seed_and_step_alone():
    draws = lambda seed, step: vars(training_draws(seed, step, 64, (3, 4, 4), 1000, "cpu"))
    first, _, again, next_step, other_seed = (
        draws(0, 7),
        draws(0, 6),
        draws(0, 7),
        draws(0, 8),
        draws(1, 7),
    )
    for name, values in first.items():
        assert torch.equal(values, again[name])
        assert not any(torch.equal(values, other[name]) for other in (next_step, other_seed))
    assert seed_of(1, 23) != seed_of(12, 3)
    # The order in which the first four were drawn before there was a fifth: runs of that time go on as they would have
    generator = generator_of("cpu", 0, "training", 7)
    assert torch.equal(first["t"], torch.randint(1000, (64,), generator=generator))
    assert torch.equal(first["noise"], torch.randn(64, 3, 4, 4, generator=generator))
    assert torch.equal(first["flip"], torch.rand(64, generator=generator) < 0.5)
    assert torch.equal(first["tilt"], 2 * torch.rand(64, generator=generator) - 1)


def test_draws_have_their_distributions():
    draws = training_draws(0, 0, 20_000, (1, 2, 2), 10, "cpu")
    counts = torch.bincount(draws.t, minlength=10)
    assert counts.shape == (10,) and (counts - 2000).abs().max() < 4 * math.sqrt(20_000 * 0.1 * 0.9)
    for values in (draws.noise, draws.normal):
        n = values.numel()
        assert abs(values.mean()) < 4 / math.sqrt(n) and abs(values.var() - 1) < 4 * math.sqrt(
            2 / n
        )
    assert abs(draws.flip.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(20_000)
    assert draws.tilt.min() >= -1 and draws.tilt.max() < 1
    assert abs(draws.tilt.mean()) < 4 / math.sqrt(3 * 20_000)
    # Other draws, not the same again
    assert abs((draws.normal * draws.tilt).mean()) < 4 / math.sqrt(3 * 20_000)


def test_validation_is_the_mean_over_fixed_triples_whatever_the_batch_size():
    images = torch.randint(256, (12, 4, 4, 3), dtype=torch.uint8)
    seen, used = [], []
    zero = lambda x_t, t: seen.extend(t.tolist()) or torch.zeros_like(x_t)
    images_of = lambda indices: used.extend(indices) or images[indices]

    def measure(**changes):
        config = replace(EXPERIMENTS["faces"].diffusion, validation_samples=48, **changes)
        denoiser = Denoiser(LittleMemory(zero, 48), NoiseScheduler(960))
        return validation_losses(
            [denoiser], images_of, np.array([3, 5, 9]), config, SINGLE_PROCESS
        )[0]

    loss, eps_error = measure(batch_size=48, seed=0)
    # The noise's own variance
    assert eps_error == loss == pytest.approx(1, abs=4 * math.sqrt(2 / (48 * 48)))
    assert sorted(seen) == list(range(10, 960, 20))  # the middle of each of 48 strata
    assert sorted(used) == [3] * 16 + [5] * 16 + [9] * 16
    assert measure(batch_size=7, seed=0) == pytest.approx((loss, loss), rel=1e-6)
    assert measure(batch_size=7, seed=1)[0] != loss


def test_validation_of_v_also_has_the_error_of_its_eps():
    """That of a network whose v is 0: so its eps is sqrt(1 - alpha_bar) x_t."""
    alpha_bar, images, seen = (
        np.cumprod(1 - np.linspace(0.01, 2, 100) / 10),
        np.full((4, 4, 4, 3), 204, np.uint8),
        [],
    )
    zero = lambda x_t, t: seen.append((x_t.double().numpy(), t.numpy())) or torch.zeros_like(x_t)
    config = replace(EXPERIMENTS["faces-v"].diffusion, validation_samples=20, batch_size=7)
    denoiser = Denoiser(LittleMemory(zero, 48), NoiseScheduler(100), objective="v")
    images_of = lambda i: torch.from_numpy(images[i])
    # Beside it, not mixed in
    other = replace(denoiser, network=LittleMemory(lambda x, t: torch.ones_like(x), 48))
    found, of_other = validation_losses(
        [denoiser, other], images_of, np.arange(4), config, SINGLE_PROCESS
    )
    x_t, t = map(np.concatenate, zip(*seen, strict=True))
    a, x_0 = alpha_bar[t].reshape(-1, 1, 1, 1), 2 * 204 / 255 - 1
    noise = (x_t - np.sqrt(a) * x_0) / np.sqrt(1 - a)
    v = np.sqrt(a) * noise - np.sqrt(1 - a) * x_0
    assert found == pytest.approx(
        ((v**2).mean(), ((np.sqrt(1 - a) * x_t - noise) ** 2).mean()), rel=1e-5
    )
    assert of_other[0] == pytest.approx(((v - 1) ** 2).mean(), rel=1e-5)


@pytest.mark.slow
def test_metrics_go_to_csv_and_tensorboard_and_resume_cuts_what_is_done_again(tmp_path):
    """And a row that a power cut has cut short, wherever."""
    log, path = MetricsLog(tmp_path), tmp_path / "metrics.csv"
    for step in (10, 20, 30):
        log.write(
            step=step, loss=1 / step, skipped_steps=0, **({"val_loss": 0.5} if step == 20 else {})
        )
    log.tensorboard.close()
    whole = path.read_text()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_text(whole[:-cut])
        assert [row["step"] for row in read_metrics(path)] == [10, 20]
    path.write_text(whole)
    # TensorBoard reads files in the order of their names, which begin with the second
    time.sleep(1.1)
    log = MetricsLog(tmp_path, resume_step=20)
    log.write(step=30, loss=0.25)
    log.tensorboard.close()
    rows = [(row["step"], row["loss"], row["val_loss"]) for row in read_metrics(path)]
    assert rows == [(10, 0.1, None), (20, 0.05, 0.5), (30, 0.25, None)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("loss")] == [
        (10, 0.1),
        (20, 0.05),
        (30, 0.25),
    ]
    assert [(e.step, e.value) for e in events.Scalars("val_loss")] == [(20, 0.5)]


def test_tensorboard_has_the_curves_the_grids_and_the_config(tiny_run):
    events = EventAccumulator(
        str(tiny_run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}
    ).Reload()
    rows = read_metrics(tiny_run / "metrics.csv")
    for column in set(COLUMNS) - {"step"}:
        logged = [(row["step"], row[column]) for row in rows if row[column] is not None]
        seen = [(event.step, event.value) for event in events.Scalars(column)] if logged else []
        np.testing.assert_allclose(seen, logged, rtol=1e-5)
    grids = sorted((tiny_run / "samples").glob("*.png"))
    for grid, event in zip(grids, events.Images("samples"), strict=True):
        assert grid.stem == f"step-{event.step:08d}"
        assert np.array_equal(Image.open(grid), Image.open(io.BytesIO(event.encoded_image_string)))
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert (tiny_run / "config.json").read_text() in text


@pytest.mark.parametrize(
    "text",
    [
        "step,loss,eps_error,val_loss,val_eps_error,val_loss_ema,val_eps_error_ema\n10,0.6,0.3,0.5,0.25,,\n15,0.4,0.2,,,,\n",
        "step,loss,val_loss,val_loss_ema\n10,0.3,0.25,\n15,0.2,,\n",
    ],
    ids=["now", "of the time before its columns, when all predicted eps"],
)
def test_the_curves_are_of_the_error_of_eps(text, tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_text(text)
    saved = []
    monkeypatch.setattr(
        "functions.training.metrics.save_figure", lambda figure, path: saved.append(figure)
    )
    plot_losses(tmp_path / "metrics.csv", tmp_path / "losses.png")
    lines = [line.get_xydata().tolist() for line in saved[0].axes[0].lines]
    assert lines == [[[10, 0.3], [15, 0.2]], [[10, 0.25]]]


def test_the_window_averages_over_images_and_its_clock_can_stand_still(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("functions.training.metrics.time.perf_counter", lambda: now[0])

    def after(window, seconds, loss, skipped=0):
        now[0] += seconds
        window.add(torch.tensor([loss, loss / 4]), torch.tensor(float(skipped)))

    window, resumed = (TrainingWindow(torch.device("cpu"), images_a_step=2) for _ in range(2))
    after(window, 2, 3.0)
    with window.paused():
        now[0] += 50
    after(window, 0, math.nan, skipped=1)  # took its time, but its loss does not count
    after(window, 1, 6.0)
    assert window.read(window.numbers().tolist()) == {
        "loss": 9 / 4,
        "eps_error": 9 / 16,
        "images_per_second": 2.0,
    }
    after(window, 0.5, 4.0)
    with window.paused():  # as the training loop reads it
        assert window.read(window.numbers().tolist()) == {
            "loss": 2.0,
            "eps_error": 0.5,
            "images_per_second": 4.0,
        }
        now[0] += 9
    after(window, 1, 2.0)
    resumed.read(resumed.numbers().tolist())  # starts its clock
    resumed.load(window.state())
    after(resumed, 0.5, 7.0)
    assert resumed.read(resumed.numbers().tolist()) == {
        "loss": 9 / 4,
        "eps_error": 9 / 16,
        "images_per_second": 4.0,
    }
    after(resumed, 1, math.inf, skipped=1)
    assert math.isnan(resumed.read(resumed.numbers().tolist())["loss"])
    resumed.load({"loss_sum": 6.0, "steps": 2})  # as checkpoints had it when all was eps
    after(resumed, 1, 3.0)
    assert resumed.read(resumed.numbers().tolist()) == {
        "loss": 9 / 6,
        "eps_error": 6.75 / 6,
        "images_per_second": 2.0,
    }


def test_learning_rate_warms_up_and_decays_and_rotation_stops_for_the_last_tenth():
    full, faces = EXPERIMENTS["ffhq-full"].diffusion, EXPERIMENTS["faces"].diffusion
    rates = [learning_rate(full, step, 10**6) for step in (0, 2500, 5000, 10**6 - 1)]
    assert rates[0] == pytest.approx(3e-5 / 5001)
    assert rates[1] == pytest.approx(1.5e-5, rel=1e-3)
    assert rates[2:] == [3e-5, 3e-5]
    assert learning_rate(EXPERIMENTS["ffhq-run1"].diffusion, 0, 100) == 3e-5
    assert learning_rate(faces, 500, 1000) == pytest.approx(faces.learning_rate / 2)
    assert learning_rate(faces, 999, 1000) < 1e-4 * faces.learning_rate
    limit = lambda step: rotation_limit(full.max_rotation, full.rotation_free_end, step / 1000)
    assert [limit(step) for step in (0, 500, 899, 900, 999)] == [3, 3, 3, 0, 0]
