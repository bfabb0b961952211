"""Train a DDPM: `python train.py` for faces in minutes, `python train.py ffhq-full` for the real thing.

Algorithm 1 of Ho et al. 2020 with gradient accumulation, mixed precision and EMA. Experiments are in config.py; every
run writes a folder of its own under runs/, laid out as functions/run_folder.py says.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from config import (
    DEFAULT_EXPERIMENT,
    EXPERIMENTS,
    RESUMABLE_FIELDS,
    ConfigError,
    DiffusionConfig,
    Experiment,
    ModelConfig,
)
from data.augmentation import augment
from data.batches import ImageFeeder, micro_batches
from data.datasets import load_images, split_images
from data.pixels import to_model_range, to_uint8
from data.sources import DataError
from functions import run_folder
from functions.checkpoint import CheckpointError, load_checkpoint, restore, save_checkpoint
from functions.command_line import Parser, add_config_flags, given_fields, plain_errors
from functions.device import DeviceError, autocast, choose_device, choose_memory_format, choose_precision
from functions.draws import seed_of, training_draws
from functions.ema import update_ema
from functions.losses import noise_prediction_loss
from functions.memory import process_memory, training_memory
from functions.metrics import MetricsLog, TrainingWindow
from functions.noise_scheduler import NoiseScheduler
from functions.report import describe, describe_memory
from functions.sampling import generate
from functions.stopping import StopSignals, TrainingError, stop_unless_finite
from functions.validation import validation_loss
from functions.visualize import plot_losses, save_grid
from models.unet import UNet


def main() -> None:
    """Read the command line and train."""
    parser = Parser(description=__doc__)
    parser.add_argument("experiment", nargs="?", help=f"{', '.join(EXPERIMENTS)}; {DEFAULT_EXPERIMENT} when left out")
    parser.add_argument(
        "--resume", nargs="?", const="newest", metavar="RUN",
        help="go on with this run's folder, or with the newest unfinished run of the experiment",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, prepare the data, and stop")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders go")
    add_config_flags(parser, "diffusion", DiffusionConfig)
    add_config_flags(parser, "model", ModelConfig)
    args = parser.parse_args()
    if args.experiment not in (None, *EXPERIMENTS):
        parser.error(f"there is no experiment {args.experiment!r}; there are {', '.join(EXPERIMENTS)}")
    device = choose_device(args.device)
    changes = given_fields(args, "diffusion", DiffusionConfig), given_fields(args, "model", ModelConfig)
    if args.resume:
        train(*open_run(args, *changes), device, args.dry_run)
    else:
        name = args.experiment or DEFAULT_EXPERIMENT
        train(name, EXPERIMENTS[name].override(*changes), args.runs, None, None, device, args.dry_run)


def open_run(args: argparse.Namespace, diffusion: dict, model: dict) -> tuple[str, Experiment, Path, Path, dict]:
    """Name, experiment, runs folder, run folder and newest checkpoint of the run to resume.

    The experiment is the one that the checkpoint was made with; only RESUMABLE_FIELDS may differ from it.
    """
    if args.resume == "newest":
        run = run_folder.newest_unfinished(args.runs, args.experiment or DEFAULT_EXPERIMENT)
    else:
        run = Path(args.resume)
        run_folder.read_config(run)  # refuses what is no run folder, a checkpoint's file among it
    checkpoint = load_checkpoint(run_folder.find_checkpoint(run))
    name, saved = checkpoint["run"]["experiment"], Experiment.from_dict(checkpoint["config"])
    if args.experiment not in (None, name):
        raise ConfigError(f"{run} is a run of {name!r}, not of {args.experiment!r}")
    fixed = [f"diffusion.{field}" for field, value in diffusion.items()
             if field not in RESUMABLE_FIELDS and value != getattr(saved.diffusion, field)]  # fmt: skip
    fixed += [f"model.{field}" for field, value in model.items() if value != getattr(saved.model, field)]
    if fixed:
        raise ConfigError(f"a resumed run cannot change {', '.join(fixed)}; start a new run for that")
    return name, saved.override(diffusion, {}), args.runs, run, checkpoint


def train(
    name: str,
    experiment: Experiment,
    runs: Path,
    run: Path | None,
    checkpoint: dict | None,
    device: torch.device,
    dry_run: bool,
) -> None:
    """Train to the last step: from the start in a new folder under `runs`, or on from the checkpoint of a `run`."""
    baseline = process_memory()
    config = experiment.diffusion
    precision = choose_precision(config.precision, device)
    torch.manual_seed(config.seed)  # for the initial weights; every later draw has a seed of its own

    # Data
    image_set = load_images(config.dataset_name, experiment.model.image_size, config.max_bad_images)
    split = split_images(image_set, config.split)
    feeder = ImageFeeder(image_set.images, device)
    steps_per_epoch = len(split.train_indices) // config.effective_batch
    total_steps = config.epochs * steps_per_epoch
    if checkpoint and checkpoint["run"].get("train_ids_hash") != split.train_ids_hash:
        raise ConfigError(f"{run} was trained on other images than {config.dataset_name} has now; it cannot go on")
    if steps_per_epoch == 0:
        raise ConfigError(
            f"{config.dataset_name} has {len(split.train_indices)} training images, fewer than one step's "
            f"{config.effective_batch} (batch_size x gradient_accumulation); lower one of the two"
        )

    # Model
    scheduler = NoiseScheduler(config.timesteps_diff, config.beta_start, config.beta_end, config.rescale_betas)
    scheduler.to(device)
    model = UNet(**vars(experiment.model)).to(device, memory_format=choose_memory_format(device))
    ema_model = copy.deepcopy(model).eval().requires_grad_(False) if config.ema_decay > 0 else None
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    first_step = restore(checkpoint, run, model, ema_model, optimizer, scaler) if checkpoint else 0
    if first_step >= total_steps:
        raise ConfigError(f"{run}: the run is finished; to go on, give more --diffusion.epochs")

    # What is about to happen, for people and for config.json
    facts = {
        "total_steps": total_steps, "steps_per_epoch": steps_per_epoch, "split": split.description,
        "train_ids_hash": split.train_ids_hash, "val_ids_hash": split.val_ids_hash,
        "parameters": sum(p.numel() for p in model.parameters()), "terminal_snr": scheduler.terminal_snr,
        "device": str(device), "precision": str(precision).removeprefix("torch."), "torch": torch.__version__,
    }  # fmt: skip
    print(describe(name, config, facts, image_set.summary, first_step, experiment.warnings()))
    if dry_run:
        resident = 0 if feeder.resident is None else feeder.resident.nbytes
        memory = training_memory(model, scheduler, config.batch_size, config.effective_batch, ema_model is not None,
                                 precision, device, baseline, resident)  # fmt: skip
        place = run or runs / f"{name}-<time>"
        print(f"{describe_memory(memory)}\n  images in  {image_set.path}\n  goes to    {place}\nnothing was started")
        return

    # Run folder: nothing is written before this line
    run = run or run_folder.create_run(runs, name)
    run_folder.write_config(run, name, experiment.to_dict(), facts)
    print(f"  goes to    {run}")

    def due(done: int, every: int) -> bool:
        return done % every == 0 or done == total_steps

    def log(done: int) -> None:
        """A row of metrics, with validation losses when they are due, and the progress bar's numbers."""
        row = {"step": done, "epoch": done / steps_per_epoch, **window.read(), "grad_norm": grad_norm.item(),
               "learning_rate": optimizer.param_groups[0]["lr"]}  # fmt: skip
        stop_unless_finite(row["loss"], done, row["learning_rate"], run)
        bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} img/s")
        for column, net in {"val_loss": model, "val_loss_ema": ema_model}.items():
            if net is not None and due(done, config.validate_every):
                row[column] = validation_loss(
                    net, scheduler, lambda indices: to_model_range(feeder.gather(indices)), split.val_indices,
                    config.validation_samples, config.batch_size, config.seed, precision,
                )  # fmt: skip
        metrics.write(**row)
        if due(done, config.validate_every):
            plot_losses(metrics.path, run / "losses.png", title=run.name)

    def sample(done: int) -> None:
        """A grid of samples, always of the same noise."""
        samples = generate(
            ema_model or model, scheduler, range(config.grid_images), image_shape, config.seed, config.batch_size,
            device, precision, steps=min(config.grid_steps, config.timesteps_diff), progress=False,
        )  # fmt: skip
        save_grid(to_uint8(samples.images).numpy(), run / "samples" / f"step-{done:08d}.png")

    def save(done: int) -> None:
        """A checkpoint to resume and sample from."""
        save_checkpoint(
            run_folder.checkpoint_path(run, done), config=experiment.to_dict(),
            run={"experiment": name, "step": done, "total_steps": total_steps, "train_ids_hash": split.train_ids_hash,
                 "window": window.state()},
            model=model.state_dict(),
            ema=ema_model.state_dict() if ema_model else None, optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
        )  # fmt: skip
        run_folder.keep_newest(run, config.keep_checkpoints)

    def keep_books(done: int, stop: StopSignals) -> None:
        """What is due after a step; on a signal, save and end the process."""
        if due(done, config.log_every) or due(done, config.validate_every):
            log(done)
        if due(done, config.sample_every):
            sample(done)
        stopping = stop.received is not None and done < total_steps
        if due(done, config.checkpoint_every) or stopping:
            save(done)
        if stopping:
            sys.exit(stop.farewell(run))

    image_shape = (experiment.model.channels, experiment.model.image_size, experiment.model.image_size)
    batches = feeder.feed(micro_batches(split.train_indices, config.seed, config.effective_batch, config.batch_size,
                                        range(first_step, total_steps)))  # fmt: skip
    parts = [slice(start, start + config.batch_size) for start in range(0, config.effective_batch, config.batch_size)]
    window = TrainingWindow(device, **(checkpoint["run"].get("window", {}) if checkpoint else {}))
    progress = tqdm(initial=first_step, total=total_steps, unit="step", dynamic_ncols=True)
    with MetricsLog(run, first_step) as metrics, progress as bar, StopSignals() as stop:
        for step in range(first_step, total_steps):
            bar.set_description(f"epoch {step // steps_per_epoch + 1}/{config.epochs}", refresh=False)
            # Gradients of the effective batch, accumulated over forward passes of batch_size images (Algorithm 1)
            draws = training_draws(config.seed, step, config.effective_batch, image_shape, scheduler.timesteps, device)
            degrees = rotation_limit(config, step / total_steps)
            for part in parts:
                x_0 = to_model_range(next(batches))
                if config.use_augmentation:
                    x_0 = augment(x_0, draws.flip[part], degrees * draws.tilt[part] if degrees else None)
                torch.manual_seed(seed_of(config.seed, "dropout", step, part.start))
                with autocast(device, precision):
                    losses = noise_prediction_loss(model, scheduler, x_0, draws.t[part], draws.noise[part])
                scaler.scale(losses.sum() / config.effective_batch).backward()
                window.add(losses.detach())
            # One step of Adam and of the average
            optimizer.param_groups[0]["lr"] = learning_rate(config, step, total_steps)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if ema_model:
                update_ema(ema_model, model, step, config.ema_decay)
            bar.update()
            with window.paused():  # the clock of images/s stands still
                keep_books(step + 1, stop)
    print(f"finished: {run}\nsample from it: python sample.py {run}")


def learning_rate(config: DiffusionConfig, step: int, total_steps: int) -> float:
    """Linear warm-up from 0, then constant or a half cosine down to 0 over the whole run."""
    rate = config.learning_rate * min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return rate


def rotation_limit(config: DiffusionConfig, progress: float) -> float:
    """The largest rotation in degrees; none in the last part of the run, where the model unlearns the tilt."""
    return config.max_rotation if progress < 1 - config.rotation_free_end else 0.0


if __name__ == "__main__":
    with plain_errors(CheckpointError, ConfigError, DataError, DeviceError, OSError, TrainingError):
        main()
