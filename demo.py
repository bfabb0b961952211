"""A page to play with a trained model: `python demo.py` serves it to this machine alone, and prints its address.

Its three tabs draw images, mix two, and make a part of one anew, with the functions of sample.py and so with its very
images. Every click takes the newest checkpoint, so that a run may be training meanwhile, and waits for those before it.
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
from pathlib import Path
from threading import Event

import numpy as np
import torch
from PIL import Image

from data.decode import decode_rgb, fit_mask, fit_square
from data.pixels import to_uint8
from functions.sampling.generation import generate_batches, open_sampler
from functions.sampling.inpainting import inpaint_image
from functions.sampling.interpolation import mixtures, x_0_of
from functions.sampling.options import SAMPLERS, add_model_flags
from functions.support.command_line import EXIT_BAD_INPUT, Parser, plain_errors, plain_sentence
from functions.support.errors import CheckpointError, UserError
from functions.support.pictures import grid_of
from functions.support.processes import SINGLE_PROCESS
from models.unet import UNet

try:
    import gradio as gr
except ImportError:
    print("error: the page wants Gradio: pip install -r requirements-demo.txt", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)

FRAMES = 25  # at most, of images that form
SIDE = 512  # of pictures in the page, in pixels
# Below its label
STYLE = ".image-frame img { width: 100%; height: 100%; object-fit: contain; padding-top: 30px }"
# Of the machine, not of the web
FONTS = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
WORKER = ThreadPoolExecutor(1)  # in which all models run
# Clicks wait for each other, in their order
QUEUED = {"concurrency_limit": 1, "concurrency_id": "model"}


def main() -> None:
    """Read the command line and serve the page until Ctrl-C."""
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    demo = Demo(parser.parse_args())
    try:
        demo.open()
    except CheckpointError as error:
        print(error)  # a model may come later
    with gr.Blocks(title="DDPM", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        page.load(
            in_worker(lambda check: str(demo.open()[0].path)),
            outputs=gr.Textbox(label="The model"),
            **QUEUED,
        )
        drawing, drawn = draw_tab(demo)
        stoppable = [drawing, mix_tab(demo), paint_tab(demo, drawn)]
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
        os._exit(130)  # and no waiting for the worker


def in_worker(work: Callable) -> Callable:
    """Have the worker do `work(check, *inputs)` for Gradio, which ends this on Stop, or when nobody looks any more.

    Samplers call `check` in every step: it then ends the work, and takes news for the page. Errors are sentences there.
    """

    def steps(*inputs: object) -> Iterator[object]:
        latest, left = deque(maxlen=1), Event()

        def check(*step: object, news: object = None) -> None:
            if left.is_set():
                raise InterruptedError
            latest.extend([news] if news else [])

        def job() -> object:
            try:
                return work(check, *inputs)
            except Exception as error:  # which is not passed on, as it holds on to the model
                if text := plain_sentence(error):
                    return gr.Error(html.escape(text), print_exception=False)
                raise

        done = WORKER.submit(job)
        try:
            while not wait([done], timeout=0.2).done:
                yield latest.pop() if latest else gr.skip()
        finally:
            left.set()
        if isinstance(done.result(), gr.Error):
            raise done.result()
        yield done.result()

    return steps


@dataclass(frozen=True)
class Demo:
    """What happens behind the page."""

    args: argparse.Namespace  # which model, on what

    def open(
        self, watch: object = None, seed: int = 0, sampler: str = "ddpm", steps: int | None = None
    ) -> tuple:
        """The newest checkpoint, and its watched `ImageSampler` as sample.py has it with these flags."""
        given = {"seed": seed or 0, "sampler": sampler, "steps": steps, "precision": "float32"}
        saved, image_sampler = open_sampler(
            argparse.Namespace(**vars(self.args), **given), SINGLE_PROCESS, UNet
        )
        return saved, replace(image_sampler, watch=watch)

    def draw(self, check: Callable, seed: int, n: int, sampler: str, steps: int | None) -> tuple:
        """Sample images 0 .. n-1, and show every few steps what the model takes them for."""
        drawn = []  # titles, and uint8 (N, H, W, 3): x_0 on the way, and at last the images

        def watch(k: int, t: int, x: torch.Tensor, x_0: torch.Tensor) -> None:
            check()
            if k % math.ceil(calls / FRAMES) == 0:
                title = f"x_0 as the model sees it after {k + 1} of {calls} network calls, at t = {t + 1}"
                drawn.append((title, to_uint8(x_0).cpu().numpy()))
                check(news=shown(drawn))

        saved, image_sampler = self.open(watch, seed, sampler, steps)
        calls = len(image_sampler.options.times(image_sampler.scheduler)) - 1
        [samples] = generate_batches(image_sampler, [range(n)])
        title = (
            f"sample.py {saved.path} --seed {seed or 0} --n {n} --sampler {sampler} --steps {calls}"
        )
        drawn.append((title, to_uint8(samples.images).numpy()))
        return shown(drawn)

    def mix(
        self, check: Callable, depth: float, share: float, *inputs: object
    ) -> list[Image.Image]:
        """The first image, the mixture and the second: of either the upload, or None, and the number."""
        first, i, second, j, *flags = inputs
        _, image_sampler = self.open(check, *flags)
        fitted = lambda rgb: fit_square(rgb, image_sampler.shape[-1])
        sources = [(n or 0) if rgb is None else fitted(rgb) for rgb, n in ((first, i), (second, j))]
        ends = torch.stack([x_0_of(image_sampler, source) for source in sources])
        t = round(depth * image_sampler.scheduler.timesteps) - 1
        mixture = mixtures(
            image_sampler, sources, ends, t, torch.tensor([share], device=ends.device)
        )
        return [
            *map(Image.fromarray, to_uint8(torch.cat([ends[:1], mixture, ends[1:]])).cpu().numpy())
        ]

    def paint(
        self, check: Callable, rgb: np.ndarray, edit: dict, repeats: int, n: int, *flags: object
    ) -> Image.Image:
        """A grid of the image, what is kept of it, and answers 0 .. n-1; the flags are those of `open`."""
        _, image_sampler = self.open(check, *flags)
        size, painted = image_sampler.shape[-1], [layer[..., 3] > 127 for layer in edit["layers"]]
        anew = fit_mask(np.any(painted, axis=0), size) if painted else np.array(False)
        if rgb is None or anew.all() or not anew.any():
            raise UserError(
                "take an image, and paint over a part of it: neither all of it nor nothing"
            )
        return grid_of(inpaint_image(image_sampler, fit_square(rgb, size), anew, repeats, n, n))

    def read(self, check: Callable, path: str) -> tuple[np.ndarray, Image.Image]:
        """An image file for the model, uint8 (S, S, 3), and how it is shown."""
        image = fit_square(decode_rgb(Path(path).read_bytes()), self.open()[0].image_shape[-1])
        return image, enlarged(image)


def take_drawn(number: int | None, drawn: list) -> tuple[np.ndarray, Image.Image]:
    """An image of those that were drawn last, and how it is shown."""
    there = drawn[-1][1] if drawn else []
    if (number or 0) >= len(there):
        raise gr.Error(
            f"There are {len(there)} images in the tab Draw; the first is number 0.",
            print_exception=False,
        )
    return there[number or 0], enlarged(there[number or 0])


def draw_tab(demo: Demo) -> tuple:
    with gr.Tab("Draw"):
        with gr.Row():
            controls = [
                seed_control(),
                slider(64, 16, "How many", "Images 0 and on of the seed."),
                *sampler_controls(),
            ]
        start = gr.Button("Draw the images", variant="primary")
        picture, drawn = (
            picture_of("The images, and meanwhile what the model takes them for"),
            gr.State([]),
        )
        back = gr.Slider(
            1,
            label="Look back",
            info="Goes through the steps again.",
            step=1,
            precision=0,
            visible=False,
        )
    back.input(
        look_back,
        [back, drawn],
        picture,
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
    )
    return start.click(in_worker(demo.draw), controls, [picture, back, drawn], **QUEUED), drawn


def mix_tab(demo: Demo) -> gr.events.Dependency:
    with gr.Tab("Mix"):
        with gr.Row():
            controls = [seed_control(), *sampler_controls()]
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
            mixture = picture_of("The mixture")
            second, second_picture = source_controls(demo, "second", 1)
    inputs = [depth, share, *first, *second, *controls]
    return start.click(
        in_worker(demo.mix), inputs, [first_picture, mixture, second_picture], **QUEUED
    )


def source_controls(demo: Demo, which: str, i: int) -> tuple[list, gr.Image]:
    """An upload, which is forgotten where a number is chosen, and the number; and where they are shown."""
    with gr.Column():
        source, picture = gr.State(), picture_of(f"The {which} image")
        chosen = number(
            i, f"Number of the {which} image", "Takes one of the seed's; 0 is the first.", least=0
        )
        upload = upload_control()
    chosen.input(lambda: (None, None), None, [source, picture], **QUEUED)
    upload.upload(in_worker(demo.read), upload, [source, picture], **QUEUED)
    return [source, chosen], picture


def paint_tab(demo: Demo, drawn: gr.State) -> gr.events.Dependency:
    with gr.Tab("Paint"):
        with gr.Row():
            seed, count = seed_control(), slider(8, 4, "How many", "Answers to the same question.")
            steps = number(50, "Steps", "From noise to the image; empty for all timesteps.")
            repeats = slider(20, 10, "Repeats", "Network calls a step: 1 leaves seams, 10 none.")
        start = gr.Button("Make what is painted over anew", variant="primary")
        with gr.Row():
            with gr.Column():
                image, brush = (
                    gr.State(),
                    gr.Brush(SIDE // 10, colors=["#ff00ff"], color_mode="fixed"),
                )
                editor = gr.ImageEditor(
                    label="Paint over what is to be made anew",
                    brush=brush,
                    sources=(),
                    height=600,
                    transforms=(),
                    layers=False,
                    canvas_size=(SIDE, SIDE),
                )
                chosen = number(0, "Number of the image", "Takes one of those just drawn.", least=0)
                take, upload = gr.Button("Take the image of this number"), upload_control()
            picture = picture_of("The image, what is kept of it, and the answers")
    take.click(take_drawn, [chosen, drawn], [image, editor], **QUEUED)
    upload.upload(in_worker(demo.read), upload, [image, editor], **QUEUED)
    inputs = [image, editor, repeats, count, seed, gr.State("ddpm"), steps]
    return start.click(in_worker(demo.paint), inputs, picture, **QUEUED)


# What several tabs have
enlarged = lambda image: Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
# Place: from 1
look_back = lambda place, d: gr.update(value=grid_of(d[:place][-1][1]), label=d[:place][-1][0])
shown = lambda d: (
    look_back(len(d), d),
    gr.update(maximum=max(2, len(d)), value=len(d), visible=True),
    d,
)
number = lambda value, label, info, least=None: gr.Number(
    value, label=label, info=info, precision=0, minimum=least
)
slider = lambda most, value, label, info: gr.Slider(
    1, most, value, step=1, precision=0, label=label, info=info
)
seed_control = lambda: number(0, "Seed", "Another seed is other noise: other images.")
sampler_controls = lambda: [
    gr.Radio(
        [*SAMPLERS],
        value="dpm++",
        label="Sampler",
        info="ddpm, the paper's, wants many steps, the others 20.",
    ),
    number(20, "Steps", "Network calls for an image; empty for all timesteps."),
]
upload_control = lambda: gr.UploadButton(
    "Upload an image, which is cropped square", file_types=["image"]
)
picture_of = lambda label: gr.Image(
    label=label, interactive=False, format="png", height=SIDE, buttons=["download"]
)


if __name__ == "__main__":
    with plain_errors():
        main()
