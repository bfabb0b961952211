"""Draws, validation, metrics and learning rate: each beside its definition."""

import hashlib
import math
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import EXPERIMENTS
from data.batches import augment
from data.datasets import load_images
from data.pixels import to_model_range
from functions.denoiser import Denoiser
from functions.losses import denoising_loss
from functions.noise_scheduler import NoiseScheduler
from functions.optimizers import rate_of
from functions.saved.loading import load_denoiser
from functions.support.random_numbers import generator_of, image_noise, seed_of
from functions.training.data import StepDraws, TrainingData, training_draws
from functions.training.metrics import QUARTERS, MetricsLog, plot_losses, read_metrics
from functions.training.recorder import Recorder
from tests.conftest import CPU, HELD_OUT, newest, normal


def test_the_noised_image_is_in_float32_whatever_the_network_computes_in():
    """In bfloat16 x_t would lose the noise at t = 0, and this network's eps would be wrong."""
    scheduler = NoiseScheduler(1000)
    x_0 = torch.rand(4, 3, 8, 8) * 2 - 1
    denoiser = Denoiser(lambda x_t, t: scheduler.predict_eps(x_t, t, x_0), scheduler)
    with torch.autocast("cpu", torch.bfloat16):
        losses = denoising_loss(denoiser, x_0, torch.arange(4), torch.randn_like(x_0))
    assert losses["loss"].max() < 1e-6


def drawn(seed: int, step: int, count: int, size: int) -> StepDraws:
    """Return the draws of `count` images (3, size, size), with 1000 timesteps."""
    config = EXPERIMENTS["faces"].override(seed=seed, batch_size=count)
    return training_draws(config.diffusion, step, (3, size, size), CPU)


def test_draws_depend_on_seed_and_step_alone():
    # Between the two draws of the same step there are draws of others.
    places = ((0, 7), (0, 6), (1, 7), (0, 7))
    draws = [drawn(*place, 64, 4) for place in places]
    for first, *others, again in zip(*draws, strict=True):
        assert torch.equal(first, again)
        assert not any(torch.equal(first, other) for other in others)


def test_no_two_images_of_a_seed_have_the_same_noise():
    """PyTorch's generator for CPUs uses 32 bits of a seed, so these must differ."""
    assert len({seed_of(0, "image", i) % 2**32 for i in range(50_000)}) == 50_000

    # This is the definition: the hash of seed and purpose, plus the index.
    start = int.from_bytes(hashlib.blake2b(b"3/image", digest_size=4).digest(), "little")
    expected = normal((start + 5) % 2**32, 3, 4, 4)
    assert torch.equal(image_noise(3, [5], (3, 4, 4), CPU, "image")()[0], expected)


def test_draws_have_their_distributions():
    """Of their values in equal bins, chi-squared lies within 4 of its standard deviations."""
    draws = drawn(0, 0, 20_000, 1)
    for values, bins in (
        (20 * torch.special.ndtr(draws.noise.flatten()), 20),
        (10 * (draws.rotation + 1), 20),
        (20 * draws.condition_drop, 20),
        (draws.t // 50, 20),
        (draws.flip, 2),
    ):
        counts = torch.bincount(values.long(), minlength=bins)
        assert len(counts) == bins
        expected = len(values) / bins
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert chi_squared < bins - 1 + 4 * math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize(
    "held_out, middles",
    [
        # The t are the middles of strata. One quarter of 0 .. 99 has none here.
        ([33, 43, 48], [16, 50, 83]),
        (sorted(HELD_OUT * 2), [6, 18, 31, 43, 56, 68, 81, 93]),
    ],
)
def test_validation_is_the_mean_over_fixed_triples(held_out, middles, trained, pictures):
    """Whatever the batch size. With v, the squared error of eps is alpha_bar times the loss."""
    count = len(middles)
    flags = "--diffusion.batch-size 2 --diffusion.gradient-accumulation 4 --diffusion.epochs 1"
    run = trained(flags, f"--diffusion.validation-samples {count}", name="faces-v")
    order = torch.randperm(count, generator=generator_of("cpu", 0, "validation t"))
    t = torch.tensor(middles)[order]
    x_0 = to_model_range(load_images(pictures, 16).images[held_out])
    eps = image_noise(0, range(count), (3, 16, 16), CPU, "validation noise")()

    denoiser = load_denoiser(run)
    expected = {}
    for suffix, part in (("", "model"), ("_ema", "ema")):
        denoiser.network.load_state_dict(newest(run)[part])
        losses = denoising_loss(denoiser, x_0, t, eps)["loss"]
        expected[f"val_loss{suffix}"] = losses.mean()
        expected[f"val_eps_error{suffix}"] = (denoiser.scheduler.alphas_cumprod[t] * losses).mean()
    # Those of the quarters are with the averaged weights.
    for quarter in range(4):
        expected[f"val_loss_q{quarter}"] = losses[t // 25 == quarter].mean()
    [*_, row] = read_metrics(run / "metrics.csv")
    for name, mean in expected.items():
        assert row[name] == pytest.approx(mean.item(), rel=1e-4, nan_ok=True), name


def test_metrics_go_to_csv_and_tensorboard_and_resume_cuts_what_is_done_again(tmp_path):
    """A row that a kill has cut short is left out, too."""
    path = tmp_path / "metrics.csv"
    log = MetricsLog(tmp_path)
    for step, loss in {10: 1 / 10, 20: 1 / 20, 30: 1 / 30}.items():
        log.write({"step": step, "loss": loss, "skipped_steps": 0})
    log.close()

    whole = path.read_text()
    for cut in range(2, len(whole.splitlines()[-1]) + 1):
        path.write_text(whole[:-cut])
        assert [row["loss"] for row in read_metrics(path) if row["step"] < 30] == [0.1, 0.05]
    # An editor has dropped the last newline, and the row is whole.
    path.write_text(whole[:-1])
    MetricsLog(tmp_path, resume_step=30).close()
    assert path.read_text() == whole

    # TensorBoard reads files in the order of their names, which begin with the second of their
    # making.
    for events in (tmp_path / "tensorboard").iterdir():
        events.rename(events.with_name(events.name.replace("tfevents.", "tfevents.0")))
    log = MetricsLog(tmp_path, resume_step=20)
    log.write({"step": 30, "loss": 0.25, "skipped_steps": 0})
    log.close()
    assert path.read_text() == whole.replace("0.0333333", "0.25")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({10: 0.1, 20: 0.05, 30: 0.25})
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.csv", "tensorboard"}


def test_metrics_keep_rows_of_numbers_and_a_new_name_is_a_column(tmp_path):
    """A spreadsheet marks the start and ends its lines. Curves can be drawn of any rows."""
    path = tmp_path / "metrics.csv"
    header = ",".join(("step", *QUARTERS)).encode()
    row = b"10,,,,0.25"
    path.write_bytes(b"\r\n".join([b"\xef\xbb\xbf" + header, row, row + b"x", row]))
    assert [row["val_loss_q3"] for row in read_metrics(path)] == [0.25, 0.25]
    plot_losses(path, tmp_path / "losses.png")

    log = MetricsLog(tmp_path, resume_step=20)
    assert path.read_bytes() == b"\n".join([header, row, row, b""])
    log.write({"step": 20, "mine": 0.5})
    log.write({"step": 30, "val_loss_q3": 1.0})
    log.close()
    rows = [header + b",mine", row + b",", row + b",", b"20,,,,,0.5", b"30,,,,1,", b""]
    assert path.read_bytes() == b"\n".join(rows)


def test_the_speed_is_that_of_the_steps_alone(monkeypatch):
    clock = [0]
    monkeypatch.setattr("functions.training.recorder.time.perf_counter", lambda: clock[0])
    rows = []
    config = SimpleNamespace(effective_batch=2, epochs=1)
    recorder = Recorder(SimpleNamespace(config=config, epoch=0, step=0))
    recorder.bar = Mock()
    recorder.metrics = SimpleNamespace(write=rows.append)
    for _ in range(2):
        for seconds in (2, 0, 1):
            with recorder.timed():
                clock[0] += seconds
            clock[0] += 50
        recorder.write({"loss": 1.0})
    assert [row["images_per_second"] for row in rows] == [2, 2]


def test_learning_rate_decays_rotation_stops_for_the_last_tenth_and_labels_are_dropped():
    """After a warm-up the rate stays, or has half a cosine."""
    full = EXPERIMENTS["ffhq-full"].diffusion
    rates = {0: 3e-5 / 5001, 2500: 3e-5 * 2501 / 5001, 5000: 3e-5, 10**6 - 1: 3e-5}
    assert {step: rate_of(full, step, 10**6) for step in rates} == pytest.approx(rates)
    faces = EXPERIMENTS["faces"].diffusion
    rates = {500: 1e-3, 750: 1e-3 * (1 - math.sqrt(1 / 2))}
    assert {step: rate_of(faces, step, 1000) for step in rates} == pytest.approx(rates)

    # Label 2 stands for none.
    config = replace(full, condition_dropout=0.25)
    data = SimpleNamespace(config=config, no_inputs={"label": 2, "attributes": -1.0})
    draws = drawn(0, 0, 40, 8)
    labels = torch.arange(40) % 2
    for done, angle in ((0.899, 3), (0.9, 0)):
        expected = augment(draws.noise, draws.flip, angle * draws.rotation)
        others = {"label": labels, "other": draws.noise, "attributes": draws.noise}
        x_0, inputs = TrainingData.augment(data, draws.noise, others, draws, done)
        assert torch.equal(x_0, expected)
        dropped = draws.condition_drop < 0.25
        assert torch.equal(inputs["label"], labels.masked_fill(dropped, 2))
        assert (inputs["attributes"][dropped] == -1).all()
        assert torch.equal(inputs["attributes"][~dropped], draws.noise[~dropped])
        # What has no value for none is never dropped.
        assert inputs["other"] is draws.noise
