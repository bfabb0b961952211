"""A page to play with a trained model: `python demo.py` serves it to this machine alone, and prints its address.

Its three tabs draw images, mix two, and make a part of one anew, with the functions of sample.py and so with its very
images. Every click takes the newest checkpoint, so that a run may be training meanwhile, and waits for those before it.
"""

import argparse
import html
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decode import decode_rgb, fit_mask, fit_square
from data.pixels import to_uint8
from functions.sampling.generation import ImageSampler, generate_batches, open_sampler
from functions.sampling.inpainting import inpaint_image
from functions.sampling.interpolation import Source, mixtures, x_0_of
from functions.sampling.options import SAMPLERS, add_model_flags
from functions.support.checkpoint import SavedModel
from functions.support.command_line import Parser, plain_errors, positive
from functions.support.errors import UserError
from functions.support.pictures import grid_of
from functions.support.processes import Processes
from models.unet import UNet

try:
    import gradio as gr
except ImportError:
    sys.exit("error: the page wants Gradio: pip install -r requirements-demo.txt")

FRAMES = 25  # at most, of images that form
SIDE = 512  # of pictures in the page, in pixels
STYLE = ".image-frame img { width: 100%; height: 100%; object-fit: contain; padding-top: 30px }"  # large, below labels
FONTS = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # of the machine, not of the web
PROGRESS = gr.Progress(track_tqdm=True)  # shows the bars of functions/ in the page
enlarged = lambda image: Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
QUEUED = {"concurrency_limit": 1, "concurrency_id": "model"}  # clicks wait for each other
Drawn = list[tuple[str, np.ndarray]]  # titles and uint8 (N, H, W, 3): what the model took the images for; last, they


def main() -> None:
    """Read the command line and serve the page until Ctrl-C."""
    parser = Parser(description=__doc__)
    add_model_flags(parser)
    parser.add_argument("--port", type=positive, default=7860, metavar="N", help="of the address (default: 7860)")
    demo = Demo(args := parser.parse_args())
    demo.open() if args.checkpoint else demo.model()  # a wrong name ends the script; a new run may come later
    with gr.Blocks(title="DDPM", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        page.load(demo.model, outputs=gr.Markdown())
        drawn = draw_tab(demo)
        mix_tab(demo)
        paint_tab(demo, drawn)
    page.queue(max_size=16)
    page.launch(server_name="127.0.0.1", server_port=args.port, share=False, ssr_mode=False, max_file_size="100mb",
                theme=FONTS, css=STYLE, footer_links=[], quiet=True, prevent_thread_lock=True)  # fmt: skip
    print(f"the page is at {page.local_url}; Ctrl-C ends it", flush=True)
    page.block_thread()
    os._exit(130)  # at once, whatever is being sampled: Python's own end would wait for it, or break off its threads


@dataclass(frozen=True)
class Demo:
    """What happens behind the page."""

    args: argparse.Namespace  # which model, on what

    def open(self, seed: int = 0, sampler: str = "ddpm", steps: int | None = None) -> tuple[SavedModel, ImageSampler]:
        """The newest checkpoint, and its sampler as sample.py has it with these flags."""
        flags = argparse.Namespace(**vars(self.args), seed=seed or 0, sampler=sampler, steps=steps)
        return open_sampler(flags, Processes(), UNet)

    def model(self) -> str:
        """Which model it is; or, in the terminal too, the command that makes one."""
        try:
            saved, _ = self.open()
            return f"{saved.path}: {saved}"
        except UserError as error:
            print(error, flush=True)
            return str(error)

    def draw(self, seed: int, n: int, sampler: str, steps: int | None) -> Iterator[tuple]:
        """Sample images 0 .. n-1 in a thread, and show meanwhile what the model takes them for."""
        with in_page():
            saved, image_sampler = self.open(seed, sampler, steps)
            calls = len(image_sampler.options.times(image_sampler.scheduler)) - 1
            drawn, left = [], Event()

            def watch(k: int, t: int, x: Tensor, x_0: Tensor) -> None:
                if left.is_set():
                    raise InterruptedError
                if k % math.ceil(calls / FRAMES) == 0:
                    title = f"The model's x_0 after {k + 1} of {calls} network calls, at t = {t + 1}"
                    drawn.append((title, to_uint8(x_0).cpu().numpy()))

            thread, seen = ThreadPoolExecutor(1), 0
            sampling = thread.submit(lambda: next(generate_batches(image_sampler, [range(n)], watch=watch)))
            try:
                while not wait([sampling], timeout=0.2).done:
                    there = len(drawn)
                    yield look_back(there, drawn) if there > seen else gr.skip(), gr.skip(), gr.skip()
                    seen = there
            finally:  # Gradio ends it where it yields, when nobody looks any more
                left.set()
                thread.shutdown(wait=False)
            title = f"{saved.path.stem}, as of sample.py --seed {seed or 0} --n {n} --sampler {sampler} --steps {calls}"
            drawn.append((title, to_uint8(sampling.result().images).numpy()))
            yield look_back(len(drawn), drawn), gr.Slider(maximum=len(drawn), value=len(drawn)), drawn

    def mix(self, first: Source, second: Source, depth: float, share: float, *flags: object) -> list[Image.Image]:
        """The first image, the mixture and the second; `flags` are those of `open`."""
        with in_page():
            _, image_sampler = self.open(*flags)
            sources = [s if isinstance(s, int) else fit_square(s, image_sampler.shape[-1]) for s in (first, second)]
            ends = torch.stack([x_0_of(image_sampler, source) for source in sources])
            t = round(depth * image_sampler.scheduler.timesteps) - 1
            mixture = mixtures(image_sampler, sources, ends, t, torch.tensor([share], device=ends.device))
            return [*map(Image.fromarray, to_uint8(torch.cat([ends[:1], mixture, ends[1:]])).cpu().numpy())]

    def paint(
        self, image: np.ndarray | None, editor: dict, repeats: int, seed: int, n: int, steps: int, progress=PROGRESS
    ) -> Image.Image:
        """A grid of the image, what is kept of it, and answers 0 .. n-1."""
        with in_page():
            _, image_sampler = self.open(seed, "ddpm", steps)
            size, painted = image_sampler.shape[-1], [layer[..., 3] > 127 for layer in editor["layers"]]
            anew = fit_mask(np.any(painted, axis=0), size) if painted else np.array(False)
            if image is None or anew.all() or not anew.any():
                raise UserError("take an image, and paint over a part of it: neither all of it nor nothing")
            return grid_of(inpaint_image(image_sampler, fit_square(image, size), anew, repeats, n, n))

    def read(self, path: str) -> tuple[np.ndarray, Image.Image]:
        """An image file for the model, uint8 (S, S, 3), and how it is shown."""
        with in_page():
            image = fit_square(decode_rgb(Path(path).read_bytes()), self.open()[0].image_shape[-1])
            return image, enlarged(image)


def take_drawn(number: int | None, drawn: Drawn) -> tuple[np.ndarray, Image.Image]:
    """An image of those that were drawn last, and how it is shown."""
    with in_page():
        there = drawn[-1][1] if drawn else []
        if (number or 0) >= len(there):
            raise UserError(f"there are {len(there)} images in the tab Draw, the first of them number 0")
        return there[number or 0], enlarged(there[number or 0])


def look_back(number: int, drawn: Drawn) -> gr.Image:
    """What was there at this number, from 1; no change before anything was drawn."""
    title, images = drawn[number - 1] if drawn else ("", None)
    return gr.Image(grid_of(images), label=title) if drawn else gr.skip()


@contextmanager
def in_page() -> Iterator[None]:
    """What a user can mend is a sentence in the page."""
    try:
        yield
    except (UserError, OSError) as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def draw_tab(demo: Demo) -> gr.State:
    """Returns what was drawn last."""
    with gr.Tab("Draw"):
        with gr.Row():
            controls = [seed_control(), slider(64, 16, "Number", "How many images are drawn."), *sampler_controls()]
        with gr.Row():
            start, stop = gr.Button("Draw the images", variant="primary"), gr.Button("Stop drawing")
        picture, drawn = picture_control("The images, and meanwhile what the model takes them for"), gr.State([])
        back = slider(2, 1, "Look back", "Goes through the steps again, from noise to images.")
    drawing = start.click(demo.draw, controls, [picture, back, drawn], **QUEUED)
    stop.click(None, cancels=drawing)
    back.input(look_back, [back, drawn], picture, queue=False, show_progress="hidden")
    return drawn


def mix_tab(demo: Demo) -> None:
    with gr.Tab("Mix"):
        with gr.Row():
            controls = [seed_control(), *sampler_controls()]
        with gr.Row():
            depth = gr.Slider(0, 1, 0.75, label="Depth", info="How far into the noise both go; 0 blends pixels.")
            share = gr.Slider(0, 1, 0.5, label="Share", info="How much of the mixture is the second image.")
        start = gr.Button("Mix the two images", variant="primary")
        with gr.Row():
            first, first_picture = source_controls(demo, "first", 0)
            mixture = picture_control("The mixture")
            second, second_picture = source_controls(demo, "second", 1)
    start.click(demo.mix, [first, second, depth, share, *controls], [first_picture, mixture, second_picture], **QUEUED)


def source_controls(demo: Demo, which: str, first: int) -> tuple[gr.State, gr.Image]:
    """An image of the seed or an upload, whichever was chosen last; and where it is shown."""
    with gr.Column():
        source, picture = gr.State(first), picture_control(f"The {which} image")
        chosen = number(first, f"Number of the {which} image", "Takes one of the seed's; 0 is the first.", least=0)
        upload = upload_control()
    chosen.input(lambda number: (number or 0, None), chosen, [source, picture])
    upload.upload(demo.read, upload, [source, picture])
    return source, picture


def paint_tab(demo: Demo, drawn: gr.State) -> None:
    with gr.Tab("Paint"):
        with gr.Row():
            controls = [seed_control(), slider(8, 4, "Number", "How many answers are made.")]
            steps = number(50, "Steps", "From noise to the image.")
            repeats = slider(20, 10, "Repeats", "Network calls a step: 1 leaves seams, 10 none.")
        start = gr.Button("Make what is painted over anew", variant="primary")
        with gr.Row():
            with gr.Column():
                image, brush = gr.State(), gr.Brush(SIDE // 10, colors=["#ff00ff"], color_mode="fixed")
                editor = gr.ImageEditor(label="Paint over what is to be made anew", brush=brush, sources=(), height=600,
                                        transforms=(), layers=False, canvas_size=(SIDE, SIDE))  # fmt: skip
                chosen = number(0, "Number of the image", "Takes one of those just drawn.", least=0)
                take, upload = gr.Button("Take the image of this number"), upload_control()
            picture = picture_control("The image, what is kept of it, and the answers")
    take.click(take_drawn, [chosen, drawn], [image, editor])
    upload.upload(demo.read, upload, [image, editor])
    start.click(demo.paint, [image, editor, repeats, *controls, steps], picture, **QUEUED)


# What several tabs have
number = lambda value, label, info, least=None: gr.Number(value, label=label, info=info, precision=0, minimum=least)
slider = lambda most, value, label, info: gr.Slider(1, most, value, step=1, precision=0, label=label, info=info)
seed_control = lambda: number(0, "Seed", "Another seed is other noise: other images.")
sampler_controls = lambda: [
    gr.Radio([*SAMPLERS], value="dpm++", label="Sampler", info="ddpm is the paper's; dpm++ is good with 20 steps."),
    number(20, "Steps", "Network calls for an image; empty for all timesteps."),
]
upload_control = lambda: gr.UploadButton("Upload an image, which is cropped square", file_types=["image"])
picture_control = lambda label: gr.Image(
    label=label, interactive=False, format="png", height=SIDE, buttons=["download", "fullscreen"]
)


if __name__ == "__main__":
    with plain_errors():
        main()
