"""The metrics of a run: metrics.csv for people and scripts, and the same in TensorBoard."""

import csv
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from functions.saved.run_folder import timestamp
from functions.support.files import write_text
from functions.support.pictures import save_figure

# The held-out loss by quarter of t, from the least noise to the most, with the weights that draw
# samples. It shows where a run learns.
QUARTERS = ("val_loss_q0", "val_loss_q1", "val_loss_q2", "val_loss_q3")
COLUMNS = (
    # The number of optimiser steps done.
    "step",
    # The number of epochs done, a fraction included.
    "epoch",
    # The mean training loss of the steps since the previous row.
    "loss",
    # The corresponding squared error of eps; with objective = "eps" it equals the loss.
    "eps_error",
    # Loss and error of eps on held-out images, with the raw weights; empty in rows without
    # validation.
    "val_loss",
    "val_eps_error",
    # Loss and error of eps on held-out images, with the EMA weights.
    "val_loss_ema",
    "val_eps_error_ema",
    # The gradient norm of the last step, before clipping.
    "grad_norm",
    "learning_rate",
    # The speed of training, excluding the time for validation and samples.
    "images_per_second",
    # The number of steps skipped so far, because their gradients were not finite.
    "skipped_steps",
    *QUARTERS,
)


class MetricsLog:
    """The file metrics.csv, and TensorBoard's log, which also has the config and the samples.

    A row is on the disk when `write` returns. Rows after `resume_step` are dropped: the resumed run
    repeats these steps.
    """

    def __init__(self, run: Path, resume_step: int = 0, config: str = ""):
        self.path = run / "metrics.csv"
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        if self.path.exists():
            columns, rows = read_rows(self.path)
            if columns == [*COLUMNS]:
                writer.writerows(row for row in rows if int(row[0]) <= resume_step)
            else:
                aside = self.path.rename(run / f"metrics-{timestamp()}.csv")
                print(f"warning: {self.path} has other columns; it is now {aside}")
        write_text(self.path, text.getvalue())
        self.tensorboard = SummaryWriter(run / "tensorboard", purge_step=resume_step + 1)
        self.tensorboard.add_text("config", f"```\n{config}\n```", resume_step)

    def write(self, **values: float) -> None:
        """Write one row. Raises ValueError, and writes nothing, for a name not in COLUMNS."""
        cells = {
            name: f"{value:.6g}" if isinstance(value, float) else value
            for name, value in values.items()
        }
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(cells)
            # The row reaches the disk before the next checkpoint, so a run that resumes from that
            # checkpoint finds the row.
            file.flush()
            os.fsync(file.fileno())
        for column, value in values.items():
            if column != "step":
                self.tensorboard.add_scalar(column, value, values["step"])
        self.tensorboard.flush()

    def show(self, samples: Image.Image, step: int) -> None:
        """Add the picture of a step's samples to TensorBoard's log."""
        pixels = np.asarray(samples.convert("RGB"))
        self.tensorboard.add_image("samples", pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left to TensorBoard's log."""
        self.tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Return the rows of a metrics.csv as numbers, None where a cell is empty; no other lines."""
    columns, rows = read_rows(path)
    return [
        {name: float(cell) if cell else None for name, cell in zip(columns, row, strict=True)}
        | {"step": int(row[0])}
        for row in rows
    ]


def read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the columns of a metrics.csv, and the cells of its rows: of each line of numbers."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        columns, *lines = [*csv.reader(file)] or [[]]
    # A row that a kill has cut has too few cells, or a short last one. No checkpoint has its step,
    # so a resumed run writes it again.
    return columns, [row for row in lines if len(row) == len(columns) and are_numbers(row)]


def are_numbers(row: list[str]) -> bool:
    """Return whether a step is the first cell, and each other one is empty or a number."""
    try:
        for cell in filter(None, row):
            float(cell)
    except ValueError:
        return False
    return row[0].isdecimal()


class TrainingWindow:
    """The steps since the last row: sums on the device, which checkpoints have, and the speed.

    The optimiser skips steps whose gradients are not finite. They are counted, but not their loss.
    """

    def __init__(self, device: torch.device, images_per_step: int):
        # The loss, the error of eps and 1, summed over the images of all steps since the last row.
        self.sums = torch.zeros(3, device=device)
        # The steps that were skipped: their number since the run began, and since the last good
        # step.
        self.skipped = torch.zeros(2, device=device)
        self.images_per_step = images_per_step
        self.start_clock()

    def start_clock(self) -> None:
        """Begin to measure the speed."""
        self.steps_timed = 0
        # Each pause moves this time forward.
        self.clock = time.perf_counter()

    def add(self, sums: Tensor, skipped: Tensor) -> None:
        """Add a step's sums over images of loss, error of eps and 1 (3,); skipped () is 1 or 0."""
        self.sums += torch.where(skipped > 0, 0.0, sums)
        self.skipped += skipped
        # A good step ends the row of skipped ones.
        self.skipped[1] *= skipped
        self.steps_timed += 1

    def read(self, grad_norm: Tensor) -> dict[str, float]:
        """Return the columns of a row, and start the next window; this waits for the device.

        `grad_norm` () is the last step's. The means are nan if all steps were skipped.
        """
        # All numbers are copied in one transfer, so that the host waits only once.
        values = torch.stack([*self.sums, self.skipped[0], grad_norm.float()])
        loss, eps_error, image_count, skipped, last_grad_norm = values.tolist()
        seconds = time.perf_counter() - self.clock
        image_count = image_count or math.nan
        row = {
            "loss": loss / image_count,
            "eps_error": eps_error / image_count,
            "grad_norm": last_grad_norm,
            "images_per_second": self.steps_timed * self.images_per_step / seconds,
            "skipped_steps": int(skipped),
        }
        self.sums.zero_()
        self.start_clock()
        return row

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock within the context, whose work is not training."""
        start = time.perf_counter()
        yield
        # `read` may have started the next window within the context.
        self.clock += time.perf_counter() - max(start, self.clock)


def plot_losses(metrics: Path, path: Path, title: str = "") -> None:
    """Plot the curves of a metrics.csv: the error of eps, and the held-out loss by quarter of t.

    Errors of eps can be compared between objectives.
    """
    rows = read_metrics(metrics)
    figure = Figure(figsize=(9.5, 4.5))
    axis = figure.subplots()
    for column, color, label in (
        ("eps_error", "0.7", "error of noise, training"),
        ("val_eps_error", "0.4", "error of noise, held out"),
        ("val_eps_error_ema", "black", "error of noise, held out, EMA"),
        *((name, None, f"loss, held out, quarter {q} of t") for q, name in enumerate(QUARTERS, 1)),
    ):
        points = {row["step"]: row[column] for row in rows if row.get(column) is not None}
        if points:
            axis.plot(points.keys(), points.values(), ".-", color=color, label=label)

    # The error starts near 1 and soon falls far below. On a linear axis the rest would look flat.
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(color="0.92")
    axis.set(xlabel="optimiser step", ylabel="mean squared error", title=title)
    axis.legend(loc=(1.02, 0.3))
    figure.tight_layout()
    save_figure(figure, path)
