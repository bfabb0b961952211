"""Play with a trained model in the browser: `python demo.py` serves a page and prints its address.

Only this machine can open the page. Its three tabs draw images, mix two, and inpaint one. They call
the same functions as sample.py and edit.py, so the images are the same. The model is read once. A
click waits until earlier clicks are finished.
"""

import html
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property, partial
from threading import Event

import numpy as np
import torch
from PIL import Image

from data.decode import fit_mask
from data.pixels import picture_of, to_uint8
from functions.samplers import SAMPLERS
from functions.sampling.editing import read_x_0
from functions.sampling.generation import ImageSampler, generate, open_sampler
from functions.sampling.guidance import with_guide
from functions.sampling.inpainting import inpaint_image
from functions.sampling.interpolation import interpolate_images
from functions.sampling.options import add_model_flags
from functions.support.checkpoint import SavedModel
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

# `in_worker` passes such a function to its `work`.
Check = Callable[..., None]
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
# The model runs in this one thread.
WORKER = ThreadPoolExecutor(1)
# The guide is the run's snapshot or checkpoint nearest to this fraction of the model's steps.
GUIDE_AT = 0.25
# Fields for integers, and sliders for integers from 1 upwards.
number = partial(gr.Number, precision=0)
slider = partial(gr.Slider, 1, step=1, precision=0)
INDEX = "An image of the seed; 0 is the first."
# Each picture has a button to download it.
picture_output = partial(
    gr.Image, interactive=False, format="png", height=SIDE, buttons=["download"]
)
# Clicks are processed one after the other, in their order.
QUEUED = {"concurrency_limit": 1, "concurrency_id": "model"}


def main() -> None:
    """Read the command line and the model, and serve the page until Ctrl-C."""
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    # The page has fields for some of these, and the others have the defaults of sample.py.
    parser.set_defaults(seed=0, sampler="dpm++", steps=None, variance=None)
    parser.set_defaults(precision="auto", batch_size=IMAGE_LIMIT)
    demo = Demo(*open_sampler(parser.parse_args(), SINGLE_PROCESS))
    with gr.Blocks(title="DDPM", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Textbox(str(demo.saved.path), label="The model")
        with gr.Row():
            controls = sampler_controls()
        stoppable = [tab(demo, controls) for tab in (draw_tab, mix_tab, paint_tab)]
        # A click on Stop calls no function. It cancels the work that the tabs' buttons started.
        gr.Button("Stop").click(None, cancels=stoppable)

    page.queue().launch(
        server_name="127.0.0.1",
        share=False,
        ssr_mode=False,
        run_history=False,
        theme=FONTS,
        css=STYLE,
        footer_links=[],
        max_file_size=10**8,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"the page is at {page.local_url}; Ctrl-C ends it", flush=True)
    page.block_thread()
    # A plain exit would wait for the worker.
    os._exit(130)


def in_worker(work: Callable[..., tuple]) -> Callable[..., Iterator[tuple]]:
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

        # While the worker is busy, Gradio gets the latest outputs five times a second.
        future = WORKER.submit(work, check, *inputs)
        try:
            while not wait([future], timeout=0.2).done:
                yield latest.pop() if latest else gr.skip()
        finally:
            # On Stop, Gradio closes this generator. The next call of `check` then ends the work.
            cancelled.set()
        error = future.exception()
        text = user_message(error) if error else None
        if text:
            raise gr.Error(html.escape(text), print_exception=False)
        yield future.result()

    return callback


@dataclass(frozen=True)
class Demo:
    """The functions behind the page's buttons, with the model and its sampler.

    `draw`, `mix`, `paint` and `choose` are called in the worker. They get `check` and the values of
    the controls, and return outputs for the page.
    """

    saved: SavedModel
    plain: ImageSampler

    @cached_property
    def guided(self) -> ImageSampler:
        """Return the sampler with the guide, an earlier snapshot or checkpoint of the run."""
        guide = str(round(GUIDE_AT * self.saved.provenance["step"]))
        options = replace(self.plain.options, guide=guide)
        return with_guide(replace(self.plain, options=options), self.saved, SINGLE_PROCESS)

    def sampler_of(
        self, on_step: Check, seed: int, sampler: str, steps: int | None, guidance: float
    ) -> ImageSampler:
        """Return the sampler that sample.py has for the same flags, which calls `on_step`."""
        image_sampler = self.plain
        changes = {"sampler": sampler, "steps": steps}
        # A diffusers folder names a variance, which is meant only for sampling over all timesteps.
        diffusion = self.saved.config["diffusion"]
        if sampler == "ddpm" and steps in (None, diffusion["timesteps_diff"]):
            changes["variance"] = diffusion.get("variance")
        # At 1 a guide would only add network calls.
        if guidance > 1:
            denoiser = replace(self.guided.denoiser, weight=guidance)
            image_sampler = replace(self.guided, denoiser=denoiser)
            changes["guidance"] = guidance
        options = replace(image_sampler.options, **changes)
        # An empty field gives None, which means 0 for the seed.
        return replace(image_sampler, options=options, seed=seed or 0, on_step=on_step)

    def draw(self, check: Check, n: int, *controls) -> tuple:
        """Sample images 0 .. n-1, and show the model's x_0 every few steps.

        A click on "Draw the images" calls this. `controls` are those that all tabs share.
        The outputs are those of `show_last`.
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

        image_sampler = self.sampler_of(on_step, *controls)
        step_count = image_sampler.step_count
        samples = generate(image_sampler, range(n))
        title = f"{n} images of seed {image_sampler.seed}: {image_sampler.options}"
        history.append((title, to_uint8(samples).numpy()))
        return show_last(history)

    def mix(self, check: Check, depth: float, share: float, *inputs) -> list[Image.Image]:
        """Return the first image, the mixture and the second.

        A click on "Mix the two images" calls this. `inputs` are the uploaded file (or None) and the
        index of the first image, the same for the second, and the controls that all tabs share.
        """
        first, first_index, second, second_index, *controls = inputs
        image_sampler = self.sampler_of(check, *controls)
        # A source is an uploaded file, or the index of an image of the seed.
        sources = [first or str(first_index or 0), second or str(second_index or 0)]
        ends = torch.stack([read_x_0(image_sampler, source) for source in sources])
        # Both images are noised to timestep t. Depth 0 is t = -1, at which images get no noise.
        weights = torch.tensor([share], device=ends.device)
        t = image_sampler.time_at(depth)
        mixture = interpolate_images(image_sampler, ends, t, weights)
        images = to_uint8(torch.cat([ends[:1], mixture, ends[1:]])).cpu().numpy()
        return list(map(picture_of, images))

    def paint(
        self, check: Check, image: np.ndarray, edit: dict, repeats: int, n: int, *controls
    ) -> Image.Image:
        """Return a grid of the image, its known pixels, and inpaintings 0 .. n-1.

        A click on "Inpaint the painted part" calls this. `controls` are those that all tabs
        share.
        """
        seed, _, steps, guidance = controls
        # RePaint needs this sampler.
        image_sampler = self.sampler_of(check, seed, "ddpm", steps, guidance)
        # The editor's layer is RGBA, and opaque where the user has painted.
        mask = np.zeros(1)
        for layer in edit["layers"]:
            mask = fit_mask(layer[..., 3] > 127, image_sampler.shape[-1])
        if image is None or mask.all() or not mask.any():
            raise UserError(
                "choose an image and paint over a part of it, but not over the whole image"
            )
        return grid_of(inpaint_image(image_sampler, image, mask, repeats, n))

    def choose(self, check: Check, source: str | int | None, *controls) -> tuple:
        """Return the pixels of an uploaded file, or of an image of the seed, and their picture.

        `source` is the file's path or the index. The pixels are uint8 (S, S, C).
        """
        # Reading a file needs none of the controls.
        upload = isinstance(source, str)
        image_sampler = self.plain if upload else self.sampler_of(check, *controls)
        x_0 = read_x_0(image_sampler, str(source or 0))
        image = to_uint8(x_0[None]).cpu().numpy()[0]
        # The picture is as large as others in the page.
        return image, picture_of(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def draw_tab(demo: Demo, controls: list) -> gr.events.Dependency:
    """Build the tab Draw. Return the event that Stop cancels."""
    with gr.Tab("Draw"):
        count = slider(IMAGE_LIMIT, 16, label="How many", info="The first images of the seed.")
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
    inputs = [count, *controls]
    return start.click(in_worker(demo.draw), inputs, [picture, back, history], **QUEUED)


def look_back(position: int, history: list) -> dict:
    """Show the images at a position of the history again; the first position is 1.

    Moving the slider "Look back" calls this.
    """
    # When demo.py is restarted, an open page loses its history.
    if not history:
        raise gr.Error("Draw the images again.", print_exception=False)
    # The slider's maximum is at least 2, so the position may be beyond the last entry.
    title, images = history[:position][-1]
    return gr.update(value=grid_of(images), label=title)


def show_last(history: list) -> tuple:
    """Return the outputs of the tab Draw: the last images, the slider at its end, the history."""
    last = len(history)
    slider_at_last = gr.update(maximum=max(2, last), value=last, visible=True)
    return look_back(last, history), slider_at_last, history


def mix_tab(demo: Demo, controls: list) -> gr.events.Dependency:
    """Build the tab Mix. Return the event that Stop cancels."""
    with gr.Tab("Mix"):
        with gr.Row():
            depth = gr.Slider(
                0, 1, 0.75, label="Depth", info="How far both are noised; 0 blends pixels."
            )
            share = gr.Slider(
                0, 1, 0.5, label="Share", info="How much of the mixture is the second image."
            )
        start = gr.Button("Mix the two images", variant="primary")
        with gr.Row():
            first, first_picture = source_controls("first", 0)
            mixture = picture_output(label="The mixture")
            second, second_picture = source_controls("second", 1)

    # A click on the button calls this.
    inputs = [depth, share, *first, *second, *controls]
    pictures = [first_picture, mixture, second_picture]
    return start.click(in_worker(demo.mix), inputs, pictures, **QUEUED)


def source_controls(which: str, i: int) -> tuple[list, gr.Image]:
    """Build the column for one of the two images. Return its inputs and its picture."""
    with gr.Column():
        picture = picture_output(label=f"The {which} image")
        index = number(i, label=f"Index of the {which} image", info=INDEX, minimum=0)
        file = gr.File(label="Or a file", file_types=["image"], height=120)
    return [file, index], picture


def paint_tab(demo: Demo, controls: list) -> gr.events.Dependency:
    """Build the tab Paint. Return the event that Stop cancels."""
    with gr.Tab("Paint"):
        with gr.Row():
            count = slider(8, 4, label="How many", info="Each inpainting is different.")
            repeats = slider(
                20, 10, label="Repeats", info="Network calls per step: 1 leaves seams, 10 does not."
            )
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
                index = number(0, label="Index of the image", info=INDEX, minimum=0)
                use = gr.Button("Use the image with this index")
                upload = gr.UploadButton("Upload an image", file_types=["image"])
            picture = picture_output(label="The image, its known part, and the inpaintings")

    # A click on the button for an image of the seed calls this.
    use.click(in_worker(demo.choose), [index, *controls], [image, editor], **QUEUED)
    # Uploading a file calls this.
    upload.upload(in_worker(demo.choose), [upload, *controls], [image, editor], **QUEUED)
    # A click on the button calls this.
    inputs = [image, editor, repeats, count, *controls]
    return start.click(in_worker(demo.paint), inputs, picture, **QUEUED)


def sampler_controls() -> list:
    """Build the controls that all tabs share: the arguments of `sampler_of` after `on_step`."""
    return [
        number(0, label="Seed", info="Another seed gives other images."),
        gr.Radio(
            [*SAMPLERS],
            value="dpm++",
            label="Sampler",
            info="ddpm, the paper's, needs many steps; the others need 20. Paint always has ddpm.",
        ),
        number(20, label="Steps", info="From noise to the image; empty: all timesteps."),
        gr.Slider(
            1,
            3,
            1,
            step=0.25,
            label="Guidance",
            info="Above 1: away from the run's own early weights. This adds network calls.",
        ),
    ]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
