"""Play with a trained model in the browser: serve a page, and print its address.

Only this machine can open the page. Its three tabs draw images, mix two, and
inpaint one. They call the same functions as sample.py and edit.py, so the
images are the same. RUN and the flags are those of sample.py, and so is the
recipe that is used without a run; the page's fields begin with their values.
"""

if __name__ == "__main__":
    from functions.support.start import prepare

    prepare()

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import NoneType

import numpy as np
import torch
from PIL import Image

from data.pictures import fit_image, fit_mask
from data.pixels import picture_of, to_uint8
from functions.samplers import SAMPLERS
from functions.sampling.editing import (
    INPAINTING,
    check_edit,
    inpaint_image,
    interpolate_images,
    read_image,
    time_at,
)
from functions.sampling.generation import Pipeline, generate, open_pipeline
from functions.sampling.settings import OF_SAMPLER, SamplingFlags, default_settings, find_run
from functions.support.command_line import (
    EXIT_BAD_INPUT,
    converted,
    read_flags,
    run_script,
    split_words,
)
from functions.support.errors import UserError
from functions.support.pictures import grid_of

try:
    import gradio as gr
except ImportError:
    print("error: the page needs Gradio: pip install -r requirements-demo.txt", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)

# The page begins with this sampler, unless a recipe or flags say otherwise.
BEGUN = {"sampler": "dpm++", "steps": 20}
# Each step of an inpainting is done this many times, as in edit.py.
RESAMPLE = 10
# The width and height of the image to paint over, in pixels.
SIDE = 512
# The fields of models with labels
LABEL_FIELDS = {
    "label": "The labels to draw, in turn, as after --label. Empty: any.",
    "cfg": "The weight of the labels; 1 is the model alone. Empty: no guidance.",
}
# The page uses fonts of the machine, so that it downloads none.
FONTS = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
# The page shows the progress bar of the sampler.
PROGRESS = gr.Progress(track_tqdm=True)


def main() -> None:
    """Read the command line and the model, and serve the page until Ctrl-C."""
    [run], words = split_words("[RUN]", sys.argv[1:])
    begun = default_settings(find_run(run, words), **BEGUN)
    pipeline = open_pipeline(read_flags(SamplingFlags(sampling=begun), words, "[RUN]", __doc__))
    tabs = [draw_tab(pipeline), mix_tab(pipeline), paint_tab(pipeline)]
    page = gr.TabbedInterface(tabs, ["Draw", "Mix", "Paint"], "DDPM", analytics_enabled=False)
    # Old pictures are deleted from the disk.
    page.delete_cache = (600, 3600)
    page.launch(server_name="127.0.0.1", share=False, show_error=True, theme=FONTS)
    # A plain exit would wait for images that are still being sampled.
    os._exit(130)


def tab(
    pipeline: Pipeline,
    work: Callable[..., Image.Image],
    samplers: Sequence[str],
    *inputs: gr.components.Component,
) -> gr.Interface:
    """Build a tab with fields for the seed, the sampler, the steps and the inputs of `work`.

    A click shows the picture that `work` returns for a sampler with these settings. Errors are
    shown in the page as one sentence.
    """

    begun = pipeline.config
    names = [*LABEL_FIELDS] if pipeline.models.label_names else []
    cfg = "" if begun.cfg is None else str(begun.cfg)
    begun_with = shlex.join(begun.label), cfg
    texts = [
        gr.Textbox(text, label=name.capitalize(), info=LABEL_FIELDS[name])
        for name, text in zip(names, begun_with, strict=False)
    ]

    def call(progress=PROGRESS, *values):
        seed, sampler, steps, *rest = values
        # Another sampler does not have the options of the first.
        others = {} if sampler == begun.sampler else OF_SAMPLER
        config = replace(begun, **others | {"sampler": sampler, "steps": steps})
        if names:
            # An empty field gives None, or "".
            label, cfg = rest[:2]
            cfg = converted([float, NoneType], cfg or "None")
            # It is instead of a guide.
            others = {} if cfg is None else {"guide": None, "guidance": None}
            config = replace(config, label=shlex.split(label or ""), cfg=cfg, **others)
        return work(replace(pipeline, config=config, seed=seed or 0), *rest[len(names) :])

    return gr.Interface(
        call,
        [
            gr.Number(pipeline.seed, label="Seed", precision=0),
            gr.Radio(samplers, value=begun.sampler, label="Sampler"),
            gr.Number(begun.steps, label="Steps", info="Empty: all timesteps.", precision=0),
            *texts,
            *inputs,
        ],
        gr.Image(show_label=False, format="png", height=560, buttons=["download"]),
        flagging_mode="never",
        clear_btn=None,
        analytics_enabled=False,
    )


def draw_tab(pipeline: Pipeline) -> gr.Interface:
    count = gr.Slider(1, 64, 16, step=1, precision=0, label="How many")
    return tab(pipeline, draw, [*SAMPLERS], count)


def mix_tab(pipeline: Pipeline) -> gr.Interface:
    depth = gr.Slider(0, 1, 0.75, label="Depth", info="How far both are noised; 0 mixes pixels.")
    share = gr.Slider(0, 1, 0.5, label="Share", info="How much of it is the second image.")
    images = []
    for index, name in enumerate(("first", "second")):
        images += [
            gr.Number(index, label=f"Index of the {name} image", precision=0),
            gr.Image(label="Or a file", type="filepath", sources=["upload"], height=150),
        ]
    return tab(pipeline, mix, [*SAMPLERS], depth, share, *images)


def paint_tab(pipeline: Pipeline) -> gr.Interface:
    first = picture_of(to_uint8(generate(pipeline, [0]))[0])
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
    steps = min(INPAINTING["steps"], pipeline.scheduler.timesteps)
    config = replace(pipeline.config, **INPAINTING | {"steps": steps})
    return tab(replace(pipeline, config=config), paint, ["ddpm"], count, editor)


def draw(pipeline: Pipeline, n: int) -> Image.Image:
    """Return a grid of images 0 .. n-1."""
    return grid_of(to_uint8(generate(pipeline, range(n), progress=True)))


def mix(pipeline: Pipeline, depth: float, share: float, *images: int | str | None) -> Image.Image:
    """Return the first image, the mixture and the second image.

    `images` are the index and the file of each. A file replaces an index.
    """
    check_edit("interpolate", pipeline.config)
    chosen = [*zip(images[::2], images[1::2], strict=True)]
    if (None, None) in chosen:
        raise UserError("give the index or a file of each image")
    (first, shown_first), (second, shown_second) = (
        read_image(pipeline, file or str(index)) for index, file in chosen
    )
    # Both images are noised to timestep t. Depth 0 is t = -1, at which images get no noise.
    t = time_at(pipeline, depth)
    weights = torch.tensor([share], device=first.device)
    mixture = interpolate_images(pipeline, torch.stack([first, second]), t, weights)
    return grid_of(to_uint8(torch.cat([shown_first, mixture, shown_second])), columns=3)


def paint(pipeline: Pipeline, n: int, edit: dict) -> Image.Image:
    """Return a grid of the image, its known pixels, and n inpaintings."""
    check_edit("inpaint", pipeline.config)
    shape = pipeline.models.enlarged_shape
    # The editor's layer is RGBA, and opaque where the user has painted.
    mask = np.zeros(1)
    for layer in edit["layers"]:
        mask = fit_mask(np.asarray(layer)[..., 3] > 127, shape[-1])
    if edit["background"] is None or mask.all() or not mask.any():
        raise UserError("choose an image and paint over a part of it, but not over the whole image")
    image = fit_image(edit["background"], shape)
    return grid_of(inpaint_image(pipeline, image, mask, RESAMPLE, n))


if __name__ == "__main__":
    run_script(main)
