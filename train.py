"""Train a DDPM: `python train.py` for faces in minutes, `python train.py ffhq-full` for real.

This is Algorithm 1 of Ho et al. 2020 with gradient accumulation, mixed precision and EMA; comments
in the loop of `train` quote its lines. Experiments are in config.py. Each run writes a new folder
in runs/, whose files functions/support/run_folder.py lists. What happens between two steps
(metrics, validation, samples, checkpoints, signals) is in functions/training/recorder.py.
On several GPUs: `torchrun --nproc-per-node 8 train.py ffhq-full`.
"""

import argparse
import copy
import math
import sys
from dataclasses import replace
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
from data.datasets import ImageSet, Split, load_images, split_images
from data.pixels import to_model_range
from functions.ema import update_ema
from functions.losses import denoising_loss, eps_errors
from functions.noise_scheduler import NoiseScheduler
from functions.optimizers import Adam, Muon
from functions.prediction import Denoiser
from functions.sampling.generation import load_intact, rebuild
from functions.support.checkpoint import (
    SavedModel,
    TrainingState,
    load_into,
    open_checkpoint,
    verify_checkpoint,
)
from functions.support.command_line import (
    Parser,
    add_config_flags,
    exit_on_user_error,
    given_fields,
)
from functions.support.device import (
    arithmetic,
    choose_device,
    choose_precision,
    fast_layout,
    set_deterministic,
)
from functions.support.errors import EXIT_STOPPED
from functions.support.processes import Processes, distributed
from functions.support.random_numbers import seed_of, training_draws
from functions.support.run_folder import (
    Facts,
    Run,
    describe,
    find_checkpoints,
    first_intact,
    run_to_resume,
)
from functions.support.settings import marked
from functions.training.compiling import compile_network
from functions.training.cost import describe_cost
from functions.training.memory import explain_lack_of_memory
from functions.training.recorder import Recorder
from models.unet import UNet


def main() -> None:
    """Read the command line and train."""
    args = parse_flags()
    changes = given_fields(args, "diffusion"), given_fields(args, "model")
    with distributed() as processes:
        device = choose_device(args.device, processes.local_rank if processes.count > 1 else None)
        name = args.experiment or DEFAULT_EXPERIMENT
        folder = processes.on_main(lambda: run_to_resume(args.resume, args.runs, name))
        if folder is None:
            run = new_run(name, args.runs, args.init, changes, processes)
        else:
            run = open_run(folder, args.experiment, args.init, changes, processes)
        with explain_lack_of_memory(run, processes):
            finished = train(run, device, processes, args.dry_run)
    if not finished:
        sys.exit(EXIT_STOPPED)


def parse_flags() -> argparse.Namespace:
    """Read the command line; end the script if flags are wrong or exclude each other."""
    parser = Parser(description=__doc__, usage="%(prog)s [experiment] [flags]")
    parser.add_argument(
        "experiment",
        nargs="?",
        help=f"One of {', '.join(EXPERIMENTS)}. Default: {DEFAULT_EXPERIMENT}.",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        metavar="RUN|auto",
        help="Resume the run in this folder. Without a value, resume the newest unfinished run of "
        "the experiment; with auto, resume that run, or start a new run if there is none. "
        "Default: a new run.",
    )
    parser.add_argument(
        "--init",
        type=Path,
        metavar="RUN|FILE|FOLDER",
        help="Start from the weights of a run, a checkpoint or a diffusers folder, and from its "
        "EMA weights if it has any. Default: new weights.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Prepare the data, describe the run and its cost, and stop.",
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:N (not with torchrun) or mps. Default: %(default)s.",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="The folder that contains the run folders. Default: %(default)s.",
    )
    add_config_flags(parser, "diffusion", DiffusionConfig)
    add_config_flags(parser, "model", ModelConfig)
    args = parser.parse_args()

    if args.experiment not in (None, *EXPERIMENTS):
        known = ", ".join(EXPERIMENTS)
        parser.error(f"there is no experiment {args.experiment!r}; choose from {known}")
    if args.init and args.resume not in (None, "auto"):
        parser.error("--init starts a new run, but --resume continues one")
    return args


def new_run(
    name: str,
    runs: Path,
    initial_path: Path | None,
    changes: tuple[dict, dict],
    processes: Processes,
) -> Run:
    """Return a new run of an experiment, which starts from the weights in `initial_path`, if any.

    Raises ConfigError for a change that does not fit these weights.
    """
    preset = EXPERIMENTS[name]
    if not initial_path:
        return Run(name, preset.override(*changes), runs)

    initial = open_initial(initial_path, processes)
    if not initial.config["diffusion"].get("clip_x_0", True):
        processes.print_main(
            f"note: {initial_path} is sampled without clipping x_0, but the new run clips x_0"
        )
    diffusion, model = changes
    # The images' channels are not taken from the weights, so other channels are refused below.
    model = {"channels": preset.model.channels} | model
    experiment = with_weight_fields(preset, initial).override(diffusion, model)
    fitting = with_weight_fields(experiment, initial)
    for field, (trained_value, value) in fitting.differences(experiment).items():
        # A preset also has a number of channels, which the user may not have thought of.
        hint = f"; add --model.channels {trained_value}" if field == "model.channels" else ""
        raise ConfigError(
            f"{field} is {trained_value} for the weights of {initial.path}; "
            f"it cannot be changed to {value}{hint}"
        )
    prior_facts = Facts(initial=f"{initial.path}: {initial}")
    return Run(name, experiment, runs, prior_facts=prior_facts, initial=initial)


def open_initial(path: Path, processes: Processes) -> SavedModel:
    """Read the model whose weights a new run starts from.

    Raises CheckpointError if these weights do not fit the config that is saved with them.
    """
    saved = load_intact(lambda: find_checkpoints(path), processes)
    rebuild(saved, torch.device("cpu"))
    return saved


def with_weight_fields(experiment: Experiment, initial: SavedModel) -> Experiment:
    """Return the experiment with the values with which the weights were trained.

    These are the fields of DiffusionConfig that belong to weights, and those of ModelConfig except
    dropout, which stays as in the experiment.
    """
    # An older file may lack a field, which then has its default.
    saved_fields = vars(DiffusionConfig) | initial.config["diffusion"]
    diffusion = {name: saved_fields[name] for name in marked(DiffusionConfig, "of_weights")}
    model = vars(initial.model) | {"dropout": experiment.model.dropout}
    return experiment.override(diffusion, model)


def open_run(
    folder: Path,
    expected_name: str | None,
    initial_path: Path | None,
    changes: tuple[dict, dict],
    processes: Processes,
) -> Run:
    """Open a run to resume it from its newest intact checkpoint.

    The experiment comes from the checkpoint, even if config.py has changed. Raises ConfigError for
    changes that a resumed run cannot make, for a run whose experiment is not `expected_name`, and
    for a run that did not start from the weights in `initial_path`; None fits any run.
    """
    path = processes.on_main(lambda: first_intact(find_checkpoints(folder), verify_checkpoint).path)
    checkpoint = open_checkpoint(path)
    name = checkpoint.contents["run"]["experiment"]
    prior_facts = Facts.of(checkpoint)
    if expected_name not in (None, name):
        raise ConfigError(f"{folder} is a run of {name!r}, not of {expected_name!r}")
    if initial_path:
        digest = open_initial(initial_path, processes).digest[:16]
        if digest not in (prior_facts.initial or ""):
            raise ConfigError(
                f"{folder} did not begin with the weights of {initial_path}; "
                "resume it without --init"
            )

    saved = Experiment.from_dict(checkpoint.contents["config"])
    resumed = saved.resumed(*changes)
    for field, (earlier, now) in saved.differences(resumed).items():
        processes.print_main(f"changed: {field} was {earlier}, is now {now}")
    preset = EXPERIMENTS.get(name, resumed)
    for field, (now, in_file) in resumed.differences(preset).items():
        processes.print_main(f"note: {field} is {now} in this run; config.py has {in_file}")
    return Run(name, resumed, folder.parent, folder, checkpoint, prior_facts)


def train(run: Run, device: torch.device, processes: Processes, dry_run: bool = False) -> bool:
    """Train a run to its last step; a resumed run starts at its checkpoint.

    Returns False if a signal has stopped the run before. With `dry_run`, prepare the data and
    describe the run instead.
    """
    # Data
    image_set, split = load_data(run.experiment)
    feeder = ImageFeeder(image_set.images, device)
    total_steps = count_steps(run, split, processes)
    steps = range(run.first_step, total_steps)
    config = run.experiment.diffusion
    image_shape = run.experiment.model.image_shape
    # Each process has its share of every effective batch, in passes of at most batch_size images.
    share = processes.shard(config.effective_batch)
    passes = forward_passes(share, config.batch_size)

    # Network
    denoiser = build_denoiser(run, device)
    model, scheduler, precision = denoiser.network, denoiser.scheduler, denoiser.precision
    state = build_training_state(run, denoiser, device)
    ema_model, optimizer, scaler = state.ema_model, state.optimizer, state.scaler
    sample_denoiser = replace(denoiser, network=ema_model or model)
    network = processes.wrap(model, device)
    train_network = network
    if config.compile and not dry_run:
        batch_sizes = {batch_slice.stop - batch_slice.start for batch_slice in passes}
        train_network = compile_network(network, denoiser, config, scaler, batch_sizes, processes)
    train_denoiser = replace(denoiser, network=train_network)

    # Facts of the run, which are printed and saved in config.json and checkpoints
    compiled = train_network is not network
    facts = Facts(
        total_steps=total_steps,
        steps_per_epoch=total_steps // config.epochs,
        split=split.description,
        train_ids_hash=split.train_ids_hash,
        val_ids_hash=split.val_ids_hash,
        parameters=sum(p.numel() for p in model.parameters()),
        terminal_snr=scheduler.terminal_snr,
        device=str(device),
        initial=run.prior_facts.initial,
        arithmetic=arithmetic(device, precision, processes.count, config.batch_size, compiled),
    )
    processes.print_main(describe(run, facts, image_set.summary))
    if dry_run:
        processes.print_main(
            describe_cost(run.experiment, denoiser, optimizer, len(steps), len(share))
        )
        folder = run.folder or run.runs_folder / f"{run.name}-<time>"
        processes.print_main(
            f"  images in  {image_set.path}\n  goes to    {folder}\nnothing was started"
        )
        return True

    batches = feeder.feed(
        micro_batches(split.train_indices, config.seed, config.effective_batch, passes, steps)
    )
    # Listing the parameters takes as long as launching some kernels, so it is done once.
    parameters = list(model.parameters())
    ema_parameters = list(ema_model.parameters()) if ema_model else []
    recorder = Recorder(run, facts, state, sample_denoiser, feeder, split.val_indices, processes)
    with recorder.opened():
        # Algorithm 1, lines 1 and 6: "repeat until converged" is a fixed number of steps here.
        for step in steps:
            # Lines 3 and 4: t and the noise eps of the whole effective batch.
            draws = training_draws(
                config.seed, step, config.effective_batch, image_shape, scheduler.timesteps, device
            )
            # Rotation is off at the end of a run, so that the network unlearns its tilt.
            degrees = rotation_limit(
                config.max_rotation, config.rotation_free_end, step / total_steps
            )

            # These are sums over images of the loss, and of the error of eps.
            sums = torch.zeros(2, device=device)
            for batch_slice in passes:  # slices of the effective batch
                # Line 2: images x_0. data/batches.py shuffles them; each comes once per epoch.
                x_0 = to_model_range(next(batches))
                if config.use_augmentation:
                    angles = degrees * draws.rotation[batch_slice] if degrees else None
                    x_0 = augment(x_0, draws.flip[batch_slice], angles)
                t = draws.t[batch_slice]
                noise = draws.noise[batch_slice]

                # Line 5: the loss and its gradient. `denoising_loss` noises x_0 (Eq. 4), and
                # compares the prediction with its target (Eq. 14). DDP averages the gradients over
                # the processes in the last pass. Each pass seeds its dropout, so that a resumed run
                # repeats it.
                torch.manual_seed(seed_of(config.seed, "dropout", step, batch_slice.start))
                with processes.gradient_sync(network, last=batch_slice is passes[-1]):
                    losses = denoising_loss(train_denoiser, scheduler, x_0, t, noise)
                    loss = losses.sum() * processes.count / config.effective_batch
                    scaler.scale(loss).backward()
                errors = eps_errors(train_denoiser, scheduler, losses, t)
                sums += torch.stack([losses, errors]).detach().sum(dim=1)

            # Line 5: the gradient step. If the loss or gradients are not finite, found_inf tells
            # the optimiser to skip it. scaler.step would skip it, too, but it would wait for the
            # device.
            optimizer.param_groups[0]["lr"] = learning_rate(config, step, total_steps)
            scaler.unscale_(optimizer)
            max_norm = config.clip_grad_norm or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            processes.sum_(sums)
            optimizer.found_inf = recorder.bad_numbers.check(sums[0], grad_norm)
            optimizer.step()
            scaler.update()
            # DDP's gradients are views of its buckets. If they were set to None, they would be
            # allocated twice.
            optimizer.zero_grad(set_to_none=processes.count == 1)

            if ema_parameters:
                # An EMA that starts from trained weights has its full decay from the first step on,
                # so that it does not forget them.
                ramp = not facts.initial
                update_ema(ema_parameters, parameters, step, config.ema_decay, ramp)
            recorder.window.add(sums, optimizer.found_inf)
            if not recorder.after_step(step + 1, grad_norm):
                return False
    processes.print_main(f"finished: {run.folder}\nsample from it: python sample.py {run.folder}")
    return True


def load_data(experiment: Experiment) -> tuple[ImageSet, Split]:
    """Load the images, and split them into training and held-out images."""
    config = experiment.diffusion
    model = experiment.model
    image_set = load_images(
        config.dataset_name, model.image_size, config.max_bad_images, model.channels
    )
    return image_set, split_images(image_set, config.split)


def count_steps(run: Run, split: Split, processes: Processes) -> int:
    """Return the number of steps of the whole run.

    Raises ConfigError if no step is left to do, if a resumed run began with other training images,
    or if the processes cannot share the effective batch.
    """
    config = run.experiment.diffusion
    total_steps = config.epochs * (len(split.train_indices) // config.effective_batch)
    if run.checkpoint and run.prior_facts.train_ids_hash != split.train_ids_hash:
        raise ConfigError(
            f"{run.folder} was trained on other images than {config.dataset_name} has; "
            "it cannot continue with these"
        )
    if total_steps == 0:
        raise ConfigError(
            f"{config.dataset_name} has {len(split.train_indices)} training images, fewer than one "
            f"step's {config.effective_batch} (batch_size x gradient_accumulation); "
            "lower one of the two"
        )
    if config.effective_batch < processes.count:
        raise ConfigError(
            f"{processes.count} processes cannot share an effective batch of "
            f"{config.effective_batch}"
        )
    if run.first_step >= total_steps:
        raise ConfigError(
            f"{run.folder}: the run is finished; to continue it, increase --diffusion.epochs"
        )
    return total_steps


def build_denoiser(run: Run, device: torch.device) -> Denoiser:
    """Build the network, with the weights of `run.initial` if there are any, and the schedule."""
    config = run.experiment.diffusion
    set_deterministic(config.deterministic)
    precision = choose_precision(
        config.precision, device, run.prior_facts.arithmetic.get("precision")
    )
    # This seed is for the initial weights. Every later draw has another seed.
    torch.manual_seed(config.seed)
    layout = fast_layout(device, training=True)
    model = UNet(**vars(run.experiment.model)).to(device, memory_format=layout)
    if run.initial:
        load_into(model, run.initial)
    scheduler = NoiseScheduler(
        config.timesteps_diff,
        config.beta_start,
        config.beta_end,
        config.rescale_betas,
        config.beta_schedule,
    )
    return Denoiser(model, scheduler, precision, config.objective)


def build_training_state(run: Run, denoiser: Denoiser, device: torch.device) -> TrainingState:
    """Build all that the steps change, as new or as the run's checkpoint has it."""
    config = run.experiment.diffusion
    model = denoiser.network
    ema_model = None
    if config.ema_decay > 0:
        ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    if config.optimizer == "muon":
        optimizer = Muon(model.parameters(), config.learning_rate, denoiser.precision)
    else:
        optimizer = Adam(model.parameters(), config.learning_rate)
    # Gradients of float16 underflow unless the loss is scaled; elsewhere the scaler does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=denoiser.precision == torch.float16)
    state = TrainingState(model, ema_model, optimizer, scaler)
    if run.checkpoint:
        state.load(run.checkpoint)
    return state


def learning_rate(config: DiffusionConfig, step: int, total_steps: int) -> float:
    """Return a step's learning rate: a linear warm-up from 0, and a half cosine if configured."""
    rate = config.learning_rate * min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return rate


if __name__ == "__main__":
    with exit_on_user_error():
        main()
