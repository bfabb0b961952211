"""Train a DDPM: `python train.py` for faces in minutes, `python train.py ffhq-full` for the real thing.

Algorithm 1 of Ho et al. 2020 with gradient accumulation, mixed precision and EMA: its lines are numbered in the loop of
`train`. Experiments are in config.py; every run writes a folder of its own under runs/, laid out as
functions/support/run_folder.py says. What happens between two steps (metrics, validation, samples, checkpoints,
signals) is in functions/training/book_keeping.py. On several GPUs: `torchrun --nproc-per-node 8 train.py ffhq-full`.
"""

import copy
import math
from pathlib import Path

import torch

from config import DEFAULT_EXPERIMENT, EXPERIMENTS, ConfigError, DiffusionConfig, Experiment, ModelConfig
from data.augmentation import augment, rotation_limit
from data.batches import ImageFeeder, forward_passes, micro_batches
from data.datasets import load_images, split_images
from data.pixels import to_model_range, to_uint8
from functions.ema import update_ema
from functions.losses import noise_prediction_loss
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser, autocast
from functions.support import run_folder
from functions.support.checkpoint import check_progress, load_checkpoint, restore
from functions.support.command_line import Parser, add_config_flags, given_fields, plain_errors
from functions.support.device import (
    arithmetic,
    choose_arithmetic,
    choose_device,
    set_deterministic,
)
from functions.support.errors import CheckpointError
from functions.support.optimizer import Adam
from functions.support.processes import Processes, joined
from functions.support.random_numbers import seed_of, training_draws
from functions.support.report import describe, describe_memory
from functions.training.bad_numbers import BadNumbers
from functions.training.book_keeping import BookKeeper
from functions.training.memory import out_of_memory_explained, process_memory, training_memory, weights_must_fit
from functions.training.metrics import TrainingWindow
from models.unet import UNet


def main() -> None:
    """Read the command line and train."""
    parser = Parser(description=__doc__, usage="%(prog)s [experiment] [flags]")
    parser.add_argument("experiment", nargs="?", help=f"{', '.join(EXPERIMENTS)}; {DEFAULT_EXPERIMENT} when left out")
    parser.add_argument(
        "--resume", nargs="?", const="newest", metavar="RUN|auto",
        help="go on with this run's folder, or with the newest unfinished run of the experiment; auto: with that, or "
        "start one if there is none",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, prepare the data, and stop")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders go")
    add_config_flags(parser, "diffusion", DiffusionConfig)
    add_config_flags(parser, "model", ModelConfig)
    args = parser.parse_args()
    if args.experiment not in (None, *EXPERIMENTS):
        parser.error(f"there is no experiment {args.experiment!r}; there are {', '.join(EXPERIMENTS)}")
    changes = given_fields(args, "diffusion", DiffusionConfig), given_fields(args, "model", ModelConfig)
    with joined() as processes:
        device = choose_device(args.device, processes.local_rank if processes.count > 1 else None)
        run = processes.from_main(
            lambda: run_folder.run_to_resume(args.resume, args.runs, args.experiment or DEFAULT_EXPERIMENT)
        )
        if run:
            name, experiment, checkpoint = open_run(run, args.experiment, *changes, processes)
        else:
            name, checkpoint = args.experiment or DEFAULT_EXPERIMENT, None
            experiment = EXPERIMENTS[name].override(*changes)
        with weights_must_fit():
            train(name, experiment, args.runs, run, checkpoint, device, processes, args.dry_run)


def open_run(
    run: Path, experiment: str | None, diffusion: dict, model: dict, processes: Processes
) -> tuple[str, Experiment, dict]:
    """Name, experiment and newest sound checkpoint of a run to resume.

    The experiment is the one that the checkpoint was made with, whatever config.py says by now; of the flags, only
    those that leave its meaning may differ from it.
    """

    def find() -> Path:
        if not run.is_dir():  # a checkpoint's file is no run
            raise CheckpointError(f"{run} is not a run folder; `NAME --resume` takes the newest unfinished run of NAME")
        return run_folder.first_sound(run_folder.find_checkpoints(run), load_checkpoint)[0]

    path = processes.from_main(find)
    checkpoint = load_checkpoint(path)
    check_progress(checkpoint["run"], path)
    try:
        name, saved = checkpoint["run"]["experiment"], Experiment.from_dict(checkpoint["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if experiment not in (None, name):
        raise ConfigError(f"{run} is a run of {name!r}, not of {experiment!r}")
    resumed = saved.resumed(diffusion, model)
    if processes.is_main:
        for field, (before, now) in saved.differences(resumed).items():
            print(f"changed: {field} was {before}, is now {now}")
        for field, (now, in_file) in resumed.differences(EXPERIMENTS.get(name, resumed)).items():
            print(f"note: {field} stays {now}, as the run was started; config.py has {in_file}")
    return name, resumed, checkpoint


def train(
    name: str,
    experiment: Experiment,
    runs: Path,
    run: Path | None,
    checkpoint: dict | None,
    device: torch.device,
    processes: Processes,
    dry_run: bool,
) -> None:
    """Train to the last step: from the start in a new folder under `runs`, or on from the checkpoint of a `run`."""
    baseline = process_memory()
    config, saved = experiment.diffusion, checkpoint["run"] if checkpoint else {}
    set_deterministic(config.deterministic)
    precision, memory_format = choose_arithmetic(config.precision, device, saved.get("arithmetic"))
    torch.manual_seed(config.seed)  # for the initial weights; every later draw has a seed of its own

    # Data
    image_set = load_images(config.dataset_name, experiment.model.image_size, config.max_bad_images)
    split = split_images(image_set, config.split)
    feeder = ImageFeeder(image_set.images, device)
    steps_per_epoch = len(split.train_indices) // config.effective_batch
    total_steps = config.epochs * steps_per_epoch
    if saved and saved.get("train_ids_hash") != split.train_ids_hash:
        raise ConfigError(f"{run} was trained on other images than {config.dataset_name} has now; it cannot go on")
    if steps_per_epoch == 0:
        raise ConfigError(
            f"{config.dataset_name} has {len(split.train_indices)} training images, fewer than one step's "
            f"{config.effective_batch} (batch_size x gradient_accumulation); lower one of the two"
        )
    if config.effective_batch < processes.count:
        raise ConfigError(f"{processes.count} processes cannot share an effective batch of {config.effective_batch}")

    # Model
    scheduler = NoiseScheduler(config.timesteps_diff, config.beta_start, config.beta_end, config.rescale_betas)
    model = UNet(**vars(experiment.model)).to(device, memory_format=memory_format)
    redraws_dropout = device.type != "mps" or experiment.model.dropout == 0
    model.set_recompute(config.recompute if redraws_dropout else "none")
    ema_model = copy.deepcopy(model).eval().requires_grad_(False) if config.ema_decay > 0 else None
    optimizer = Adam(model.parameters(), lr=config.learning_rate, fused=True)  # takes found_inf, below
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    first_step = restore(checkpoint, run, model, ema_model, optimizer, scaler) if checkpoint else 0
    if first_step >= total_steps:
        raise ConfigError(f"{run}: the run is finished; to go on, give more --diffusion.epochs")

    resident = 0 if feeder.resident is None else feeder.resident.nbytes
    passes = forward_passes(processes.own_range(config.effective_batch), config.batch_size)
    largest_pass = passes[0].stop - passes[0].start
    memory = training_memory(model, scheduler, config.effective_batch, largest_pass, ema_model is not None, precision,
                             device, baseline, resident)  # fmt: skip

    # What is about to happen, for people and for config.json
    how = arithmetic(device, precision, memory_format, processes.count, config.batch_size)
    facts = {
        "total_steps": total_steps, "steps_per_epoch": steps_per_epoch, "split": split.description,
        "train_ids_hash": split.train_ids_hash, "val_ids_hash": split.val_ids_hash,
        "parameters": sum(p.numel() for p in model.parameters()), "terminal_snr": scheduler.terminal_snr,
        "device": str(device), **how,
    }  # fmt: skip
    processes.say(describe(name, config, facts, image_set.summary, first_step, experiment.warnings()))
    for what, before in saved.get("arithmetic", how).items():
        if before != how[what]:
            processes.say(f"note: {what} was {before}, is now {how[what]}: no longer bit for bit as if never stopped")
    if dry_run:
        place = run or runs / f"{name}-<time>"
        processes.say(f"{describe_memory(memory(largest_pass))}\n  images in  {image_set.path}\n  goes to    {place}")
        processes.say("nothing was started")
        return

    # The books of the run; nothing is written before they are opened
    image_shape = (experiment.model.channels, experiment.model.image_size, experiment.model.image_size)
    books = BookKeeper(
        runs=runs, run=run, config=config, first_step=first_step, steps_per_epoch=steps_per_epoch, facts=facts,
        identity={
            "config": experiment.to_dict(),
            "run": {"experiment": name, "total_steps": total_steps, "train_ids_hash": split.train_ids_hash,
                    "arithmetic": how},
        },
        model=model, ema_model=ema_model, optimizer=optimizer, scaler=scaler,
        denoiser=Denoiser(model, scheduler, ema_model, precision),
        window=TrainingWindow(device, config.effective_batch, **saved.get("window", {})),
        bad_numbers=BadNumbers(device, **saved.get("bad_numbers", {})),
        processes=processes, device=device, precision=precision, image_shape=image_shape,
        val_indices=split.val_indices, x_0_of=lambda indices: to_model_range(feeder.gather(indices)),
        to_pixels=to_uint8,
    )  # fmt: skip

    batches = feeder.feed(micro_batches(split.train_indices, config.seed, config.effective_batch, passes,
                                        range(first_step, total_steps)))  # fmt: skip
    with out_of_memory_explained(memory, largest_pass, config.effective_batch, device, processes.count), books:
        network = processes.wrap(model, device)
        if checkpoint and Experiment.from_dict(checkpoint["config"]) != experiment:
            books.save(first_step)  # so that from now on the run is resumed as it was changed
        for step in range(first_step, total_steps):  # Algorithm 1, lines 1 and 6: total_steps times
            # Lines 3 and 4: t and eps of the whole effective batch, which is cut into passes of batch_size images
            draws = training_draws(config.seed, step, config.effective_batch, image_shape, scheduler.timesteps, device)
            degrees = rotation_limit(config.max_rotation, config.rotation_free_end, step / total_steps)
            loss = torch.zeros((), device=device)
            for part in passes:
                x_0 = to_model_range(next(batches))  # line 2: every image once an epoch, shuffled, by data/batches.py
                if config.use_augmentation:
                    x_0 = augment(x_0, draws.flip[part], degrees * draws.tilt[part] if degrees else None)
                torch.manual_seed(seed_of(config.seed, "dropout", step, part.start))
                with processes.accumulating(network, last=part is passes[-1]):
                    with autocast(device, precision):  # line 5: the loss; below, its gradient
                        losses = noise_prediction_loss(network, scheduler, x_0, draws.t[part], draws.noise[part])
                    scaler.scale(losses.sum() * processes.count / config.effective_batch).backward()
                loss += losses.detach().sum()
            # Line 5: the step, by Adam, which skips it where numbers are not finite; then the average of the weights
            optimizer.param_groups[0]["lr"] = learning_rate(config, step, total_steps)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm or math.inf)
            optimizer.found_inf = books.bad_numbers.check(processes.sum_(loss), grad_norm)
            optimizer.step()
            scaler.update()
            optimizer.zero_grad()
            if ema_model:
                update_ema(ema_model, model, step, config.ema_decay)
            books.window.add(loss, optimizer.found_inf)
            books.after_step(step + 1, grad_norm)
    processes.say(f"finished: {books.run}\nsample from it: python sample.py {books.run}")


def learning_rate(config: DiffusionConfig, step: int, total_steps: int) -> float:
    """Linear warm-up from 0, then constant or a half cosine down to 0 over the whole run."""
    rate = config.learning_rate * min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return rate


if __name__ == "__main__":
    with plain_errors(ConfigError):
        main()
