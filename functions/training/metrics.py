"""The metrics of a run: metrics.csv for people and scripts, and the same in TensorBoard."""

import csv
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from functions.support.files import write_text
from functions.support.pictures import save_figure

# The held-out loss by quarter of t, from the least noise to the most, with the weights that draw
# samples. It shows where a run learns.
QUARTERS = ("val_loss_q0", "val_loss_q1", "val_loss_q2", "val_loss_q3")


class MetricsLog:
    """The file metrics.csv, and TensorBoard's log, which also has the config and the samples.

    A row is on the disk when `write` returns. Rows after `resume_step` are dropped: the resumed run
    repeats these steps.
    """

    def __init__(self, run: Path, resume_step: int = 0, config: str = ""):
        self.path = run / "metrics.csv"
        self.columns, rows = read_rows(self.path) if self.path.exists() else ([], [])
        self.rewrite([row for row in rows if int(row[0]) <= resume_step])
        self.tensorboard = SummaryWriter(run / "tensorboard", purge_step=resume_step + 1)
        self.tensorboard.add_text("config", f"```\n{config}\n```", resume_step)

    def rewrite(self, rows: list[list[str]]) -> None:
        """Write the file anew, with these rows; those of fewer columns get empty cells."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for row in [self.columns, *rows]:
            writer.writerow(row + [""] * (len(self.columns) - len(row)))
        write_text(self.path, text.getvalue())

    def write(self, row: dict[str, float]) -> None:
        """Write one row, which begins with the step. A name that is new becomes a column."""
        if new := [name for name in row if name not in self.columns]:
            _, rows = read_rows(self.path)
            self.columns += new
            self.rewrite(rows)
        cells = {
            name: f"{value:.6g}" if isinstance(value, float) else value
            for name, value in row.items()
        }
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(cells)
            # The row reaches the disk before the next checkpoint, so a run that resumes from that
            # checkpoint finds the row.
            file.flush()
            os.fsync(file.fileno())
        for name, value in row.items():
            if name != "step":
                self.tensorboard.add_scalar(name, value, row["step"])
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


@dataclass
class Window:
    """The steps since the last row, which a checkpoint has, too.

    Steps whose gradients are not finite are skipped. They are counted, but not their losses.
    """

    # Each loss by its name, summed over the images of the steps that were not skipped.
    sums: dict[str, float] = field(default_factory=dict)
    # The number of these images.
    images: int = 0
    # The number of steps that were skipped since the run began, and since the last good step.
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def add(self, sums: dict[str, float], images: int) -> None:
        """Add a step's losses, each summed over its images."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.images += images
        self.skipped_in_a_row = 0

    def skip(self, names: Iterable[str]) -> None:
        """Count a step that was skipped, whose losses have these names."""
        for name in names:
            self.sums.setdefault(name, 0.0)
        self.skipped_steps += 1
        self.skipped_in_a_row += 1

    def means(self) -> dict[str, float]:
        """Return the mean of each loss, nan if all steps were skipped, and start anew."""
        means = {name: value / (self.images or math.nan) for name, value in self.sums.items()}
        self.sums = {}
        self.images = 0
        return means


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
