"""The named experiments are the reference's, and a config that cannot work says what would."""

import re
from dataclasses import dataclass, replace

import pytest
import torch

import train
from config import (
    DEFAULT_EXPERIMENT,
    EXPERIMENTS,
    ConfigError,
    DiffusionConfig,
    Experiment,
    ModelConfig,
)
from functions.support.command_line import Parser, add_config_flags, given_fields
from functions.support.errors import UserError
from functions.support.processes import Processes
from models.unet import UNet
from tests.conftest import ROOT, call

# These are the fields that the reference's own script gives.
DIFFUSION = dict(
    dataset_name="FFHQ",
    learning_rate=3e-5,
    batch_size=20,
    use_augmentation=False,
    timesteps_diff=200,
)
MODEL = dict(
    lowest_resolution_size=8, dim_multiply=[1, 2, 2, 4, 8], transformer_layers=[3], base_dim=64
)


def test_the_references_own_call_works_and_is_run_1():
    """The reference's fields come first, in its order, and all others have defaults."""
    run_1 = EXPERIMENTS["ffhq-run1"]

    assert DiffusionConfig(*DIFFUSION.values()) == DiffusionConfig(**DIFFUSION)
    assert DiffusionConfig(**DIFFUSION).effective_batch == 80
    assert vars(run_1.diffusion).items() >= DIFFUSION.items()
    assert run_1.model == ModelConfig(**MODEL) == ModelConfig(*MODEL.values())


@pytest.mark.parametrize(
    ("name", "diffusion", "base_dim"),
    [
        (
            "ffhq-run1",
            dict(
                timesteps_diff=200,
                rescale_betas=False,
                ema_decay=0,
                epochs=45,
                clip_grad_norm=0,
                warmup_steps=0,
                use_augmentation=False,
                max_rotation=0,
            ),
            64,
        ),
        (
            "ffhq-run2",
            dict(
                timesteps_diff=1000,
                rescale_betas=True,
                ema_decay=0.9999,
                epochs=45,
                clip_grad_norm=0,
                warmup_steps=0,
                use_augmentation=False,
                max_rotation=0,
            ),
            64,
        ),
        (
            "ffhq-full",
            dict(
                timesteps_diff=1000,
                rescale_betas=True,
                ema_decay=0.9999,
                epochs=500,
                clip_grad_norm=1,
                warmup_steps=5000,
                use_augmentation=True,
                max_rotation=3,
            ),
            128,
        ),
    ],
)
def test_ffhq_runs_are_those_of_the_reference(name, diffusion, base_dim):
    shared = dict(
        learning_rate=3e-5, batch_size=20, gradient_accumulation=4, lr_schedule="constant"
    )
    experiment = EXPERIMENTS[name]

    assert vars(experiment.diffusion).items() >= {**diffusion, **shared}.items()
    assert experiment.model.base_dim == base_dim
    assert experiment.model.dropout == 0


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_an_experiment_survives_json_and_builds_a_network_without_a_warning(experiment):
    assert Experiment.from_dict(experiment.to_dict()) == experiment
    assert experiment.warnings() == []
    # The network is built without memory for its weights; an error would end the test.
    with torch.device("meta"):
        UNet(**vars(experiment.model))


def test_what_differs_is_named_and_only_what_leaves_the_meaning_may_change():
    faces = EXPERIMENTS["faces"]
    changed = faces.override({"epochs": 3, "log_every": 7}, {"dropout": 0.1})
    assert faces.differences(changed) == {
        "diffusion.epochs": (70, 3),
        "diffusion.log_every": (25, 7),
        "model.dropout": (0.0, 0.1),
    }
    assert faces.differences(faces) == {}

    # A smaller batch size with more accumulation leaves the images of a step as they were.
    smaller = {
        "batch_size": 4,
        "gradient_accumulation": 4,
        "keep_every": 5,
        "checkpoint_minutes": 1.0,
    }
    assert faces.resumed(smaller, {}).diffusion.batch_size == 4

    # Alone it does not.
    for part, field, value in (
        ("diffusion", "batch_size", 4),
        ("diffusion", "seed", 1),
        ("model", "dropout", 0.1),
    ):
        with pytest.raises(ConfigError, match=f"cannot change {part}.{field};"):
            changes = {"diffusion": {"epochs": 99}, "model": {}, part: {field: value}}
            faces.resumed(**changes)


@pytest.mark.parametrize(
    ("field", "value", "what_fits"),
    [
        ("batch_size", 0, "1 or more"),
        ("epochs", 0, "1 or more"),
        ("gradient_accumulation", 0, "1 or more"),
        ("log_every", 0, "1 or more"),
        ("keep_checkpoints", 0, "1 or more"),
        ("max_skipped_steps", 0, "1 or more"),
        ("norm_groups", 0, "1 or more"),
        ("max_bad_images", -1, "0 or more"),
        ("warmup_steps", -1, "0 or more"),
        ("seed", -1, "0 or more"),
        ("keep_every", -1, "0 or more"),
        ("dataset_name", "", "a data set's name"),
        ("dataset_name", 7, "a string"),
        ("learning_rate", float("nan"), "above 0"),
        ("learning_rate", "fast", "a number"),
        ("batch_size", True, "an integer"),
        ("use_augmentation", 1, "True or False"),
        ("timesteps_diff", 1, "at least 2"),
        ("timesteps_diff", 10**6 + 1, "at most 1,000,000"),
        ("split", "half", '"reference" or "official"'),
        ("max_rotation", 90, "between 0 and 10"),
        ("rotation_free_end", 2, "between 0 and 1"),
        ("beta_start", 0, "between 0 and 1"),
        ("beta_end", 1e-5, "at least beta_start"),
        ("beta_end", 0.2, "below 0.2 with timesteps_diff = 200"),
        ("beta_schedule", "sigmoid", '"linear" or "cosine"'),
        ("objective", "x_0", '"eps" or "v"'),
        ("objective", None, "a string"),
        ("clip_grad_norm", float("inf"), "0 (off) or more"),
        ("lr_schedule", "linear", '"constant" or "cosine"'),
        ("ema_decay", 1, "below 1"),
        ("precision", "half", '"auto" or "float32" or "bfloat16" or "float16"'),
        ("compile", "auto", "True or False"),
        ("checkpoint_minutes", float("nan"), "0 (off) or more"),
        (
            "dim_multiply",
            [1, 2, 2, 4],
            "one multiplier for each resolution, 128, 64, 32, 16, 8; 4 of them reach 64",
        ),
        ("dim_multiply", [], "a list of 1 to 15 integers"),
        ("dim_multiply", [1, 2, 0, 4, 8], "1 or more"),
        ("dim_multiply", [1, 2, 2.5, 4, 8], "a list of integers"),
        ("image_size", 100, "lowest_resolution_size = 8 times a power of 2"),
        ("transformer_layers", [5], "levels between 0 and 4"),
        ("transformer_layers", [-1], "0 or more"),
        ("base_dim", 63, "even"),
        ("norm_groups", 24, "a divisor of 64"),
        ("dropout", 1, "below 1"),
        ("dialect", "lucidrains", '"ho" or "diffusers"'),
        ("channels", 2, "3 (RGB) or 1 (grey)"),
    ],
)
def test_a_field_that_does_not_fit_says_what_would(field, value, what_fits):
    config = DiffusionConfig(**DIFFUSION)
    if not hasattr(config, field):
        config = ModelConfig(**MODEL)

    with pytest.raises(ConfigError, match=re.escape(what_fits)) as error:
        replace(config, **{field: value})

    message = str(error.value)
    assert message.startswith(f"{type(config).__name__}: {field} is ")
    assert "\n" not in message


def test_betas_whose_alpha_bar_underflows_are_refused():
    """The sum of all betas is about 1005, and exp(-1005) is 0 in float64."""
    long = {**DIFFUSION, "timesteps_diff": 100_000}
    DiffusionConfig(**long)
    with pytest.raises(ConfigError, match="it must be smaller with timesteps_diff = 100000"):
        DiffusionConfig(**long, rescale_betas=False)


def test_only_levels_with_attention_need_whole_heads():
    """Of 4 and 8 channels, 4 make no head of 8."""
    narrow = {"base_dim": 4, "image_size": 8, "norm_groups": 2, "dialect": "diffusers"}
    attending = ModelConfig(4, (1, 2), (1,), **narrow)
    UNet(**vars(attending))
    with pytest.raises(ConfigError, match="heads of 8 channels"):
        replace(attending, transformer_layers=(0,))
    with pytest.raises(ConfigError, match="heads of 8 channels"):
        replace(attending, dim_multiply=(2, 1), transformer_layers=())


@pytest.mark.parametrize(
    ("field", "value"), [("beta_start", 2e-4), ("beta_end", 0.03), ("rescale_betas", False)]
)
def test_cosine_betas_refuse_what_they_have_no_use_for(field, value):
    # 10 timesteps would be too few for linear betas.
    cosine = DiffusionConfig(**{**DIFFUSION, "timesteps_diff": 10}, beta_schedule="cosine")

    message = '"linear" when beta_start, beta_end or rescale_betas are changed'
    with pytest.raises(ConfigError, match=message):
        replace(cosine, **{field: value})

    # Linear betas take the same change without an error.
    replace(DiffusionConfig(**DIFFUSION), **{field: value})


@pytest.mark.parametrize(
    ("name", "other", "also"),
    [
        (
            "faces-v",
            "faces",
            {
                "diffusion.learning_rate": (2e-3, 1e-3),
                "diffusion.beta_schedule": ("linear", "cosine"),
            },
        ),
        (
            "ffhq-v",
            "ffhq-full",
            {
                "diffusion.beta_schedule": ("linear", "cosine"),
                "diffusion.lr_schedule": ("constant", "cosine"),
            },
        ),
    ],
)
def test_the_v_presets_differ_in_their_objective_and_what_it_wants_alone(name, other, also):
    changes = EXPERIMENTS[other].differences(EXPERIMENTS[name])
    assert changes == {"diffusion.objective": ("eps", "v"), **also}


def test_the_default_has_the_guide_of_readme_as_a_snapshot():
    readme = (ROOT / "README.md").read_text()
    step = int(re.search(r"train\.py && .*sample\.py .* --guide (\d+)", readme)[1])
    config = EXPERIMENTS[DEFAULT_EXPERIMENT].diffusion

    # 811 of the embedded people are for training.
    assert step < config.epochs * (811 // config.effective_batch)
    assert step % config.snapshot_every == 0


def test_what_is_probably_not_meant_is_warned_of():
    narrow = EXPERIMENTS["faces"].override({}, {"norm_groups": 32})
    assert "norm_groups = 32 leaves 1 channel per group" in narrow.warnings()[0]

    still = EXPERIMENTS["ffhq-full"].override({"use_augmentation": False}, {})
    assert still.warnings() == ["max_rotation has no effect without use_augmentation = True"]


def test_a_saved_config_with_unknown_or_missing_fields():
    saved = EXPERIMENTS["faces-v"].to_dict()

    with pytest.raises(ConfigError, match="surprise"):
        Experiment.from_dict({**saved, "model": {**saved["model"], "surprise": 1}})
    with pytest.raises(ConfigError, match="diffusion"):
        Experiment.from_dict({"model": saved["model"]})

    # A run of an earlier version has fields that went, such as this one.
    saved["diffusion"]["recompute"] = "norms"
    with pytest.raises(ConfigError, match=r"'recompute'.* continue with commit 447a7f4"):
        Experiment.from_dict(saved)


@dataclass
class Bare:
    """Stand in for a config with a field that nobody explains."""

    # This one has a comment.
    epochs: int = 1
    batch_size: int = 2


def test_a_field_without_a_comment_is_named():
    with pytest.raises(UserError, match="Bare: batch_size has no comment"):
        add_config_flags(Parser(), "bare", Bare)


def changes_of(*flags):
    """Return the fields that train.py's flags change, as `train.main` does."""
    args = call(train.parse_flags, *flags)
    return given_fields(args, "diffusion"), given_fields(args, "model")


@pytest.mark.parametrize(
    ("timesteps", "levels", "shown"),
    [
        ("--diffusion.timesteps", "--model.attention-levels", True),
        ("--diffusion.timesteps-diff", "--model.transformer-layers", False),
    ],
)
def test_fields_with_misleading_names_have_flags_with_true_ones(
    timesteps, levels, shown, tiny_run, capsys
):
    """Both names of a flag set the field, in a new run and in a resumed one; help has one alone."""
    changes = changes_of(timesteps, 100, levels, "1")
    assert changes == ({"timesteps_diff": 100}, {"transformer_layers": (1,)})
    new = train.new_run("faces", tiny_run.parent, None, changes, Processes()).experiment
    assert (new.diffusion.timesteps_diff, new.model.transformer_layers) == (100, (1,))

    # The run has these values; others would make it another run.
    train.open_run(tiny_run, None, None, changes, Processes())
    for flags, field in (
        ((timesteps, 50), "diffusion.timesteps_diff"),
        ((levels, "0"), "model.transformer_layers"),
    ):
        with pytest.raises(ConfigError, match=f"cannot change {field};"):
            train.open_run(tiny_run, None, None, changes_of(*flags), Processes())

    capsys.readouterr()
    with pytest.raises(SystemExit):
        changes_of("--help")
    words = capsys.readouterr().out.split()
    assert (timesteps in words) is (levels in words) is shown
