"""Play with a trained model in the browser: `python demo.py` serves a page and prints its address.

Only this machine can open the page. Its three tabs draw images, mix two, and inpaint one. They call
the same functions as sample.py and edit.py, so the images are the same. Every click uses the newest
checkpoint, so you can use the page while a run is training; without any run, it uses a model in
pretrained/. A click waits until earlier clicks are finished.
"""

import argparse
import html
import math
import os
import shlex
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

from data.decode import fit_image, fit_mask, read_image
from data.pixels import picture_of, to_model_range, to_uint8
from functions.samplers import SAMPLERS
from functions.sampling.generation import ImageSampler, generate, open_sampler
from functions.sampling.guidance import with_guide
from functions.sampling.inpainting import inpaint_image
from functions.sampling.interpolation import interpolate_images
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
    print("error: the page needs Gradio: pip install -r requirements-demo.txt", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)

# A callback returns these values to Gradio's components.
Outputs = TypeVar("Outputs")
# `in_worker` passes such a function to its `work`.
Check = Callable[..., None]
# The value of a control: an upload, a number or a choice.
Value = np.ndarray | int | str | None

# At most this many images are drawn per click.
IMAGE_LIMIT = 64
# At most this many pictures show how images form.
FRAME_LIMIT = 25
# The width and height of pictures in the page, in pixels.
SIDE = 512
# The label would cover a picture's upper edge, so the picture starts below it.
STYLE = ".image-frame img { width: 100%; height: 100%; object-fit: contain; padding-top: 30px }"
# The page uses fonts of the machine, so that it downloads none.
FONTS = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
# All models run in this one thread.
WORKER = ThreadPoolExecutor(1)
# The guide is the run's snapshot or checkpoint nearest to this fraction of the model's steps.
GUIDE_AT = 0.25
# Fields for integers, and sliders for integers from 1 upwards.
number = partial(gr.Number, precision=0)
slider = partial(gr.Slider, 1, step=1, precision=0)
# The field for the seed.
seed_field = partial(number, 0, label="Seed", info="Another seed gives other images.")
# The button for image files.
upload_button = partial(
    gr.UploadButton, "Upload an image (it is cropped to a square)", file_types=["image"]
)
# Each picture has a button to download it.
picture_output = partial(
    gr.Image, interactive=False, format="png", height=SIDE, buttons=["download"]
)
# Clicks are processed one after the other, in their order.
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
        # This is called when the page is opened, and shows the path of the newest checkpoint.
        page.load(in_worker(lambda check: str(demo.open()[0].path)), outputs=model, **QUEUED)

        drawing, history = draw_tab(demo)
        stoppable = [drawing, mix_tab(demo), paint_tab(demo, history)]
        # A click on Stop calls no function. It cancels the work that the tabs' buttons started.
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

    `work` calls `check` after every step, and may pass it new outputs for the page. When Gradio
    ends the callback, on Stop or when the page is closed, `check` raises an error, which ends
    `work`. Errors that the user can fix are shown in the page as one sentence.
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
            # This comes after the `except` block, because the original error keeps the model's
            # tensors in memory.
            raise gr.Error(html.escape(text), print_exception=False)

        # While the worker is busy, Gradio gets the latest outputs five times a second.
        future = WORKER.submit(job)
        try:
            while not wait([future], timeout=0.2).done:
                yield latest.pop() if latest else gr.skip()
        finally:
            # On Stop, Gradio closes this generator. The next call of `check` then ends the job.
            cancelled.set()
        yield future.result()

    return callback


@dataclass(frozen=True)
class Demo:
    """The functions behind the page's buttons, with the model and device of the command line.

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
        guidance: float = 1,
    ) -> tuple[SavedModel, ImageSampler]:
        """Return the newest checkpoint and its `ImageSampler`, which calls `on_step` at each step.

        sample.py has the same sampler for the same flags. If `guidance`, the weight w, is above 1,
        the guide is an earlier snapshot or checkpoint of the same run.
        """
        # Flags without a field in the page have their defaults.
        parser = Parser()
        add_sampling_flags(parser)
        # An empty field gives None, which means 0 for the seed and all timesteps for the steps.
        parser.set_defaults(
            **vars(self.args), seed=seed or 0, sampler=sampler, steps=steps, batch_size=IMAGE_LIMIT
        )
        saved, image_sampler = open_sampler(parser.parse_args([]), SINGLE_PROCESS)
        # At 1 a guide would only add network calls.
        if guidance > 1:
            guide = str(round(GUIDE_AT * saved.provenance["step"]))
            options = replace(image_sampler.options, guide=guide, guidance=guidance)
            image_sampler = replace(image_sampler, options=options)
            image_sampler = with_guide(image_sampler, saved, SINGLE_PROCESS)
        return saved, replace(image_sampler, on_step=on_step)

    def draw(self, check: Check, seed: int, n: int, *controls: Value) -> tuple:
        """Sample images 0 .. n-1, and show the model's x_0 every few steps.

        A click on "Draw the images" calls this. `controls` are those of `sampler_controls`. The
        outputs are those of `show_last`.
        """
        # Each entry is a title and images, uint8 (N, H, W, C). The last entry has the samples, and
        # the entries before have the x_0 of several steps.
        history = []

        # The sampler calls this after every step.
        def on_step(k, t, x, x_0):
            check()
            if k % math.ceil(step_count / FRAME_LIMIT) == 0:
                done = f"{k + 1} of {step_count} steps"
                title = f"the model's estimate of x_0 after {done}, at t = {t + 1}"
                history.append((title, to_uint8(x_0).cpu().numpy()))
                check(outputs=show_last(history))

        saved, image_sampler = self.open(on_step, seed, *controls)
        step_count = image_sampler.step_count
        samples = generate(image_sampler, range(n))

        # The last title is the command that samples the same images.
        options = image_sampler.options
        flags = f"--seed {seed or 0} --n {n} --sampler {options.sampler} --steps {step_count}"
        if options.guide:
            flags += f" --guide {options.guide} --guidance {options.guidance:g}"
        # The path may contain spaces.
        path = shlex.quote(str(saved.path))
        history.append((f"sample.py {path} {flags}", to_uint8(samples.images).numpy()))
        return show_last(history)

    def mix(self, check: Check, depth: float, share: float, *inputs: Value) -> list[Image.Image]:
        """Return the first image, the mixture and the second.

        A click on "Mix the two images" calls this. `inputs` are the upload (or None) and the index
        of the first image, the same for the second image, and the arguments of `open` after
        `on_step`.
        """
        first, first_index, second, second_index, *flags = inputs
        _, image_sampler = self.open(check, *flags)

        # A source is an upload, cropped and resized, or the index of an image of the seed.
        ends = []
        for pixels, i in ((first, first_index), (second, second_index)):
            if pixels is None:
                x_0 = generate(image_sampler, [i or 0]).images
            else:
                image = fit_image(picture_of(pixels), image_sampler.shape)
                x_0 = to_model_range(torch.from_numpy(image)[None])
            ends.append(x_0)

        # Both images are noised to timestep t. Depth 0 is t = -1, at which images get no noise.
        ends = torch.cat(ends).to(image_sampler.device)
        weights = torch.tensor([share], device=ends.device)
        t = image_sampler.time_at(depth)
        mixture = interpolate_images(image_sampler, ends, t, weights)
        images = to_uint8(torch.cat([ends[:1], mixture, ends[1:]])).cpu().numpy()
        return list(map(picture_of, images))

    def paint(
        self, check: Check, pixels: np.ndarray, edit: dict, repeats: int, n: int, *flags: Value
    ) -> Image.Image:
        """Return a grid of the image, its known pixels, and inpaintings 0 .. n-1.

        A click on "Inpaint the painted part" calls this. `flags` are the arguments of `open` after
        `on_step`.
        """
        _, image_sampler = self.open(check, *flags)
        shape = image_sampler.shape

        # The editor's layers are RGBA and opaque where the user has painted.
        masks = [layer[..., 3] > 127 for layer in edit["layers"]]
        mask = fit_mask(np.any(masks, axis=0), shape[-1]) if masks else np.array(False)
        if pixels is None or mask.all() or not mask.any():
            raise UserError(
                "choose an image and paint over a part of it, but not over the whole image"
            )
        image = fit_image(picture_of(pixels), shape)
        return grid_of(inpaint_image(image_sampler, image, mask, repeats, n))

    def read(self, check: Check, path: str) -> tuple[np.ndarray, Image.Image]:
        """Return the pixels of an uploaded file, uint8 (S, S, C), and the picture for the page."""
        saved, _ = self.open()
        image = read_image(path, saved.model.image_shape, fit=True)
        return image, enlarge(image)


def draw_tab(demo: Demo) -> tuple:
    """Build the tab Draw. Return the event that Stop cancels, and the state with its history."""
    with gr.Tab("Draw"):
        with gr.Row():
            controls = [
                seed_field(),
                slider(IMAGE_LIMIT, 16, label="How many", info="The first images of the seed."),
                *sampler_controls(),
            ]
        start = gr.Button("Draw the images", variant="primary")
        picture = picture_output(label="The images; while they form, the model's estimates of them")
        history = gr.State([])
        back = slider(label="Look back", info="Shows earlier steps.", visible=False)

    # Moving the slider calls this directly, without the worker. If it moves several times in a row,
    # only the last position counts.
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


def look_back(position: int, history: list) -> dict:
    """Show the images at a position of the history again; the first position is 1.

    Moving the slider "Look back" calls this.
    """
    # The slider's maximum is at least 2, so the position may be beyond the last entry.
    title, images = history[:position][-1]
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
                0, 1, 0.75, label="Depth", info="How far both are noised; 0 blends pixels."
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
    """Build the column for one of the two images. Return its inputs and its picture.

    The inputs are a state, which holds the upload or None, and the field with the index.
    """
    with gr.Column():
        source = gr.State()
        picture = picture_output(label=f"The {which} image")
        index = number(
            i,
            label=f"Index of the {which} image",
            info="An image of the seed; 0 is the first.",
            minimum=0,
        )
        upload = upload_button()

    # Typing an index calls this, which removes the upload.
    index.input(lambda: (None, None), None, [source, picture], **QUEUED)
    # Uploading a file calls this, which shows the file.
    upload.upload(in_worker(demo.read), upload, [source, picture], **QUEUED)
    return [source, index], picture


def paint_tab(demo: Demo, history: gr.State) -> gr.events.Dependency:
    """Build the tab Paint. Return the event that Stop cancels."""
    with gr.Tab("Paint"):
        with gr.Row():
            seed = seed_field()
            count = slider(8, 4, label="How many", info="Each inpainting is different.")
            steps = number(50, label="Steps", info="From noise to the image; empty: all timesteps.")
            repeats = slider(
                20, 10, label="Repeats", info="Network calls per step: 1 leaves seams, 10 does not."
            )
            guidance = guidance_slider()
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
                index = number(
                    0,
                    label="Index of the image",
                    info="One of the images just drawn; 0 is the first.",
                    minimum=0,
                )
                use = gr.Button("Use the image with this index")
                upload = upload_button()
            picture = picture_output(label="The image, its known part, and the inpaintings")

    # A click on the button for an image of the tab Draw calls this.
    use.click(drawn_image, [index, history], [image, editor], **QUEUED)
    # Uploading a file calls this.
    upload.upload(in_worker(demo.read), upload, [image, editor], **QUEUED)

    # A click on the button calls this. RePaint needs the sampler ddpm.
    inputs = [image, editor, repeats, count, seed, gr.State("ddpm"), steps, guidance]
    return start.click(in_worker(demo.paint), inputs, picture, **QUEUED)


def drawn_image(i: int | None, history: list) -> tuple[np.ndarray, Image.Image]:
    """Return image i of the last images in the history, and the picture for the page.

    A click on "Use the image with this index" calls this.
    """
    images = history[-1][1] if history else []
    # An empty field gives None, which means the first image.
    i = i or 0
    if i >= len(images):
        raise gr.Error(
            f"The tab Draw has {len(images)} images; the first has the index 0.",
            print_exception=False,
        )
    return images[i], enlarge(images[i])


def enlarge(image: np.ndarray) -> Image.Image:
    """Enlarge an image to the size of pictures in the page."""
    return picture_of(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def sampler_controls() -> list:
    """Build the controls of the sampler, its steps and its guidance."""
    return [
        gr.Radio(
            [*SAMPLERS],
            value="dpm++",
            label="Sampler",
            info="ddpm, the paper's, needs many steps; the others need 20.",
        ),
        number(20, label="Steps", info="From noise to the image; empty: all timesteps."),
        guidance_slider(),
    ]


def guidance_slider() -> gr.Slider:
    """Build the slider for the weight w of the guide; at 1 there is no guide."""
    return gr.Slider(
        1,
        3,
        1,
        step=0.25,
        label="Guidance",
        info="Above 1: away from the run's own early weights. This adds network calls.",
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
