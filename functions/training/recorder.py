"""The work between two steps: metrics, validation, sample grids, checkpoints and stopping."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_uint8
from functions.denoiser import Denoiser
from functions.losses import denoising_loss, eps_errors
from functions.saved.run_folder import new_folder
from functions.support import processes
from functions.support.errors import UserError, printable
from functions.support.files import write_text
from functions.support.pictures import save_grid
from functions.support.processes import batches_of
from functions.training.data import TrainingData
from functions.training.metrics import QUARTERS, MetricsLog, plot_losses
from functions.training.resuming import (
    StopSignals,
    delete_old,
    explain_failed_writes,
    last_checkpoint,
    locked,
)
from functions.training.run import TrainingRun

# The run ends at a row of metrics.csv if at least so many steps directly before it were skipped.
MOST_SKIPPED = 20


class Recorder:
    """The records of a run: within the context `opened`, `after_step` does all that is due.

    All processes validate together. Rank 0 samples and writes, and the others wait for it in the
    next step.
    """

    def __init__(self, run: TrainingRun):
        self.run = run
        self.config = run.config
        self.saved_at = time.monotonic()
        self.stop_signals = StopSignals()
        # Only rank 0 has this log.
        self.metrics: MetricsLog | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the files, of a new run in a new folder, and the bar; say when the run is finished.

        Raises UserError for a failed write.
        """
        run = self.run
        is_new = not run.folder
        if is_new:
            run.folder = processes.on_main(new_folder, run.runs_folder, run.name)
        with explain_failed_writes(run.folder, run.how_to_resume), ExitStack() as stack:
            # From the first line on, a run that has a folder saves before it ends.
            stack.enter_context(self.stop_signals)
            processes.on_main(self.open_files, stack, is_new)
            self.bar = tqdm(
                initial=run.step,
                total=run.total_steps,
                unit="step",
                dynamic_ncols=True,
                disable=not processes.is_main(),
            )
            stack.enter_context(self.bar)
            run.window.start_clock()
            yield
            if run.is_finished:
                # Printed here: a broken pipe can no longer harm a finished run.
                self.bar.close()
                processes.print_main(f"finished: {run.folder}\nsample from it: {run.how_to_sample}")

    def open_files(self, stack: ExitStack, is_new: bool) -> None:
        """Open the files of the run in rank 0; the stack closes them."""
        run = self.run
        # `open_run` has locked a run that is resumed.
        if is_new:
            stack.enter_context(locked(run.folder))
        config = json.dumps(run.contents(), indent=2)
        write_text(run.folder / "config.json", config)
        self.metrics = MetricsLog(run.folder, run.step, config)
        stack.callback(self.metrics.close)
        print(f"  goes to    {run.folder}", flush=True)

    def is_due(self, every: int) -> bool:
        """Return whether work that is done every `every` steps is due; 0 means never."""
        return every > 0 and (self.run.step % every == 0 or self.run.is_finished)

    def after_step(self, losses: Tensor, t: Tensor, grad_norm: Tensor) -> bool:
        """Do all that is due after a step, with the losses and t (B,) of this process's images.

        After a signal to any process, this saves a checkpoint, and returns that the run is stopped.
        """
        run = self.run
        config = self.config
        run.count_step(losses, t)
        self.bar.set_description(
            f"epoch {min(int(run.epoch) + 1, config.epochs)}/{config.epochs}", refresh=False
        )
        self.bar.update()

        # The clock stops here, so that images_per_second is the speed of training only.
        with run.window.paused():
            validating = self.is_due(config.validate_every)
            if validating or self.is_due(config.log_every):
                self.log(grad_norm, validating)
            if self.is_due(config.snapshot_every) and processes.is_main():
                run.save_snapshot(run.file("snapshots"))
            if self.is_due(config.sample_every) and processes.is_main():
                samples = save_grid(to_uint8(sample_grid(run)), run.file("samples"))
                self.metrics.show(samples, run.step)
            # All processes get the same answer, so that they stop after the same step. They
            # exchange it on their CPUs, and do not wait for a GPU.
            signal_received = processes.any_rank(self.stop_signals.received is not None)
            stopped = signal_received and not run.is_finished
            minutes = (time.monotonic() - self.saved_at) / 60
            overdue = 0 < config.checkpoint_minutes <= minutes
            # The checkpoint comes last: if the run is killed before it, it resumes from the
            # checkpoint before, and writes all of this again.
            if self.is_due(config.checkpoint_every) or overdue or stopped:
                self.saved_at = time.monotonic()
                if processes.is_main():
                    run.save(run.file("checkpoints"))
                    delete_old(run.folder, run.step, config.keep_checkpoints)

        if stopped:
            # torchrun ends all processes when one has ended. So they wait until rank 0 has saved.
            processes.wait()
            # Its last line is complete then.
            self.bar.close()
            reason = self.stop_signals.received or "a signal to another process"
            processes.print_main(f"stopped by {reason}, saved; continue with: {run.how_to_resume}")
        return stopped

    def log(self, grad_norm: Tensor, validating: bool) -> None:
        """Write a row of metrics; raise UserError if too many steps were skipped."""
        run = self.run
        learning_rate = run.optimizer.param_groups[0]["lr"]
        # This waits for the device.
        row = {
            "step": run.step,
            "epoch": run.epoch,
            "learning_rate": learning_rate,
            **run.window.read(grad_norm),
        }
        skipped_in_a_row = int(run.window.skipped[1])
        if skipped_in_a_row >= MOST_SKIPPED:
            raise UserError(
                f"the last {skipped_in_a_row} steps had gradients that are not finite numbers "
                f"(gradient norm {row['grad_norm']:.4g}, learning rate {learning_rate:.3g}). They "
                "changed no weights. Resume with a lower learning rate, clipped gradients, or in "
                "bfloat16 or float32. "
                f"Last good checkpoint: {last_checkpoint(run.folder) or 'there is none yet'}"
            )
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} img/s")
        # All processes validate, and rank 0 writes.
        if validating:
            row |= validate(run)
        if processes.is_main():
            self.metrics.write(**row)
            if validating:
                title = printable(run.folder.name)
                plot_losses(self.metrics.path, run.folder / "losses.png", title)


@torch.no_grad()
def sample_grid(run: TrainingRun) -> Tensor:
    """Sample the images of a run's grid, always from the same noise: (N, C, H, W) in [-1, 1]."""
    denoiser = run.sample_denoiser
    batches = batches_of(range(run.config.grid_images), run.config.batch_size)
    with denoiser.evaluating():
        return torch.cat([run.data.sample(denoiser, places) for places in batches])


def validate(run: TrainingRun) -> dict[str, float]:
    """Validate a run's raw weights, and its EMA weights if there are any: columns of metrics.csv.

    All processes validate together.
    """
    denoisers = {"": run.denoiser}
    if run.ema_model:
        denoisers["_ema"] = run.sample_denoiser
    losses = validation_losses([*denoisers.values()], run.data)
    columns = {}
    for suffix, values in zip(denoisers, losses, strict=True):
        # The quarters of the last denoiser stay. It draws samples.
        names = (f"val_loss{suffix}", f"val_eps_error{suffix}", *QUARTERS)
        columns |= zip(names, values, strict=True)
    return columns


@torch.no_grad()
def validation_losses(denoisers: list[Denoiser], data: TrainingData) -> list[list[float]]:
    """Return each denoiser's mean loss (Eq. 14), mean error of eps, and mean loss by quarter of t.

    The means are over the triples of `data.held_out`, whatever the batch size, and nan for a
    quarter without a triple. Losses can be compared between runs with the same objective, and
    errors of eps between all runs. The processes share the batches, and all get the means.
    """
    # Sums of loss, error, losses by quarter of t; and of ones, once and by quarter
    total = torch.zeros(len(denoisers), 11, dtype=torch.float64)
    batches = batches_of(range(data.config.validation_samples), data.config.batch_size)
    for places in batches[processes.rank() :: processes.count()]:
        x_0, t, eps, inputs = data.held_out(places)
        quarters = 4 * t // data.config.timesteps_diff
        masks = [quarters == q for q in range(4)]
        for i, denoiser in enumerate(denoisers):
            with denoiser.evaluating():
                losses = denoising_loss(denoiser.given(**inputs), x_0, t, eps)
                errors = eps_errors(denoiser, losses, t)
            sums = [losses, errors, *(losses * mask for mask in masks)]
            sums += [torch.ones_like(losses), *masks]
            total[i] += torch.stack(sums).sum(dim=1).cpu()
    total = processes.all_reduce(total)
    sums, ones = total[:, :6], total[:, [6, 6, 7, 8, 9, 10]]
    return (sums / ones).tolist()
