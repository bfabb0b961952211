"""Between two steps of a training: metrics, validation, sample grids, checkpoints and stopping."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from torch import Tensor
from tqdm import tqdm

from data.batches import ImageFeeder
from data.pixels import to_model_range, to_uint8
from functions.evaluation.bits_per_dim import BoundOptions, evenly, measure_bits_per_dim
from functions.prediction import Denoiser
from functions.sampling.generation import ImageSampler, generate
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import TrainingState, save_checkpoint
from functions.support.errors import EXIT_STOPPED, CheckpointError
from functions.support.files import TensorFile
from functions.support.pictures import save_grid
from functions.support.processes import Processes
from functions.support.run_folder import Facts, Run, delete_old, locked
from functions.training.bad_numbers import BadNumbers
from functions.training.metrics import MetricsLog, TrainingWindow, fetch, plot_losses
from functions.training.stopping import StopSignals, failed_writes_explained
from functions.training.validation import validation_losses

# The bound takes at least one of every so many timesteps. Its error comes from the number of
# images, hardly from this.
BOUND_T_STRIDE = 50
# It returns columns of metrics.csv.
Measurement = Callable[[], dict[str, float]]


@dataclass
class Recorder:
    """Does what is due after a step, and ends the run after a signal: see `after_step`.

    Within `opened` it has the run folder's lock, its files and the progress bar. All processes
    validate and sample together; rank 0 writes.
    """

    run: Run
    facts: Facts
    state: TrainingState
    # Samples are drawn with this one. It has the EMA weights if there are any.
    denoiser: Denoiser
    images: ImageFeeder
    val_indices: np.ndarray
    processes: Processes

    def __post_init__(self) -> None:
        self.config = self.run.experiment.diffusion
        self.window = TrainingWindow(self.images.device, self.config.effective_batch)
        self.bad_numbers = BadNumbers(self.images.device)
        if self.run.checkpoint:
            self.load(self.run.checkpoint)
        self.saved_at = time.monotonic()
        self.stop = StopSignals()
        self.bar = tqdm(disable=True)
        # Rank 0 writes them.
        self.metrics: MetricsLog | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the run's folder, do what is left to do of an earlier start, and close it again."""
        run = self.run
        with ExitStack() as stack:
            run.folder = self.processes.on_main(lambda: self.open_folder(stack))
            stack.enter_context(self.stop)
            bar = tqdm(
                initial=run.first_step,
                total=self.facts.total_steps,
                unit="step",
                dynamic_ncols=True,
                disable=not self.processes.is_main,
            )
            self.bar = stack.enter_context(bar)
            self.catch_up(run.first_step)
            # The data are prepared and the network is compiled, so nobody is slow from here on.
            self.processes.wait_less()
            yield

    def open_folder(self, stack: ExitStack) -> Path:
        """Make the folder, lock it and begin its files, in rank 0; the stack closes them."""
        run = self.run
        run.make_folder()
        stack.enter_context(locked(run.folder))
        config = run.write_config(self.facts)
        self.metrics = MetricsLog(run.folder, run.first_step)
        # TensorBoard still writes when it is closed.
        close = failed_writes_explained(run.folder)(self.metrics.tensorboard.close)
        stack.callback(close)
        self.metrics.tensorboard.add_text("config", f"```\n{config}\n```", run.first_step)
        print(f"  goes to    {run.folder}", flush=True)
        return run.folder

    def catch_up(self, first_step: int) -> None:
        """Do what a run that was stopped left to the one that goes on.

        A signal ends it here, too: then it is left to the next one.
        """
        checkpoint = self.run.checkpoint
        if not checkpoint:
            return
        with self.window.paused(), failed_writes_explained(self.run.folder):
            unmeasured = checkpoint.contents["run"].get("unmeasured", False)
            if unmeasured:
                measurements = self.measurements_due(first_step)
                unmeasured = self.write_row({"step": first_step}, measurements)
            # The next resume takes the config from the checkpoint, so a changed one is saved now.
            if checkpoint.contents["config"] != self.run.experiment.to_dict():
                self.save(first_step, unmeasured)
            if self.is_stopping(first_step):
                self.stop_run()

            if self.is_due(self.config.sample_every, first_step):
                grid = self.run.path_of("samples", first_step)
                if not self.processes.on_main(grid.exists):
                    self.sample(first_step)

    def load(self, checkpoint: TensorFile) -> None:
        """Go on with the numbers that `save` wrote."""
        saved = checkpoint.contents["run"]
        try:
            self.window.load(saved["window"])
            self.bad_numbers.load(saved["bad_numbers"])
        except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"{checkpoint.path}: its part 'run' is not what this version writes, "
                "so its training cannot go on exactly; it can be sampled from"
            ) from error

    def save(self, done: int, unmeasured: bool = False) -> None:
        """Write a checkpoint to resume and sample from.

        It remembers whether the row of metrics lacks what was to be measured for it.
        """
        self.saved_at = time.monotonic()
        if not self.processes.is_main:
            return
        run = {
            "experiment": self.run.name,
            "step": done,
            "unmeasured": unmeasured,
            **vars(self.facts),
            "window": self.window.state(),
            "bad_numbers": self.bad_numbers.state(),
        }
        path = self.run.path_of("checkpoints", done)
        save_checkpoint(path, self.run.experiment.to_dict(), run, self.state)
        delete_old(self.run.folder, done, self.config.keep_checkpoints, self.config.keep_every)

    def is_due(self, every: int, done: int) -> bool:
        """Return whether it is the turn of what is done every so many steps; 0 means never."""
        return every > 0 and (done % every == 0 or done == self.facts.total_steps)

    def measurements_due(self, done: int) -> list[Measurement]:
        """Return what is to be measured on held-out images when `done` steps are done."""
        measurements = []
        if self.is_due(self.config.validate_every, done):
            measurements.append(self.validate)
        if self.is_due(self.config.bits_per_dim_every * self.facts.steps_per_epoch, done):
            measurements.append(self.bits_per_dim)
        return measurements

    def is_stopping(self, done: int) -> bool:
        """Return whether a signal to any process ends all of them after this step."""
        stop = self.stop.received is not None or self.processes.orphaned
        # They agree here, so that they stop after the same step.
        return self.processes.any(stop) and done < self.facts.total_steps

    def after_step(self, done: int, grad_norm: Tensor) -> None:
        """Do all that is due when `done` steps are done.

        After a signal to any process, save and end all of them. Whoever stops a run may leave
        little time, so what is to be measured, and the grid, are left to the run that goes on.
        """
        config = self.config
        epoch = min(done // self.facts.steps_per_epoch + 1, config.epochs)
        self.bar.set_description(f"epoch {epoch}/{config.epochs}", refresh=False)
        self.bar.update()

        # The speed in images a second is of training alone, so its clock is stopped.
        with self.window.paused(), failed_writes_explained(self.run.folder):
            measurements = self.measurements_due(done)
            unmeasured = False
            if self.is_due(config.log_every, done) or measurements:
                unmeasured = self.log(done, grad_norm, measurements)

            stopping = self.is_stopping(done)
            minutes = (time.monotonic() - self.saved_at) / 60
            overdue = 0 < config.checkpoint_minutes <= minutes
            if self.is_due(config.checkpoint_every, done) or overdue or stopping:
                self.save(done, unmeasured)
            if self.is_due(config.sample_every, done) and not stopping:
                self.sample(done)

        if stopping:
            self.stop_run()

    def stop_run(self) -> NoReturn:
        """End all processes of a run that is saved, with a status that says so."""
        # torchrun ends all processes when one has ended. So they wait here for each other, until
        # rank 0 has saved.
        self.processes.any(False)
        reason = self.stop.received or "a signal to another process, or the end of torchrun"
        self.processes.print_main(
            f"stopped by {reason}, saved; go on with: python train.py --resume {self.run.folder}"
        )
        sys.exit(EXIT_STOPPED)

    def log(self, done: int, grad_norm: Tensor, measurements: list[Measurement]) -> bool:
        """Write a row of metrics, and show loss and speed beside the progress bar.

        Returns what `write_row` does.
        """
        learning_rate = self.state.optimizer.param_groups[0]["lr"]

        # A row without validation waits for the device only here.
        window = self.window.sums()
        bad_numbers = self.bad_numbers.counts(self.state.scaler)
        numbers = fetch({"grad_norm": grad_norm, **window, **bad_numbers})

        # Too many bad steps in a row end the run here.
        max_skipped = self.config.max_skipped_steps
        skipped = self.bad_numbers.read(numbers, max_skipped, learning_rate, self.run.folder)
        row = {
            "step": done,
            **self.window.read(numbers),
            "grad_norm": numbers["grad_norm"],
            "learning_rate": learning_rate,
            "skipped_steps": skipped,
        }
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} img/s")
        return self.write_row(row, measurements)

    def write_row(self, row: dict[str, float], measurements: list[Measurement]) -> bool:
        """Write a row of metrics, with the columns of these measurements.

        Returns whether some were left out, as a signal had come before they began.
        """
        row["epoch"] = row["step"] / self.facts.steps_per_epoch
        unmeasured = False
        # All processes measure, and rank 0 writes.
        for measure in measurements:
            unmeasured = self.is_stopping(row["step"])
            if unmeasured:
                break
            row |= measure()
        if self.processes.is_main:
            self.metrics.write(**row)
            if measurements:
                folder = self.run.folder
                plot_losses(self.metrics.path, folder / "losses.png", title=folder.name)
        return unmeasured

    def validate(self) -> dict[str, float]:
        """Return the columns of a validation of the raw weights, and of the EMA weights if any."""
        denoisers = {"": replace(self.denoiser, network=self.state.model)}
        # With an average, `self.denoiser` has its weights.
        if self.state.ema_model:
            denoisers["_ema"] = self.denoiser
        losses = validation_losses(
            [*denoisers.values()],
            self.images.gather,
            self.val_indices,
            self.config,
            self.processes,
        )
        columns = {}
        for suffix, (loss, eps_error) in zip(denoisers, losses, strict=True):
            columns[f"val_loss{suffix}"] = loss
            columns[f"val_eps_error{suffix}"] = eps_error
        return columns

    def bits_per_dim(self) -> dict[str, float]:
        """Return the column of the variational bound, of some of the held-out images."""
        options = BoundOptions(BOUND_T_STRIDE, self.config.batch_size, self.config.seed)
        bound = measure_bits_per_dim(
            self.denoiser,
            lambda indices: to_model_range(self.images.gather(indices)),
            evenly(self.val_indices, self.config.bits_per_dim_images),
            options,
            self.processes,
        )
        return {"bits_per_dim": bound.total}

    def sample(self, done: int) -> None:
        """Draw a grid of samples, always from the same noise, and write it."""
        config = self.config
        steps = min(config.grid_steps, config.timesteps_diff)
        options = SamplerOptions(config.grid_sampler, steps)
        # No CUDA graph here: one that cannot be recorded leaves PyTorch's generator, which dropout
        # draws from, unusable. A grid takes seconds as it is.
        sampler = ImageSampler(
            self.denoiser,
            options,
            self.run.experiment.model.image_shape,
            config.seed,
            self.images.device,
            config.batch_size,
            use_cuda_graph=False,
        )

        # Each process samples a part of the grid. With more processes than images some have none.
        part = None
        indices = self.processes.shard(config.grid_images)
        if indices:
            samples = generate(sampler, indices)
            part = to_uint8(samples.images).numpy()
        parts = [part for part in self.processes.gather(part) if part is not None]

        if self.processes.is_main:
            grid = save_grid(np.concatenate(parts), self.run.path_of("samples", done))
            self.metrics.tensorboard.add_image("samples", np.asarray(grid), done, dataformats="HWC")
