"""What happens between two steps of a training: metrics, validation, sample grids, checkpoints, and stopping."""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_model_range, to_uint8
from functions.evaluation.bits_per_dim import BoundOptions, evenly, measure_bits_per_dim
from functions.prediction import Denoiser
from functions.sampling.generation import ImageSampler, generate
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import TrainingState, save_checkpoint
from functions.support.errors import CheckpointError
from functions.support.pictures import save_grid
from functions.support.processes import Processes
from functions.support.run_folder import Run, delete_old, locked
from functions.training.bad_numbers import BadNumbers
from functions.training.metrics import MetricsLog, TrainingWindow, plot_losses
from functions.training.stopping import EXIT_STOPPED, StopSignals, failed_writes_explained
from functions.training.validation import validation_losses

# Of the timesteps in bits/dim: its error comes from the number of images, hardly from this
BOUND_T_STRIDE = 50


@dataclass
class BookKeeper:
    """Entered, it holds the run folder's lock, files and the progress bar; `after_step` does what is due.

    Validation and sampling are done by all processes together; rank 0 writes.
    """

    run: Run
    state: TrainingState
    denoiser: Denoiser  # to sample with: of the EMA weights if there are any
    images: object  # an ImageFeeder
    val_indices: np.ndarray
    processes: Processes

    def __post_init__(self) -> None:
        self.config = self.run.experiment.diffusion
        self.window = TrainingWindow(self.images.device, self.config.effective_batch)
        self.bad_numbers = BadNumbers(self.images.device)

    def __enter__(self) -> "BookKeeper":
        first_step = self.run.first_step
        self.steps_per_epoch, self.total_steps = (
            self.run.facts["steps_per_epoch"],
            self.run.facts["total_steps"],
        )
        self.saved_at = time.monotonic()
        if self.run.checkpoint:
            self.load(self.run.remembered)
        with ExitStack() as stack:  # undone if anything here fails
            self.run.folder = self.processes.from_main(lambda: self.open_folder(stack))
            self.stop = stack.enter_context(StopSignals())
            self.bar = stack.enter_context(
                tqdm(
                    initial=first_step,
                    total=self.total_steps,
                    unit="step",
                    dynamic_ncols=True,
                    disable=not self.processes.is_main,
                )
            )
            due = first_step > 0 and first_step % self.config.sample_every == 0
            if due and not self.processes.from_main(self.run.path_of("samples", first_step).exists):
                self.sample(first_step)  # which a stop left no time for
            if (
                self.run.checkpoint
                and self.run.checkpoint.contents["config"] != self.run.experiment.to_dict()
            ):
                with failed_writes_explained(self.run.folder):
                    # So that from now on the run is resumed as it was changed
                    self.save(first_step)
            self.stack = stack.pop_all()
        return self

    def open_folder(self, stack: ExitStack) -> Path:
        """In rank 0: make the folder, hold it, and begin its files."""
        self.run.make_folder()
        stack.enter_context(locked(self.run.folder))
        config = self.run.write_config()
        self.metrics = MetricsLog(self.run.folder, self.run.first_step)
        stack.callback(self.metrics.tensorboard.close)
        self.metrics.tensorboard.add_text("config", f"```\n{config}\n```", self.run.first_step)
        print(f"  goes to    {self.run.folder}", flush=True)
        return self.run.folder

    def __exit__(self, *error: object) -> None:
        with failed_writes_explained(self.run.folder):  # TensorBoard still writes when it is closed
            self.stack.__exit__(*error)

    def load(self, remembered: dict) -> None:
        """Go on with the numbers that `save` wrote."""
        try:
            self.window.load(remembered["window"])
            self.bad_numbers.load(remembered["bad_numbers"])
        except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"{self.run.checkpoint.path}: its part 'run' is not what this version writes, so its training cannot "
                "go on exactly; it can be sampled from"
            ) from error

    def save(self, done: int) -> None:
        """A checkpoint to resume and sample from."""
        self.saved_at = time.monotonic()
        if not self.processes.is_main:
            return
        remembered = {"window": self.window.state(), "bad_numbers": self.bad_numbers.state()}
        run = {"experiment": self.run.name, "step": done, **self.run.facts, **remembered}
        save_checkpoint(
            self.run.path_of("checkpoints", done), self.run.experiment.to_dict(), run, self.state
        )
        delete_old(self.run.folder, done, self.config.keep_checkpoints, self.config.keep_every)

    def after_step(self, done: int, grad_norm: Tensor) -> None:
        """All that is due when `done` steps are; after a signal to any process, save and end them all."""
        due = lambda every: done % every == 0 or done == self.total_steps
        epoch = min(done // self.steps_per_epoch + 1, self.config.epochs)
        self.bar.set_description(f"epoch {epoch}/{self.config.epochs}", refresh=False)
        self.bar.update()
        with self.window.paused(), failed_writes_explained(self.run.folder):
            validating = due(self.config.validate_every)
            bounding = self.config.bits_per_dim_every and due(
                self.config.bits_per_dim_every * self.steps_per_epoch
            )
            if due(self.config.log_every) or validating or bounding:
                self.log(done, grad_norm, validating, bool(bounding))
            stop = self.stop.received is not None or self.processes.orphaned
            stopping = self.processes.any(stop) and done < self.total_steps
            overdue = 0 < self.config.checkpoint_minutes <= (time.monotonic() - self.saved_at) / 60
            if due(self.config.checkpoint_every) or overdue or stopping:
                self.save(done)
            # When stopping there may be no time for it
            if due(self.config.sample_every) and not stopping:
                self.sample(done)
        if stopping:
            # Waits: torchrun ends all when one has ended, and rank 0 is to save in peace
            self.processes.any(False)
            why = self.stop.received or "a signal to another process, or the end of torchrun"
            self.processes.say(
                f"stopped by {why}, saved; go on with: python train.py --resume {self.run.folder}"
            )
            sys.exit(EXIT_STOPPED)

    def log(self, done: int, grad_norm: Tensor, validating: bool, bounding: bool) -> None:
        """A row of metrics, with validation losses and bits/dim when they are due, and the progress bar's numbers."""
        rate = self.state.optimizer.param_groups[0]["lr"]
        numbers = torch.cat(
            [grad_norm[None], self.window.numbers(), self.bad_numbers.numbers(self.state.scaler)]
        )
        norm, *numbers = numbers.cpu().tolist()  # the one wait of a row without validation
        skipped = self.bad_numbers.read(
            numbers[3:], self.config.max_skipped_steps, rate, self.run.folder
        )
        row = {
            "step": done,
            "epoch": done / self.steps_per_epoch,
            **self.window.read(numbers[:3]),
            "grad_norm": norm,
            "learning_rate": rate,
            "skipped_steps": skipped,
        }
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} img/s")
        if validating:
            networks = {"": self.state.model} | (
                {"_ema": self.state.ema_model} if self.state.ema_model else {}
            )
            denoisers = [replace(self.denoiser, network=network) for network in networks.values()]
            losses = validation_losses(
                denoisers, self.images.gather, self.val_indices, self.config, self.processes
            )
            for suffix, (loss, eps_error) in zip(networks, losses, strict=True):
                row |= {f"val_loss{suffix}": loss, f"val_eps_error{suffix}": eps_error}
        if bounding:
            options = BoundOptions(BOUND_T_STRIDE, self.config.batch_size, self.config.seed)
            held_out = evenly(self.val_indices, self.config.bits_per_dim_images)
            x_0_of = lambda indices: to_model_range(self.images.gather(indices))
            bound = measure_bits_per_dim(self.denoiser, x_0_of, held_out, options, self.processes)
            row["bits_per_dim"] = bound.total
        if self.processes.is_main:
            self.metrics.write(**row)
            if validating:
                plot_losses(
                    self.metrics.path, self.run.folder / "losses.png", title=self.run.folder.name
                )

    def sample(self, done: int) -> None:
        """A grid of samples, always of the same noise."""
        mine = self.processes.own_range(self.config.grid_images)
        options = SamplerOptions(steps=min(self.config.grid_steps, self.config.timesteps_diff))
        sampler = ImageSampler(
            self.denoiser, options, self.run.image_shape, self.config.seed, self.images.device
        )
        pixels = (
            to_uint8(generate(sampler, mine, self.config.batch_size).images).numpy()
            if mine
            else None
        )
        parts = [part for part in self.processes.gather(pixels) if part is not None]
        if self.processes.is_main:
            grid = save_grid(np.concatenate(parts), self.run.path_of("samples", done))
            self.metrics.tensorboard.add_image("samples", np.asarray(grid), done, dataformats="HWC")
