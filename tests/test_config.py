"""The named experiments are the reference's, and a config that cannot work says what would."""

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from inspect import signature

import pytest
import torch

from config import (
    EXPERIMENTS,
    ConfigError,
    DiffusionConfig,
    Experiment,
    ModelConfig,
    build_network,
    build_scheduler,
)
from functions.noise_scheduler import NoiseScheduler
from functions.support.settings import fields_with
from tests.conftest import refused

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
    assert DiffusionConfig(*DIFFUSION.values()) == DiffusionConfig(**DIFFUSION)
    assert DiffusionConfig(**DIFFUSION).effective_batch == 80
    assert EXPERIMENTS["ffhq-run1"].model == ModelConfig(**MODEL) == ModelConfig(*MODEL.values())


# Each run of the reference changes the one before it.
RUN_1 = DIFFUSION | dict(
    rescale_betas=False,
    ema_decay=0,
    epochs=45,
    clip_grad_norm=0,
    warmup_steps=0,
    max_rotation=0,
    gradient_accumulation=4,
    lr_schedule="constant",
)
RUN_2 = RUN_1 | dict(timesteps_diff=1000, rescale_betas=True, ema_decay=0.9999)
FULL = RUN_2 | dict(
    epochs=500, clip_grad_norm=1, warmup_steps=5000, use_augmentation=True, max_rotation=3
)


@pytest.mark.parametrize(
    "name, diffusion, base_dim",
    [("ffhq-run1", RUN_1, 64), ("ffhq-run2", RUN_2, 64), ("ffhq-full", FULL, 128)],
)
def test_ffhq_runs_are_those_of_the_reference(name, diffusion, base_dim):
    experiment = EXPERIMENTS[name]
    assert vars(experiment.diffusion).items() >= diffusion.items()
    assert experiment.model.base_dim == base_dim
    assert experiment.model.dropout == 0


def test_the_day_has_the_noise_of_64_px():
    shift = build_scheduler(vars(EXPERIMENTS["ffhq-day"].diffusion)).log_snr_shift
    assert shift == pytest.approx(2 * math.log(64 / 128), abs=1e-3)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_survives_json_and_builds_a_network_without_a_warning(name):
    experiment = EXPERIMENTS[name]
    assert Experiment.from_dict(experiment.to_dict()) == experiment
    # The reference's first two runs have groups of 2 channels, which is one of their faults.
    assert len([*experiment.warnings()]) == (name in ("ffhq-run1", "ffhq-run2"))
    # The network is built without memory for its weights; an error would end the test.
    with torch.device("meta"):
        build_network(experiment.model)


@pytest.mark.parametrize(
    "changes, refusal",
    [
        # A smaller batch size with more accumulation leaves the images of a step as they were.
        ({"batch_size": 4, "gradient_accumulation": 4, "epochs": 99, "dataset_name": "moved"}, ""),
        ({"learning_rate": 1e-4, "ema_decay": 0.99, "rotation_free_end": 0.2, "log_every": 1}, ""),
        ({"batch_size": 4}, "batch, 16, as with batch_size = 4 and gradient_accumulation = 4;"),
        ({"batch_size": 3}, "batch, 16, as with a batch_size that divides it;"),
        ({"dropout": 0.1, "epochs": 3}, "cannot change model.dropout;"),
        ({"optimizer": "adam", "labels": True}, "change diffusion.labels, diffusion.optimizer;"),
        ({"objective": "v", "split": "official"}, "change diffusion.objective, diffusion.split;"),
        # A run has an average of its weights from the first step on, or none.
        ({"seed": 1, "ema_decay": 0.0}, "change diffusion.ema_decay, diffusion.seed;"),
    ],
)
def test_resume_keeps_what_is_fixed_and_names_all_that_differs(changes, refusal):
    faces = EXPERIMENTS["faces"]
    changed = faces.override(**changes)
    before = {name: vars(faces.diffusion).get(name, faces.model.dropout) for name in changes}
    differences = {name.split(".")[1]: pair for name, pair in faces.differences(changed).items()}
    assert differences == {name: (before[name], changes[name]) for name in changes}
    with refused(refusal, ConfigError) if refusal else nullcontext():
        faces.check_resumption(changed)


def test_weights_fix_the_objective_and_all_that_the_schedule_is_built_from():
    """A new argument of the schedule fails here until its field has the mark."""
    _, *betas = signature(NoiseScheduler).parameters
    fixed = fields_with(DiffusionConfig, "fixed_by_weights")
    assert fixed == {"objective", "timesteps_diff", *betas}

    # 200 of the betas for 1000 timesteps
    config = DiffusionConfig(**DIFFUSION, rescale_betas=False)
    expected = torch.linspace(1e-4, 0.02, 200, dtype=torch.float64)
    torch.testing.assert_close(build_scheduler(vars(config)).betas, expected)


# These fields fit to each other.
COSINE = {"timesteps_diff": 10, "beta_schedule": "cosine"}


# A field, a value, and which values fit; then other fields with which the first one does not fit.
@pytest.mark.parametrize(
    "row",
    [
        ("batch_size", 0, "1 or more"),
        ("max_bad_images", -1, "0 or more"),
        ("seed", 2**64, "from 0 to 18,446,744,073,709,551,615"),
        ("dataset_name", "", "a name or a path"),
        ("learning_rate", float("nan"), "finite"),
        ("learning_rate", 2, "from 1e-09 to 1"),
        ("use_augmentation", 1, "True or False"),
        ("timesteps_diff", 1, "from 2 to 1,000,000"),
        ("max_rotation", 90, "from 0 to 10"),
        ("ema_decay", 1, "from 0 to 0.999999"),
        ("dropout", 1, "from 0 to 0.99"),
        ("split", "half", '"reference" or "official"'),
        ("beta_start", 0, "0 < beta_start <= beta_end < 0.2: use more timesteps"),
        # Cosine betas refuse what they have no use for.
        ("beta_end", 0.03, '"linear" when beta_start, beta_end or', COSINE),
        ("dim_multiply", [1, 2, 2.5, 4, 8], "a list, and each item an integer"),
        ("image_size", 64, "128: lowest_resolution_size = 8, which each of the 5 levels of dim"),
        ("transformer_layers", [5], "levels between 0 and 4"),
        ("base_dim", 63, "even"),
        ("norm_groups", 24, "a divisor of 64"),
        ("channels", 2, "3 or 1"),
    ],
)
def test_a_field_that_does_not_fit_says_what_would(row):
    field, value, what_fits, *others = row
    config = DiffusionConfig(**DIFFUSION)
    if not hasattr(config, field):
        config = ModelConfig(**MODEL)
    config = replace(config, **dict(*others))

    with refused(re.escape(what_fits), ConfigError) as error:
        replace(config, **{field: value})

    message = str(error.value)
    assert message.startswith(f"{type(config).__name__}: ")
    assert others or f"{field} is " in message
    assert "\n" not in message


def test_what_is_probably_not_meant_is_warned_of():
    narrow = EXPERIMENTS["faces"].override(norm_groups=32)
    assert "norm_groups = 32 leaves 1 of the 4 channels" in next(narrow.warnings())

    still = EXPERIMENTS["ffhq-full"].override(use_augmentation=False)
    assert [*still.warnings()] == ["max_rotation has no effect without use_augmentation = True"]


def test_another_image_size_keeps_the_levels_unless_a_size_of_the_last_is_given():
    faces = EXPERIMENTS["faces"]
    assert faces.override(image_size=64).model.lowest_resolution_size == 8
    three = faces.override(image_size=64, dim_multiply=[1, 2, 4])
    assert three.model.lowest_resolution_size == 16
    with refused("image_size is 64; it must be 32: lowest_resolution_size = 4", ConfigError):
        faces.override(image_size=64, lowest_resolution_size=4)


def test_a_saved_config_with_unknown_or_missing_fields():
    saved = EXPERIMENTS["faces-v"].to_dict()
    with refused("DiffusionConfig: missing", ConfigError):
        Experiment.from_dict(saved | {"diffusion": {}})

    # A run of an earlier version has fields that went, such as this one.
    saved["diffusion"]["recompute"] = "norms"
    with refused(r"see CHANGELOG\.md\): recompute", ConfigError):
        Experiment.from_dict(saved)
    # Another field has only another name.
    del saved["diffusion"]["recompute"], saved["diffusion"]["condition_dropout"]
    saved["diffusion"]["label_dropout"] = 0.25
    assert Experiment.from_dict(saved).diffusion.condition_dropout == 0.25


def test_a_config_of_before_says_which_of_two_networks_it_was():
    """Commit a67ff70 could export the other one. test_survival.py has a run of ours."""
    saved = EXPERIMENTS["faces-v"].to_dict()
    saved["model"]["dialect"] = "diffusers"
    with refused("^dialect = diffusers is gone: with commit a67ff70, .* --export", ConfigError):
        Experiment.from_dict(saved)


def test_the_preset_of_cifar10_is_the_papers():
    """These are the values of Appendix B of Ho et al. 2020."""
    diffusion = EXPERIMENTS["cifar10"].diffusion
    expected = dict(
        learning_rate=2e-4,
        warmup_steps=5000,
        effective_batch=128,
        ema_decay=0.9999,
        clip_grad_norm=1.0,
        timesteps_diff=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        objective="eps",
        use_augmentation=True,
        max_rotation=0.0,
        lr_schedule="constant",
    )
    assert {name: getattr(diffusion, name) for name in expected} == expected
    assert EXPERIMENTS["cifar10"].model.dropout == 0.1

    # The paper trains for 800,000 steps, which end within the last epoch.
    steps_per_epoch = 50_000 // 128
    assert 0 <= diffusion.epochs * steps_per_epoch - 800_000 < steps_per_epoch
