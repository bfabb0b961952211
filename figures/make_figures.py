"""Make every picture of README and docs/ffhq.md from real runs: `python figures/make_figures.py [RUN]`.

RUN is a run folder of the `faces` experiment; the newest one when left out. What rotation costs in fine detail is a
matter of photos: `--photos SOURCE`, any copy of FFHQ, draws that figure too (curves only, no photo).
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the repository's modules are found from any folder

from config import EXPERIMENTS, ModelConfig  # noqa: E402
from data.datasets import images_of_run, load_images  # noqa: E402
from data.pixels import to_model_range, to_uint8  # noqa: E402
from figures.rotation_figures import draw_rotation, draw_rotation_spectrum  # noqa: E402
from figures.sampling_figures import draw_sampling  # noqa: E402
from functions.noise_scheduler import NoiseScheduler  # noqa: E402
from functions.sampling.generation import ImageSampler, frame_steps, generate, rebuild  # noqa: E402
from functions.sampling.options import SamplerOptions  # noqa: E402
from functions.support.checkpoint import load_weights  # noqa: E402
from functions.support.command_line import Parser, plain_errors  # noqa: E402
from functions.support.device import choose_device  # noqa: E402
from functions.support.pictures import plt, save_figure, save_gif, save_grid, save_strip  # noqa: E402
from functions.support.random_numbers import generator_of  # noqa: E402
from functions.support.run_folder import find_checkpoints, newest_checkpoints  # noqa: E402
from functions.training.metrics import plot_losses  # noqa: E402
from models.blocks import sinusoidal_embedding  # noqa: E402
from models.unet import UNet  # noqa: E402

FIGURES = Path(__file__).resolve().parent
SCHEDULES = {
    "T = 1000": NoiseScheduler(1000),
    "T = 200, rescaled": NoiseScheduler(200),
    "T = 200, betas as for 1000": NoiseScheduler(200, rescale_betas=False),
}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "run", nargs="?", type=Path, help="a run folder; the newest `faces` run when left out"
    )
    parser.add_argument(
        "--photos",
        metavar="SOURCE",
        help="also draw what rotation costs in detail, from these images",
    )
    args = parser.parse_args()
    checkpoint, *_ = (
        find_checkpoints(args.run) if args.run else newest_checkpoints(ROOT / "runs", "faces")
    )
    draw_cumulative_noise()
    draw_schedules()
    draw_time_embedding()
    draw_unet()
    draw_rotation(FIGURES)
    if args.photos:
        draw_rotation_spectrum(args.photos, FIGURES)
    draw_run(checkpoint)
    with tempfile.TemporaryDirectory() as temporary:
        draw_sampling(checkpoint, FIGURES, 32, Path(temporary))


def draw_cumulative_noise() -> None:
    """One image at t = 0, 66, 132 and 200 of 200 steps, by q(x_t | x_0) at once, for both schedules of T = 200."""
    image_set = load_images("emoji_faces", 64)
    image = image_set.images[500]
    x_0 = to_model_range(torch.from_numpy(np.array(image))[None])
    noise = torch.randn(x_0.shape, generator=generator_of("cpu", 0, "figure"))
    times = (0, 66, 132, 200)
    figure, axes = plt.subplots(2, len(times), figsize=(7, 3.9))
    for row, name in zip(axes, list(SCHEDULES)[:0:-1], strict=True):
        for axis, t in zip(row, times, strict=True):
            # Paper's t = 0: no noise
            x_t = SCHEDULES[name].q_sample(x_0, t - 1, noise) if t else x_0
            axis.imshow(to_uint8(x_t)[0].numpy(), interpolation="bicubic")
            axis.set(xticks=[], yticks=[], title=f"t = {t}")
        row[0].set_ylabel(name.replace(", ", ",\n"), fontsize=9)
    figure.tight_layout()
    save_figure(figure, FIGURES / "cumulative_noise.png")


def draw_schedules() -> None:
    """alpha_bar and the signal-to-noise ratio over t / T."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, scheduler in SCHEDULES.items():
        alpha_bar = scheduler.alphas_cumprod.numpy()
        t = np.arange(1, scheduler.timesteps + 1) / scheduler.timesteps
        style = "--" if "rescaled" in name else "-"
        left.plot(t, alpha_bar, style, label=name)
        right.plot(
            t,
            alpha_bar / (1 - alpha_bar),
            style,
            label=f"{name}: {scheduler.terminal_snr:.2g} at T",
        )
    left.set(xlabel="t / T", ylabel=r"$\bar\alpha_t$, share of the image's variance left")
    right.set(xlabel="t / T", ylabel="signal-to-noise ratio", yscale="log")
    for axis in (left, right):
        axis.grid(color="0.92")
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save_figure(figure, FIGURES / "schedule.png")


def draw_time_embedding() -> None:
    """The sinusoidal embedding of all 1000 timesteps, for base_dim 64."""
    embedding = sinusoidal_embedding(torch.arange(1000), 64).numpy()
    figure, axes = plt.subplots(2, 1, figsize=(7, 3.4), sharex=True)
    for axis, name, half in zip(axes, ("sin", "cos"), np.split(embedding, 2, axis=1), strict=True):
        picture = axis.imshow(
            half.T, aspect="auto", cmap="RdBu", interpolation="nearest", vmin=-1, vmax=1
        )
        axis.set(ylabel=f"{name}\nfrequency", yticks=[0, 31], yticklabels=["1", "1e-4"])
    axes[1].set_xlabel("timestep t")
    figure.tight_layout()
    figure.colorbar(picture, ax=axes, ticks=[-1, 0, 1])
    save_figure(figure, FIGURES / "time_embedding.png")


def draw_unet() -> None:
    """The network of `ffhq-run2`, from the shapes of a real forward pass: a bar a block, as high as its image."""
    model_config: ModelConfig = EXPERIMENTS["ffhq-run2"].model
    with torch.device("meta"):  # shapes without memory or time
        model = UNet(**vars(model_config))
    blocks = []  # (channels, resolution, attention?) in the order of the forward pass

    def record(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        kind = type(module).__name__
        if kind == "ResidualBlock":
            blocks.append([output.shape[1], output.shape[2], False])
        elif kind == "SelfAttention":
            blocks[-1][2] = True

    for module in model.modules():
        module.register_forward_hook(record)
    size = model_config.image_size
    model(
        torch.empty(1, 3, size, size, device="meta"),
        torch.empty(1, dtype=torch.int64, device="meta"),
    )

    figure, axis = plt.subplots(figsize=(10, 4))
    centres = {}
    for i, (channels, resolution, attention) in enumerate(blocks):
        height = np.log2(resolution) - 2
        color = "tab:orange" if attention else "tab:blue"
        axis.bar(
            i, height, 0.8, bottom=-height / 2, color=color, alpha=0.35 + 0.65 * channels / 512
        )
        axis.text(
            i,
            0,
            channels,
            rotation=90,
            ha="center",
            va="center",
            fontsize=8,
            color="white",
            weight="bold",
        )
        centres.setdefault(resolution, []).append(i)
    for resolution, places in centres.items():
        top = (np.log2(resolution) - 2) / 2
        axis.text(places[0], top + 0.12, f"{resolution} x {resolution}", fontsize=8, ha="left")
        axis.annotate(
            "",
            (places[-1] + 0.4, -top - 0.12),
            (places[0] - 0.4, -top - 0.12),
            arrowprops={"arrowstyle": "->", "color": "0.6", "linestyle": "--"},
        )
    axis.bar(0, 0, color="tab:blue", label="residual block (number: its channels)")
    axis.bar(0, 0, color="tab:orange", label="residual block, then self-attention")
    axis.plot([], [], "--", color="0.6", label="skip connections of a level")
    axis.legend(loc="lower center", ncols=3, frameon=False, fontsize=9, bbox_to_anchor=(0.5, -0.12))
    axis.set(xlim=(-1, len(blocks)), ylim=(-3.1, 3.1))
    axis.axis("off")
    figure.tight_layout()
    save_figure(figure, FIGURES / "unet.png")


def draw_run(checkpoint: Path) -> None:
    """Loss curves, sample grid, strip and animation of a run, as `python sample.py` draws them (seed 0)."""
    run, device = checkpoint.parent.parent, choose_device("auto")
    plot_losses(run / "metrics.csv", FIGURES / "losses.png")
    saved = load_weights(checkpoint)
    image_sampler = ImageSampler(
        rebuild(UNet, saved, device), SamplerOptions(), saved.image_shape, 0, device
    )
    timesteps = image_sampler.scheduler.timesteps
    gif_steps, strip_steps = frame_steps(timesteps, 40), frame_steps(timesteps, 9)
    samples = generate(
        image_sampler, range(36), 36, {("x", step) for step in (*gif_steps, *strip_steps)}
    )
    faces = to_uint8(samples.images).numpy()
    save_grid(faces, FIGURES / "faces.png", columns=9)
    image_set, split = images_of_run(saved.config["diffusion"], saved.image_shape[-1])
    neighbours = nearest(faces[:12], image_set.images[split.train_indices])
    save_grid(np.concatenate([faces[:12], neighbours]), FIGURES / "neighbours.png", columns=12)
    save_gif(
        [samples.frames["x", step][:6] for step in gif_steps], FIGURES / "denoising.gif", columns=6
    )
    titles = [f"t = {timesteps - step}" for step in strip_steps]
    save_strip(
        [samples.frames["x", step][:4] for step in strip_steps], titles, FIGURES / "strip.png"
    )


def nearest(images: np.ndarray, training: np.ndarray) -> np.ndarray:
    """For each image the training image, mirrored or not, whose grey levels, standardised, correlate with it most."""

    def shape(pictures: np.ndarray) -> np.ndarray:
        grey = pictures.mean(axis=3).reshape(len(pictures), -1)
        grey = grey - grey.mean(axis=1, keepdims=True)
        return grey / np.linalg.norm(grey, axis=1, keepdims=True)

    both = np.concatenate([training, training[:, :, ::-1]])
    return both[(shape(images) @ shape(both).T).argmax(axis=1)]


if __name__ == "__main__":
    with plain_errors():
        main()
