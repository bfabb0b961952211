"""A model to give away: one file, or a folder that diffusers loads, with a model card and samples."""

import json
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

A DDPM ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)) trained on {data}; {weights}.

![Samples](samples.png)

*The first {count} images of seed {seed}: {options}.*

    from diffusers import DDPMPipeline
    pipeline = DDPMPipeline.from_pretrained("{folder}")
    images = pipeline(batch_size=4).images
    images[0].save("image.png")

The training:

    {config}
"""
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
    data = Path(str(saved.config["diffusion"].get("dataset_name", "unknown"))).name  # a path is nobody's business
    config = {**saved.config, "diffusion": {**saved.config["diffusion"], "dataset_name": data}}
    return CARD.format(data=data, name=saved.run["experiment"], weights=saved.summary, count=IN_CARD, seed=seed,
                       options=options, folder=folder, config=json.dumps(config, indent=2).replace("\n", "\n    "))  # fmt: skip
