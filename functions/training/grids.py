"""Draw the grid of images that a training writes from time to time."""

import torch
from torch import Tensor

from data.pixels import to_model_range
from functions.details import shrink
from functions.enlarging import enlarge
from functions.samplers import SAMPLERS
from functions.support.processes import batches_of
from functions.support.random_numbers import image_noise
from functions.training.run import TrainingRun


@torch.no_grad()
def sample_grid(run: TrainingRun) -> Tensor:
    """Sample the images of a run's grid, (N, C, H, W) in [-1, 1], always from the same noise.

    What the network gets beside the noise is that of held-out images, but all labels in turn. With
    objective details, these images are shrunk to a quarter, and enlarged twice.
    """
    config = run.config
    denoiser = run.sample_denoiser
    count = config.grid_images
    held_out, inputs = run.data.gather(run.data.split.val_indices[:count])
    held_out = to_model_range(held_out)
    if "label" in inputs:
        inputs["label"] = torch.arange(len(run.data.image_set.label_names), device=run.device)
    sampler = SAMPLERS[config.grid_sampler]
    steps = min(config.grid_steps, config.timesteps_diff)

    def noise_of(places, shape, purpose="image"):
        return image_noise(config.seed, places, shape, run.device, purpose)

    def sampled(places):
        given = {name: value[[i % len(value) for i in places]] for name, value in inputs.items()}
        noise = noise_of(places, run.data.image_shape)
        return sampler.function(
            denoiser.given(**given), noise(), steps, **sampler.options, step_noise=lambda k: noise()
        )

    def enlarged(places):
        channels, size, _ = run.data.image_shape
        small = shrink(shrink(held_out[[i % len(held_out) for i in places]])).clamp(-1, 1)
        middle = enlarge(denoiser, small, noise_of(places, (channels, size // 2, size // 2)))
        return enlarge(denoiser, middle, noise_of(places, run.data.image_shape, "details"))

    draw = enlarged if config.objective == "details" else sampled
    with denoiser.evaluating():
        return torch.cat([draw(places) for places in batches_of(range(count), config.batch_size)])
