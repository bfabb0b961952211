"""Play with a trained model in the browser: `python demo.py` serves a page and prints its address.

Only this machine can open the page. Its three tabs draw images, mix two, and inpaint one. They call
the same functions as sample.py and edit.py, so the images are the same; ddpm has the small
variance. The model is read once. A click waits until earlier clicks are finished.
"""

import html
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from threading import Event

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decode import fit_mask
from data.pixels import picture_of, to_uint8
from functions.samplers import SAMPLERS
from functions.sampling.editing import read_x_0
from functions.sampling.generation import ImageSampler, generate, open_sampler
from functions.sampling.guides import corrected
from functions.sampling.inpainting import inpaint_image
from functions.sampling.interpolation import interpolate_images
from functions.sampling.options import add_model_flags, add_steps_and_guide_flags
from functions.support.command_line import (
    EXIT_BAD_INPUT,
    Parser,
    exit_on_user_error,
    user_message,
)
from functions.support.errors import UserError
from functions.support.pictures import grid_of
from functions.support.processes import SINGLE_PROCESS

try:
    import gradio as gr
except ImportError:
    print("error: the page needs Gradio: pip install -r requirements-demo.txt", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)

# At most this many images are drawn per click.
IMAGE_LIMIT = 64
# Each step of an inpainting is done this many times, as in edit.py.
RESAMPLE = 10
# The width and height of pictures in the page, in pixels.
SIDE = 512
# The label would cover a picture's upper edge, so the picture starts below it.
STYLE = ".image-frame img { width: 100%; height: 100%; object-fit: contain; padding-top: 30px }"
# The page uses fonts of the machine, so that it downloads none.
FONTS = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
# The model runs in this one thread.
WORKER = ThreadPoolExecutor(1)
# Fields for integers, and sliders for integers from 1 upwards.
number = partial(gr.Number, precision=0)
slider = partial(gr.Slider, 1, step=1, precision=0)
# The titles of the pictures that the tabs Mix and Paint make.
MIXED = "The first image, the mixture and the second image"
INPAINTED = "The image, its known part, and the inpaintings"
# Each picture has a button to download it.
picture_output = partial(
    gr.Image, interactive=False, format="png", height=SIDE, buttons=["download"]
)


def main() -> None:
    """Read the command line and the model, and serve the page until Ctrl-C."""
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    # The page has fields for some of these, and the others have the defaults of sample.py.
    parser.set_defaults(seed=0, sampler="dpm++", steps=20, variance=None)
    parser.set_defaults(precision="auto", batch_size=IMAGE_LIMIT)
    add_steps_and_guide_flags(parser)
    args = parser.parse_args()
    saved, image_sampler = open_sampler(args, SINGLE_PROCESS)
    image_sampler = corrected(image_sampler, saved, SINGLE_PROCESS)
    # Old pictures are deleted from the disk.
    with gr.Blocks(title="DDPM", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        with gr.Row():
            controls = sampler_controls(args.steps)
        stoppable = [tab(image_sampler, controls) for tab in (draw_tab, mix_tab, paint_tab)]
        # A click on Stop calls no function. It cancels the work that the tabs' buttons started.
        gr.Button("Stop").click(None, cancels=stoppable)

    page.launch(server_name="127.0.0.1", share=False, theme=FONTS, css=STYLE, max_file_size=10**8)
    # A plain exit would wait for the worker.
    os._exit(130)


def in_worker(
    image_sampler: ImageSampler, work: Callable[..., dict | tuple], shows_steps: bool = True
) -> Callable[..., Iterator]:
    """Return a callback for Gradio that calls `work(sampler, *inputs)` in the worker.

    The callback gets the values of `sampler_controls`, and then the inputs. The sampler is
    `image_sampler` with these values. While it runs, the page shows the model's x_0, unless
    `shows_steps` is false. When Gradio ends the callback, on Stop or when the page is closed, the
    sampler raises an error at its next step, which ends `work`. Errors that the user can fix are
    shown in the page as one sentence.
    """

    def callback(seed, name, steps, *inputs):
        latest = deque(maxlen=1)
        cancelled = Event()

        def on_step(k, t, x, x_0):
            if cancelled.is_set():
                raise InterruptedError
            latest.append((f"The model's estimate of x_0 at t = {t + 1}", to_uint8(x_0)))

        def run():
            options = replace(image_sampler.options, sampler=name, steps=steps)
            # An empty field gives None, which means 0 for the seed.
            sampler = replace(image_sampler, options=options, seed=seed or 0, on_step=on_step)
            return work(sampler, *inputs)

        # While the worker is busy, Gradio gets the latest x_0 five times a second.
        future = WORKER.submit(run)
        try:
            while not wait([future], timeout=0.2).done:
                yield show(*latest.pop()) if latest and shows_steps else gr.skip()
        finally:
            # On Stop, Gradio closes this generator.
            cancelled.set()
        error = future.exception()
        text = user_message(error) if error else None
        if text:
            raise gr.Error(html.escape(text), print_exception=False)
        yield future.result()

    return callback


def show(title: str, pixels: Tensor, columns: int | None = None) -> dict:
    """Return the output for a picture: a grid of images, uint8 (N, H, W, C), with a title."""
    return gr.update(value=grid_of(pixels.cpu().numpy(), columns), label=title)


def draw(image_sampler: ImageSampler, n: int) -> dict:
    """Sample images 0 .. n-1. A click on "Draw the images" calls this."""
    images = generate(image_sampler, range(n))
    title = f"{n} images of seed {image_sampler.seed}: {image_sampler.options}"
    return show(title, to_uint8(images))


def mix(
    image_sampler: ImageSampler,
    depth: float,
    share: float,
    first_file: str | None,
    first_index: int | None,
    second_file: str | None,
    second_index: int | None,
) -> dict:
    """Show the first image, the mixture and the second image.

    A click on "Mix the two images" calls this. The arguments are explained in `read_source`.
    """
    first = read_source(image_sampler, first_file, first_index)
    second = read_source(image_sampler, second_file, second_index)
    # Both images are noised to timestep t. Depth 0 is t = -1, at which images get no noise.
    t = image_sampler.time_at(depth)
    weights = torch.tensor([share], device=first.device)
    mixture = interpolate_images(image_sampler, torch.stack([first, second]), t, weights)
    images = torch.stack([first, mixture[0], second])
    return show(MIXED, to_uint8(images), columns=3)


def read_source(image_sampler: ImageSampler, file: str | None, index: int | None) -> Tensor:
    """Return the image of an uploaded file or, without one, that of an index of the seed.

    It is (C, S, S) in [-1, 1].
    """
    return read_x_0(image_sampler, file or str(index or 0))


def choose(
    image_sampler: ImageSampler, file: str | None, index: int | None
) -> tuple[np.ndarray, Image.Image]:
    """Return the pixels, uint8 (S, S, C), of the image of `read_source`, and their picture.

    A click on "Use this image" calls this.
    """
    x_0 = read_source(image_sampler, file, index)
    image = to_uint8(x_0[None]).cpu().numpy()[0]
    # The picture is as large as others in the page.
    return image, picture_of(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def paint(image_sampler: ImageSampler, image: np.ndarray, edit: dict, n: int) -> dict:
    """Show the image, its known pixels, and inpaintings 0 .. n-1.

    A click on "Inpaint the painted part" calls this.
    """
    # The editor's layer is RGBA, and opaque where the user has painted.
    mask = np.zeros(1)
    for layer in edit["layers"]:
        mask = fit_mask(layer[..., 3] > 127, image_sampler.shape[-1])
    if image is None or mask.all() or not mask.any():
        raise UserError("choose an image and paint over a part of it, but not over the whole image")
    # RePaint needs this sampler.
    options = replace(image_sampler.options, sampler="ddpm")
    image_sampler = replace(image_sampler, options=options)
    pictures = inpaint_image(image_sampler, image, mask, RESAMPLE, n)
    return show(INPAINTED, torch.from_numpy(pictures))


def draw_tab(image_sampler: ImageSampler, controls: list) -> gr.events.Dependency:
    """Build the tab Draw. Return the event that Stop cancels."""
    with gr.Tab("Draw"):
        count = slider(IMAGE_LIMIT, 16, label="How many", info="The first images of the seed.")
        start = gr.Button("Draw the images", variant="primary")
        picture = picture_output(label="The images")
    return start.click(in_worker(image_sampler, draw), [*controls, count], picture)


def mix_tab(image_sampler: ImageSampler, controls: list) -> gr.events.Dependency:
    """Build the tab Mix. Return the event that Stop cancels."""
    with gr.Tab("Mix"):
        with gr.Row():
            depth = gr.Slider(
                0, 1, 0.75, label="Depth", info="How far both are noised; 0 blends pixels."
            )
            share = gr.Slider(
                0, 1, 0.5, label="Share", info="How much of the mixture is the second image."
            )
        with gr.Row():
            first = source_controls("first image", 0)
            second = source_controls("second image", 1)
        start = gr.Button("Mix the two images", variant="primary")
        picture = picture_output(label=MIXED)
    inputs = [*controls, depth, share, *first, *second]
    return start.click(in_worker(image_sampler, mix), inputs, picture)


def source_controls(name: str, i: int) -> list:
    """Build the controls for an image, which give the arguments of `read_source`."""
    with gr.Column():
        index = number(
            i, label=f"Index of the {name}", info="An image of the seed; 0 is the first.", minimum=0
        )
        file = gr.File(label="Or a file", file_types=["image"], height=120)
    return [file, index]


def paint_tab(image_sampler: ImageSampler, controls: list) -> gr.events.Dependency:
    """Build the tab Paint. Return the event that Stop cancels."""
    with gr.Tab("Paint"):
        count = slider(8, 4, label="How many", info="Each inpainting is different.")
        start = gr.Button("Inpaint the painted part", variant="primary")
        with gr.Row():
            with gr.Column():
                image = gr.State()
                editor = gr.ImageEditor(
                    label="Paint over the part to inpaint",
                    brush=gr.Brush(SIDE // 10, colors=["#ff00ff"], color_mode="fixed"),
                    sources=(),
                    height=600,
                    transforms=(),
                    layers=False,
                    canvas_size=(SIDE, SIDE),
                )
                use = gr.Button("Use this image")
                source = source_controls("image", 0)
            picture = picture_output(label=INPAINTED)

    chosen = in_worker(image_sampler, choose, shows_steps=False)
    use.click(chosen, [*controls, *source], [image, editor])
    inputs = [*controls, image, editor, count]
    return start.click(in_worker(image_sampler, paint), inputs, picture)


def sampler_controls(steps: int) -> list:
    """Build the controls that all tabs share: the seed, the sampler and the steps."""
    return [
        number(0, label="Seed", info="Another seed gives other images."),
        gr.Radio(
            [*SAMPLERS],
            value="dpm++",
            label="Sampler",
            info="ddpm, the paper's, needs many steps; the others need 20. Paint always has ddpm.",
        ),
        number(steps, label="Steps", info="From noise to the image; empty: all timesteps."),
    ]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
