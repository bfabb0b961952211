"""Play with a trained model in the browser: `python demo.py` serves a page and prints its address.

Only this machine can open the page. Its three tabs draw images, mix two, and inpaint one. They call
the same functions as sample.py and edit.py, so the images are the same. RUN and the flags are those
of sample.py, and so is the recipe that is used without a run; the page's fields begin with their
values.
"""

if __name__ == "__main__":
    from functions.support.threads import limit_spinning

    limit_spinning()

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from data.decode import fit_image, fit_mask
from data.pixels import picture_of, to_uint8
from functions.samplers import SAMPLERS
from functions.sampling.editing import (
    INPAINTING_STEPS,
    inpaint_image,
    mixtures_at,
    read_image,
    require_full_noise,
)
from functions.sampling.generation import ImageSampler, generate, open_drawing
from functions.sampling.options import SamplerOptions, add_sampling_flags
from functions.sampling.recipes import parse_drawing
from functions.support.command_line import EXIT_BAD_INPUT, Parser, run_script
from functions.support.errors import UserError
from functions.support.pictures import grid_of

try:
    import gradio as gr
except ImportError:
    print("error: the page needs Gradio: pip install -r requirements-demo.txt", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)

# The page begins with so many steps, or T if that is less, unless --steps says otherwise.
STEPS = 20
# Each step of an inpainting is done this many times, as in edit.py.
RESAMPLE = 10
# The options that a sampler does not leave to another one
OWN = {"spacing": None, "eta": None, "variance": None, "temperature": 1.0}
# The width and height of the image to paint over, in pixels.
SIDE = 512
# The page uses fonts of the machine, so that it downloads none.
FONTS = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
# The page shows the progress bar of the sampler.
PROGRESS = gr.Progress(track_tqdm=True)


def main() -> None:
    """Read the command line and the model, and serve the page until Ctrl-C."""
    parser = Parser(description=__doc__)
    add_sampling_flags(parser)
    parser.set_defaults(sampler="dpm++")
    args = parse_drawing(parser)
    image_sampler = open_drawing(args)
    steps = args.steps or min(STEPS, image_sampler.scheduler.timesteps)
    options = replace(image_sampler.options, steps=steps, variance=args.variance)
    image_sampler = replace(image_sampler, options=options)

    tabs = [draw_tab(image_sampler), mix_tab(image_sampler), paint_tab(image_sampler)]
    page = gr.TabbedInterface(tabs, ["Draw", "Mix", "Paint"], "DDPM", analytics_enabled=False)
    # Old pictures are deleted from the disk.
    page.delete_cache = (600, 3600)
    page.launch(server_name="127.0.0.1", share=False, show_error=True, theme=FONTS)
    # A plain exit would wait for images that are still being sampled.
    os._exit(130)


def tab(
    image_sampler: ImageSampler,
    work: Callable[..., Image.Image],
    samplers: Sequence[str],
    *inputs: gr.components.Component,
) -> gr.Interface:
    """Build a tab with fields for the seed, the sampler, the steps and the inputs of `work`.

    A click shows the picture that `work` returns for a sampler with these settings. Errors are
    shown in the page as one sentence.
    """

    names = image_sampler.label_names
    begun = image_sampler.options
    of_labels = names and [
        gr.Dropdown(["", *names], value="".join(begun.label[:1]), label="Label"),
        gr.Number(begun.cfg, label="Guidance by the label", info="Empty: none. 1: no effect."),
    ]

    def call(progress=PROGRESS, *values):
        seed, name, steps, *rest = values
        of_label, rest = rest[: len(of_labels)], rest[len(of_labels) :]
        options = replace(with_sampler(image_sampler.options, name), steps=steps)
        label, cfg = of_label or ("", None)
        options = replace(options, label=(label,) if label else (), cfg=cfg if label else None)
        # An empty field gives None.
        chosen = replace(image_sampler, options=options, seed=seed or 0)
        return work(chosen.for_edits(), *rest)

    name = begun.sampler if begun.sampler in samplers else samplers[0]
    return gr.Interface(
        call,
        [
            gr.Number(image_sampler.seed, label="Seed", precision=0),
            gr.Radio(samplers, value=name, label="Sampler"),
            gr.Number(begun.steps, label="Steps", info="Empty: all timesteps.", precision=0),
            *of_labels,
            *inputs,
        ],
        gr.Image(show_label=False, format="png", height=560, buttons=["download"]),
        flagging_mode="never",
        clear_btn=None,
        analytics_enabled=False,
    )


def with_sampler(options: SamplerOptions, name: str) -> SamplerOptions:
    """Return the options with this sampler; of another one's own options none is left."""
    return options if name == options.sampler else replace(options, sampler=name, **OWN)


def draw_tab(image_sampler: ImageSampler) -> gr.Interface:
    count = gr.Slider(1, 64, 16, step=1, precision=0, label="How many")
    return tab(image_sampler, draw, [*SAMPLERS], count)


def mix_tab(image_sampler: ImageSampler) -> gr.Interface:
    depth = gr.Slider(0, 1, 0.75, label="Depth", info="How far both are noised; 0 mixes pixels.")
    share = gr.Slider(0, 1, 0.5, label="Share", info="How much of it is the second image.")
    images = []
    for index, name in enumerate(("first", "second")):
        images += [
            gr.Number(index, label=f"Index of the {name} image", precision=0),
            gr.Image(label="Or a file", type="filepath", sources=["upload"], height=150),
        ]
    return tab(image_sampler, mix, [*SAMPLERS], depth, share, *images)


def paint_tab(image_sampler: ImageSampler) -> gr.Interface:
    first = picture_of(to_uint8(generate(image_sampler, [0]))[0])
    editor = gr.ImageEditor(
        first.resize((SIDE, SIDE)),
        label="Paint over the part to inpaint",
        type="pil",
        format="png",
        sources=["upload"],
        brush=gr.Brush(SIDE // 10, colors=["#ff00ff"], color_mode="fixed"),
        transforms=(),
        layers=False,
        canvas_size=(SIDE, SIDE),
        height=600,
    )
    count = gr.Slider(1, 8, 4, step=1, precision=0, label="How many")
    # RePaint needs ddpm, with all of its noise.
    steps = min(INPAINTING_STEPS, image_sampler.scheduler.timesteps)
    options = replace(image_sampler.options, sampler="ddpm", steps=steps, **OWN)
    return tab(replace(image_sampler, options=options), paint, ["ddpm"], count, editor)


def draw(image_sampler: ImageSampler, n: int) -> Image.Image:
    """Return a grid of images 0 .. n-1."""
    return grid_of(to_uint8(generate(image_sampler, range(n), progress=True)))


def mix(
    image_sampler: ImageSampler,
    depth: float,
    share: float,
    first_index: int | None,
    first_file: str | None,
    second_index: int | None,
    second_file: str | None,
) -> Image.Image:
    """Return the first image, the mixture and the second image. A file replaces an index."""
    first, shown_first = read_image(image_sampler, first_file or str(first_index or 0))
    second, shown_second = read_image(image_sampler, second_file or str(second_index or 0))
    # Both images are noised to timestep t. Depth 0 is t = -1, at which images get no noise.
    t = image_sampler.time_at(depth)
    weights = torch.tensor([share], device=first.device)
    mixture = mixtures_at(image_sampler, torch.stack([first, second]), t, weights)
    return grid_of(to_uint8(torch.cat([shown_first, mixture, shown_second])), columns=3)


def paint(image_sampler: ImageSampler, n: int, edit: dict) -> Image.Image:
    """Return a grid of the image, its known pixels, and n inpaintings."""
    require_full_noise(image_sampler)
    shape = image_sampler.enlarged_shape()
    # The editor's layer is RGBA, and opaque where the user has painted.
    mask = np.zeros(1)
    for layer in edit["layers"]:
        mask = fit_mask(np.asarray(layer)[..., 3] > 127, shape[-1])
    if edit["background"] is None or mask.all() or not mask.any():
        raise UserError("choose an image and paint over a part of it, but not over the whole image")
    image = fit_image(edit["background"], shape)
    return grid_of(inpaint_image(image_sampler, image, mask, RESAMPLE, n))


if __name__ == "__main__":
    run_script(main)
