"""Guidance: on Gaussians it is what algebra says, and nothing else meets a run's snapshots."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import evaluate
import sample
from functions import prediction
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser, predict
from functions.samplers import SAMPLERS, ddpm_sample
from functions.sampling import calibration
from functions.sampling.generation import generate
from functions.sampling.guidance import find_guide
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import load_weights
from functions.support.errors import UserError
from functions.support.run_folder import checkpoints_of, find_checkpoints
from tests.conftest import (
    call,
    image_sampler_of,
    newest,
    small_unet,
    train_tiny,
)
from tests.spoilt_files import same

SCHEDULER = NoiseScheduler(40)
FEW = ["--sampler", "dpm++", "--steps", 3, "--n", 2, "--device", "cpu", "--individual"]


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """Return a finished run of 10 steps, with snapshots of steps 4, 8 and 10."""
    runs = tmp_path_factory.mktemp("guided")
    return train_tiny(pictures, runs, "--diffusion.snapshot-every", 4)


def ideal(mean, deviation, **fields):
    """Return the ideal denoiser of images whose pixels are from N(mean, deviation^2)."""

    def network(x_t, t):
        a = SCHEDULER.alpha_bar(t).view(-1, 1, 1, 1).float()
        x_0 = mean + deviation**2 * a**0.5 / (a * deviation**2 + 1 - a) * (x_t - a**0.5 * mean)
        return (x_t - a**0.5 * x_0) / (1 - a) ** 0.5

    return Denoiser(network, SCHEDULER, **fields)


@pytest.mark.parametrize("w", [0.5, 1.5, 3.0])
def test_samples_of_guided_gaussians_have_the_mean_and_variance_of_algebra(w):
    """Each x_0 is linear in x_t, so is the guided one, and so the steps of Algorithm 2.

    Mean and variance of x are carried through the steps here, in float64, with the coefficients of
    Eq. 7 computed from the betas. The guide is asked only at a log-SNR from -7 to 6.
    """
    fine, coarse = (0.4, 0.3), (0.1, 0.6)
    guided = ideal(*fine, guide=ideal(*coarse), guidance=w)
    betas = SCHEDULER.betas.double().numpy()
    alpha_bars = np.cumprod(1 - betas)

    mean, variance = 0.0, 1.0
    for t in reversed(range(40)):
        a = alpha_bars[t]
        previous = alpha_bars[t - 1] if t else 1.0
        slope, offset = 0.0, 0.0
        w_t = w if -7 <= math.log(a / (1 - a)) <= 6 else 1.0
        for weight, (m, s) in ((w_t, fine), (1 - w_t, coarse)):
            gain = s**2 * a**0.5 / (a * s**2 + 1 - a)
            slope += weight * gain
            offset += weight * m * (1 - gain * a**0.5)
        of_x_0 = previous**0.5 * betas[t] / (1 - a)
        of_x_t = (1 - betas[t]) ** 0.5 * (1 - previous) / (1 - a)
        sigma_squared = betas[t] * (1 - previous) / (1 - a)
        mean = (of_x_0 * slope + of_x_t) * mean + of_x_0 * offset
        variance = (of_x_0 * slope + of_x_t) ** 2 * variance + sigma_squared

    generator = torch.Generator().manual_seed(0)
    shape = (40_000, 1, 1, 1)
    x_T = torch.randn(shape, generator=generator)
    samples = ddpm_sample(
        guided,
        SCHEDULER,
        x_T,
        clip_x_0=False,
        step_noise=lambda k: torch.randn(shape, generator=generator),
    )
    assert samples.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / 40_000))
    assert samples.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / 40_000))


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
def test_a_guide_is_asked_only_where_images_form(beta_schedule):
    scheduler = NoiseScheduler(1000, beta_schedule=beta_schedule)
    asked = []

    def record(x_t, t):
        asked.append(t[0].item())
        return x_t

    guide = Denoiser(record, scheduler)
    model = Denoiser(lambda x_t, t: x_t, scheduler, guide=guide, guidance=2.0)
    ddpm_sample(model, scheduler, torch.zeros(1, 1, 1, 1), step_noise=lambda k: torch.zeros(1))

    # sigma^2 = (1 - alpha_bar) / alpha_bar is exp(-log-SNR).
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
    inside = (sigmas >= math.exp(-3)) & (sigmas <= math.exp(3.5))
    assert asked[::-1] == inside.nonzero().flatten().tolist()
    assert 700 < len(asked) < 970
    # With tiny betas alpha_bar is 1, so nothing may be divided by 1 - alpha_bar.
    assert not prediction.is_guided(NoiseScheduler(100, beta_start=1e-20), 0)


def test_the_mix_is_clipped_and_each_network_has_its_own_objective():
    x_t = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    guide = Denoiser(lambda x_t, t: 0.5 * x_t, SCHEDULER, objective="v")
    guided = ideal(0.4, 0.3, guide=guide, guidance=2.0)
    late, _ = predict(ideal(0.4, 0.3), SCHEDULER, x_t, 20)
    early, _ = predict(guide, SCHEDULER, x_t, 20)
    x_0, eps = predict(guided, SCHEDULER, x_t, 20, clip_x_0=True)
    torch.testing.assert_close(x_0, (2 * late - early).clamp(-1, 1))
    torch.testing.assert_close(SCHEDULER.predict_x_0(x_t, 20, eps), x_0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_weight_of_1_and_a_guide_that_is_the_model_change_no_bit(network, sampler, clip):
    plain = image_sampler_of(network, options=SamplerOptions(sampler, 5, clip_x_0=clip))
    expected = generate(plain, range(2)).images

    def images(guide, w):
        denoiser = replace(plain.denoiser, guide=guide, guidance=w)
        return generate(replace(plain, denoiser=denoiser), range(2)).images

    other = Denoiser(small_unet(dropout=0.5).eval(), plain.scheduler)
    other.network.conv_out.weight.data.mul_(2)
    assert torch.equal(images(other, 1.0), expected)
    assert (images(other, 2.0) - expected).abs().max() > 0.01
    assert torch.equal(images(plain.denoiser, 2.0), expected)


def test_snapshots_are_the_averaged_weights_in_float16(run):
    assert [path.stem for path in checkpoints_of(run, "snapshots")] == [
        f"step-{i:08d}" for i in (4, 8, 10)
    ]
    saved = load_weights(checkpoints_of(run, "snapshots")[-1])
    weights = newest(run)["ema"]
    assert same(saved.weights, {name: weight.half() for name, weight in weights.items()})
    assert saved.kind == "EMA"
    assert saved.provenance["step"] == 10


def test_a_step_is_the_nearest_snapshot_or_checkpoint(run):
    saved = load_weights(checkpoints_of(run)[-1])
    steps = {"0": "snapshots/step-00000004", "5": "checkpoints/step-00000005"}
    # Later files, and the snapshot of the model itself, are no guides.
    steps |= {"7": "snapshots/step-00000008", "99": "snapshots/step-00000008"}
    early = load_weights(checkpoints_of(run)[0])
    assert find_guide("9", early) == [run / "snapshots/step-00000004.safetensors"]
    for step, file in steps.items():
        assert find_guide(step, saved) == [run / f"{file}.safetensors"]
    assert find_guide(str(run), saved) == find_checkpoints(run)


def test_files_and_the_manifest_hold_the_guide_and_its_weight(run, tmp_path, capsys):
    """Files of one guide are never taken for those of another, or of none."""
    call(sample.main, run, *FEW, "--guide", 4)
    digest = load_weights(checkpoints_of(run, "snapshots")[0]).digest
    assert "guide" in capsys.readouterr().out
    folder = next(run.glob(f"samples/*guided1.5-{digest[:8]}*"))
    facts = json.loads((folder / "samples.json").read_text())
    assert (facts["guide"], facts["guidance"]) == (digest, 1.5)

    out = [*FEW, "--out", tmp_path / "images"]
    call(sample.main, run, *out)
    for flags in (["--guide", 4], ["--guide", 4, "--guidance", 2]):
        with pytest.raises(UserError, match="with other settings"):
            call(sample.main, run, *out, *flags)


@pytest.mark.slow
def test_either_network_has_its_own_calibration(run, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "IMAGE_COUNT", 12)
    copy = shutil.copytree(run, tmp_path / run.name)
    call(sample.main, copy, *FEW, "--guide", 4, "--calibrate", "own")
    names = {path.name for path in copy.rglob("*calibration*")}
    assert names == {f"step-{i:08d}-calibration-own.safetensors" for i in (4, 10)}


def test_a_damaged_snapshot_is_named_and_other_files_are_passed_over(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / run.name)
    (copy / "snapshots" / "step-0000004a.safetensors").write_bytes(b"")
    damaged = checkpoints_of(copy, "snapshots")[0]
    data = bytearray(damaged.read_bytes())
    data[-9] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(UserError, match=damaged.name):
        call(sample.main, copy, *FEW, "--guide", 4)


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--diffusion.timesteps-diff", 50], "another noise schedule"),
        (["--diffusion.beta-schedule", "cosine"], "another noise schedule"),
        (
            ["--model.image-size", 32, "--model.dim-multiply", "1,2,2"],
            r"its images are \(3, 32, 32\)",
        ),
    ],
)
def test_a_guide_of_another_shape_or_schedule_is_refused(run, trained, flags, reason):
    other = trained(*flags, "--diffusion.epochs", 1)
    with pytest.raises(UserError, match=f"cannot guide .*{reason}"):
        call(sample.main, run, *FEW, "--guide", other)


@pytest.mark.parametrize(
    "main, flags, message",
    [
        (sample.main, ["--guidance", 2], "needs a --guide"),
        (sample.main, ["--guide", 4, "--guidance", "nan"], "from 0 to"),
        (sample.main, ["--guide", 4, "--export", "x.safetensors"], "ignored with --export"),
        # Without --metrics this measures bits/dim.
        (evaluate.main, ["--guide", 4], "single model"),
        (evaluate.main, ["--guide", 4, "--metrics", "bands"], "single model"),
        (evaluate.main, ["--guide", 4, "--metrics", "bands,fid"], "single model"),
    ],
)
def test_what_cannot_be_guided_is_refused(main, flags, message, run):
    with pytest.raises(UserError, match=message):
        call(main, run, *flags)


def test_a_run_without_snapshots_says_how_to_get_them(tiny_run, tmp_path):
    copy = tmp_path / tiny_run.name / "checkpoints"
    copy.mkdir(parents=True)
    shutil.copy(checkpoints_of(tiny_run)[-1], copy)
    with pytest.raises(UserError, match="snapshot-every"):
        call(sample.main, copy.parent, *FEW, "--guide", 4)
