"""Play with a trained model in the browser: `python demo.py` serves a page and prints its address.

The page is for this machine alone. Its three tabs draw images, mix two, and inpaint one. They call
the functions of sample.py, so the images are the same. Every click takes the newest checkpoint, so
a run may be training meanwhile. A click waits until the earlier clicks are served.
"""

import argparse
import html
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from threading import Event
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from data.decode import fit_mask, fit_square, read_image
from data.pixels import to_uint8
from functions.samplers import SAMPLERS
from functions.sampling.generation import ImageSampler, generate, open_sampler
from functions.sampling.inpainting import inpaint_image
from functions.sampling.interpolation import mixtures, source_to_x_0
from functions.sampling.options import add_model_flags, add_sampling_flags
from functions.support.checkpoint import SavedModel
from functions.support.command_line import (
    EXIT_BAD_INPUT,
    Parser,
    exit_on_user_error,
    user_message,
)
from functions.support.errors import CheckpointError, UserError
from functions.support.pictures import grid_of
from functions.support.processes import SINGLE_PROCESS

try:
    import gradio as gr
except ImportError:
    print("error: the page wants Gradio: pip install -r requirements-demo.txt", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)

# This is what a callback returns to Gradio's components.
Outputs = TypeVar("Outputs")
# `in_worker` hands such a function to its work.
Check = Callable[..., None]
# The value of a control is an upload, a number or a choice.
Value = np.ndarray | int | str | None

# At most this many images are drawn.
IMAGE_LIMIT = 64
# At most this many pictures show how images form.
FRAME_LIMIT = 25
# Pictures in the page have this width and height in pixels.
SIDE = 512
# A picture starts below its label, which would cover its upper edge.
STYLE = ".image-frame img { width: 100%; height: 100%; object-fit: contain; padding-top: 30px }"
# The fonts are installed on the machine, so that the page downloads none.
FONTS = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
# All models run in this one thread.
WORKER = ThreadPoolExecutor(1)
# Fields for integers, and sliders for integers from 1 on.
number = partial(gr.Number, precision=0)
slider = partial(gr.Slider, 1, step=1, precision=0)
# This is the field for the seed.
seed_field = partial(number, 0, label="Seed", info="Another seed is other noise: other images.")
# This is the button for image files.
upload_button = partial(
    gr.UploadButton, "Upload an image, which is cropped square", file_types=["image"]
)
# A picture has a button for downloads.
picture_output = partial(
    gr.Image, interactive=False, format="png", height=SIDE, buttons=["download"]
)
# Clicks are served one after the other, in their order.
QUEUED = {"concurrency_limit": 1, "concurrency_id": "model"}


def main() -> None:
    """Read the command line and serve the page until Ctrl-C."""
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    demo = Demo(parser.parse_args())
    try:
        demo.open()
    except CheckpointError as error:
        # The page opens without a model, because a run may write a checkpoint later.
        print(error)

    with gr.Blocks(title="DDPM", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        model = gr.Textbox(label="The model")
        # Opening the page calls this, which names the newest checkpoint.
        page.load(in_worker(lambda check: str(demo.open()[0].path)), outputs=model, **QUEUED)

        drawing, history = draw_tab(demo)
        stoppable = [drawing, mix_tab(demo), paint_tab(demo, history)]
        # A click on Stop calls no function, and cancels what the buttons of the tabs have started.
        gr.Button("Stop").click(None, cancels=stoppable)

    page.queue(max_size=16).launch(
        server_name="127.0.0.1",
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        theme=FONTS,
        css=STYLE,
        footer_links=[],
        max_file_size=10**8,
        state_session_capacity=9,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"the page is at {page.local_url}; Ctrl-C ends it", flush=True)
    try:
        Event().wait()
    finally:
        page.close(verbose=False)
        # A plain exit would wait for the worker.
        os._exit(130)


def in_worker(work: Callable[..., Outputs]) -> Callable[..., Iterator[Outputs]]:
    """Return a callback for Gradio that calls `work(check, *inputs)` in the worker.

    `work` calls `check` after every step, and may hand it new outputs for the page. When Gradio
    ends the callback, on Stop or when the page is closed, `check` raises an error, which ends
    `work`. Errors that a user can mend are shown in the page as one sentence.
    """

    def callback(*inputs):
        latest = deque(maxlen=1)
        cancelled = Event()

        def check(*step, outputs=None):
            if cancelled.is_set():
                raise InterruptedError
            if outputs:
                latest.append(outputs)

        def job():
            try:
                return work(check, *inputs)
            except Exception as error:
                text = user_message(error)
                if not text:
                    raise
            # This is outside of `except`, because the original error refers to the model's memory.
            raise gr.Error(html.escape(text), print_exception=False)

        # While the worker is busy, Gradio gets the latest outputs five times a second.
        future = WORKER.submit(job)
        try:
            while not wait([future], timeout=0.2).done:
                yield latest.pop() if latest else gr.skip()
        finally:
            # Gradio closes this generator on Stop. The next `check` then ends the job.
            cancelled.set()
        yield future.result()

    return callback


@dataclass(frozen=True)
class Demo:
    """Do what the buttons of the page ask for, with the model and device of the command line.

    `draw`, `mix`, `paint` and `read` are called in the worker. They get `check` and the values of
    the controls, and return outputs for the page.
    """

    args: argparse.Namespace  # the flags of `add_model_flags`

    def open(
        self,
        on_step: Check | None = None,
        seed: int = 0,
        sampler: str = "ddpm",
        steps: int | None = None,
    ) -> tuple[SavedModel, ImageSampler]:
        """Return the newest checkpoint and its `ImageSampler`, which calls `on_step` in each step.

        The sampler is the one that sample.py has with the same flags.
        """
        # All flags that the page has no field for have their defaults.
        parser = Parser()
        add_sampling_flags(parser)
        # An empty field gives None, which means 0 for the seed and all timesteps for the steps.
        parser.set_defaults(
            **vars(self.args), seed=seed or 0, sampler=sampler, steps=steps, batch_size=IMAGE_LIMIT
        )
        saved, image_sampler = open_sampler(parser.parse_args([]), SINGLE_PROCESS)
        return saved, replace(image_sampler, on_step=on_step)

    def draw(self, check: Check, seed: int, n: int, sampler: str, steps: int | None) -> tuple:
        """Sample images 0 .. n-1, and show the model's x_0 every few steps.

        A click on "Draw the images" calls this. It returns what `show_last` returns.
        """
        # This has titles and images, uint8 (N, H, W, 3): first x_0 of several steps, then the
        # samples.
        history = []

        # The sampler calls this after every step.
        def on_step(k, t, x, x_0):
            check()
            if k % math.ceil(calls / FRAME_LIMIT) == 0:
                title = (
                    f"x_0 as the model sees it after {k + 1} of {calls} network calls, "
                    f"at t = {t + 1}"
                )
                history.append((title, to_uint8(x_0).cpu().numpy()))
                check(outputs=show_last(history))

        saved, image_sampler = self.open(on_step, seed, sampler, steps)
        calls = image_sampler.network_calls
        samples = generate(image_sampler, range(n))

        # The last title is the command that samples the same images.
        flags = f"--seed {seed or 0} --n {n} --sampler {sampler} --steps {calls}"
        history.append((f"sample.py {saved.path} {flags}", to_uint8(samples.images).numpy()))
        return show_last(history)

    def mix(self, check: Check, depth: float, share: float, *inputs: Value) -> list[np.ndarray]:
        """Return the first image, the mixture and the second.

        A click on "Mix the two images" calls this. `inputs` are the upload (or None) and the number
        of the first image, the same of the second, and the arguments of `open` after `on_step`.
        """
        first, first_number, second, second_number, *flags = inputs
        _, image_sampler = self.open(check, *flags)

        # A source is an upload, cropped and resized, or the number of an image of the seed.
        sources = []
        for rgb, i in ((first, first_number), (second, second_number)):
            source = i or 0
            if rgb is not None:
                source = fit_square(rgb, image_sampler.shape[-1])
            sources.append(source)

        # Both images are noised to timestep t. Depth 0 is t = -1, where images are not noised.
        ends = torch.stack([source_to_x_0(image_sampler, source) for source in sources])
        t = round(depth * image_sampler.scheduler.timesteps) - 1
        weights = torch.tensor([share], device=ends.device)
        mixture = mixtures(image_sampler, sources, ends, t, weights)
        images = to_uint8(torch.cat([ends[:1], mixture, ends[1:]])).cpu().numpy()
        return list(images)

    def paint(
        self, check: Check, rgb: np.ndarray, edit: dict, repeats: int, n: int, *flags: Value
    ) -> Image.Image:
        """Return a grid of the image, its known pixels, and answers 0 .. n-1.

        A click on "Make what is painted over anew" calls this. `flags` are the arguments of `open`
        after `on_step`.
        """
        _, image_sampler = self.open(check, *flags)
        size = image_sampler.shape[-1]

        # The editor's layers are RGBA, and opaque where the user has painted.
        masks = [layer[..., 3] > 127 for layer in edit["layers"]]
        mask = fit_mask(np.any(masks, axis=0), size) if masks else np.array(False)
        if rgb is None or mask.all() or not mask.any():
            raise UserError(
                "take an image, and paint over a part of it: neither all of it nor nothing"
            )
        return grid_of(inpaint_image(image_sampler, fit_square(rgb, size), mask, repeats, n))

    def read(self, check: Check, path: str) -> tuple[np.ndarray, Image.Image]:
        """Return the pixels of an uploaded file, uint8 (S, S, 3), and the picture for the page."""
        saved, _ = self.open()
        image = read_image(path, saved.model.image_size, fit=True)
        return image, enlarge(image)


def draw_tab(demo: Demo) -> tuple:
    """Build the tab Draw. Return the event that Stop cancels, and the state with its history."""
    with gr.Tab("Draw"):
        with gr.Row():
            controls = [
                seed_field(),
                slider(IMAGE_LIMIT, 16, label="How many", info="Images 0 and on of the seed."),
                *sampler_controls(),
            ]
        start = gr.Button("Draw the images", variant="primary")
        picture = picture_output(label="The images, and meanwhile what the model takes them for")
        history = gr.State([])
        back = slider(label="Look back", info="Goes through the steps again.", visible=False)

    # Moving the slider calls this at once, without the worker. Of several moves in a row the last
    # counts.
    back.input(
        look_back,
        [back, history],
        picture,
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
    )
    # A click on the button calls this.
    event = start.click(in_worker(demo.draw), controls, [picture, back, history], **QUEUED)
    return event, history


def look_back(place: int, history: list) -> dict:
    """Show the images at a place of the history again; the first place is 1.

    Moving the slider "Look back" calls this.
    """
    # The slider's maximum is at least 2, so the place may be beyond the last.
    title, images = history[:place][-1]
    return gr.update(value=grid_of(images), label=title)


def show_last(history: list) -> tuple:
    """Return the outputs of the tab Draw: the last images, the slider at its end, the history."""
    last = len(history)
    slider_at_last = gr.update(maximum=max(2, last), value=last, visible=True)
    return look_back(last, history), slider_at_last, history


def mix_tab(demo: Demo) -> gr.events.Dependency:
    """Build the tab Mix. Return the event that Stop cancels."""
    with gr.Tab("Mix"):
        with gr.Row():
            controls = [seed_field(), *sampler_controls()]
        with gr.Row():
            depth = gr.Slider(
                0, 1, 0.75, label="Depth", info="How far into the noise both go; 0 blends pixels."
            )
            share = gr.Slider(
                0, 1, 0.5, label="Share", info="How much of the mixture is the second image."
            )
        start = gr.Button("Mix the two images", variant="primary")
        with gr.Row():
            first, first_picture = source_controls(demo, "first", 0)
            mixture = picture_output(label="The mixture")
            second, second_picture = source_controls(demo, "second", 1)

    # A click on the button calls this.
    inputs = [depth, share, *first, *second, *controls]
    pictures = [first_picture, mixture, second_picture]
    return start.click(in_worker(demo.mix), inputs, pictures, **QUEUED)


def source_controls(demo: Demo, which: str, i: int) -> tuple[list, gr.Image]:
    """Build the column of an image to mix. Return its inputs and its picture.

    The inputs are a state, which has the upload or None, and the field with the number.
    """
    with gr.Column():
        source = gr.State()
        picture = picture_output(label=f"The {which} image")
        index = number(
            i,
            label=f"Number of the {which} image",
            info="Takes one of the seed's; 0 is the first.",
            minimum=0,
        )
        upload = upload_button()

    # Typing a number calls this, which removes the upload.
    index.input(lambda: (None, None), None, [source, picture], **QUEUED)
    # Uploading a file calls this, which shows the file.
    upload.upload(in_worker(demo.read), upload, [source, picture], **QUEUED)
    return [source, index], picture


def paint_tab(demo: Demo, history: gr.State) -> gr.events.Dependency:
    """Build the tab Paint. Return the event that Stop cancels."""
    with gr.Tab("Paint"):
        with gr.Row():
            seed = seed_field()
            count = slider(8, 4, label="How many", info="Answers to the same question.")
            steps = number(
                50, label="Steps", info="From noise to the image; empty for all timesteps."
            )
            repeats = slider(
                20, 10, label="Repeats", info="Network calls a step: 1 leaves seams, 10 none."
            )
        start = gr.Button("Make what is painted over anew", variant="primary")
        with gr.Row():
            with gr.Column():
                image = gr.State()
                editor = gr.ImageEditor(
                    label="Paint over what is to be made anew",
                    brush=gr.Brush(SIDE // 10, colors=["#ff00ff"], color_mode="fixed"),
                    sources=(),
                    height=600,
                    transforms=(),
                    layers=False,
                    canvas_size=(SIDE, SIDE),
                )
                index = number(
                    0,
                    label="Number of the image",
                    info="Takes one of the images just drawn.",
                    minimum=0,
                )
                take = gr.Button("Take the image of this number")
                upload = upload_button()
            picture = picture_output(label="The image, what is kept of it, and the answers")

    # A click on the button for an image of the tab Draw calls this.
    take.click(take_image, [index, history], [image, editor], **QUEUED)
    # Uploading a file calls this.
    upload.upload(in_worker(demo.read), upload, [image, editor], **QUEUED)

    # A click on the button calls this. RePaint needs the sampler ddpm.
    inputs = [image, editor, repeats, count, seed, gr.State("ddpm"), steps]
    return start.click(in_worker(demo.paint), inputs, picture, **QUEUED)


def take_image(i: int | None, history: list) -> tuple[np.ndarray, Image.Image]:
    """Return image i of the last images in the history, and the picture for the page.

    A click on "Take the image of this number" calls this.
    """
    images = history[-1][1] if history else []
    # An empty field gives None, which means the first image.
    i = i or 0
    if i >= len(images):
        raise gr.Error(
            f"There are {len(images)} images in the tab Draw; the first is number 0.",
            print_exception=False,
        )
    return images[i], enlarge(images[i])


def enlarge(image: np.ndarray) -> Image.Image:
    """Enlarge an image to the size of pictures in the page."""
    return Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def sampler_controls() -> list:
    """Build the controls of the sampler and its steps."""
    return [
        gr.Radio(
            [*SAMPLERS],
            value="dpm++",
            label="Sampler",
            info="ddpm, the paper's, wants many steps, the others 20.",
        ),
        number(20, label="Steps", info="Network calls for an image; empty for all timesteps."),
    ]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
