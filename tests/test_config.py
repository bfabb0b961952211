"""The named experiments are the reference's, and a config that cannot work says what would."""

import math
import re
from inspect import signature

import pytest
import torch

from config import (
    EXPERIMENTS,
    ConfigError,
    DiffusionConfig,
    Experiment,
    ModelConfig,
)
from functions.denoiser import OBJECTIVES
from functions.noise_scheduler import BETA_SCHEDULES, NoiseScheduler, build_scheduler
from functions.optimizers import LR_SCHEDULES, OPTIMIZERS
from functions.samplers import SAMPLERS
from functions.support.settings import fields_with
from functions.training.description import check_changes, warnings
from functions.training.opening import check_names
from models.networks import build_network
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
    base_dim=64,
    dropout=0,
)
RUN_2 = RUN_1 | dict(timesteps_diff=1000, rescale_betas=True, ema_decay=0.9999)
FULL = RUN_2 | dict(
    epochs=500,
    clip_grad_norm=1,
    warmup_steps=5000,
    use_augmentation=True,
    max_rotation=3,
    base_dim=128,
)
# Appendix B of Ho et al. 2020
PAPER = dict(
    learning_rate=2e-4,
    warmup_steps=5000,
    batch_size=128,
    gradient_accumulation=1,
    # They train for 800,000 steps, which end within the last epoch of 390.
    epochs=math.ceil(800_000 / 390),
    ema_decay=0.9999,
    clip_grad_norm=1,
    timesteps_diff=1000,
    beta_start=1e-4,
    beta_end=0.02,
    beta_schedule="linear",
    objective="eps",
    use_augmentation=True,
    max_rotation=0,
    lr_schedule="constant",
    dropout=0.1,
)
# It has the noise of 64 px.
DAY = dict(image_size=128, log_snr_shift=pytest.approx(2 * math.log(64 / 128), abs=1e-3))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ffhq-run1", RUN_1),
        ("ffhq-run2", RUN_2),
        ("ffhq-full", FULL),
        ("ffhq-day", DAY),
        ("cifar10", PAPER),
    ],
)
def test_presets_are_what_their_runs_were(name, expected):
    fields = vars(EXPERIMENTS[name].diffusion) | vars(EXPERIMENTS[name].model)
    assert {field: fields[field] for field in expected} == expected


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_survives_json_and_builds_a_network_with_known_warnings(name):
    experiment = EXPERIMENTS[name]
    assert Experiment.from_dict(experiment.to_dict()) == experiment
    # The first two runs have groups of 2 channels, and in the first x_T shows the image.
    faults = {"ffhq-run1": 2, "ffhq-run2": 1}
    snr = build_scheduler(vars(experiment.diffusion)).terminal_snr
    assert len([*warnings(experiment, 10**6, snr)]) == faults.get(name, 0)
    # The network is built without memory for its weights; an error would end the test.
    with torch.device("meta"):
        build_network(experiment.model)


# A smaller batch size with more accumulation leaves the images of a step as they were.
FREE = dict(
    batch_size=4,
    gradient_accumulation=4,
    epochs=99,
    dataset_name="moved",
    learning_rate=1e-4,
    ema_decay=0.99,
)
# A run has an average of its weights from the first step on, or none.
FIXED = dict(ema_decay=0.0, labels=True, objective="v", optimizer="adam", seed=1, split="official")
NAMES = ", ".join(f"diffusion.{name}" for name in FIXED)


def test_resume_keeps_what_is_fixed_and_names_all_that_differs():
    faces = EXPERIMENTS["faces"]
    check_changes(faces, faces.override(**FREE))
    for changes, refusal in (
        (FREE | FIXED | {"dropout": 0.1}, f"cannot change {NAMES}, model.dropout;"),
        ({"batch_size": 4}, "keeps its effective batch .* of 16"),
    ):
        with refused(refusal, ConfigError):
            check_changes(faces, faces.override(**changes))


def test_weights_fix_the_objective_and_all_that_the_schedule_is_built_from():
    """A new argument of the schedule fails here until its field has the mark."""
    _, *betas = signature(NoiseScheduler).parameters
    fixed = fields_with(DiffusionConfig, "fixed_by_weights")
    assert fixed == {"objective", "timesteps_diff", *betas}


@pytest.mark.parametrize(
    "field, value, what_fits",
    [
        ("seed", 2**64, "from 0 to 18,446,744,073,709,551,615"),
        ("dataset_name", "", "a name or a path"),
        ("learning_rate", 2, "from 1e-09 to 1"),
        ("split", "half", '"reference" or "official"'),
        ("dim_multiply", [1, 2, 2.5, 4, 8], "a list, and each item an integer"),
        ("transformer_layers", [5], "levels between 0 and 4"),
        ("base_dim", 63, "even"),
        ("image_size", 36, "a multiple of 16, as the 5 levels"),
    ],
)
def test_a_field_that_does_not_fit_says_what_would(field, value, what_fits):
    experiment = Experiment(DiffusionConfig(**DIFFUSION, beta_end=0.03), ModelConfig(**MODEL))
    with refused(re.escape(what_fits), ConfigError) as error:
        experiment.override(**{field: value})
    assert re.fullmatch(f"{field} is .*", str(error.value))


TABLES = {
    "objective": OBJECTIVES,
    "optimizer": OPTIMIZERS,
    "lr_schedule": LR_SCHEDULES,
    "grid_sampler": SAMPLERS,
    "beta_schedule": BETA_SCHEDULES,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_name_is_refused_by_its_table_before_images_are_read(name):
    faces = EXPERIMENTS["faces"]
    check_names(faces.diffusion)
    for row in TABLES[name]:
        check_names(faces.override(**{name: row}).diffusion)
    with refused(f"^{name} is 'new'; it must be .*{[*TABLES[name]][-1]}", ConfigError):
        check_names(faces.override(**{name: "new"}).diffusion)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"beta_start": 0}, "beta_start is 0 .* 0 < beta_start <= beta_end < 0.2: use more timest"),
        (
            {"beta_schedule": "cosine", "beta_end": 0.03},
            "beta_end is 0.03, and cosine betas do no",
        ),
        ({"beta_schedule": "cosine", "rescale_betas": False}, "rescale_betas is False, and cosine"),
    ],
)
def test_a_schedule_refuses_by_name_what_its_function_does_not_take(changes, sentence):
    diffusion = DiffusionConfig(**DIFFUSION | changes)
    with refused(sentence, ConfigError):
        check_names(diffusion)


def test_a_wrong_preset_is_a_sentence_of_its_name_and_field_and_stops_no_other(monkeypatch):
    monkeypatch.setattr(EXPERIMENTS, "data", {**EXPERIMENTS.data})

    @EXPERIMENTS
    def too_wide():
        return EXPERIMENTS["faces"].override(norm_groups=7)

    assert "too-wide" in [*EXPERIMENTS] and EXPERIMENTS["faces"].model.norm_groups == 8
    with refused("^the preset 'too-wide' of config.py: norm_groups is 7; it must", ConfigError):
        EXPERIMENTS["too-wide"]


def test_a_saved_config_with_unknown_or_missing_fields():
    saved = EXPERIMENTS["faces-v"].to_dict()
    saved["diffusion"] = {"recompute": "norms"}
    with refused("DiffusionConfig: missing or unknown: batch_size, .*, recompute", ConfigError):
        Experiment.from_dict(saved)
