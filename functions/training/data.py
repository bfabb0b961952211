"""The data of a run: its images and their split, the batches of its steps, and their draws."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from config import ConfigError, Experiment
from data.augmentation import augment
from data.batches import gather, indices_of_steps
from data.conditions import with_conditions, without_conditions
from data.datasets import ImageSet, split_images
from functions.support import processes
from functions.support.errors import printable
from functions.training.draws import StepDraws, training_draws


class TrainingData:
    """The images of a run, and what each step gets of them.

    Raises ConfigError for images that do not fit the network, and for too few.

    Attributes:
        image_set, split: the images, and which of them train and validate.
        facts: what is known of images and model, as the rows of CONDITIONS need it.
        share: this process's places in the effective batch.
        gather: returns the images with given indices and their inputs, on the device.
    """

    def __init__(self, experiment: Experiment, image_set: ImageSet, device: torch.device):
        self.config = config = experiment.diffusion
        self.image_shape = experiment.model.image_shape
        self.image_set = image_set
        self.device = device
        self.facts = vars(config) | vars(experiment.model) | image_set.facts

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
        self.share = processes.shard(config.effective_batch)
        self.gather = partial(gather, image_set.images, image_set.inputs, device)

    def batches(self, steps: range) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield this process's images of each of these steps, and their inputs.

        Images are uint8 (B, S, S, C), and the inputs of the network (B, ...) by name.
        """
        config = self.config
        indices = indices_of_steps(
            self.split.train_indices, config.seed, config.effective_batch, self.share, steps
        )
        return map(self.gather, indices)

    def draw(self, step: int) -> StepDraws:
        """Draw t, the noise and the augmentation of this process's images of a step."""
        draws = training_draws(
            self.config.seed,
            step,
            self.config.effective_batch,
            self.image_shape,
            self.config.timesteps_diff,
            self.device,
        )
        return StepDraws(*(draw[self.share.start : self.share.stop] for draw in draws))

    def augment(
        self, x_0: Tensor, inputs: dict[str, Tensor], draws: StepDraws, done: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flip and rotate x_0 (B, C, H, W), if the config says so, and drop some conditions.

        `done` is the fraction of the run before this step.
        """
        config = self.config
        if config.use_augmentation:
            angle = None
            # Rotation is off at the end of a run, so that the network unlearns its tilt.
            if config.max_rotation and done < 1 - config.rotation_free_end:
                angle = config.max_rotation * draws.rotation
            x_0 = augment(x_0, draws.flip, angle)
        inputs = with_conditions(inputs, x_0, vars(config))
        dropped = draws.condition_drop < config.condition_dropout
        return x_0, without_conditions(inputs, dropped, self.facts)
