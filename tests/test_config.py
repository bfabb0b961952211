"""The named experiments are those of the reference, and a config that cannot work says what would."""

import re
from dataclasses import fields, replace

import pytest

from config import EXPERIMENTS, ConfigError, DiffusionConfig, Experiment, ModelConfig

DIFFUSION = dict(dataset_name="FFHQ", learning_rate=3e-5, batch_size=20, use_augmentation=False, timesteps_diff=200)
MODEL = dict(lowest_resolution_size=8, dim_multiply=[1, 2, 2, 4, 8], transformer_layers=[3], base_dim=64)


def test_the_references_own_call_works_and_is_run_1():
    run_1 = EXPERIMENTS["ffhq-run1"]
    given = DiffusionConfig(**DIFFUSION)
    assert all(getattr(run_1.diffusion, name) == value for name, value in DIFFUSION.items())
    assert run_1.model == ModelConfig(**MODEL)
    assert given.effective_batch == 80


def test_ffhq_runs_are_those_of_the_reference():
    runs = {name: EXPERIMENTS[name].diffusion for name in ("ffhq-run1", "ffhq-run2", "ffhq-full")}
    assert [run.timesteps_diff for run in runs.values()] == [200, 1000, 1000]
    assert [run.rescale_betas for run in runs.values()] == [False, True, True]
    assert [run.ema_decay for run in runs.values()] == [0, 0.9999, 0.9999]
    assert [run.epochs for run in runs.values()] == [45, 45, 500]
    assert [run.clip_grad_norm for run in runs.values()] == [0, 0, 1]
    assert [run.warmup_steps for run in runs.values()] == [0, 0, 5000]
    assert [run.use_augmentation for run in runs.values()] == [False, False, True]
    assert [run.max_rotation for run in runs.values()] == [0, 0, 3]
    assert {(run.learning_rate, run.batch_size, run.effective_batch, run.lr_schedule) for run in runs.values()} == {
        (3e-5, 20, 80, "constant")
    }
    assert [EXPERIMENTS[name].model.base_dim for name in runs] == [64, 64, 128]
    assert {EXPERIMENTS[name].model.dropout for name in runs} == {0}


def test_what_differs_is_named_and_only_what_leaves_the_meaning_may_change():
    faces = EXPERIMENTS["faces"]
    changed = faces.override({"epochs": 3, "log_every": 7}, {"dropout": 0.1})
    assert faces.differences(changed) == {
        "diffusion.epochs": (70, 3), "diffusion.log_every": (25, 7), "model.dropout": (0.0, 0.1),
    }  # fmt: skip
    assert faces.differences(faces) == {}
    smaller = {"batch_size": 4, "gradient_accumulation": 4, "keep_every": 5, "checkpoint_minutes": 1.0}
    assert faces.resumed(smaller, {}).diffusion.batch_size == 4
    for wrong, named in (({"batch_size": 4}, "diffusion.batch_size"), ({"seed": 1}, "diffusion.seed")):
        with pytest.raises(ConfigError, match=f"cannot change {named};"):
            faces.resumed(wrong, {})
    with pytest.raises(ConfigError, match=r"cannot change model\.dropout"):
        faces.resumed({"epochs": 99}, {"dropout": 0.1})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_survive_json_like_containers(name):
    assert Experiment.from_dict(EXPERIMENTS[name].to_dict()) == EXPERIMENTS[name]


def test_the_contracts_fields_come_first_and_the_rest_have_defaults():
    assert [field.name for field in fields(DiffusionConfig)][:5] == list(DIFFUSION)
    assert [field.name for field in fields(ModelConfig)][:4] == list(MODEL)
    DiffusionConfig(**DIFFUSION), ModelConfig(**MODEL)


@pytest.mark.parametrize(
    ("field", "value", "what_fits"),
    [
        ("dataset_name", "", "a data set's name"),
        ("dataset_name", 7, "a text"),
        ("learning_rate", -1e-4, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("learning_rate", "fast", "a number"),
        ("batch_size", 0, "1 or more"),
        ("batch_size", 2.5, "an integer"),
        ("batch_size", True, "an integer"),
        ("use_augmentation", 1, "True or False"),
        ("timesteps_diff", 1, "at least 2"),
        ("split", "half", '"reference" or "official"'),
        ("max_rotation", 90, "between 0 and 10"),
        ("rotation_free_end", 2, "between 0 and 1"),
        ("max_bad_images", -1, "0 or more"),
        ("beta_start", 0, "between 0 and 1"),
        ("beta_end", 1e-5, "at least beta_start"),
        ("beta_end", 0.2, "below 0.2 with timesteps_diff = 200"),
        ("epochs", 0, "1 or more"),
        ("gradient_accumulation", 0, "1 or more"),
        ("clip_grad_norm", -1, "0 (off) or more"),
        ("clip_grad_norm", float("inf"), "0 (off) or more"),
        ("warmup_steps", -5, "0 or more"),
        ("lr_schedule", "linear", '"constant" or "cosine"'),
        ("ema_decay", 1, "below 1"),
        ("precision", "half", "one of auto, float32"),
        ("recompute", "all", '"none", "norms" or "blocks"'),
        ("seed", -1, "0 or more"),
        ("log_every", 0, "1 or more"),
        ("keep_checkpoints", 0, "1 or more"),
        ("keep_every", -1, "0 or more"),
        ("checkpoint_minutes", -1.0, "0 (off) or more"),
        ("checkpoint_minutes", float("nan"), "0 (off) or more"),
        ("max_skipped_steps", 0, "1 or more"),
        ("deterministic", 1, "True or False"),
    ],
)
def test_a_diffusion_field_that_does_not_fit(field, value, what_fits):
    with pytest.raises(ConfigError, match=re.escape(what_fits)) as error:
        replace(DiffusionConfig(**DIFFUSION), **{field: value})
    assert f"{field} is {value!r}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "what_fits"),
    [
        ("dim_multiply", [1, 2, 2, 4], "one multiplier for each resolution, 128, 64, 32, 16, 8; 4 of them reach 64"),
        ("dim_multiply", [1, 2, 2, 4, 8, 8], "128, 64, 32, 16, 8"),
        ("dim_multiply", [], "integers"),
        ("dim_multiply", [1, 2, 0, 4, 8], "1 or more"),
        ("dim_multiply", [1, 2, 2.5, 4, 8], "a list of integers"),
        ("dim_multiply", "12248", "a list of integers"),
        ("image_size", 4, "lowest_resolution_size = 8 times a power of 2"),
        ("image_size", 100, "lowest_resolution_size = 8 times a power of 2"),
        ("transformer_layers", [5], "levels between 0 and 4"),
        ("transformer_layers", [-1], "0 or more"),
        ("base_dim", 63, "even"),
        ("base_dim", 2, "at least 4"),
        ("norm_groups", 24, "a divisor of 64"),
        ("norm_groups", 0, "1 or more"),
        ("dropout", 1, "below 1"),
        ("channels", 1, "3"),
    ],
)
def test_a_model_field_that_does_not_fit(field, value, what_fits):
    with pytest.raises(ConfigError, match=re.escape(what_fits)) as error:
        replace(ModelConfig(**MODEL), **{field: value})
    assert "ModelConfig: " in str(error.value)
    assert "\n" not in str(error.value)


def test_every_accepted_model_config_builds_the_network():
    import torch

    from models.unet import UNet

    for experiment in EXPERIMENTS.values():
        with torch.device("meta"):
            UNet(**vars(experiment.model))


def test_narrow_groups_are_warned_of():
    narrow = EXPERIMENTS["faces"].override({}, {"norm_groups": 32})
    assert "norm_groups = 32 leaves 1 channel a group" in narrow.warnings()[0]
    still = EXPERIMENTS["ffhq-full"].override({"use_augmentation": False}, {})
    assert still.warnings() == ["max_rotation has no effect without use_augmentation = True"]
    assert not any(experiment.warnings() for experiment in EXPERIMENTS.values())


def test_a_saved_config_with_unknown_or_missing_fields():
    saved = EXPERIMENTS["faces"].to_dict()
    with pytest.raises(ConfigError, match="surprise"):
        Experiment.from_dict({**saved, "model": {**saved["model"], "surprise": 1}})
    with pytest.raises(ConfigError, match="diffusion"):
        Experiment.from_dict({"model": saved["model"]})
