"""What happens between two steps of a training: metrics, validation, sample grids, checkpoints, and stopping."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from functions.evaluation.bits_per_dim import BoundOptions, evenly, measure_bits_per_dim
from functions.prediction import Denoiser
from functions.sampling.generation import ImageSampler, generate
from functions.sampling.options import SamplerOptions
from functions.support import run_folder
from functions.support.checkpoint import save_checkpoint
from functions.support.pictures import save_grid
from functions.support.processes import Processes
from functions.training.bad_numbers import BadNumbers
from functions.training.metrics import MetricsLog, TrainingWindow, plot_losses
from functions.training.stopping import EXIT_STOPPED, StopSignals, failed_writes_explained
from functions.training.validation import validation_loss

BOUND_T_STRIDE = 50  # of the timesteps in bits/dim: its error comes from the number of images, hardly from this


@dataclass
class BookKeeper:
    """Entered, it holds the run folder's lock, files and the progress bar; `after_step` does what is due.

    Validation and sampling are shared by all processes; rank 0 writes.
    """

    runs: Path
    run: Path | None  # None: a new folder under `runs`
    config: object  # the run's DiffusionConfig
    identity: dict  # of a checkpoint: `config`, and the part of `run` that stays the same
    facts: dict  # for config.json
    first_step: int
    steps_per_epoch: int

    model: nn.Module
    ema_model: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    denoiser: Denoiser  # the one to sample with, of the two
    window: TrainingWindow
    bad_numbers: BadNumbers

    processes: Processes
    device: torch.device
    precision: torch.dtype
    image_shape: Sequence[int]
    val_indices: np.ndarray
    x_0_of: Callable[[np.ndarray], Tensor]  # image indices -> (B, C, H, W) in [-1, 1]
    to_pixels: Callable[[Tensor], Tensor]  # the way back, to uint8 (B, H, W, C)

    def __enter__(self) -> "BookKeeper":
        self.saved_at = time.monotonic()
        self.total_steps = self.identity["run"]["total_steps"]
        with ExitStack() as stack:  # undone if anything here fails
            self.run = self.processes.from_main(lambda: self._open(stack))
            self.stop = stack.enter_context(StopSignals())
            self.bar = stack.enter_context(tqdm(
                initial=self.first_step, total=self.total_steps, unit="step", dynamic_ncols=True,
                disable=not self.processes.is_main,
            ))  # fmt: skip
            due = self.first_step > 0 and self.first_step % self.config.sample_every == 0
            if due and not self.processes.from_main(self.grid_path(self.first_step).exists):
                self.sample(self.first_step)  # which a stop left no time for
            self.stack = stack.pop_all()
        return self

    def _open(self, stack: ExitStack) -> Path:
        self.run = self.run or run_folder.create_run(self.runs, self.identity["run"]["experiment"])
        stack.enter_context(run_folder.locked(self.run))
        run_folder.write_config(self.run, self.identity["run"]["experiment"], self.identity["config"], self.facts)
        self.metrics = stack.enter_context(MetricsLog(self.run, self.first_step))
        print(f"  goes to    {self.run}", flush=True)
        return self.run

    def __exit__(self, *error: object) -> None:
        self.stack.__exit__(*error)

    def after_step(self, done: int, grad_norm: Tensor) -> None:
        """All that is due when `done` steps are; after a signal to any process, save and end them all."""
        due = lambda every: done % every == 0 or done == self.total_steps
        epoch = min(done // self.steps_per_epoch + 1, self.config.epochs)
        self.bar.set_description(f"epoch {epoch}/{self.config.epochs}", refresh=False)
        self.bar.update()
        with self.window.paused(), failed_writes_explained(self.run):
            validating = due(self.config.validate_every)
            bounding = self.config.bits_per_dim_every and due(self.config.bits_per_dim_every * self.steps_per_epoch)
            if due(self.config.log_every) or validating or bounding:
                self.log(done, grad_norm, validating, bool(bounding))
            stop = self.stop.received is not None or self.processes.orphaned
            stopping = self.processes.any(stop) and done < self.total_steps
            minutes = (time.monotonic() - self.saved_at) / 60
            overdue = 0 < self.config.checkpoint_minutes <= minutes
            if due(self.config.checkpoint_every) or overdue or stopping:
                self.save(done)
            if due(self.config.sample_every) and not stopping:  # when stopping there may be no time for it
                self.sample(done)
        if stopping:
            self.processes.wait()  # torchrun ends all when one has ended, and rank 0 is to save in peace
            if self.processes.is_main:
                why = self.stop.received or "a signal to another process, or the end of torchrun"
                print(f"stopped by {why}, saved; go on with: python train.py --resume {self.run}")
            sys.exit(EXIT_STOPPED)

    def log(self, done: int, grad_norm: Tensor, validating: bool, bounding: bool) -> None:
        """A row of metrics, with validation losses and bits/dim when they are due, and the progress bar's numbers."""
        rate = self.optimizer.param_groups[0]["lr"]
        skipped = self.bad_numbers.read(self.config.max_skipped_steps, rate, self.scaler, self.run)
        row = {"step": done, "epoch": done / self.steps_per_epoch, **self.window.read(), "grad_norm": grad_norm.item(),
               "learning_rate": rate, "skipped_steps": skipped}  # fmt: skip
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} img/s")
        for column, net in {"val_loss": self.model, "val_loss_ema": self.ema_model}.items():
            if net is not None and validating:
                row[column] = validation_loss(
                    net, self.denoiser.scheduler, self.x_0_of, self.val_indices, self.config.validation_samples,
                    self.config.batch_size, self.config.seed, self.precision, self.processes,
                )  # fmt: skip
        if bounding:
            options = BoundOptions(BOUND_T_STRIDE, self.config.batch_size, self.config.seed)
            images = evenly(self.val_indices, self.config.bits_per_dim_images)
            bound = measure_bits_per_dim(self.denoiser, self.x_0_of, images, options, self.processes)
            row["bits_per_dim"] = bound.total
        if self.processes.is_main:
            self.metrics.write(**row)
            if validating:
                plot_losses(self.metrics.path, self.run / "losses.png", title=self.run.name)

    def sample(self, done: int) -> None:
        """A grid of samples, always of the same noise."""
        mine = self.processes.own_range(self.config.grid_images)
        settings = SamplerOptions(steps=min(self.config.grid_steps, self.config.timesteps_diff))
        drawing = ImageSampler(self.denoiser, settings, self.image_shape, self.config.seed, self.device)
        draw = lambda: generate(drawing, mine, self.config.batch_size, progress=False).images
        pixels = [self.to_pixels(draw()).numpy()] if mine else []
        everyones = [part for parts in self.processes.gather(pixels) for part in parts]
        if self.processes.is_main:
            save_grid(np.concatenate(everyones), self.grid_path(done))

    def grid_path(self, done: int) -> Path:
        return self.run / "samples" / f"step-{done:08d}.png"

    def save(self, done: int) -> None:
        """A checkpoint to resume and sample from."""
        self.saved_at = time.monotonic()
        if not self.processes.is_main:
            return
        self.metrics.flush()  # on the disk before the checkpoint that counts on it
        save_checkpoint(
            run_folder.checkpoint_path(self.run, done), config=self.identity["config"],
            run={**self.identity["run"], "step": done, "window": self.window.state(),
                 "bad_numbers": self.bad_numbers.state()},
            model=self.model.state_dict(), ema=self.ema_model.state_dict() if self.ema_model else None,
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
        )  # fmt: skip
        run_folder.keep(self.run, done, self.config.keep_checkpoints, self.config.keep_every)
