"""Draw the pictures of README and docs/ from three real runs, and from the models
in the box.

`python -m figures.make_figures RUN_FACES RUN_PEOPLE RUN_DIGITS`

These are run folders of the experiments `faces`, `ffhq-64` and `mnist`. No photo is needed, and
none is drawn. One is made elsewhere: example.webp, which is example.png of `python example.py` at
a third of its size.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageSequence

from config import EXPERIMENTS
from data.batches import rotate
from data.datasets import load_images
from data.pixels import to_model_range, to_uint8
from figures import saved_model
from figures.saved_model import GUIDE_STEPS, open_saved
from functions.evaluation.training_images import load_and_split
from functions.noise_scheduler import NoiseScheduler
from functions.sampling.generation import Pipeline, generate
from functions.sampling.samples_folder import generate_frames, save_gif
from functions.sampling.settings import PRETRAINED
from functions.sampling.strips import save_columns, save_strip
from functions.saved.run_folder import checkpoints_of, step_of
from functions.support.command_line import run_script
from functions.support.pictures import save_figure, save_grid, save_image
from functions.support.random_numbers import generator_of
from functions.training.metrics import plot_losses
from models.blocks import Downsample, ResidualBlock, SelfAttention, Upsample
from models.networks import build_network

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "figures"
SCHEDULER = NoiseScheduler(1000)  # the paper's

GUIDE = f"--guide {GUIDE_STEPS['ffhq-64']}"
GUIDED = f"{saved_model.GUIDED} {GUIDE}"

# The name of a picture -> a command for the run PEOPLE or the recipes CLEAR and LIKE_PHOTOS, and a
# pattern of the file that it writes. Images are samples of seed 0, by their indices.
COMMANDS = {
    "people.png": ("sample CLEAR", "grid.png"),
    "people_like_photos.png": ("sample LIKE_PHOTOS", "grid.png"),
    "interpolation.png": (
        # At t = T nothing would be left of both ends.
        f"edit interpolate 6 19 PEOPLE {GUIDED} --depths 0.25 0.5 0.75",
        "interpolation-*.png",
    ),
    "variations.png": (f"edit vary 22 PEOPLE {GUIDED}", "variations-*.png"),
    "inpainting.png": (
        f"edit inpaint 26.png PEOPLE --steps 50 {GUIDE} --mask mask.png --n 5",
        "inpainting-*.png",
    ),
}

# Plots stay PNG. All other pictures become WebP, a tenth as large and as good to the eye, because
# each one that is drawn again stays in the history of the repository.
PLOTS = ("schedule.png", "v.png", "unet.png", "losses.png")

# The weights of classifier-free guidance that are compared.
LABEL_WEIGHTS = (1, 3)
# The weights of a guide that are compared: others in between look nearly alike.
WEIGHTS = (1, 2, 3)


def main() -> None:
    """Draw all figures into this folder."""
    parser = ArgumentParser(description=__doc__)
    for name in ("faces", "people", "digits"):
        parser.add_argument(name, type=Path)
    faces, people, digits = map(Path.resolve, vars(parser.parse_args()).values())

    # The runs are read first, so that a missing one ends the script immediately.
    draw_people(people)
    draw_enlarged()
    draw_faces(faces)
    draw_labels(digits)

    draw_cumulative_noise()
    draw_schedule()
    draw_v()
    draw_unet()
    draw_rotation()
    with tempfile.TemporaryDirectory() as temporary:
        draw_commands(people, Path(temporary))
    for path in [*FIGURES.glob("*.png"), *FIGURES.glob("*.gif")]:
        if path.name not in PLOTS:
            lighten(path)


def lighten(path: Path) -> None:
    """Replace a picture or an animation by a WebP."""
    with Image.open(path) as picture:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
        durations = [frame.info.get("duration", 0) for frame in frames]
    first, *others = frames
    first.save(
        path.with_suffix(".webp"),
        save_all=bool(others),
        append_images=others,
        duration=durations,
        loop=0,
        # Noise needs most of the bytes of an animation.
        quality=75 if others else 88,
    )
    path.unlink()


def draw_cumulative_noise() -> None:
    """Draw how `faces` noises an image."""
    image = load_images("emoji_people", 32).images[[300]]
    x_0 = to_model_range(image)
    noise = torch.randn(x_0.shape, generator=generator_of("cpu", 0, "figure"))
    columns = {"t = 0": image}
    for t in (50, 100, 250, 500, 1000):
        # The titles have the paper's t, where t = 0 is the image. Code t is one less.
        columns[f"t = {t}"] = to_uint8(SCHEDULER.q_sample(x_0, t - 1, noise))
    save_strip(columns, FIGURES / "cumulative_noise.png")


def draw_schedule() -> None:
    """Draw alpha_bar over t, with the log-SNR of some t under the axis."""
    figure = Figure(figsize=(5.2, 3.2))
    axis = figure.subplots()
    # The axis has the paper's t, from 1 to T. Code t is one less.
    axis.plot(range(1, SCHEDULER.timesteps + 1), SCHEDULER.alphas_cumprod)
    ticks = (1, 250, 500, 750, SCHEDULER.timesteps)
    axis.set_xticks(ticks, [f"{t}\n{SCHEDULER.log_snr(t - 1):.1f}" for t in ticks])
    axis.set(xlabel="t, and under it the log-SNR", ylabel=r"$\bar\alpha_t$, share of variance left")
    axis.grid(color="0.92")
    save_figure(figure, FIGURES / "schedule.png")


def draw_v() -> None:
    """Draw the quarter circle on which x_t moves from the image to the noise, and v along it."""
    figure = Figure(figsize=(3.6, 3.1))
    axis = figure.subplots()
    angles = np.linspace(0, np.pi / 2, 100)
    axis.plot(np.cos(angles), np.sin(angles), "--", color="0.6")
    cos, sin = np.cos(np.pi / 4), np.sin(np.pi / 4)
    ends = {"$x_0$": (1, 0), r"$\epsilon$": (0, 1), "$x_t$": (cos, sin)}
    for name, end in ends.items():
        axis.annotate("", end, (0, 0), arrowprops={"arrowstyle": "->"})
        axis.annotate(name, end, (6, 3), textcoords="offset points", fontsize=13)
    axis.annotate("", (cos - sin / 2, sin + cos / 2), (cos, sin), arrowprops={"color": "tab:red"})
    axis.text(cos - sin / 2, sin + cos / 2 + 0.03, "$v$", fontsize=13, color="tab:red")
    axis.set(xlim=(-0.05, 1.2), ylim=(-0.05, 1.2), aspect="equal")
    axis.axis("off")
    save_figure(figure, FIGURES / "v.png")


def draw_unet() -> None:
    """Draw the network of `faces`: a bar for each block, whose height shows its resolution."""
    blocks = parts_of_unet()
    places = np.array(sorted(blocks))
    channels, resolutions, attentions = np.array([blocks[place] for place in places]).T
    # Each level halves the resolution, so the logarithm falls in equal steps.
    heights = np.log2(resolutions) - 1
    figure = Figure(figsize=(10, 4.4))
    axis = figure.subplots()

    kinds = ("residual block (number: its channels)", "residual block, then self-attention")
    for attention, kind in enumerate(kinds):
        chosen = attentions == attention
        bars = axis.bar(places[chosen], heights[chosen], bottom=-heights[chosen] / 2, label=kind)
        axis.bar_label(
            bars,
            channels[chosen],
            label_type="center",
            fontsize=8,
            color="white",
            weight="bold",
            rotation=90,
        )

    # A level has blocks on both sides of the U, so a line leads from the first to the last.
    for resolution in np.unique(resolutions):
        level = places[resolutions == resolution]
        edge = (np.log2(resolution) - 1) / 2 + 0.12
        axis.text(level[0] - 0.4, edge + 0.08, f"{resolution} x {resolution}", fontsize=8)
        [line] = axis.plot((level[0] - 0.4, level[-1] + 0.4), (edge, edge), "--", color="0.6")
    line.set_label("skip connections of a level")

    # A place without a block is one where the resolution changes.
    for place in set(range(places[-1])) - blocks.keys():
        sign = "\N{DOWNWARDS ARROW}" if place < places.mean() else "\N{UPWARDS ARROW}"
        axis.text(place, 0, sign, ha="center", va="center", fontsize=12)
    base = -heights.max() / 2 - 0.5
    [line] = axis.plot((-0.4, places[-1] + 0.4), (base, base), color="tab:green")
    line.set_label("time embedding of t, added in every residual block")
    axis.vlines(places, base, -heights / 2, color="tab:green", linewidth=0.8)
    for place, name in ((-1, "$x_t$"), (places[-1] + 1, r"$\epsilon_\theta$")):
        axis.text(place, 0, name, ha="center", va="center")

    figure.legend(loc="lower center", ncols=2, frameon=False, fontsize=9)
    axis.axis("off")
    figure.subplots_adjust(0, 0.11, 1, 1)
    save_figure(figure, FIGURES / "unet.png")


def parts_of_unet() -> dict[int, list]:
    """Return [channels, resolution, attention?] of each residual block of `faces`, by its place.

    Blocks and resamplings are recorded in a real forward pass, so the figure agrees with the
    network. A resampling has a place, too.
    """
    model_config = EXPERIMENTS["faces"].model
    # On the meta device tensors have shapes but no data, so the pass needs no memory or time.
    with torch.device("meta"):
        model = build_network(model_config)
        x_t = torch.empty(1, *model_config.image_shape)
        t = torch.empty(1, dtype=torch.int64)

    # Forward hooks run in the order of the forward pass.
    parts = []

    def record(module, inputs, output):
        if isinstance(module, ResidualBlock):
            parts.append([*output.shape[1:3], False])
        elif isinstance(module, SelfAttention):
            # Attention comes right after the residual block that it belongs to.
            parts[-1][2] = True
        elif isinstance(module, (Downsample, Upsample)):
            parts.append(None)

    for module in model.modules():
        module.register_forward_hook(record)
    model(x_t, t)
    return {place: part for place, part in enumerate(parts) if part}


def draw_rotation() -> None:
    """Draw embedded faces rotated in the usual way, which has black corners, and in ours."""
    images = load_images("emoji_faces", 64).images[[500, 800, 300]]
    x_0 = to_model_range(images)

    pictures = [Image.fromarray(image) for image in images]
    columns = {"original": images}

    # Training draws angles up to 3 degrees. At 10 degrees the corners are easier to see.
    for degrees in (3, 10):
        title = f"{degrees}\N{DEGREE SIGN}"
        usual = [picture.rotate(degrees, Image.Resampling.BICUBIC) for picture in pictures]
        columns[f"{title}, as usual"] = np.stack(usual)

        # Training draws an angle for each image. Here all images have the same angle.
        angle = torch.full((len(images),), float(degrees))
        columns[f"{title}, ours"] = to_uint8(rotate(x_0, angle))
    save_strip(columns, FIGURES / "rotation.png")


def draw_faces(run: Path) -> None:
    """Draw a run's losses, the samples of `python sample.py` with seed 0, and how they form.

    And the training image that is nearest to each of some samples.
    """
    plot_losses(run / "metrics.csv", FIGURES / "losses.png")
    pipeline = open_saved(run)
    images, states, estimates = generate_frames(pipeline, range(36))
    faces = to_uint8(images)
    save_grid(faces, FIGURES / "faces.png", columns=9)
    save_columns(states, FIGURES / "strip.png")
    save_columns(estimates, FIGURES / "progressive.png")

    # Each nearest training image is right below its sample, to show which samples are copies.
    image_set, split = load_and_split(pipeline.models.saved)
    neighbours, _ = nearest(faces[:12], image_set.images[split.train_indices])
    save_grid(np.concatenate([faces[:12], neighbours]), FIGURES / "neighbours.png", columns=12)


def draw_people(run: Path) -> None:
    """Draw a run's samples: how they improve, follow a guide, and form from noise."""
    snapshots = checkpoints_of(run, "snapshots")
    total = step_of(snapshots[-1])
    # These are a quarter of the run, its half and its end.
    chosen = [
        min(snapshots, key=lambda path: abs(step_of(path) - step))
        for step in (total / 4, total / 2, total)
    ]
    rows = [draw_pixels(open_saved(path, GUIDED), 9) for path in chosen]
    save_grid(np.concatenate(rows), FIGURES / "people_by_step.png", columns=9)

    pipeline = open_saved(run, GUIDED)
    rows = []
    for weight in WEIGHTS:
        guided = replace(pipeline, config=replace(pipeline.config, guidance=weight))
        rows.append(draw_pixels(guided, 8))
    columns = {f"sample {i}": images for i, images in enumerate(np.stack(rows, axis=1))}
    save_strip(columns, FIGURES / "guidance.png", [f"w = {weight:g}" for weight in WEIGHTS])

    pipeline = open_saved(run, f"--steps 250 {GUIDE}")
    _, states, _ = generate_frames(pipeline, range(6))
    save_gif(states.values(), FIGURES / "denoising.gif", columns=6)


def draw_enlarged() -> None:
    """Draw one sample of the recipe at each size: as the model leaves it, and each doubling."""
    recipe = open_saved(PRETRAINED, "--device cpu")
    models = recipe.models
    columns = {}
    for count in range(len(models.enlargers) + 1):
        enlargers = models.enlargers[:count]
        pixels = draw_pixels(replace(recipe, models=replace(models, enlargers=enlargers)), 3)
        columns[f"{pixels.shape[1]} px"] = pixels[-1:]
    # Each pixel of a small sample becomes a square, so that all are as large as the last.
    largest = pixels.shape[1]
    for title, image in columns.items():
        times = largest // image.shape[1]
        columns[title] = image.repeat(2 * times, axis=1).repeat(2 * times, axis=2)
    save_strip(columns, FIGURES / "enlarged.png")


def draw_labels(run: Path) -> None:
    """Draw a sample of each label, from the same noise in both rows, with each weight."""
    names = open_saved(run).models.label_names
    flags = f"--sampler dpm++ --steps 20 --label {shlex.join(names)}"
    pipelines = [open_saved(run, f"{flags} --cfg {weight}") for weight in LABEL_WEIGHTS]
    rows = [draw_pixels(pipeline, len(names)) for pipeline in pipelines]
    titles = [f"w = {weight}" for weight in LABEL_WEIGHTS]
    columns = dict(zip(names, np.stack(rows, axis=1), strict=True))
    save_strip(columns, FIGURES / "labels.png", titles)


def draw_pixels(pipeline: Pipeline, count: int) -> np.ndarray:
    """Return the first samples as uint8 images, (count, H, W, C)."""
    return to_uint8(generate(pipeline, range(count)))


def draw_commands(run: Path, temporary: Path) -> None:
    """Run each of COMMANDS in a temporary folder, and copy its picture into this folder."""
    # Inpainting reads its image and the mask from files. White marks what is replaced: the lower
    # half.
    pipeline = open_saved(run, GUIDED)
    [image] = to_uint8(generate(pipeline, [26]))
    save_image(image, temporary / "26.png")
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[len(mask) // 2 :] = 255
    save_image(mask, temporary / "mask.png")

    # Modules are found from any folder.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    like_photos = PRETRAINED.with_name("people-like-photos.toml")
    named = {"PEOPLE": run, "CLEAR": PRETRAINED, "LIKE_PHOTOS": like_photos}
    for figure, (command, pattern) in COMMANDS.items():
        out = temporary / Path(figure).stem
        words = [named.get(word, word) for word in command.split()]
        call = [sys.executable, "-m", *words, "--out", out]
        subprocess.run(call, check=True, cwd=temporary, env=environment)
        [file] = out.glob(pattern)
        shutil.copyfile(file, FIGURES / figure)


def nearest(images: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each image (N, H, W, C) the training image most like it, and their correlation.

    There are M training images (M, H, W, C). The coefficients (N,) are those of grey levels, so
    neither colour nor brightness nor contrast counts.
    """
    # Training flips images, so a sample may be the mirror image of a training image.
    both = np.concatenate([training, training[:, :, ::-1]])
    correlation = standardised(images) @ standardised(both).T
    return both[correlation.argmax(axis=1)], correlation.max(axis=1)


def standardised(images: np.ndarray) -> np.ndarray:
    """Return the grey levels of images (N, H, W, C) with mean 0 and norm 1: (N, H * W) float32."""
    grey = images.mean(axis=3, dtype=np.float32).reshape(len(images), -1)
    grey -= grey.mean(axis=1, keepdims=True)
    grey /= np.linalg.norm(grey, axis=1, keepdims=True)
    return grey


if __name__ == "__main__":
    run_script(main)
