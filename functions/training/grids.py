"""Draw the grid of samples that a training writes from time to time."""

from torch import Tensor

from data.conditions import in_grids, with_conditions
from data.pixels import to_model_range
from functions.sampling.generation import Drawing, generate
from functions.sampling.models import Models
from functions.sampling.settings import DrawingConfig
from functions.training.run import TrainingRun


def draw_grid(run: TrainingRun) -> Tensor:
    """Draw the images of a run's grid, (N, C, H, W) in [-1, 1], always from the same noise."""
    config = run.config
    # What the network gets beside the noise is that of held-out images, but all labels in turn.
    images, inputs = run.data.gather(run.data.split.val_indices[: config.grid_images])
    inputs = with_conditions(inputs, to_model_range(images), vars(config))
    denoiser = run.sample_denoiser
    models = Models(
        denoiser,
        run.data.image_shape,
        run.device,
        inputs=in_grids(inputs, run.data.facts),
    )
    settings = DrawingConfig(
        model=run.name,
        sampler=config.grid_sampler,
        steps=min(config.grid_steps, config.timesteps_diff),
        batch_size=config.batch_size,
    )
    with denoiser.evaluating():
        return generate(Drawing(models, settings, config.seed), range(config.grid_images))
