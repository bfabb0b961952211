"""train.py --init: a new run from the weights of another, of an exported file, or of a folder of diffusers."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import sample
import train
from config import ConfigError, ModelConfig
from functions.support.checkpoint import load_weights
from functions.support.processes import Processes
from functions.support.run_folder import checkpoints_of
from functions.training.metrics import read_metrics
from tests.conftest import TINY, call, during, interrupt, newest
from tests.functions.support.test_diffusers_folder import SMALL

PAIRS = [*zip(TINY[::2], TINY[1::2], strict=True)]
# Without what comes from the weights
TRAINING = [
    text
    for pair in PAIRS
    if "--model" not in pair[0] and "timesteps" not in pair[0]
    for text in pair
]


@pytest.mark.parametrize("kind", ["run", "file", "folder"])
def test_a_run_begins_with_the_averaged_weights_of_another(
    kind, tiny_run, pictures, tmp_path, monkeypatch, capsys
):
    """Network, T and betas are those of the weights, whatever the preset has; the average moves little from them."""
    source = {
        "run": tiny_run,
        "file": tmp_path / "faces.safetensors",
        "folder": tmp_path / "faces",
    }[kind]
    if kind != "run":
        call(sample.main, tiny_run, "--export", source)
    began, original, before = [], train.update_ema, load_weights(checkpoints_of(tiny_run)[-1])

    def watched(ema_model, model, step, decay, ramp):
        if step == 0:  # whose step of Adam is of the learning rate
            began.extend(
                torch.equal(p, before.weights[name]) for name, p in ema_model.named_parameters()
            )
            began.extend(
                (p - before.weights[name]).abs().max() < 2.1e-4
                for name, p in model.named_parameters()
            )
        original(ema_model, model, step, decay, ramp)

    monkeypatch.setattr(train, "update_ema", watched)
    flags = ["--diffusion.dataset-name", pictures, "--runs", tmp_path / "runs", *TRAINING]
    call(train.main, "cifar10", "--init", source, *flags)
    run = next((tmp_path / "runs").iterdir())
    contents = newest(run)
    said = contents["run"]["initial"]
    assert str(source) in said and (kind == "folder" or before.digest[:16] in said)
    assert json.loads((run / "config.json").read_text())["run"]["initial"] == said
    assert f"begins as  {said}" in capsys.readouterr().out
    assert contents["config"]["model"] == before.config["model"] | {"dropout": 0.1}  # the preset's
    assert contents["config"]["diffusion"]["timesteps_diff"] == 100
    moved = {
        part: max(
            (contents[part][name] - tensor).abs().max() for name, tensor in before.weights.items()
        )
        for part in ("model", "ema")
    }
    # Ten steps of an average over 10,000
    assert began and all(began) and 0 < moved["ema"] < 0.01 * moved["model"]


@pytest.mark.slow
def test_the_loss_begins_where_that_of_the_weights_ended(tmp_path):
    flags = [
        *TRAINING,
        "--diffusion.dataset-name",
        "emoji_people",
        "--diffusion.validation-samples",
        100,
    ]
    for what, steps in (("log", 10), ("validate", 50), ("sample", 500), ("checkpoint", 500)):
        flags += [f"--diffusion.{what}-every", steps]
    call(train.main, "faces", *TINY, *flags, "--diffusion.epochs", 3, "--runs", tmp_path / "first")
    source = next((tmp_path / "first").iterdir())
    call(
        train.main,
        "faces",
        *flags,
        "--init",
        source,
        "--diffusion.learning-rate",
        1e-4,
        "--runs",
        tmp_path / "then",
    )
    first, *_, ended = read_metrics(source / "metrics.csv")
    begins = read_metrics(next((tmp_path / "then").iterdir()) / "metrics.csv")
    assert first["loss"] > 0.8 and ended["val_loss_ema"] < 0.5 and begins[-1]["step"] >= 200
    validated = [row["val_loss_ema"] for row in begins if row["val_loss_ema"] is not None]
    assert len(validated) >= 4 and validated == pytest.approx(
        [ended["val_loss_ema"]] * len(validated), rel=0.02
    )
    assert begins[0]["loss"] < 0.6


def test_a_folder_of_another_dialect_schedule_and_objective(tmp_path, capsys):
    scheduler = DDPMScheduler(
        50, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False
    )
    DDPMPipeline(UNet2DModel(**SMALL), scheduler).save_pretrained(tmp_path)
    initial = train.open_initial(tmp_path, Processes())
    assert "is sampled without clipping x_0" in capsys.readouterr().out
    made = train.new_experiment("faces", ({"seed": 1}, {"dropout": 0.2}), initial)
    wanted = dict(
        timesteps_diff=50,
        beta_schedule="cosine",
        rescale_betas=True,
        objective="v",
        learning_rate=2e-3,
    )
    assert {
        name: getattr(made.diffusion, name) for name in wanted
    } == wanted and made.diffusion.seed == 1
    assert made.model == ModelConfig(
        8, (1, 2), (1,), 16, 16, dropout=0.2, norm_groups=4, dialect="diffusers"
    )


def test_what_contradicts_the_weights_is_refused(tiny_run, trained):
    for flag, value in (
        ("--model.base-dim", 16),
        ("--diffusion.timesteps-diff", 50),
        ("--diffusion.objective", "v"),
    ):
        with pytest.raises(
            ConfigError, match=f"{flag[2:].replace('-', '_')} is .* cannot become {value}"
        ):
            trained("--init", tiny_run, flag, value)
    # The flags of TINY say what the weights are
    assert trained("--init", tiny_run, "--dry-run") is None


def test_a_resumed_run_remembers_where_it_began(tiny_run, trained, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt), during(7, interrupt):
        trained("--init", tiny_run)
    with pytest.raises(ConfigError, match="did not begin with the weights of"):
        trained("--resume", "auto", "--init", next(tmp_path.iterdir()))
    run = trained("--resume", "auto", "--init", tiny_run)
    said = newest(run)["run"]["initial"]
    assert capsys.readouterr().out.count(f"begins as  {said}") == 2
    assert len([*run.parent.iterdir()]) == 1 and newest(run)["run"]["step"] == 10
    with pytest.raises(SystemExit):
        trained("--resume", run, "--init", tiny_run)
    assert "--init starts a new run, --resume goes on with one" in capsys.readouterr().err
