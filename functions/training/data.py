"""The data of a run: what its steps, validations and grids get of images and random numbers."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from config import DiffusionConfig, Experiment
from data.batches import augment, epoch_order, gather
from data.datasets import ImageSet, split_images
from data.pixels import to_model_range
from functions.denoiser import Denoiser
from functions.samplers import SAMPLERS
from functions.support import processes
from functions.support.errors import printable
from functions.support.random_numbers import generator_of, image_noise
from functions.support.settings import ConfigError

Draws = TypeVar("Draws", bound=tuple)


class StepDraws(NamedTuple):
    """The random numbers of one optimiser step, for its B images."""

    t: Tensor  # (B,) int64, uniform in 0 .. T-1
    noise: Tensor  # (B, C, H, W) float32, standard normal
    flip: Tensor  # (B,) bool, True with probability 1/2
    # (B,) float32, uniform in [-1, 1). The rotation is this fraction of the largest angle.
    rotation: Tensor
    # (B,) float32, uniform in [0, 1). Below condition_dropout, the inputs are dropped.
    condition_drop: Tensor


def training_draws(
    config: DiffusionConfig, step: int, image_shape: Sequence[int], device: torch.device
) -> StepDraws:
    """Draw t and noise (Algorithm 1, lines 3 and 4) and the augmentation for an effective batch."""
    # The draws are made for the whole effective batch and cut later. So an image's draws depend on
    # its place in the effective batch, but not on the batch size.
    # These four draws come from one generator, so another draw between them, or another order,
    # would change every run. A new field needs a separate generator:
    # generator_of(device, seed, f"training {NAME}", step).
    seed, count = config.seed, config.effective_batch
    options = {"generator": generator_of(device, seed, "training", step), "device": device}
    of_labels = generator_of(device, seed, "training label", step)
    return StepDraws(
        t=torch.randint(config.timesteps_diff, (count,), **options),
        noise=torch.randn(count, *image_shape, **options),
        flip=torch.rand(count, **options) < 0.5,
        rotation=2 * torch.rand(count, **options) - 1,
        condition_drop=torch.rand(count, generator=of_labels, device=device),
    )


def cut(draws: Draws, places: range) -> Draws:
    """Return the draws of the images at these places."""
    return type(draws)(*(draw[places.start : places.stop] for draw in draws))


class TrainingData:
    """The images of a run, and what its steps, validations and grids get of them.

    Raises ConfigError for images that do not fit the network, and for too few.

    Attributes:
        image_set, split: the images, and which of them train and validate.
        steps_per_epoch, total_steps: the number of steps of an epoch, and of the whole run.
        share: this process's places in the effective batch.
        no_inputs: the value of each input of the network that stands for none.
        gather: returns the images with given indices and their inputs, on the device.
    """

    def __init__(
        self,
        experiment: Experiment,
        image_set: ImageSet,
        device: torch.device,
        no_inputs: dict[str, float | Tensor],
    ):
        self.config = config = experiment.diffusion
        self.image_shape = experiment.model.image_shape
        self.image_set = image_set
        self.device = device
        self.no_inputs = no_inputs

        shape = tuple(image_set.images.shape[1:])
        channels, size, _ = self.image_shape
        if shape != (size, size, channels):
            raise ConfigError(
                f"the images of {printable(image_set.name)} are {shape} (height, width, channels), "
                f"and the network's {(size, size, channels)}"
            )
        self.split = split_images(image_set, config.split)
        self.steps_per_epoch = len(self.split.train_indices) // config.effective_batch
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{config.dataset_name} has {len(self.split.train_indices)} training images, fewer "
                f"than one step's {config.effective_batch} (batch_size x gradient_accumulation); "
                "lower one of the two"
            )
        if config.effective_batch < processes.count():
            raise ConfigError(
                f"{processes.count()} processes cannot share an effective batch of "
                f"{config.effective_batch}"
            )
        self.total_steps = config.epochs * self.steps_per_epoch
        self.share = processes.shard(config.effective_batch)
        self.gather = partial(gather, image_set.images, image_set.inputs, device)

    def batch(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this process's images of a step, and their inputs.

        Images are uint8 (B, S, S, C), and the inputs of the network (B, ...) by name. Images left
        over at the end of an epoch are dropped.
        """
        # Which images a step uses depends only on its number, so a run can resume at any step.
        indices = self.split.train_indices
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self.config.effective_batch
        order = epoch_order(len(indices), self.config.seed, epoch)
        return self.gather(indices[order[first + self.share.start : first + self.share.stop]])

    def draw(self, step: int) -> StepDraws:
        """Draw t, the noise and the augmentation of this process's images of a step."""
        return cut(training_draws(self.config, step, self.image_shape, self.device), self.share)

    def augment(
        self, x_0: Tensor, inputs: dict[str, Tensor], draws: StepDraws, done: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flip and rotate x_0 (B, C, H, W), if the config says so, and drop some inputs.

        `done` is the fraction of the run before this step.
        """
        config = self.config
        if config.use_augmentation:
            angle = None
            # Rotation is off at the end of a run, so that the network unlearns its tilt.
            if config.max_rotation and done < 1 - config.rotation_free_end:
                angle = config.max_rotation * draws.rotation
            x_0 = augment(x_0, draws.flip, angle)
        # All inputs of an image are dropped at once, and what has no value for none stays.
        dropped = draws.condition_drop < config.condition_dropout
        for name in inputs.keys() & self.no_inputs.keys():
            values = inputs[name]
            none = torch.as_tensor(self.no_inputs[name], device=values.device, dtype=values.dtype)
            mask = dropped.view(-1, *[1] * (values.dim() - 1))
            inputs = inputs | {name: torch.where(mask, none, values)}
        return x_0, inputs

    @cached_property
    def held_out_order(self) -> Tensor:
        """An order of the timesteps of a validation: (validation_samples,) int64."""
        generator = generator_of("cpu", self.config.seed, "validation t")
        return torch.randperm(self.config.validation_samples, generator=generator)

    def held_out_images(self, places: range) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the images x_0 of a validation at B places, and their inputs."""
        # The triples are spread evenly over the images: the numbers of triples with any two images
        # differ by at most one.
        indices = self.split.val_indices
        chosen = indices[np.array(places) * len(indices) // self.config.validation_samples]
        images, inputs = self.gather(chosen)
        return to_model_range(images), inputs

    def held_out(self, places: range) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Return the triples (x_0, t, noise) of a validation at B places, and the network's inputs.

        They are always the same. The count of places is `config.validation_samples`.
        """
        config = self.config
        count = config.validation_samples
        x_0, inputs = self.held_out_images(places)
        # 0 .. T-1 is divided into one stratum per triple. The t are the strata's midpoints,
        # shuffled.
        order = self.held_out_order[places.start : places.stop]
        t = (2 * order + 1) * config.timesteps_diff // (2 * count)
        # The noise of a triple depends on its place among all triples, not on its batch.
        noise = image_noise(config.seed, places, x_0.shape[1:], self.device, "validation noise")
        return x_0, t.to(self.device), noise(), inputs

    def grid_images(self, places: range) -> tuple[Tensor, dict[str, Tensor]]:
        """Return held-out images at B places of a grid, and their inputs, but labels in turn."""
        indices = self.split.val_indices
        images, inputs = self.gather(indices[np.array(places) % len(indices)])
        if "label" in inputs:
            label = torch.tensor(places, device=self.device)
            inputs["label"] = label % len(self.image_set.label_names)
        return images, inputs

    def sample(self, denoiser: Denoiser, places: range) -> Tensor:
        """Sample images (B, C, H, W) at B places of a grid, always from the same noise."""
        config = self.config
        _, inputs = self.grid_images(places)
        noise = image_noise(config.seed, places, self.image_shape, self.device, "image")
        sampler = SAMPLERS[config.grid_sampler]
        return sampler.function(
            denoiser.given(**inputs),
            noise(),
            min(config.grid_steps, config.timesteps_diff),
            **sampler.options,
            step_noise=lambda k: noise(),
        )
