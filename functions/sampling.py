"""From a checkpoint to pictures: what `sample.py` and `sampleFFHQ.py` share, and training's grids use.

The scripts hand in the model's class and the conversion to pixels, so that this module knows neither.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from functions import visualize
from functions.checkpoint import CheckpointError, export_weights, load_into, load_weights
from functions.command_line import positive, share
from functions.device import DTYPES, autocast, choose_device, choose_precision
from functions.draws import ImageNoise
from functions.noise_scheduler import NoiseScheduler
from functions.samplers import ddim_sample, ddpm_sample, trailing_timesteps

GIF_FRAMES = 40
STRIP_COLUMNS = 9
STRIP_ROWS = 6


@dataclass
class Samples:
    """Images x_0 (N, C, H, W) in [-1, 1], and in `frames`, by number of steps, what was kept of all states then."""

    images: Tensor
    frames: dict[int, Tensor] = field(default_factory=dict)


def add_sampling_flags(parser: argparse.ArgumentParser, n: int) -> None:
    """The flags of both scripts; `n` is the default number of images."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        help="a checkpoint, an exported .safetensors, or a run folder; the newest run's when left out",
    )
    parser.add_argument("--n", type=positive, default=n, metavar="N", help=f"how many images ({n})")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on the seed and i alone (0)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images at a time (64)")
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="a fast look with N steps of DDIM; when left out, ancestral sampling over all steps",
    )
    parser.add_argument(
        "--eta",
        type=share,
        default=1.0,
        metavar="X",
        help="of DDIM: 1 adds noise in every step and is safe for any model; 0 is deterministic (1)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where pictures go; samples/ in the run's folder")
    parser.add_argument("--individual", action="store_true", help="also one PNG for each image")
    parser.add_argument("--strip", action="store_true", help="also the denoising of some images, as one figure")
    parser.add_argument("--gif", action="store_true", help="also the grid denoising, as an animated GIF")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE.safetensors",
        help="write the weights (EMA's if there are) and the config there, and draw nothing",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", default="float32", choices=("auto", *DTYPES), help="of the network (float32)")


def rebuild(
    build_model: Callable[..., nn.Module], weights: dict[str, Tensor], config: dict, path: Path, device: torch.device
) -> tuple[nn.Module, NoiseScheduler]:
    """Model and schedule of a checkpoint, from what the checkpoint says alone.

    Raises:
        CheckpointError: its config and its weights do not fit each other.
    """
    try:
        diffusion = config["diffusion"]
        scheduler = NoiseScheduler(
            diffusion["timesteps_diff"], diffusion["beta_start"], diffusion["beta_end"], diffusion["rescale_betas"]
        )
        with torch.device("meta"):  # shapes only: nothing is initialised that is overwritten at once
            model = build_model(**config["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its config does not describe a model of this version: {error}") from error
    load_into(model, weights, path)
    # Without gradients and in float32, channels_last was the faster layout on the CPU too: 3.5 against 4.7 ms an image
    # of the faces network on 2 cores.
    model.to(device, memory_format=torch.channels_last)
    return model.eval().requires_grad_(False), scheduler.to(device)


def generate(
    model: nn.Module,
    scheduler: NoiseScheduler,
    images: Sequence[int],
    shape: Sequence[int],
    seed: int,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    steps: int | None = None,
    eta: float = 1.0,
    frames_after: Sequence[int] = (),
    to_frame: Callable[[Tensor], Tensor] = Tensor.cpu,
    progress: bool = True,
) -> Samples:
    """Draw samples; image i depends on (seed, i) alone, not on the others or on the batch size.

    Args:
        images: the numbers i of the images to draw.
        shape: (C, H, W).
        steps: DDIM with so many network calls; None: ancestral sampling (Algorithm 2) over all T.
        eta: DDIM's. Fresh noise in every step (1) lets later steps correct the errors of earlier ones, which a young
            or small model makes: without it (0) those of the `faces` run grow into wrong colours and speckle.
        frames_after: numbers of steps after which the states are kept; 0 keeps x_T.
        to_frame: what is kept of a state; pixels take a quarter of its memory.
        progress: show a bar over all network calls.

    Returns:
        Everything on the CPU.
    """
    training = model.training
    model.eval()

    def eps_model(x_t: Tensor, t: Tensor) -> Tensor:
        with autocast(device, precision):
            return model(x_t, t).float()

    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    calls = len(batches) * (steps or scheduler.timesteps)
    parts = []
    with tqdm(total=calls, unit="step", desc="sampling", disable=not progress, dynamic_ncols=True) as bar:
        for batch in batches:
            noise = ImageNoise(seed, batch, shape, device)
            x_T = noise.draw()
            part = Samples(x_T, {0: to_frame(x_T)} if 0 in frames_after else {})

            def on_step(k: int, t: int, x: Tensor, x_0: Tensor, part: Samples = part) -> None:
                if k + 1 in frames_after:
                    part.frames[k + 1] = to_frame(x)
                bar.update()

            options = {"step_noise": lambda k, noise=noise: noise.draw(), "on_step": on_step}
            if steps is None:
                part.images = ddpm_sample(eps_model, scheduler, x_T, **options).cpu()
            else:
                part.images = ddim_sample(eps_model, scheduler, x_T, steps, eta, **options).cpu()
            parts.append(part)
    model.train(training)
    frames = {step: torch.cat([part.frames[step] for part in parts]) for step in frames_after}
    return Samples(torch.cat([part.images for part in parts]), frames)


def frame_steps(steps: int, count: int) -> list[int]:
    """`count` numbers of steps from 0 to `steps`, denser at the end, where the image takes shape."""
    shares = [1 - (1 - i / (count - 1)) ** 1.5 for i in range(count)]
    return sorted({round(share * steps) for share in shares})


def sample_to_files(
    args: argparse.Namespace,
    checkpoint: Path,
    build_model: Callable[..., nn.Module],
    to_pixels: Callable[[Tensor], Tensor],
) -> None:
    """What the scripts do with the flags of `add_sampling_flags`.

    Args:
        checkpoint: a checkpoint or an exported file.
        build_model: the model's class; takes the config's `model` fields.
        to_pixels: (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C).

    Raises:
        CheckpointError, DeviceError, SamplingError, OSError: nothing has been drawn then.
    """
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    weights, config, run = load_weights(checkpoint)
    model, scheduler = rebuild(build_model, weights, config, checkpoint, device)
    print(f"{checkpoint}: {run['weights']} weights after {run['step']:,} of {run['total_steps']:,} steps")
    if args.export:
        export_weights(args.export, weights, config, run)
        print(f"wrote {args.export}")
        return

    steps = args.steps or scheduler.timesteps
    trailing_timesteps(scheduler.timesteps, steps)  # refuses numbers of steps that the model does not have
    sampler = f"ddim{steps}-eta{args.eta:g}" if args.steps else "ddpm"
    folder = args.out or run_or_folder_of(checkpoint) / "samples" / f"{checkpoint.stem}-{sampler}-seed{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    gif_steps = frame_steps(steps, GIF_FRAMES) if args.gif else []
    strip_steps = frame_steps(steps, STRIP_COLUMNS) if args.strip else []
    shape = (config["model"]["channels"], config["model"]["image_size"], config["model"]["image_size"])
    samples = generate(
        model, scheduler, range(args.n), shape, args.seed, args.batch_size, device, precision, args.steps,
        args.eta, {*gif_steps, *strip_steps}, lambda x: to_pixels(x).cpu(),
    )  # fmt: skip

    images = to_pixels(samples.images).numpy()
    frames = {step: frame.numpy() for step, frame in samples.frames.items()}
    columns = 5 if args.n == 20 else None  # the reference's grid
    visualize.save_grid(images, folder / "grid.png", columns)
    print(f"wrote {folder / 'grid.png'}")
    if args.gif:
        visualize.save_gif([frames[step] for step in gif_steps], folder / "denoising.gif", columns)
        print(f"wrote {folder / 'denoising.gif'}")
    if args.strip:
        titles = [f"t = {round(scheduler.timesteps * (1 - step / steps))}" for step in strip_steps]
        visualize.save_strip([frames[step][:STRIP_ROWS] for step in strip_steps], titles, folder / "strip.png")
        print(f"wrote {folder / 'strip.png'}")
    if args.individual:
        for i, image in enumerate(images):
            visualize.save_image(image, folder / f"{i:05d}.png")
        print(f"wrote {folder / '00000.png'} .. {args.n - 1:05d}.png")


def run_or_folder_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in; the folder of any other file."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
