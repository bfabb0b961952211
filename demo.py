"""A page to play with a trained model: `python demo.py` serves it and prints its address.

It serves this machine alone. Its three tabs draw images, mix two, and make a part of one anew, with
the functions of sample.py and so with its very images. Every click takes the newest checkpoint, so
that a run may be training meanwhile, and waits for the clicks before it.
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
from functions.sampling.options import add_model_flags
from functions.support.checkpoint import SavedModel
from functions.support.command_line import (
    EXIT_BAD_INPUT,
    Parser,
    exit_on_user_error,
    plain_sentence,
)
from functions.support.errors import CheckpointError, UserError
from functions.support.pictures import grid_of
from functions.support.processes import SINGLE_PROCESS

try:
    import gradio as gr
except ImportError:
    print("error: the page wants Gradio: pip install -r requirements-demo.txt", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)

# What the page shows, as Gradio's components take it.
Shown = TypeVar("Shown")
# What `in_worker` hands to its work.
Check = Callable[..., None]
# The value of a control: an upload, a number or a choice.
Value = np.ndarray | int | str | None

# At most so many images are drawn.
MOST = 64
# At most so many pictures show how images form.
FRAMES = 25
# Pictures in the page are so many pixels wide and high.
SIDE = 512
# A picture starts below its label, which would cover its upper edge.
STYLE = ".image-frame img { width: 100%; height: 100%; object-fit: contain; padding-top: 30px }"
# The fonts are the machine's own, so that the page asks nothing of the web.
FONTS = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
# All models run in this one thread.
WORKER = ThreadPoolExecutor(1)
# Fields for integers, and sliders for integers from 1 on.
number = partial(gr.Number, precision=0)
slider = partial(gr.Slider, 1, step=1, precision=0)
# The field for the seed.
seed_field = partial(number, 0, label="Seed", info="Another seed is other noise: other images.")
# The button for image files.
upload_button = partial(
    gr.UploadButton, "Upload an image, which is cropped square", file_types=["image"]
)
# The place of a picture, with a button for downloads.
picture_place = partial(
    gr.Image, interactive=False, format="png", height=SIDE, buttons=["download"]
)
# Clicks wait for each other, in their order.
QUEUED = {"concurrency_limit": 1, "concurrency_id": "model"}


def main() -> None:
    """Read the command line and serve the page until Ctrl-C."""
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    demo = Demo(parser.parse_args())
    try:
        demo.open()
    except CheckpointError as error:
        # The page opens all the same, as a model may come later.
        print(error)

    with gr.Blocks(title="DDPM", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        model = gr.Textbox(label="The model")
        # This runs when somebody opens the page, and names the newest checkpoint.
        page.load(in_worker(lambda check: str(demo.open()[0].path)), outputs=model, **QUEUED)

        drawing, drawn = draw_tab(demo)
        stoppable = [drawing, mix_tab(demo), paint_tab(demo, drawn)]
        # A click on Stop runs no function, and ends what the buttons of the tabs have started.
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


def in_worker(work: Callable[..., Shown]) -> Callable[..., Iterator[Shown]]:
    """Return a callback for Gradio that has the worker do `work(check, *inputs)`.

    Samplers call `check` in every step. It takes news for the page, and it ends the work when
    Gradio ends the callback: on Stop, or when nobody looks any more. Errors that a user can mend
    are sentences in the page.
    """

    def callback(*inputs):
        latest = deque(maxlen=1)
        left = Event()

        def check(*step, news=None):
            if left.is_set():
                raise InterruptedError
            if news:
                latest.append(news)

        def job():
            try:
                return work(check, *inputs)
            except Exception as error:
                text = plain_sentence(error)
                if not text:
                    raise
            # Outside of `except` the error itself is gone: it would hold on to the model.
            raise gr.Error(html.escape(text), print_exception=False)

        # While the worker is busy, Gradio gets the latest news five times a second.
        done = WORKER.submit(job)
        try:
            while not wait([done], timeout=0.2).done:
                yield latest.pop() if latest else gr.skip()
        finally:
            # Gradio closes this generator on Stop, and then the next `check` ends the job.
            left.set()
        yield done.result()

    return callback


@dataclass(frozen=True)
class Demo:
    """What happens behind the page.

    `draw`, `mix`, `paint` and `read` run in the worker. It hands them `check` and then the values
    of the controls, and they return what the page shows.
    """

    args: argparse.Namespace  # which model, on what

    def open(
        self,
        watch: Check | None = None,
        seed: int = 0,
        sampler: str = "ddpm",
        steps: int | None = None,
    ) -> tuple[SavedModel, ImageSampler]:
        """Return the newest checkpoint and its `ImageSampler`.

        The sampler calls `watch` in every step. With the same flags sample.py has the same one.
        """
        # An empty field gives None, which means 0 for the seed and all timesteps for the steps.
        args = argparse.Namespace(
            **vars(self.args),
            seed=seed or 0,
            sampler=sampler,
            steps=steps,
            precision="float32",
            batch_size=MOST,
        )
        saved, image_sampler = open_sampler(args, SINGLE_PROCESS)
        return saved, replace(image_sampler, watch=watch)

    def draw(self, check: Check, seed: int, n: int, sampler: str, steps: int | None) -> tuple:
        """Sample images 0 .. n-1, and show every few steps what the model takes them for.

        It runs on a click on "Draw the images", and returns what `shown` does.
        """
        # Titles, and uint8 images (N, H, W, 3): x_0 on the way, and at last the samples.
        drawn = []

        # The sampler calls this in every step; `calls` is known by then.
        def watch(k, t, x, x_0):
            check()
            if k % math.ceil(calls / FRAMES) == 0:
                title = (
                    f"x_0 as the model sees it after {k + 1} of {calls} network calls, "
                    f"at t = {t + 1}"
                )
                drawn.append((title, to_uint8(x_0).cpu().numpy()))
                check(news=shown(drawn))

        saved, image_sampler = self.open(watch, seed, sampler, steps)
        calls = len(image_sampler.times) - 1
        samples = generate(image_sampler, range(n))

        # The last title is the command that draws the same images.
        flags = f"--seed {seed or 0} --n {n} --sampler {sampler} --steps {calls}"
        drawn.append((f"sample.py {saved.path} {flags}", to_uint8(samples.images).numpy()))
        return shown(drawn)

    def mix(self, check: Check, depth: float, share: float, *inputs: Value) -> list[np.ndarray]:
        """Return the first image, the mixture and the second.

        It runs on a click on "Mix the two images". `inputs` are the upload, or None, and the number
        of either image, and then the flags of `open`.
        """
        first, first_number, second, second_number, *flags = inputs
        _, image_sampler = self.open(check, *flags)

        # A source is an upload, fitted to the model, or else the number of an image of the seed.
        sources = []
        for rgb, i in ((first, first_number), (second, second_number)):
            source = i or 0
            if rgb is not None:
                source = fit_square(rgb, image_sampler.shape[-1])
            sources.append(source)

        # Both images are noised to timestep t. At depth 0 it is -1, and they stay as they are.
        ends = torch.stack([source_to_x_0(image_sampler, source) for source in sources])
        t = round(depth * image_sampler.scheduler.timesteps) - 1
        weights = torch.tensor([share], device=ends.device)
        mixture = mixtures(image_sampler, sources, ends, t, weights)
        images = to_uint8(torch.cat([ends[:1], mixture, ends[1:]])).cpu().numpy()
        return list(images)

    def paint(
        self, check: Check, rgb: np.ndarray, edit: dict, repeats: int, n: int, *flags: Value
    ) -> Image.Image:
        """Return a grid of the image, what is kept of it, and answers 0 .. n-1.

        It runs on a click on "Make what is painted over anew". The flags are those of `open`.
        """
        _, image_sampler = self.open(check, *flags)
        size = image_sampler.shape[-1]

        # The editor's layers are RGBA; what is painted over is opaque.
        painted = [layer[..., 3] > 127 for layer in edit["layers"]]
        mask = fit_mask(np.any(painted, axis=0), size) if painted else np.array(False)
        if rgb is None or mask.all() or not mask.any():
            raise UserError(
                "take an image, and paint over a part of it: neither all of it nor nothing"
            )
        return grid_of(inpaint_image(image_sampler, fit_square(rgb, size), mask, repeats, n))

    def read(self, check: Check, path: str) -> tuple[np.ndarray, Image.Image]:
        """Return an image file for the model, uint8 (S, S, 3), and how the page shows it.

        It runs when a file is uploaded.
        """
        saved, _ = self.open()
        image = read_image(path, saved.model.image_size, fit=True)
        return image, enlarged(image)


def draw_tab(demo: Demo) -> tuple:
    """Build the tab Draw. Return the event that Stop cancels, and the state with what was drawn."""
    with gr.Tab("Draw"):
        with gr.Row():
            controls = [
                seed_field(),
                slider(MOST, 16, label="How many", info="Images 0 and on of the seed."),
                *sampler_controls(),
            ]
        start = gr.Button("Draw the images", variant="primary")
        picture = picture_place(label="The images, and meanwhile what the model takes them for")
        drawn = gr.State([])
        back = slider(label="Look back", info="Goes through the steps again.", visible=False)

    # This runs when the slider is moved, and does not wait for the worker. Of several moves in a
    # row the last counts.
    back.input(
        look_back,
        [back, drawn],
        picture,
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
    )
    # This runs when the button is clicked.
    drawing = start.click(in_worker(demo.draw), controls, [picture, back, drawn], **QUEUED)
    return drawing, drawn


def look_back(place: int, drawn: list) -> dict:
    """Show the images of a step again, by its place in `drawn`, from 1.

    It runs when the slider "Look back" is moved.
    """
    # The slider goes to 2 at least, so its place can be beyond the last.
    title, images = drawn[:place][-1]
    return gr.update(value=grid_of(images), label=title)


def shown(drawn: list) -> tuple:
    """Return what the tab Draw shows: the last images, the slider at its end, and the state."""
    last = len(drawn)
    slider_at_last = gr.update(maximum=max(2, last), value=last, visible=True)
    return look_back(last, drawn), slider_at_last, drawn


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
            mixture = picture_place(label="The mixture")
            second, second_picture = source_controls(demo, "second", 1)

    # This runs when the button is clicked.
    inputs = [depth, share, *first, *second, *controls]
    pictures = [first_picture, mixture, second_picture]
    return start.click(in_worker(demo.mix), inputs, pictures, **QUEUED)


def source_controls(demo: Demo, which: str, i: int) -> tuple[list, gr.Image]:
    """Build the column of an image to mix. Return its inputs and its picture.

    The inputs are the state with an upload, which is None without one, and the number.
    """
    with gr.Column():
        source = gr.State()
        picture = picture_place(label=f"The {which} image")
        chosen = number(
            i,
            label=f"Number of the {which} image",
            info="Takes one of the seed's; 0 is the first.",
            minimum=0,
        )
        upload = upload_button()

    # This runs when a number is typed, and forgets the upload.
    chosen.input(lambda: (None, None), None, [source, picture], **QUEUED)
    # This runs when a file is uploaded, and shows it.
    upload.upload(in_worker(demo.read), upload, [source, picture], **QUEUED)
    return [source, chosen], picture


def paint_tab(demo: Demo, drawn: gr.State) -> gr.events.Dependency:
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
                chosen = number(
                    0,
                    label="Number of the image",
                    info="Takes one of those just drawn.",
                    minimum=0,
                )
                take = gr.Button("Take the image of this number")
                upload = upload_button()
            picture = picture_place(label="The image, what is kept of it, and the answers")

    # This runs when the button for an image of the tab Draw is clicked.
    take.click(take_drawn, [chosen, drawn], [image, editor], **QUEUED)
    # This runs when a file is uploaded.
    upload.upload(in_worker(demo.read), upload, [image, editor], **QUEUED)

    # This runs when the button is clicked. RePaint wants the sampler ddpm.
    inputs = [image, editor, repeats, count, seed, gr.State("ddpm"), steps]
    return start.click(in_worker(demo.paint), inputs, picture, **QUEUED)


def take_drawn(i: int | None, drawn: list) -> tuple[np.ndarray, Image.Image]:
    """Return image i of those that were drawn last, and how the page shows it.

    It runs on a click on "Take the image of this number".
    """
    images = drawn[-1][1] if drawn else []
    # An empty field gives None, which means the first image.
    i = i or 0
    if i >= len(images):
        raise gr.Error(
            f"There are {len(images)} images in the tab Draw; the first is number 0.",
            print_exception=False,
        )
    return images[i], enlarged(images[i])


def enlarged(image: np.ndarray) -> Image.Image:
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
