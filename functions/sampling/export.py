"""Export a model as one file, or as a diffusers folder with a model card and samples."""

import os
import shutil
from pathlib import Path

from data.pixels import to_uint8
from functions.sampling.generation import Drawing, generate
from functions.sampling.models import Models
from functions.sampling.settings import DrawingConfig
from functions.saved.checkpoint import SavedModel, write_tensors
from functions.saved.diffusers_folder import write_folder
from functions.support.errors import UserError
from functions.support.files import write_text
from functions.support.pictures import save_grid

# The model card shows this many samples.
SAMPLE_COUNT = 16


def export(models: Models, seed: int, path: Path) -> None:
    """Write a .safetensors file, which sample.py reads, or a folder, which diffusers loads.

    The model card of a folder shows samples of the seed.

    Raises UserError for a path that exists or has another extension, and CheckpointError as
    `write_folder` does.
    """
    saved = models.saved
    if path.exists():
        raise UserError(f"{path} exists, and --export does not overwrite")
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        # The file can be published. Dtype and identity of the weights stay.
        contents = {"config": saved.config, "run": saved.provenance}
        write_tensors(path, {saved.part: saved.weights}, contents)
        return
    if path.suffix:
        raise UserError(
            f"{path}: --export needs NAME.safetensors, or NAME without an extension for a folder"
        )

    # The folder is filled under a temporary name, so that `path` is complete as soon as it exists.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_folder(saved, temporary)
        steps = min(20, saved.scheduler.timesteps)
        config = DrawingConfig(model=str(saved.path), sampler="dpm++", steps=steps)
        drawing = Drawing(models, config, seed)
        images = generate(drawing, range(SAMPLE_COUNT), progress=True)
        save_grid(to_uint8(images), temporary / "samples.png")
        caption = f"The first {SAMPLE_COUNT} images: {drawing}."
        write_text(temporary / "README.md", model_card(saved, path.name, caption))
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_card(saved: SavedModel, folder: str, caption: str) -> str:
    """Return the folder's README.md, which model hubs display. `caption` goes under samples.png."""
    return f"""---
license:  # to be filled in: what others may do with the weights
datasets:  # to be filled in: the images of the training
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [ddpm, pytorch, unconditional-image-generation]
---

# {saved.provenance["experiment"]}

A DDPM ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)): {saved}.

![Samples](samples.png)

*{caption}*

    from diffusers import DDPMPipeline
    pipeline = DDPMPipeline.from_pretrained({folder!r})
    images = pipeline(batch_size=4, num_inference_steps={saved.scheduler.timesteps}).images
    images[0].save("image.png")
"""
