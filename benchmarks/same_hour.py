"""Train our presets, diffusers and lucidrains on the same photos for the same CPU time.

    python benchmarks/same_hour.py DATA [--minutes 40] [--seed 0] [--at-once 2] [--out same_hour]

DATA is FFHQ, or a path, of some thousand images: the steps are whole epochs. Each program trains on
its training images, at 32 px, on the CPU, in a process of its own and with one thread. After an
eighth, a quarter, a half and all of the time it draws 400 samples by a sampler of 20 calls that it
ships. Their distance from the training images (as `evaluate.py distance`), and that of as many
held-out images, go to OUT/distances.json and OUT/same_hour.png, and the samples to OUT, too. The
time is CPU time of training from the first step on: that of child processes counts, and the clock
stands while samples are drawn. Two programs train at once, on a core each. A program that is in
distances.json is not trained again. NOTES.md names the packages; Linux alone counts child
processes. docs/speed.md shows and explains a run.
"""

import json
import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

# PyTorch reads this when it is imported, in the processes of the programs, too.
os.environ["OMP_NUM_THREADS"] = "1"
# So does accelerate, by which diffusers and lucidrains train. It would take a GPU.
os.environ["ACCELERATE_USE_CPU"] = "true"

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from torch.nn.functional import mse_loss

# Python looks for modules in this script's folder, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from benchmarks.compare import build_diffusers
from config import EXPERIMENTS
from data.datasets import load_images, split_images
from data.pixels import to_model_range, to_uint8
from functions.evaluation.bits_per_dim import evenly_spaced
from functions.evaluation.fidelity import Features, frechet_distance, training_features
from functions.sampling.generation import Drawing, generate
from functions.sampling.models import Models
from functions.sampling.settings import DrawingConfig
from functions.support.command_line import Parser, run_script
from functions.support.device import choose_precision
from functions.support.errors import UserError
from functions.support.files import write_text
from functions.support.pictures import save_figure, save_image
from functions.training.recorder import Recorder

# The network of `faces`; those of the others have its width.
MODEL = EXPERIMENTS["faces"].model
SIZE = MODEL.image_size
BATCH = 16
CALLS = 20
SAMPLES = 400
# Samples are drawn after these parts of the time.
PARTS = (1 / 8, 1 / 4, 1 / 2, 1)
# An epoch is timed beforehand, after these steps.
WARM_UP_STEPS = 5
# The figure shows so many samples of each program.
SHOWN = 12
# The rate of `faces-v`, for Adam, and whether its precision is bfloat16 on this CPU.
OUR_RATE = 1e-3
OUR_BFLOAT16 = choose_precision("auto", torch.device("cpu")) == torch.bfloat16
# A hue for each project.
HUES = {"ours": "tab:blue", "diffusers": "tab:orange", "lucidrains": "tab:green"}

Value = TypeVar("Value")
# It returns the first n samples of seed 0, uint8 (n, H, W, C).
Draw = Callable[[int], np.ndarray]
# A program calls it after each step, with the number of steps done.
AfterStep = Callable[[int, Draw], None]
# (data set, folder of its training images as PNG files, steps, seed, after_step)
Program = Callable[[str, Path, int, int, AfterStep], None]


def train_ours(
    name: str, data: str, photos: Path, steps: int, seed: int, after_step: AfterStep
) -> None:
    """Train a preset with the network of `faces`, by train.py."""

    class Reporter(Recorder):
        """A Recorder that reports the steps."""

        def after_step(self, *step):
            # The validation, the grid and the checkpoint of the last step come after it.
            after_step(self.run.step + 1, self.draw)
            return super().after_step(*step)

        def draw(self, n):
            models = Models(self.run.sample_denoiser, MODEL.image_shape, self.run.device)
            config = DrawingConfig(model=name, sampler="dpm++", steps=CALLS, batch_size=BATCH)
            with self.run.sample_denoiser.evaluating():
                return to_uint8(generate(Drawing(models, config), range(n)))

    flags = {
        "diffusion.dataset-name": data,
        "diffusion.seed": seed,
        "diffusion.epochs": steps // steps_of_epoch(photos),
        # They are due after the last step alone.
        "diffusion.validate-every": steps,
        "diffusion.sample-every": steps,
        "diffusion.checkpoint-every": steps,
        "diffusion.snapshot-every": 0,
        "model.image-size": SIZE,
        "model.lowest-resolution-size": MODEL.lowest_resolution_size,
        "model.dim-multiply": MODEL.dim_multiply,
        "model.transformer-layers": MODEL.transformer_layers,
        "model.base-dim": MODEL.base_dim,
        "model.norm-groups": MODEL.norm_groups,
        "runs": photos.parent / "runs",
        "device": "cpu",
    }
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    command_line = mock.patch.object(sys, "argv", ["train.py", name, *words])
    with command_line, mock.patch.object(train, "Recorder", Reporter):
        train.main()


def train_diffusers(
    rate: float,
    precision: str,
    data: str,
    photos: Path,
    steps: int,
    seed: int,
    after_step: AfterStep,
) -> None:
    """Train as examples/unconditional_image_generation of diffusers does, with its defaults."""
    import diffusers
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(seed)
    accelerator = Accelerator(mixed_precision=precision)
    # The widths and the details are ours; the script's own network has 114 M parameters.
    model = build_diffusers(MODEL)
    schedule = diffusers.DDPMScheduler(1000)
    # The rest are the defaults of the script's flags, with --use_ema and --random_flip, as in the
    # commands of its README.
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, betas=(0.95, 0.999), eps=1e-8, weight_decay=1e-6
    )
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=steps)
    average = EMAModel(
        model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4
    )
    model, optimizer, rates = accelerator.prepare(model, optimizer, rates)
    # Of its DPM-Solver++, the form with fresh noise is the better one in few steps. Its steps are
    # even in log-SNR, and x_0 is clipped to [-1, 1], as DDPMScheduler does.
    sampler = diffusers.DPMSolverMultistepScheduler.from_config(
        schedule.config, algorithm_type="sde-dpmsolver++", use_lu_lambdas=True, thresholding=True
    )

    @torch.no_grad()
    def draw(n):
        # The averaged weights take the place of the others while samples are drawn.
        average.store(model.parameters())
        average.copy_to(model.parameters())
        model.eval()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, *MODEL.image_shape, generator=generator)
        sampler.set_timesteps(CALLS)
        for t in sampler.timesteps:
            eps = torch.cat([model(part, t).sample.float() for part in x.split(BATCH)])
            x = sampler.step(eps, t, x, generator=generator).prev_sample
        average.restore(model.parameters())
        model.train()
        return to_uint8(x.clamp(-1, 1))

    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(photos.iterdir())])
    images = to_model_range(pixels)
    for step in range(steps):
        # Each epoch has its own order, and its last, smaller batch is dropped.
        if step % (len(images) // BATCH) == 0:
            batches = iter(torch.randperm(len(images)).split(BATCH))
        x_0 = images[next(batches)]
        x_0 = torch.where(torch.rand(len(x_0), 1, 1, 1) < 0.5, x_0.flip(3), x_0)
        noise = torch.randn_like(x_0)
        t = torch.randint(1000, (len(x_0),))
        eps = model(schedule.add_noise(x_0, noise, t), t).sample
        accelerator.backward(mse_loss(eps, noise))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        after_step(step + 1, draw)


def train_lucidrains(
    changes: dict, data: str, photos: Path, steps: int, seed: int, after_step: AfterStep
) -> None:
    """Train by the Trainer of denoising-diffusion-pytorch, with its defaults but for `changes`."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    torch.manual_seed(seed)
    # Width and multipliers are ours. Blocks, attention, objective and betas are the package's.
    network = Unet(dim=MODEL.base_dim, dim_mults=MODEL.dim_multiply)
    trainer = Trainer(
        GaussianDiffusion(network, image_size=SIZE, sampling_timesteps=CALLS),
        photos,
        train_num_steps=steps,
        # It never samples by itself.
        save_and_sample_every=2 * steps,
        calculate_fid=False,
        results_folder=photos.parent / "lucidrains",
        **changes,
    )
    model = trainer.ema.ema_model
    update = trainer.ema.update

    @torch.random.fork_rng()
    def draw(n):
        model.eval()
        torch.manual_seed(0)
        samples = torch.cat([model.sample(batch_size=BATCH) for _ in range(0, n, BATCH)])[:n]
        return to_uint8(2 * samples - 1)

    def update_and_report():
        update()
        after_step(trainer.step, draw)

    # The trainer updates its average after each step.
    trainer.ema.update = update_and_report
    trainer.train()


# The programs, by the names in the figure. Those with "our settings" have our rate, batch and
# precision, and all else as shipped.
PROGRAMS: dict[str, Program] = {
    "ours, faces": partial(train_ours, "faces"),
    "ours, faces-v": partial(train_ours, "faces-v"),
    "ours, ffhq-64 at 32 px": partial(train_ours, "ffhq-64"),
    "diffusers": partial(train_diffusers, 1e-4, "no"),
    "diffusers, our settings": partial(train_diffusers, OUR_RATE, "bf16" if OUR_BFLOAT16 else "no"),
    "lucidrains": partial(train_lucidrains, {}),
    "lucidrains, our settings": partial(
        train_lucidrains,
        {"train_lr": OUR_RATE, "amp": OUR_BFLOAT16, "mixed_precision_type": "bf16"},
    ),
}


def steps_of_epoch(photos: Path) -> int:
    """Return the number of batches in the folder of training images, the rest dropped."""
    return len(list(photos.iterdir())) // BATCH


class Timed(Exception):
    """The steps that are timed beforehand are done."""


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its child processes, dead or alive."""
    process = psutil.Process()
    times = [
        process.cpu_times(),
        *(child.cpu_times() for child in process.children(recursive=True)),
    ]
    return sum(
        time.user + time.system + time.children_user + time.children_system for time in times
    )


def seconds_of_step(name: str, data: str, photos: Path, seed: int) -> float:
    """Return the CPU seconds of a step of a program: the mean of an epoch's."""
    epoch = steps_of_epoch(photos)
    times = []

    def after_step(step, draw):
        if step in (WARM_UP_STEPS, WARM_UP_STEPS + epoch):
            times.append(cpu_seconds())
        if len(times) == 2:
            raise Timed

    with suppress(Timed):
        PROGRAMS[name](data, photos, epoch * (WARM_UP_STEPS + 1), seed, after_step)
    return (times[1] - times[0]) / epoch


def draw_on_the_way(
    name: str, data: str, photos: Path, steps: int, seed: int, count: int
) -> list[float]:
    """Train a program in this process, and write `count` samples at each of PARTS.

    Return the CPU minutes of these steps, from the end of the first step on.
    """
    minutes = []
    marks = {round(part * steps) for part in PARTS}
    start = 0.0

    def after_step(step, draw):
        # The first step imports and allocates. Drawing moves the start, so that it takes no time.
        nonlocal start
        if step == 1:
            start = cpu_seconds()
        if step in marks:
            stopped = cpu_seconds()
            np.save(samples_path(photos.parent, name, len(minutes)), draw(count))
            minutes.append((stopped - start) / 60)
            start += cpu_seconds() - stopped

    PROGRAMS[name](data, photos, steps, seed, after_step)
    if len(minutes) < len(PARTS):
        raise RuntimeError(f"{name} has made fewer than {steps} steps")
    return minutes


def samples_path(out: Path, name: str, part: int) -> Path:
    """Return the path of the samples of a program, uint8 (N, H, W, C), at a place of PARTS."""
    return out / f"{name}-{part}.npy"


def start_processes_as_scripts_do() -> None:
    """Start processes in the platform's way again: a spawned process would spawn its own, too.

    A spawned worker imports PyTorch anew, and lucidrains' Trainer starts new ones in every epoch.
    """
    multiprocessing.set_start_method(None, force=True)


def in_process(work: Callable[..., Value], *arguments: Any) -> Value:
    """Return `work(*arguments)`, called in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, start_processes_as_scripts_do) as pool:
        return pool.submit(work, *arguments).result()


def train_and_draw(
    name: str, data: str, photos: Path, minutes: float, seed: int, count: int
) -> tuple[int, list[float]]:
    """Train a program for about so many CPU minutes. Return its steps and the minutes at PARTS."""
    seconds = in_process(seconds_of_step, name, data, photos, seed)
    # The rate of a program falls over its steps, so their number is set beforehand.
    epoch = steps_of_epoch(photos)
    steps = max(1, round(60 * minutes / seconds / epoch)) * epoch
    print(f"{name}: {steps:,} steps of {seconds:.2f} CPU-seconds", flush=True)
    return steps, in_process(draw_on_the_way, name, data, photos, steps, seed, count)


def distance(features: Features, pixels: np.ndarray) -> float:
    """Return the distance of images, uint8 (N, H, W, C), from the training images."""
    return frechet_distance(features([to_model_range(pixels)]))


def plot(results: dict, out: Path) -> None:
    """Draw the distances over CPU minutes, above the first samples of each program at the end."""
    names = [name for name in PROGRAMS if name in results["programs"]]
    figure = Figure(figsize=(10, 5 + 0.7 * len(names)))
    # The upper part has the curves, and the lower one the samples.
    curves, samples = figure.subplots(2, 1, height_ratios=(5, 0.7 * len(names)))
    rows = []
    labels = []
    for place, name in enumerate(names):
        facts = results["programs"][name]
        project = name.partition(",")[0]
        style = {"color": HUES[project], "linestyle": "--" if "settings" in name else "-"}
        # The lines of a project differ by their markers.
        curves.plot(facts["minutes"], facts["distances"], "osD^vPX"[place], label=name, **style)
        images = np.load(samples_path(out, name, len(PARTS) - 1))[:SHOWN]
        rows.append(np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255))
        labels.append(f"{name}\n{facts['distances'][-1]:.2f}")
    curves.axhline(results["held out"], color="black", linestyle=":", label="held-out photos")
    ticks = [part * results["settings"]["minutes"] for part in PARTS]
    curves.set(xscale="log", yscale="log", xlabel="CPU minutes of training")
    curves.set_ylabel("distance from the training photos\n(lower is better)")
    curves.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    curves.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    curves.yaxis.set_major_formatter("{x:g}")
    curves.minorticks_off()
    curves.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

    # (rows, SHOWN, H, W, C) -> (rows H, SHOWN W, C)
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    samples.imshow(grid, interpolation="bicubic")
    samples.set_xticks([])
    samples.set_yticks(len(rows[0][0]) * (np.arange(len(rows)) + 0.5), labels, fontsize=8)
    samples.tick_params(length=0)
    samples.spines[:].set_visible(False)
    figure.tight_layout()
    save_figure(figure, out / "same_hour.png")


def main() -> None:
    """Train the programs that are not in distances.json yet, and draw the figure."""
    parser = Parser(description=__doc__)
    parser.add_argument("data", metavar="DATA", help="FFHQ, or the path of a data set.")
    parser.add_argument(
        "--minutes", type=float, default=40, help="CPU minutes of training. Default: %(default)s."
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="The seed of weights and training; samples always have seed 0. Default: %(default)s.",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=2,
        help="How many programs train at the same time, a core each. Default: %(default)s.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("same_hour"), help="A folder. Default: %(default)s."
    )
    args = parser.parse_args()

    image_set = load_images(args.data, SIZE)
    split = split_images(image_set, "reference")
    held_out = evenly_spaced(split.val_indices, SAMPLES)
    # Only distances of equal numbers can be compared.
    count = len(held_out)
    ids_hash = split.hashes["train_ids_hash"]
    settings = {"minutes": args.minutes, "seed": args.seed, "images": ids_hash}
    path = args.out / "distances.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if results.setdefault("settings", settings) != settings:
        raise UserError(f"{path} has results of {results['settings']}; choose another --out")
    features = training_features(image_set, split)
    results["held out"] = distance(features, image_set.images[held_out])
    programs = results.setdefault("programs", {})

    photos = args.out / "photos"
    shutil.rmtree(photos, ignore_errors=True)
    photos.mkdir(parents=True)
    # The others read the same pixels from files.
    for i in split.train_indices:
        save_image(image_set.images[i], photos / f"{i:05d}.png")

    with ThreadPoolExecutor(args.at_once) as threads:
        arguments = (args.data, photos, args.minutes, args.seed, count)
        futures = {
            threads.submit(train_and_draw, name, *arguments): name
            for name in PROGRAMS
            if name not in programs
        }
        try:
            for future in as_completed(futures):
                name = futures[future]
                # The others' hours are not lost with a program that fails.
                if future.exception():
                    traceback.print_exception(future.exception())
                    continue
                steps, minutes = future.result()
                paths = [samples_path(args.out, name, part) for part in range(len(PARTS))]
                distances = [distance(features, np.load(samples)) for samples in paths]
                programs[name] = {"steps": steps, "minutes": minutes, "distances": distances}
                write_text(path, json.dumps(results, indent=2))
                print(f"{name}: {programs[name]}", flush=True)
        except KeyboardInterrupt:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    missing = [name for name in PROGRAMS if name not in programs]
    if missing:
        raise UserError(f"no results of {', '.join(missing)}; the same command trains them again")
    plot(results, args.out)


if __name__ == "__main__":
    run_script(main)
