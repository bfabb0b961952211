"""Trainings with objective v, mixed t and cosine betas; and runs of the time before there were any of these."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from functions.noise_scheduler import NoiseScheduler
from functions.support.random_numbers import training_draws
from functions.support.run_folder import checkpoints_of
from functions.timesteps import mixed_timesteps
from functions.training.metrics import COLUMNS, read_metrics
from tests.conftest import call, during, newest, terminate, train_tiny
from tests.kill import assert_same_run
from tests.spoilt_files import contents_text, same, with_contents

NEW_FIELDS = {"objective": "eps", "t_sampling": "uniform", "beta_schedule": "linear"}
NEW_COLUMNS = {"eps_error", "val_eps_error", "val_eps_error_ema"}


def seen_in(pictures, runs, *flags):
    """A training's folder, and the t and the losses (10 steps, effective batch) that it goes through."""
    with pytest.MonkeyPatch.context() as patch:
        original, seen = train.denoising_loss, []

        def seeing(model, scheduler, x_0, t, noise):
            losses = original(model, scheduler, x_0, t, noise)
            seen.append((t, losses.detach()))
            return losses

        patch.setattr(train, "denoising_loss", seeing)
        run = train_tiny(pictures, runs, *flags, name="faces-v")
    return run, *(torch.cat(values).numpy().reshape(10, -1) for values in zip(*seen, strict=True))


def numbers(run, column):
    return {
        row["step"]: row[column]
        for row in read_metrics(run / "metrics.csv")
        if row[column] is not None
    }


@pytest.mark.slow
def test_a_run_with_v_mixed_t_and_cosine_betas(pictures, tmp_path):
    """Its errors of eps are its losses times alpha_bar; stopped and resumed it is the same; it is sampled from."""
    flags = ["--diffusion.t-sampling", "mixed", "--diffusion.beta-schedule", "cosine"]
    straight, t, losses = seen_in(pictures, tmp_path / "straight", *flags)
    f = np.cos((np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert t.max() < 99  # at the last alpha_bar is not f, as its beta is capped
    errors = f[t + 1] / f[0] * losses
    for column, values in (("loss", losses), ("eps_error", errors)):
        means = {
            last: values[first:last].mean()
            for first, last in ((0, 2), (2, 4), (4, 5), (5, 6), (6, 8), (8, 10))
        }
        assert numbers(straight, column) == pytest.approx(means, rel=1e-5)
    for of in ("", "_ema"):
        loss, error = (numbers(straight, f"val_{what}{of}") for what in ("loss", "eps_error"))
        assert loss.keys() == error.keys() == {5, 10}
        assert all(0 < error[step] < loss[step] for step in (5, 10))
    with pytest.raises(SystemExit, match="75"), during(7, terminate):
        train_tiny(pictures, tmp_path / "cut", *flags, name="faces-v")
    call(train.main, "faces-v", "--resume", "--runs", tmp_path / "cut")
    (cut,) = (tmp_path / "cut").iterdir()
    assert_same_run(straight, cut)
    assert (cut / "losses.png").stat().st_size > 10_000
    call(sample.main, cut, "--n", 4, "--steps", 4, "--out", tmp_path / "pictures")
    grids = [cut / "samples" / "step-00000010.png", tmp_path / "pictures" / "grid.png"]
    training, script = (np.asarray(Image.open(grid)).astype(float) for grid in grids)
    # Of 255: the networks are laid out otherwise in memory
    assert abs(training - script).max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize(("t_sampling", "passes"), [("mixed", 1), ("mixed", 3), ("uniform", 3)])
def test_a_place_has_its_t_however_the_batch_is_cut(t_sampling, passes, pictures, tmp_path):
    """In passes of 3, the even places of the second are odd ones of the whole."""
    own = ["--diffusion.batch-size", 9 // passes, "--diffusion.gradient-accumulation", passes]
    _, t, _ = seen_in(pictures, tmp_path, "--diffusion.t-sampling", t_sampling, *own)
    for step, found in enumerate(t):
        draws = training_draws(0, step, 9, (3, 16, 16), 100, "cpu")
        mixed = mixed_timesteps(NoiseScheduler(100, beta_schedule="cosine"), draws.t, draws.normal)
        assert found.tolist() == (mixed if t_sampling == "mixed" else draws.t).tolist()


def test_for_eps_the_error_of_eps_is_the_loss(tiny_run):
    for of in ("", "val_"):
        assert numbers(tiny_run, f"{of}eps_error") == numbers(tiny_run, f"{of}loss") != {}
    assert numbers(tiny_run, "val_eps_error_ema") == numbers(tiny_run, "val_loss_ema") != {}


def as_before(run):
    """Make of a run one of the time before the fields, columns and sums that came with v."""
    config = json.loads((run / "config.json").read_text())
    for checkpoint in checkpoints_of(run):
        contents = json.loads(contents_text(checkpoint.read_bytes()))
        contents["run"]["window"]["loss_sum"] = contents["run"]["window"].pop("sums")[0]
        for part in (contents["config"], config):
            assert {
                field: part["diffusion"].pop(field, value) for field, value in NEW_FIELDS.items()
            } == NEW_FIELDS
        checkpoint.write_bytes(with_contents(checkpoint.read_bytes(), contents))
    (run / "config.json").write_text(json.dumps(config))
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    kept = [place for place, column in enumerate(rows[0]) if column not in NEW_COLUMNS]
    (run / "metrics.csv").write_text(
        "".join(",".join(row[place] for place in kept) + "\n" for row in rows)
    )


@pytest.mark.slow
def test_an_earlier_run_is_sampled_from_and_goes_on_as_it_would_have(
    unfinished, tiny_run, tmp_path, capsys
):
    """In its rows the error of eps is the loss."""
    call(sample.main, unfinished, "--n", 2, "--steps", 5, "--out", tmp_path / "now")
    as_before(unfinished)
    call(sample.main, unfinished, "--n", 2, "--steps", 5, "--out", tmp_path / "before")
    assert (tmp_path / "before" / "grid.png").read_bytes() == (
        tmp_path / "now" / "grid.png"
    ).read_bytes()
    call(train.main, "faces", "--resume", "--runs", unfinished.parent)
    assert "changed:" not in capsys.readouterr().out
    found, straight = (read_metrics(run / "metrics.csv") for run in (unfinished, tiny_run))
    assert [*found[0]] == [*COLUMNS]
    for row, expected in zip(found, straight, strict=True):
        for column in {*COLUMNS} - {"images_per_second"}:
            assert row[column] == expected[column]
    assert all(
        same(newest(unfinished)[part], newest(tiny_run)[part])
        for part in ("config", "model", "ema", "exp_avg")
    )
