"""Train a DDPM: `train.py` for faces in minutes, `train.py ffhq-full` for real.

`train` is Algorithm 1 of Ho et al. 2020, with gradient accumulation, mixed
precision and EMA, and all that is due after a step. Experiments are in
config.py, losses in functions/losses.py and optimizers in
functions/optimizers.py. Each run writes a new folder in runs/, whose files
functions/saved/run_folder.py lists. On several GPUs:
`torchrun --nproc-per-node 8 train.py ffhq-full`.

The name of an experiment comes before the flags; without one it is faces. Its
values are the defaults of the flags or, with --resume, those of the run, or,
with --init, those of the weights.
"""

if __name__ == "__main__":
    from functions.support.start import prepare

    prepare()

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.utils import clip_grad_norm_

from data.pixels import to_model_range
from functions.ema import update_ema
from functions.losses import denoising_loss
from functions.optimizers import rate_of
from functions.support import processes
from functions.support.command_line import run_script
from functions.support.errors import UserError
from functions.support.processes import batches_of
from functions.support.random_numbers import seed_of
from functions.training.opening import open_run
from functions.training.recorder import Recorder, sample_grid
from functions.training.resuming import StopSignals, delete_old, last_checkpoint
from functions.training.run import TrainingRun
from functions.training.validation import validate

# This is EX_TEMPFAIL of sysexits.h, which means "try again later": the run was stopped by a signal
# and saved, and can be resumed.
EXIT_STOPPED = 75
# The run ends if so many steps in a row were skipped.
MOST_SKIPPED = 20


def main() -> None:
    """Read the command line and train."""
    # The run is new, or it begins with the weights of --init, or it is resumed.
    with processes.connected(), open_run(sys.argv[1:], __doc__) as run:
        processes.print_main(run.describe())
        with StopSignals() as signals:
            is_finished = train(run, lambda: signals.received is not None)
        if is_finished:
            processes.print_main(f"finished: {run.folder}\nsample from it: {run.how_to_sample}")
        else:
            reason = signals.received or "a signal to another process"
            processes.print_main(f"stopped by {reason}, saved; continue with: {run.how_to_resume}")
    if not is_finished:
        sys.exit(EXIT_STOPPED)


def train(run: TrainingRun, is_to_stop: Callable[[], bool] = lambda: False) -> bool:
    """Train a run to its last step. Return False if it is stopped before, and saved.

    `is_to_stop()` is asked after each step. Raises UserError for a failed write, and if the
    gradients of MOST_SKIPPED steps in a row were not finite.
    """
    config = run.config
    optimizer = run.optimizer
    scaler = run.scaler

    # The effective batch is batch_size x gradient_accumulation, whatever the number of processes.
    # Each process has its share of it, in passes of at most batch_size images.
    passes = batches_of(run.data.share, config.batch_size)
    network = processes.wrap(run.model)
    train_network = network
    if run.is_to_compile:
        # The passes have one or two sizes. Each gets kernels of its own in the first step.
        train_network = torch.compile(network, dynamic=False)
    denoiser = replace(run.denoiser, network=train_network)
    # Listing the parameters takes as long as launching some kernels, so it is done once.
    parameters = list(run.model.parameters())
    ema_parameters = list(run.ema_model.parameters()) if run.ema_model else []
    max_norm = config.clip_grad_norm or math.inf

    def is_due(every: int) -> bool:
        """Return whether what is done every `every` steps is due; 0 means never."""
        return every > 0 and (run.step % every == 0 or run.is_finished)

    saved_at = time.monotonic()
    recorder = Recorder(run)
    with recorder.opened():
        # Algorithm 1. The numbers are those of its lines.
        while not run.is_finished:  # 1: repeat
            with recorder.timed():
                # All random numbers of a step follow from the seed and the step.
                step = run.step
                draws = run.data.draw(step)
                # 2: images x_0 of this process, in [-1, 1], and what else the network gets
                images, inputs = run.data.batch(step)
                fraction_done = step / run.total_steps
                x_0, inputs = run.data.augment(to_model_range(images), inputs, draws, fraction_done)
                t = draws.t  # 3: timesteps, uniform in 0 .. T-1, the paper's 1 .. T
                eps = draws.noise  # 4: standard normal noise

                # 5: the gradient of || eps - eps_theta(x_t, t) ||^2, accumulated over passes.
                # `denoising_loss` noises x_0 to x_t (Eq. 4).
                sums = []
                for k, places in enumerate(passes):
                    rows = slice(k * config.batch_size, (k + 1) * config.batch_size)
                    # Each pass seeds its dropout, so that a resumed run repeats it.
                    place = step * config.effective_batch + places[0]
                    torch.manual_seed(seed_of(config.seed, "dropout", place))
                    with processes.gradient_sync(network, last=places is passes[-1]):
                        given = denoiser.given(**{name: x[rows] for name, x in inputs.items()})
                        # One number for each image, by name
                        losses = denoising_loss(given, x_0[rows], t[rows], eps[rows])
                        # DDP averages over the processes, so the factor makes their mean a sum.
                        mean = losses["loss"].sum() * processes.count() / config.effective_batch
                        scaler.scale(mean).backward()
                    sums.append(torch.stack([each.detach().sum() for each in losses.values()]))
                sums = processes.all_reduce(torch.stack(sums).sum(dim=0))

                # 5: the optimizer's step
                rate = rate_of(config, step, run.total_steps)
                for group in optimizer.param_groups:
                    # A group may have another rate than the config's, and keeps this proportion.
                    group["lr"] = rate * (group["initial_lr"] / config.learning_rate)
                scaler.unscale_(optimizer)
                grad_norm = clip_grad_norm_(parameters, max_norm)
                # The host waits here for the device, once a step. Then the device waits until the
                # host has gathered the next images and launched the first kernels: a few of the 130
                # ms of a step of `ffhq-v` on an H100, by an estimate (10 us a launch).
                is_good = bool(grad_norm.isfinite())
                if is_good:
                    optimizer.step()
                    run.window.add(
                        dict(zip(losses, sums.tolist(), strict=True)), config.effective_batch
                    )
                else:
                    run.window.skip(losses)
                scaler.update()
                # Those of parameters that the optimizer does not move, too
                run.model.zero_grad()
                if run.ema_model:
                    update_ema(ema_parameters, parameters, step, config.ema_decay, run.ema_ramp)
                run.step += 1

            # What is due after this step. All processes validate, and rank 0 samples and writes;
            # the others wait for it in the next step.
            if run.window.skipped_in_a_row >= MOST_SKIPPED:
                raise UserError(
                    f"the last {MOST_SKIPPED} steps had gradients that are not finite numbers "
                    f"(learning rate {rate:.3g}). They changed no weights. Resume with a lower "
                    "learning rate, clipped gradients, or in bfloat16 or float32. "
                    f"Last good checkpoint: {last_checkpoint(run.folder) or 'there is none yet'}"
                )
            if is_due(config.log_every) or is_due(config.validate_every):
                row = run.window.means() | {"grad_norm": grad_norm.item(), "learning_rate": rate}
                row["skipped_steps"] = run.window.skipped_steps
                if is_due(config.validate_every):
                    row |= validate(run)
                recorder.write(row)
            if is_due(config.snapshot_every) and processes.is_main():
                run.save_snapshot(run.file("snapshots"))
            if is_due(config.sample_every) and processes.is_main():
                recorder.show(sample_grid(run))
            # All processes get the same answer, so that they stop after the same step. They
            # exchange it on their CPUs, and do not wait for a GPU.
            is_stopped = processes.any_rank(is_to_stop()) and not run.is_finished
            is_late = 0 < config.checkpoint_minutes * 60 <= time.monotonic() - saved_at
            # The checkpoint comes last: if the run is killed before it, it resumes from the
            # checkpoint before, and writes all of this again.
            if is_due(config.checkpoint_every) or is_late or is_stopped:
                saved_at = time.monotonic()
                if processes.is_main():
                    run.save(run.file("checkpoints"))
                    delete_old(run.folder, run.step, config.keep_checkpoints)
            if is_stopped:
                # torchrun ends all processes when one has ended. So they wait for rank 0 to save.
                processes.wait()
                return False
            # 6: until the last step
    return True


if __name__ == "__main__":
    run_script(
        main,
        "half of --diffusion.batch-size with twice --diffusion.gradient-accumulation gives the "
        "same result, also with --resume; or use a smaller --model.base-dim or another device",
    )
