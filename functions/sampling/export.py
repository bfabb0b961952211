"""A model to give away: one file, or a folder that diffusers loads, with a model card and samples."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from data.pixels import to_uint8
from functions.sampling.generation import ImageSampler, generate
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import SavedModel, export_weights
from functions.support.diffusers_folder import write_folder
from functions.support.errors import UserError
from functions.support.pictures import save_grid

CARD = """---
license:  # to be filled in: what others may do with the weights
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [ddpm, pytorch, unconditional-image-generation]
datasets: [{data}]
---

# {name}

A DDPM ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)) for images of {size} x {size} pixels; {weights}.
Trained on {images}{facts}.

![Samples](samples.png)

*The first {count} images of seed {seed}: {options}.*

    from diffusers import DDPMPipeline
    pipeline = DDPMPipeline.from_pretrained("{folder}")
    images = pipeline(batch_size=4).images
    images[0].save("image.png")
"""
FACTS = ("learning_rate", "batch_size", "gradient_accumulation", "lr_schedule", "ema_decay", "objective", "t_sampling",
         "timesteps_diff", "beta_schedule", "base_dim", "dim_multiply", "transformer_layers", "dropout")  # fmt: skip
IN_CARD = 16  # images


def export(saved: SavedModel, image_sampler: ImageSampler, path: Path) -> None:
    """Write FILE.safetensors, which sample.py reads; or else a folder for diffusers, whole or not at all.

    Raises UserError for what exists, and CheckpointError as `write_folder` does.
    """
    if path.exists():
        raise UserError(f"{path} exists; --export overwrites nothing")
    if path.suffix == ".safetensors":
        export_weights(saved, path)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_folder(saved, temporary)
        options = SamplerOptions("dpm++", min(20, image_sampler.scheduler.timesteps))
        samples = generate(replace(image_sampler, options=options), range(IN_CARD), IN_CARD).images
        save_grid(to_uint8(samples).numpy(), temporary / "samples.png")
        (temporary / "README.md").write_text(model_card(saved, path.name, image_sampler.seed, options))
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_card(saved: SavedModel, folder: str, seed: int, options: SamplerOptions) -> str:
    """The README.md that hubs show."""
    fields = saved.config["diffusion"] | saved.config["model"]
    data = Path(str(fields.get("dataset_name", ""))).name  # a path is nobody's business
    facts = "".join(f", {name} {fields[name]}" for name in FACTS if name in fields)
    return CARD.format(data=data, images=data or "images that nobody names", name=saved.run["experiment"], facts=facts,
                       size=fields["image_size"], weights=saved.summary, count=IN_CARD, seed=seed, options=options,
                       folder=folder)  # fmt: skip
