"""Train a DDPM: `train.py` for faces in minutes, `train.py ffhq-full` for real.

The loop of `train` is Algorithm 1 of Ho et al. 2020, with gradient
accumulation, mixed precision and EMA. Experiments are in config.py. Each run
writes a new folder in runs/, whose files functions/saved/run_folder.py lists.
The rest is in functions/training/. There run.py has what steps change and
checkpoints save, data.py has what a step gets, and recorder.py does what is due
after a step (metrics, validation, samples, checkpoints, signals). On several
GPUs: `torchrun --nproc-per-node 8 train.py ffhq-full`.

The name of an experiment comes before the flags; without one it is faces. Its
values are the defaults of the flags or, with --resume, those of the run, or,
with --init, those of the weights.
"""

if __name__ == "__main__":
    from functions.support.start import prepare

    prepare()

import math
import sys
from dataclasses import replace

import torch
from torch.nn.utils import clip_grad_norm_

from data.pixels import to_model_range
from functions.ema import update_ema
from functions.losses import denoising_loss
from functions.optimizers import rate_of
from functions.support import processes
from functions.support.command_line import run_script
from functions.support.processes import batches_of
from functions.support.random_numbers import seed_of
from functions.training.opening import open_run
from functions.training.recorder import Recorder
from functions.training.run import TrainingRun

# This is EX_TEMPFAIL of sysexits.h, which means "try again later": the run was stopped by a signal
# and saved, and can be resumed.
EXIT_STOPPED = 75


def main() -> None:
    """Read the command line and train."""
    # The run is new, or it begins with the weights of --init, or it is resumed.
    with processes.connected(), open_run(sys.argv[1:], __doc__) as (run, is_dry):
        processes.print_main(run.describe())
        stopped = not is_dry and not train(run)
    if stopped:
        sys.exit(EXIT_STOPPED)


def train(run: TrainingRun) -> bool:
    """Train a run to its last step. Return False if a signal has stopped it before."""
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

    recorder = Recorder(run)
    with recorder.opened():
        # Algorithm 1. The numbers are those of its lines.
        while not run.is_finished:  # 1: repeat
            # All random numbers of a step follow from the seed and the step.
            step = run.step
            draws = run.data.draw(step)
            # 2: images x_0 of this process, in [-1, 1], and what else the network gets, if anything
            images, inputs = run.data.batch(step)
            fraction_done = step / run.total_steps
            x_0, inputs = run.data.augment(to_model_range(images), inputs, draws, fraction_done)
            t = draws.t  # 3: timesteps, uniform in 0 .. T-1, the paper's 1 .. T
            eps = draws.noise  # 4: standard normal noise

            # 5: the gradient of || eps - eps_theta(x_t, t) ||^2, accumulated over passes.
            # `denoising_loss` noises x_0 to x_t (Eq. 4), and returns one number for each image.
            losses = []
            for k, places in enumerate(passes):
                rows = slice(k * config.batch_size, (k + 1) * config.batch_size)
                # Each pass seeds its dropout, so that a resumed run repeats it.
                place = step * config.effective_batch + places[0]
                torch.manual_seed(seed_of(config.seed, "dropout", place))
                with processes.gradient_sync(network, last=places is passes[-1]):
                    given = denoiser.given(**{name: value[rows] for name, value in inputs.items()})
                    loss = denoising_loss(given, x_0[rows], t[rows], eps[rows])
                    # DDP averages over the processes, so the factor makes their mean a sum.
                    mean = loss.sum() * processes.count() / config.effective_batch
                    scaler.scale(mean).backward()
                losses.append(loss.detach())

            # 5: the optimiser's step. If the gradient is not finite, weights and moments stay.
            optimizer.param_groups[0]["lr"] = rate_of(config, step, run.total_steps)
            scaler.unscale_(optimizer)
            grad_norm = clip_grad_norm_(parameters, max_norm)
            optimizer.found_inf = (~grad_norm.isfinite()).float()  # () 1 or 0; no host waits
            optimizer.step()
            scaler.update()
            # Those of parameters that an optimizer of one's own does not move, too
            run.model.zero_grad()
            if run.ema_model:
                update_ema(ema_parameters, parameters, step, config.ema_decay, run.ema_ramp)

            # Here everything that is due is written: rows of metrics, validations, snapshots,
            # samples, checkpoints. A signal stops the run.
            if recorder.after_step(torch.cat(losses), t, grad_norm):
                return False
            # 6: until the last step
    return True


if __name__ == "__main__":
    run_script(
        main,
        "half of --diffusion.batch-size with twice --diffusion.gradient-accumulation gives the "
        "same result, also with --resume; or use a smaller --model.base-dim or another device",
    )
