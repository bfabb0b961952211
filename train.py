"""Train a DDPM: `python train.py` for faces in minutes, `python train.py ffhq-full` for the real thing.

Algorithm 1 of Ho et al. 2020 with gradient accumulation, mixed precision and EMA: its lines are numbered in the loop of
`train`. Experiments are in config.py; every run writes a folder of its own under runs/, laid out as
functions/support/run_folder.py says. What happens between two steps (metrics, validation, samples, checkpoints,
signals) is in functions/training/book_keeping.py. On several GPUs: `torchrun --nproc-per-node 8 train.py ffhq-full`.
"""

import copy
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from config import (
    DEFAULT_EXPERIMENT,
    EXPERIMENTS,
    ConfigError,
    DiffusionConfig,
    Experiment,
    ModelConfig,
)
from data.augmentation import augment, rotation_limit
from data.batches import ImageFeeder, forward_passes, micro_batches
from data.datasets import Split, load_images, split_images
from data.pixels import to_model_range
from functions.ema import update_ema
from functions.losses import denoising_loss, eps_errors
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.sampling.generation import rebuild
from functions.support.checkpoint import (
    SavedModel,
    TrainingState,
    check_whole,
    load_into,
    open_checkpoint,
)
from functions.support.command_line import Parser, add_config_flags, given_fields, plain_errors
from functions.support.device import (
    Adam,
    arithmetic,
    choose_device,
    choose_precision,
    fast_layout,
    set_deterministic,
)
from functions.support.diffusers_folder import load_model
from functions.support.processes import Processes, joined
from functions.support.random_numbers import seed_of, training_draws
from functions.support.run_folder import Run, find_checkpoints, first_sound, run_to_resume
from functions.timesteps import mixed_timesteps
from functions.training.book_keeping import BookKeeper
from functions.training.compiling import compiled_if_worth_it
from functions.training.start import describe, describe_compute, fit_memory
from models.unet import UNet

# What weights are made for: --init takes it over from where they come from
OF_WEIGHTS = (
    "timesteps_diff",
    "beta_start",
    "beta_end",
    "rescale_betas",
    "beta_schedule",
    "objective",
    "lowest_resolution_size",
    "dim_multiply",
    "transformer_layers",
    "base_dim",
    "image_size",
    "channels",
    "norm_groups",
    "dialect",
)


def main() -> None:
    """Read the command line and train."""
    parser = Parser(description=__doc__, usage="%(prog)s [experiment] [flags]")
    parser.add_argument(
        "experiment",
        nargs="?",
        help=f"{', '.join(EXPERIMENTS)}; {DEFAULT_EXPERIMENT} when left out",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        metavar="RUN|auto",
        help="a new run when left out; RUN: go on with that folder; without a value: with the newest unfinished run of "
        "the experiment; auto: with that, or start a new one if there is none",
    )
    initial = "start from these weights, EMA's if there are: of a run, a file or a folder of diffusers (new weights)"
    parser.add_argument("--init", type=Path, metavar="RUN|FILE|FOLDER", help=initial)
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would happen, prepare the data, and stop"
    )
    device_help = "auto, cpu, cuda, cuda:N (not with torchrun) or mps (auto)"
    parser.add_argument("--device", default="auto", metavar="NAME", help=device_help)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="of run folders (runs)"
    )
    add_config_flags(parser, "diffusion", DiffusionConfig)
    add_config_flags(parser, "model", ModelConfig)
    args = parser.parse_args()
    if args.experiment not in (None, *EXPERIMENTS):
        parser.error(
            f"there is no experiment {args.experiment!r}; there are {', '.join(EXPERIMENTS)}"
        )
    if args.init and args.resume not in (None, "auto"):
        parser.error("--init starts a new run, --resume goes on with one")
    changes = (
        given_fields(args, "diffusion", DiffusionConfig),
        given_fields(args, "model", ModelConfig),
    )
    name = args.experiment or DEFAULT_EXPERIMENT
    with joined() as processes:
        device = choose_device(args.device, processes.local_rank if processes.count > 1 else None)
        folder = processes.from_main(lambda: run_to_resume(args.resume, args.runs, name))
        initial = open_initial(args.init, processes) if args.init else None
        if folder:
            run = open_run(folder, args.experiment, changes, processes)
            if initial and initial.digest[:16] not in (run.remembered.get("initial") or ""):
                raise ConfigError(
                    f"{folder} did not begin with the weights of {args.init}, so it does not go on"
                )
        else:
            run = Run(name, new_experiment(name, changes, initial), args.runs, initial=initial)
        train(run, device, processes, args.dry_run)


def open_initial(path: Path, processes: Processes) -> SavedModel:
    """The model whose weights a new run starts from. `CheckpointError` if its weights and its config do not fit."""
    read = cache(load_model)  # so that rank 0, which reads it to find it, does not do so twice
    saved = read(processes.from_main(lambda: first_sound(find_checkpoints(path), read).path))
    rebuild(UNet, saved, torch.device("cpu"))
    if not saved.config["diffusion"].get("clip_x_0", True):
        processes.say(f"note: {path} is sampled without clipping x_0, the new run with it")
    return saved


def new_experiment(name: str, changes: tuple[dict, dict], initial: SavedModel | None) -> Experiment:
    """The experiment of a new run: what the initial weights are made for comes from them, all else from the preset.

    `ConfigError` for a change that contradicts the weights.
    """
    if initial is None:
        return EXPERIMENTS[name].override(*changes)
    preset, fields = EXPERIMENTS[name], initial.config["diffusion"] | initial.config["model"]
    own = [
        {
            field: fields.get(field, getattr(part, field, None))
            for field in OF_WEIGHTS
            if hasattr(config, field)
        }
        for part, config in ((DiffusionConfig, preset.diffusion), (ModelConfig, preset.model))
    ]
    experiment = preset.override(*own)
    changed = experiment.override(*changes)
    for field, (of_weights, wanted) in experiment.differences(changed).items():
        if field.split(".")[1] in OF_WEIGHTS:
            raise ConfigError(
                f"{field} is {of_weights} for the weights of {initial.path}, and cannot become {wanted}"
            )
    return changed


def open_run(
    folder: Path, wanted: str | None, changes: tuple[dict, dict], processes: Processes
) -> Run:
    """A run to resume, at its newest sound checkpoint.

    The experiment is the one that the checkpoint was made with, whatever config.py says by now; of the changes, only
    those that leave its meaning are taken. `ConfigError` for others, or when `wanted` is another experiment.
    """
    path = processes.from_main(lambda: first_sound(find_checkpoints(folder), check_whole).path)
    checkpoint = open_checkpoint(path)
    name = checkpoint.contents["run"]["experiment"]
    saved = Experiment.from_dict(checkpoint.contents["config"])
    if wanted not in (None, name):
        raise ConfigError(f"{folder} is a run of {name!r}, not of {wanted!r}")
    resumed = saved.resumed(*changes)
    for field, (before, now) in saved.differences(resumed).items():
        processes.say(f"changed: {field} was {before}, is now {now}")
    for field, (now, in_file) in resumed.differences(EXPERIMENTS.get(name, resumed)).items():
        processes.say(f"note: {field} stays {now}, as the run was started; config.py has {in_file}")
    return Run(name, resumed, folder.parent, folder, checkpoint)


def train(run: Run, device: torch.device, processes: Processes, dry_run: bool = False) -> None:
    """Train to the last step: a new run from the start, or one with a checkpoint on from there."""
    config = run.experiment.diffusion
    set_deterministic(config.deterministic)
    started_with = run.remembered.get("arithmetic", {}).get("precision")
    precision = choose_precision(config.precision, device, started_with)
    # For the initial weights; every later draw has a seed of its own
    torch.manual_seed(config.seed)

    # Data
    image_set = load_images(
        config.dataset_name, run.experiment.model.image_size, config.max_bad_images
    )
    split = split_images(image_set, config.split)
    images = ImageFeeder(image_set.images, device)
    steps_per_epoch = len(split.train_indices) // config.effective_batch
    total_steps = config.epochs * steps_per_epoch
    check_length(run, split, total_steps, processes)

    # Model
    scheduler = NoiseScheduler(
        config.timesteps_diff,
        config.beta_start,
        config.beta_end,
        config.rescale_betas,
        config.beta_schedule,
    )
    model = UNet(**vars(run.experiment.model)).to(device, memory_format=fast_layout(device))
    began = run.remembered.get("initial")
    if run.initial:
        load_into(model, run.initial)
        began, run.initial = f"{run.initial.path}: {run.initial}", None  # its memory
    model.set_recompute(config.recompute)
    ema_model = copy.deepcopy(model).eval().requires_grad_(False) if config.ema_decay > 0 else None
    # Skips a step if found_inf, below
    optimizer = Adam(model.parameters(), lr=config.learning_rate, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    state = TrainingState(model, ema_model, optimizer, scaler)
    if run.checkpoint:
        state.load(run.checkpoint)

    # What is about to happen, for people and for config.json
    run.facts = {
        "total_steps": total_steps,
        "steps_per_epoch": steps_per_epoch,
        "split": split.description,
        "train_ids_hash": split.train_ids_hash,
        "val_ids_hash": split.val_ids_hash,
        "parameters": sum(p.numel() for p in model.parameters()),
        "terminal_snr": scheduler.terminal_snr,
        "device": str(device),
        "initial": began,
        "arithmetic": arithmetic(device, precision, processes.count, config.batch_size),
    }
    processes.say(describe(run, image_set.summary))
    denoiser = Denoiser(model, scheduler, precision, config.objective)
    if dry_run:
        place = run.folder or run.runs / f"{run.name}-<time>"
        processes.say(describe_compute(run, denoiser))
        processes.say(f"  images in  {image_set.path}\n  goes to    {place}\nnothing was started")
        return
    fit_memory(run, denoiser, processes)
    config = run.experiment.diffusion  # with a smaller batch_size where the memory wants it

    passes = forward_passes(processes.own_range(config.effective_batch), config.batch_size)
    batches = images.feed(
        micro_batches(
            split.train_indices,
            config.seed,
            config.effective_batch,
            passes,
            range(run.first_step, total_steps),
        )
    )
    averaged = replace(denoiser, network=ema_model or model)
    network = processes.wrap(model, device)
    trained = compiled_if_worth_it(denoiser, network, run, passes, processes)
    with BookKeeper(run, state, averaged, images, split.val_indices, processes) as books:
        # Algorithm 1, lines 1 and 6: total_steps times
        for step in range(run.first_step, total_steps):
            # Lines 3 and 4: t and eps of the whole effective batch, which is cut into passes of batch_size images
            draws = training_draws(
                config.seed,
                step,
                config.effective_batch,
                run.image_shape,
                scheduler.timesteps,
                device,
            )
            t = (
                mixed_timesteps(scheduler, draws.t, draws.normal)
                if config.t_sampling == "mixed"
                else draws.t
            )
            degrees = rotation_limit(
                config.max_rotation, config.rotation_free_end, step / total_steps
            )
            # Of the loss, and of the error of eps that belongs to it
            sums = torch.zeros(2, device=device)
            for places in passes:  # slices of the effective batch
                # Line 2: every image once an epoch, shuffled, by data/batches.py
                x_0 = to_model_range(next(batches))
                if config.use_augmentation:
                    x_0 = augment(
                        x_0, draws.flip[places], degrees * draws.tilt[places] if degrees else None
                    )
                torch.manual_seed(seed_of(config.seed, "dropout", step, places.start))
                with processes.accumulating(network, last=places is passes[-1]):
                    # Line 5: the loss and its gradient, which DDP averages over the processes
                    losses = denoising_loss(trained, scheduler, x_0, t[places], draws.noise[places])
                    scaler.scale(losses.sum() * processes.count / config.effective_batch).backward()
                sums += (
                    torch.stack([losses, eps_errors(trained, scheduler, losses, t[places])])
                    .detach()
                    .sum(dim=1)
                )
            # Line 5: the step. Where numbers are not finite Adam skips it by found_inf, so scaler.step is not needed
            optimizer.param_groups[0]["lr"] = learning_rate(config, step, total_steps)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(
                model.parameters(), config.clip_grad_norm or math.inf
            )
            optimizer.found_inf = books.bad_numbers.check(processes.sum_(sums)[0], grad_norm)
            optimizer.step()
            scaler.update()
            # None would be made anew, beside DDP's buckets
            optimizer.zero_grad(set_to_none=processes.count == 1)
            if ema_model:
                update_ema(ema_model, model, step, config.ema_decay, ramp=not began)
            books.window.add(sums, optimizer.found_inf)
            books.after_step(step + 1, grad_norm)
    processes.say(f"finished: {run.folder}\nsample from it: python sample.py {run.folder}")


def check_length(run: Run, split: Split, total_steps: int, processes: Processes) -> None:
    """`ConfigError` unless there are steps to do, on the images that the run was started with."""
    config, images = run.experiment.diffusion, len(split.train_indices)
    if run.checkpoint and run.remembered.get("train_ids_hash") != split.train_ids_hash:
        raise ConfigError(
            f"{run.folder} was trained on other images than {config.dataset_name} has; it cannot go on"
        )
    if total_steps == 0:
        raise ConfigError(
            f"{config.dataset_name} has {images} training images, fewer than one step's {config.effective_batch} "
            "(batch_size x gradient_accumulation); lower one of the two"
        )
    if config.effective_batch < processes.count:
        raise ConfigError(
            f"{processes.count} processes cannot share an effective batch of {config.effective_batch}"
        )
    if run.first_step >= total_steps:
        raise ConfigError(
            f"{run.folder}: the run is finished; to go on, give more --diffusion.epochs"
        )


def learning_rate(config: DiffusionConfig, step: int, total_steps: int) -> float:
    """Linear warm-up from 0, then constant or a half cosine down to 0 over the whole run."""
    rate = config.learning_rate * min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return rate


if __name__ == "__main__":
    with plain_errors(ConfigError):
        main()
