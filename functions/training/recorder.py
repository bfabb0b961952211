"""The work between two steps: metrics, validation, sample grids, checkpoints and stopping."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from data.batches import ImageFeeder
from data.pixels import to_model_range, to_uint8
from functions.evaluation.bits_per_dim import BoundOptions, evenly_spaced, measure_bits_per_dim
from functions.prediction import Denoiser
from functions.sampling.generation import ImageSampler, generate
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import TrainingState, save_checkpoint, save_snapshot
from functions.support.pictures import save_grid
from functions.support.processes import Processes
from functions.support.run_folder import Facts, Run, delete_old, locked
from functions.training.bad_numbers import BadNumbers
from functions.training.metrics import MetricsLog, TrainingWindow, fetch, plot_losses
from functions.training.stopping import StopSignals, explain_failed_writes
from functions.training.validation import validation_losses

# The variational bound uses one timestep of this many, and more of the first ones. Its error comes
# mostly from the number of images.
BOUND_T_STRIDE = 50
# A measurement returns columns of metrics.csv.
Measurement = Callable[[], dict[str, float]]


@dataclass
class Recorder:
    """The records of a run: `after_step` does everything that is due after a step.

    Within the context `opened` the run folder is locked, and its files and the progress bar are
    open. All processes validate and sample together, and rank 0 writes.
    """

    run: Run
    facts: Facts
    state: TrainingState
    # This denoiser draws the samples, with the EMA weights if there are any.
    denoiser: Denoiser
    feeder: ImageFeeder
    val_indices: np.ndarray
    processes: Processes

    def __post_init__(self) -> None:
        self.config = self.run.experiment.diffusion
        self.window = TrainingWindow(self.feeder.device, self.config.effective_batch)
        self.bad_numbers = BadNumbers(self.feeder.device)
        if self.run.checkpoint:
            saved = self.run.checkpoint.contents["run"]
            self.window.load(saved["window"])
            self.bad_numbers.load(saved["bad_numbers"])
        self.saved_at = time.monotonic()
        self.stop_signals = StopSignals()
        self.bar = tqdm(disable=True)
        # Only rank 0 has this log.
        self.metrics: MetricsLog | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the run folder, and open its files and the progress bar."""
        run = self.run
        with ExitStack() as stack:
            run.folder = self.processes.on_main(lambda: self.open_folder(stack))
            stack.enter_context(self.stop_signals)
            bar = tqdm(
                initial=run.first_step,
                total=self.facts.total_steps,
                unit="step",
                dynamic_ncols=True,
                disable=not self.processes.is_main,
            )
            self.bar = stack.enter_context(bar)
            # The next resumed run takes its config from the checkpoint, so changes are saved now.
            checkpoint = run.checkpoint
            if checkpoint and checkpoint.contents["config"] != run.experiment.to_dict():
                with explain_failed_writes(run.folder):
                    self.save(run.first_step)
            yield

    def open_folder(self, stack: ExitStack) -> Path:
        """Create the run folder in rank 0, lock it and open its files; the stack closes them."""
        run = self.run
        run.make_folder()
        stack.enter_context(locked(run.folder))
        config = run.write_config(self.facts)
        self.metrics = MetricsLog(run.folder, run.first_step)
        # Closing TensorBoard writes to the disk, which may fail.
        close = explain_failed_writes(run.folder)(self.metrics.tensorboard.close)
        stack.callback(close)
        self.metrics.tensorboard.add_text("config", f"```\n{config}\n```", run.first_step)
        print(f"  goes to    {run.folder}", flush=True)
        return run.folder

    def save(self, done: int) -> None:
        """Write a checkpoint to resume and sample from."""
        self.saved_at = time.monotonic()
        if not self.processes.is_main:
            return
        contents = {
            "experiment": self.run.name,
            "step": done,
            **vars(self.facts),
            "window": self.window.state(),
            "bad_numbers": self.bad_numbers.state(),
        }
        path = self.run.path_of("checkpoints", done)
        save_checkpoint(path, self.run.experiment.to_dict(), contents, self.state)
        delete_old(self.run.folder, done, self.config.keep_checkpoints, self.config.keep_every)

    def save_snapshot(self, done: int) -> None:
        """Write the snapshot of a step."""
        if not self.processes.is_main:
            return
        state = self.state
        path = self.run.path_of("snapshots", done)
        part, model = ("ema", state.ema_model) if state.ema_model else ("model", state.model)
        config = self.run.experiment.to_dict()
        facts = {"experiment": self.run.name, "step": done, **vars(self.facts)}
        save_snapshot(path, config, facts, part, model)

    def is_due(self, every: int, done: int) -> bool:
        """Return whether work that is done every `every` steps is due; 0 means never."""
        return every > 0 and (done % every == 0 or done == self.facts.total_steps)

    def measurements_due(self, done: int) -> list[Measurement]:
        """Return the measurements on held-out images that are due when `done` steps are done."""
        measurements = []
        if self.is_due(self.config.validate_every, done):
            measurements.append(self.validate)
        if self.is_due(self.config.bits_per_dim_every * self.facts.steps_per_epoch, done):
            measurements.append(self.bits_per_dim)
        return measurements

    def after_step(self, done: int, grad_norm: Tensor) -> bool:
        """Do everything that is due when `done` steps are done, and return whether to go on.

        After a signal to any process, this saves a checkpoint and returns False in all of them.
        There may be little time after a signal, so nothing is measured and no grid is drawn.
        """
        config = self.config
        epoch = min(done // self.facts.steps_per_epoch + 1, config.epochs)
        self.bar.set_description(f"epoch {epoch}/{config.epochs}", refresh=False)
        self.bar.update()

        # The clock stops here, so that images_per_second is the speed of training only.
        with self.window.paused(), explain_failed_writes(self.run.folder):
            # All processes get the same answer, so that they stop after the same step.
            stopping = self.processes.any(self.stop_signals.received is not None)
            stopping = stopping and done < self.facts.total_steps
            measurements = self.measurements_due(done)
            if self.is_due(config.log_every, done) or measurements:
                self.log(done, grad_norm, [] if stopping else measurements)
            # The snapshot comes before the checkpoint: a run that is killed in between repeats the
            # step, and writes it again.
            if self.is_due(config.snapshot_every, done):
                self.save_snapshot(done)
            minutes = (time.monotonic() - self.saved_at) / 60
            overdue = 0 < config.checkpoint_minutes <= minutes
            if self.is_due(config.checkpoint_every, done) or overdue or stopping:
                self.save(done)
            if self.is_due(config.sample_every, done) and not stopping:
                self.sample(done)

        if stopping:
            # torchrun ends all processes when one has ended. So they wait until rank 0 has saved.
            self.processes.any(False)
            reason = self.stop_signals.received or "a signal to another process"
            self.processes.print_main(
                f"stopped by {reason}, saved; "
                f"continue with: python train.py --resume {self.run.folder}"
            )
        return not stopping

    def log(self, done: int, grad_norm: Tensor, measurements: list[Measurement]) -> None:
        """Write a row of metrics with these measurements, and show loss and speed in the bar."""
        learning_rate = self.state.optimizer.param_groups[0]["lr"]

        # For a row without measurements, this is the only wait for the device.
        sums = self.window.sums()
        counts = self.bad_numbers.counts(self.state.scaler)
        scalars = fetch({"grad_norm": grad_norm, **sums, **counts})

        # Too many bad steps in a row end the run here.
        max_skipped = self.config.max_skipped_steps
        skipped = self.bad_numbers.check_counts(
            scalars, max_skipped, learning_rate, self.run.folder
        )
        row = {
            "step": done,
            "epoch": done / self.facts.steps_per_epoch,
            **self.window.read(scalars),
            "grad_norm": scalars["grad_norm"],
            "learning_rate": learning_rate,
            "skipped_steps": skipped,
        }
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} img/s")
        # All processes measure, and rank 0 writes.
        for measure in measurements:
            row |= measure()
        if self.processes.is_main:
            self.metrics.write(**row)
            if measurements:
                folder = self.run.folder
                plot_losses(self.metrics.path, folder / "losses.png", title=folder.name)

    def validate(self) -> dict[str, float]:
        """Validate the raw weights, and the EMA weights if there are any; return the columns."""
        denoisers = {"": replace(self.denoiser, network=self.state.model)}
        if self.state.ema_model:
            # In this case `self.denoiser` has the EMA weights.
            denoisers["_ema"] = self.denoiser
        losses = validation_losses(
            [*denoisers.values()],
            self.feeder.gather,
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
        """Measure the variational bound on a part of the held-out images; return its column."""
        options = BoundOptions(BOUND_T_STRIDE, self.config.batch_size, self.config.seed)
        bound = measure_bits_per_dim(
            self.denoiser,
            lambda indices: to_model_range(self.feeder.gather(indices)),
            evenly_spaced(self.val_indices, self.config.bits_per_dim_images),
            options,
            self.processes,
        )
        return {"bits_per_dim": bound.total}

    def sample(self, done: int) -> None:
        """Draw a grid of samples, always from the same noise, and write it to a file."""
        config = self.config
        steps = min(config.grid_steps, config.timesteps_diff)
        options = SamplerOptions(config.grid_sampler, steps)
        sampler = ImageSampler(
            self.denoiser,
            options,
            self.run.experiment.model.image_shape,
            config.seed,
            self.feeder.device,
            config.batch_size,
        )

        # Each process samples a part of the grid, or nothing if there are more processes than
        # images.
        part = None
        indices = self.processes.shard(config.grid_images)
        if indices:
            samples = generate(sampler, indices)
            part = to_uint8(samples.images).numpy()
        parts = [part for part in self.processes.gather(part) if part is not None]

        if self.processes.is_main:
            grid = save_grid(np.concatenate(parts), self.run.path_of("samples", done))
            pixels = np.asarray(grid.convert("RGB"))
            self.metrics.tensorboard.add_image("samples", pixels, done, dataformats="HWC")
