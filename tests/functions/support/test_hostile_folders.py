"""Folders of diffusers that need another network or schedule, or that are made to do harm.

Each is refused in a sentence.
"""

import os
import shutil
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from functions.sampling.export import export
from functions.sampling.generation import ImageSampler
from functions.support.diffusers_folder import PICKLE, WEIGHTS, load_folder
from functions.support.errors import CheckpointError, UserError
from functions.support.loading import load_denoiser, rebuild
from tests.conftest import CPU, OPTIONS
from tests.functions.support.test_diffusers_folder import SCHEDULE, UNET, change, save_theirs

UNET_WEIGHTS = f"unet/{WEIGHTS}"


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    return save_theirs(tmp_path_factory.mktemp("pipeline") / "theirs")


@pytest.fixture
def folder(theirs, tmp_path):
    return shutil.copytree(theirs, tmp_path / "theirs")


# These values are proper in diffusers, but need what our network or schedule has not. The message
# has the field, the value, and what is read in its place.
UNREAD = [
    (UNET, "layers_per_block", 1),
    (UNET, "act_fn", "gelu"),
    (UNET, "_class_name", "UNet2DConditionModel"),
    (UNET, "block_out_channels", [16, 24]),
    (UNET, "in_channels", 4),
    (UNET, "down_block_types", ["DownBlock2D", "ResnetDownsampleBlock2D"]),
    (UNET, "up_block_types", ["UpBlock2D"] * 2),
    (UNET, "attention_head_dim", 16),
    (SCHEDULE, "prediction_type", "sample"),
    # The field's older form, in which False means that the network predicts x_0.
    (SCHEDULE, "predict_epsilon", False),
    (SCHEDULE, "variance_type", "learned_range"),
    (SCHEDULE, "beta_schedule", "scaled_linear"),
    (SCHEDULE, "clip_sample_range", 2.0),
]
REFUSED = [
    (part, field, value, f"{field} is {value!r}; it must be ") for part, field, value in UNREAD
]
REFUSED += [
    (UNET, "cross_attention_dim", 768, "cross_attention_dim is 768; the field is unknown"),
    *(
        (UNET, "sample_size", size, "sample_size must be an integer")
        for size in (None, [16, 32], [-1, -1])
    ),
    (UNET, "block_out_channels", [], "block_out_channels a list of integers"),
    (UNET, "down_block_types", None, "do not describe a supported model"),
    (UNET, "block_out_channels", [10**9, 10**9], "it must be from 4 to 16,384"),
    (UNET, "block_out_channels", [16, 16 * 10**8], "cannot build a model from its config"),
    (UNET, "norm_num_groups", 0, "cannot build a model from its config"),
    (SCHEDULE, "clip_sample", "false", "clip_sample is 'false'; it must be True"),
    (SCHEDULE, "beta_end", 7, "cannot build a model from its config"),
    (SCHEDULE, "beta_end", "x", "do not describe a supported model"),
    (SCHEDULE, "num_train_timesteps", 10**9, "use 2 to 1,000,000 timesteps"),
    (
        "model_index.json",
        "_class_name",
        "StableDiffusionPipeline",
        "_class_name is 'StableDiffusionPipeline'",
    ),
]


@pytest.mark.parametrize(("part", "field", "value", "said"), REFUSED)
def test_what_another_network_or_schedule_would_need_is_refused(part, field, value, said, folder):
    change(folder / part, **{field: value})
    assert said in refusal(folder)


def refusal(folder):
    """Return what is said of a folder, which is one short line."""
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(folder)

    message = str(caught.value)
    assert message.startswith(str(folder))
    assert message.isprintable()
    assert len(message) < len(str(folder)) + 400
    return message


def spoil_weights(change_them):
    """Return a function that changes the dict of a folder's weights."""

    def spoil(folder):
        weights = load_file(folder / UNET_WEIGHTS)
        change_them(weights)
        save_file(weights, folder / UNET_WEIGHTS)

    return spoil


def with_bias(tensor):
    return spoil_weights(lambda weights: weights.update({"conv_in.bias": tensor}))


def add_old_names(weights):
    for name in [*weights]:
        if "to_out" in name:
            weights[name.replace("to_out.0", "proj_attn")] = weights[name].clone()


def put_a_pipe_for_the_config(folder):
    (folder / UNET).unlink()
    os.mkfifo(folder / UNET)


HOSTILE = {
    "no weights": (lambda f: (f / UNET_WEIGHTS).unlink(), "there is no such file"),
    "no schedule": (lambda f: (f / SCHEDULE).unlink(), "there is no such file"),
    "a pickle": (
        lambda f: (f / UNET_WEIGHTS).rename(f / "unet" / PICKLE),
        "save_pretrained(NEW_FOLDER)",
    ),
    "deep": (lambda f: (f / UNET).write_text('{"a":' * 10**5), "cannot be read"),
    "cut off": (lambda f: os.truncate(f / UNET_WEIGHTS, 20_000), "truncated"),
    "one missing": (
        spoil_weights(lambda weights: weights.pop("conv_in.bias")),
        "1 weights are missing or unknown, such as 'conv_in.bias'",
    ),
    "a shape": (with_bias(torch.zeros(9)), "is torch.float32 (9,)"),
    "a type": (with_bias(torch.zeros(16).int()), "torch.int32"),
    "NaN": (with_bias(torch.full([16], torch.nan)), "not finite"),
    "a pipe for the config": (put_a_pipe_for_the_config, "not a regular file"),
    "old and new": (spoil_weights(add_old_names), "appears twice"),
}


@pytest.mark.parametrize(("spoil", "said"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_folders_are_refused_in_a_sentence(spoil, said, folder):
    spoil(folder)
    assert said in refusal(folder)


def test_what_cannot_be_exported_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    saved = load_folder(folder)
    image_sampler = ImageSampler(rebuild(saved, CPU), OPTIONS, saved.model.image_shape, 0, CPU)

    with pytest.raises(UserError, match=r"--export needs NAME\.safetensors"):
        export(saved, image_sampler, tmp_path / "out.pt")

    # The grid is drawn when the folder is half filled.
    full = mock.Mock(side_effect=OSError("full"))
    monkeypatch.setattr("functions.sampling.export.save_grid", full)
    with pytest.raises(OSError, match="full"):
        export(saved, image_sampler, tmp_path / "out")

    # Diffusers has no such network.
    saved.config["model"]["dim_multiply"] = [2, 2]
    with pytest.raises(CheckpointError, match="dim_multiply begins with 2"):
        export(saved, image_sampler, tmp_path / "out")

    assert [*tmp_path.iterdir()] == [folder]
