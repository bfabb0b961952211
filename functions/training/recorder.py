"""What a run writes beside its checkpoints: metrics, curves, grids of samples, and the bar."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_uint8
from functions.saved.run_folder import new_folder
from functions.support import processes
from functions.support.errors import printable
from functions.support.files import write_text
from functions.support.pictures import save_grid
from functions.support.processes import batches_of
from functions.training.metrics import MetricsLog, plot_losses
from functions.training.resuming import explain_failed_writes, locked
from functions.training.run import TrainingRun


class Recorder:
    """The files and the bar of a run, within the context `opened`. Rank 0 alone writes."""

    def __init__(self, run: TrainingRun):
        self.run = run
        # Only rank 0 has this log.
        self.metrics: MetricsLog | None = None
        # The speed is that of these steps since the last row, in these seconds.
        self.steps_timed = 0
        self.seconds = 0.0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Open the files, of a new run in a new folder, and the bar.

        Raises UserError for a failed write.
        """
        run = self.run
        is_new = not run.folder
        if is_new:
            run.folder = processes.on_main(new_folder, run.runs_folder, run.name)
        with explain_failed_writes(run.folder, run.how_to_resume), ExitStack() as stack:
            processes.on_main(self.open_files, stack, is_new)
            self.bar = tqdm(
                initial=run.step,
                total=run.total_steps,
                unit="step",
                dynamic_ncols=True,
                disable=not processes.is_main(),
            )
            stack.enter_context(self.bar)
            self.clock = time.perf_counter()
            yield

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

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measure the time of a training step in the context, and show it in the bar."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.steps_timed += 1
        epochs = self.run.config.epochs
        epoch = min(int(self.run.epoch) + 1, epochs)
        self.bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
        self.bar.update()

    def write(self, row: dict[str, float]) -> None:
        """Write a row of metrics.csv, with step, epoch and speed; draw curves after a validation.

        All processes call this, and rank 0 writes.
        """
        run = self.run
        speed = self.steps_timed * run.config.effective_batch / self.seconds
        self.steps_timed = 0
        self.seconds = 0.0
        row = {"step": run.step, "epoch": run.epoch, **row, "images_per_second": speed}
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {speed:.0f} img/s")
        if processes.is_main():
            self.metrics.write(row)
            if "val_loss" in row:
                title = printable(run.folder.name)
                plot_losses(self.metrics.path, run.folder / "losses.png", title)

    def show(self, images: Tensor) -> None:
        """Write a grid of images (N, C, H, W), in [-1, 1], also to TensorBoard."""
        samples = save_grid(to_uint8(images), self.run.file("samples"))
        self.metrics.show(samples, self.run.step)


@torch.no_grad()
def sample_grid(run: TrainingRun) -> Tensor:
    """Sample the images of a run's grid, always from the same noise: (N, C, H, W) in [-1, 1]."""
    denoiser = run.sample_denoiser
    batches = batches_of(range(run.config.grid_images), run.config.batch_size)
    with denoiser.evaluating():
        return torch.cat([run.data.sample(denoiser, places) for places in batches])
