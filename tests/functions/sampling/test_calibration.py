"""The calibration restores what is known to be damaged, and leaves the ideal denoiser as it is."""

import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

import sample
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser, predict
from functions.sampling import calibration
from functions.support.files import TensorFile, write_tensors
from tests.conftest import LittleMemory, call
from tests.functions.gaussian_bands import MU, SCHEDULER, by_bands, draw_images, ideal_eps


def damped_x_0(x_t, t, scheduler):
    x_0 = scheduler.predict_x_0(x_t, t, ideal_eps(x_t, t, scheduler))
    return scheduler.predict_eps(
        x_t, t, MU + by_bands(x_0 - MU, torch.tensor([0.2, 3.0, 0.5, 0.1]))
    )


def damped_eps(x_t, t, scheduler):
    """The fault of real networks."""
    return by_bands(ideal_eps(x_t, t, scheduler), torch.tensor([0.5, 1.0, 0.97, 0.9]))


def denoiser_of(eps, scheduler):
    return Denoiser(LittleMemory(lambda x_t, t: eps(x_t, t, scheduler), 4096), scheduler)


def x_0_of(denoiser, t):
    """On images that nothing was fitted to; and these."""
    x_0, noise = (
        draw_images(256, seed=5),
        torch.randn(256, 3, 16, 16, generator=torch.Generator().manual_seed(6)),
    )
    scheduler = denoiser.scheduler
    return predict(denoiser, scheduler, scheduler.q_sample(x_0, t, noise), t)[0], x_0


def error_of(denoiser, t):
    found, x_0 = x_0_of(denoiser, t)
    return (found - x_0).square().mean().item()


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    "eps, worse", [(damped_x_0, {600: 1.2, 750: 1.01}), (damped_eps, {600: 1.05, 999: 10})]
)
def test_it_restores_the_ideal_denoiser(eps, worse, beta_schedule):
    """At timesteps that were fitted and at those between; `worse` is the least damage."""
    scheduler = NoiseScheduler(1000, beta_schedule=beta_schedule)
    damaged, ideal = denoiser_of(eps, scheduler), denoiser_of(ideal_eps, scheduler)
    better = replace(damaged, calibration=calibration.calibrate(damaged, draw_images(512), 256))
    for t in (600, 612, 750, 888, 990, 998, 999):
        assert error_of(better, t) < 1.02 * error_of(ideal, t)
    for t, times in worse.items():
        assert error_of(damaged, t) > times * error_of(ideal, t)
    assert error_of(better, 599) == error_of(damaged, 599)


def test_it_leaves_the_ideal_denoiser_as_it_is():
    """Within the error of 512 images."""
    ideal = denoiser_of(ideal_eps, SCHEDULER)
    same = replace(ideal, calibration=calibration.calibrate(ideal, draw_images(512), 256))
    for t in (600, 750, 888):
        found, x_0 = x_0_of(same, t)
        change = (found - x_0_of(ideal, t)[0]).square().mean()
        assert change < 0.005 * (found - x_0).square().mean()


def test_it_is_the_same_for_one_timestep_and_for_many():
    weights = torch.rand(1000, 4, 2, generator=torch.Generator().manual_seed(0))
    weights[:600] = torch.tensor([1.0, 0.0])
    mix = calibration.Calibration(MU, weights)
    x_0, x_t = draw_images(3), draw_images(3, seed=1)
    together = mix(x_0, x_t, torch.tensor([999, 50, 700]), SCHEDULER)
    for k, t in enumerate((999, 50, 700)):
        torch.testing.assert_close(
            together[k], mix(x_0[k : k + 1], x_t[k : k + 1], t, SCHEDULER)[0]
        )
    in_band = by_bands(x_0[:1] - MU, weights[999, :, 0])
    in_band += by_bands(x_t[:1] - SCHEDULER.alpha_bar(999) ** 0.5 * MU, weights[999, :, 1])
    torch.testing.assert_close(together[:1], MU + in_band)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["own", "data"])
def test_sample_makes_it_once_and_says_what_it_is_from(
    which, tiny_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(calibration, "IMAGES", 12)
    flags = [
        "--sampler",
        "ddim",
        "--steps",
        "3",
        "--n",
        "2",
        "--individual",
        "--device",
        "cpu",
        "--calibrate",
    ]
    path = tiny_run / "checkpoints" / f"step-00000010-calibration-{which}.safetensors"
    call(sample.main, tiny_run, *flags, which)
    assert f"wrote {path}" in capsys.readouterr().out
    folder = tiny_run / "samples" / f"step-00000010-ddim3-calibrated-{which}-seed0"
    assert json.loads((folder / "samples.json").read_text())["calibrate"] == which
    first, made = (folder / "00000.png").read_bytes(), path.read_bytes()
    call(sample.main, tiny_run, *flags, which, "--out", tmp_path / "again")
    assert "calibration" not in capsys.readouterr().out.replace(f"calibrated-{which}", "")
    assert (tmp_path / "again" / "00000.png").read_bytes() == first
    call(sample.main, tiny_run, *flags[:-1], "--out", tmp_path / "without")
    assert (tmp_path / "without" / "00000.png").read_bytes() != first
    contents, wrong = (
        TensorFile(path).contents,
        {"mean": torch.zeros(1, 1, 1), "weights": torch.ones(100, 4, 2)},
    )
    right, of_another_step = TensorFile(path).tensors(), {**contents, "weights": "of another step"}
    for spoil in (
        lambda: path.write_bytes(made[:-100]),
        lambda: path.write_bytes(b"PK"),
        lambda: write_tensors(path, wrong, contents),
        lambda: write_tensors(
            path, {name: 0 * tensor for name, tensor in right.items()}, of_another_step
        ),
    ):
        spoil()
        call(sample.main, tiny_run, *flags, which, "--out", tmp_path / "anew")
        assert path.read_bytes() == made
    path.unlink()
    with patch.object(calibration, "write_tensors", side_effect=OSError("no room")):
        call(sample.main, tiny_run, *flags, which, "--out", tmp_path / "not kept")
    assert "the calibration is not kept: no room" in capsys.readouterr().err
    assert (tmp_path / "not kept" / "00000.png").read_bytes() == first
