"""The metrics of a run: metrics.csv for people and scripts, and the same in TensorBoard."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from functions.support.files import write_text
from functions.support.pictures import save_figure

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
)


class MetricsLog:
    """The file metrics.csv and TensorBoard's log, to which `write` appends rows.

    A row is on the disk when `write` returns. Rows after `resume_step` come from an interrupted
    run. They are dropped, because the resumed run repeats these steps.
    """

    def __init__(self, run: Path, resume_step: int = 0):
        self.path = run / "metrics.csv"
        lines = [",".join(COLUMNS)]
        if self.path.exists():
            for row in read_metrics(self.path):
                if row["step"] <= resume_step:
                    lines.append(format_row(row))
        write_text(self.path, "\n".join(lines) + "\n")
        self.tensorboard = SummaryWriter(run / "tensorboard", purge_step=resume_step + 1)

    def write(self, **values: float) -> None:
        """Write one row; columns that are not given stay empty.

        Raises ValueError, and writes nothing, for a name that is not in COLUMNS.
        """
        for name in values:
            if name not in COLUMNS:
                raise ValueError(f"{name!r} is not a column of metrics.csv; add it to COLUMNS")
        with open(self.path, "a") as file:
            file.write(format_row(values) + "\n")
            # The row reaches the disk before the next checkpoint, so a run that resumes from that
            # checkpoint finds the row.
            file.flush()
            os.fsync(file.fileno())
        for column, value in values.items():
            if column != "step":
                self.tensorboard.add_scalar(column, value, values["step"])
        self.tensorboard.flush()


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Return the rows of a metrics.csv as numbers, None where a cell is empty.

    Damaged rows are left out, with a warning.
    """
    # What follows the last newline is incomplete: the process was killed while it wrote this line.
    header, *lines = path.read_text(errors="replace").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            cells = zip(header.split(","), line.split(","), strict=True)
            row = {column: float(cell) if cell else None for column, cell in cells}
            row["step"] = int(row["step"])
            rows.append(row)
        except (ValueError, TypeError):
            print(f"WARNING: {path}: line {number} is damaged and left out", file=sys.stderr)
    return rows


def format_row(values: dict[str, float | None]) -> str:
    """Return a line of metrics.csv, without the newline."""
    return ",".join(format_number(values.get(column)) for column in COLUMNS)


def format_number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class TrainingWindow:
    """The steps since the last row: sums of loss and error of eps on the device, and the speed.

    A step whose gradients are not finite is skipped by the optimiser, and counted here. Its loss
    does not count. `images_per_step` is the effective batch.
    """

    def __init__(self, device: torch.device, images_per_step: int):
        # The loss and the error of eps, summed over images.
        self.sums_of_losses = torch.zeros(2, device=device)
        # The number of steps that were skipped.
        self.skipped = torch.zeros((), device=device)
        self.steps = 0
        # The number of steps that were skipped in all windows before.
        self.skipped_before = 0
        # The number of steps in the last windows in which all steps were skipped.
        self.skipped_in_a_row = 0
        self.images_per_step = images_per_step
        self.steps_timed = 0
        # The time at which the window began. Each pause moves it forward.
        self.clock = 0.0

    def start_clock(self) -> None:
        """Begin to measure the speed."""
        self.clock = time.perf_counter()

    def state(self) -> dict[str, list[float] | int]:
        """Return the sums for a checkpoint, so that a resumed run has all steps in its next row."""
        return {
            "sums": self.sums_of_losses.tolist(),
            "skipped": int(self.skipped),
            "steps": self.steps,
            "skipped_before": self.skipped_before,
        }

    def load(self, state: dict[str, list[float] | int]) -> None:
        """Restore the sums that `state` returned. Their steps do not count for the speed."""
        self.sums_of_losses.copy_(torch.tensor(state["sums"]))
        self.skipped.fill_(state["skipped"])
        self.steps = state["steps"]
        self.skipped_before = state["skipped_before"]

    def add(self, sums: Tensor, skipped: Tensor) -> None:
        """Add a step's loss and error of eps (2,), summed over images.

        `skipped` () is 1 if the step was skipped, otherwise 0.
        """
        self.sums_of_losses += torch.where(skipped > 0, 0.0, sums)
        self.skipped += skipped
        self.steps += 1
        self.steps_timed += 1

    def read(self, grad_norm: Tensor) -> dict[str, float]:
        """Return the columns of a row, and start the next window. This waits for the device.

        `grad_norm` () is that of the last step. The means are nan if all steps were skipped.
        """
        # All numbers are copied in one transfer, so that the host waits only once.
        values = torch.stack([*self.sums_of_losses, self.skipped, grad_norm.float()])
        loss, eps_error, skipped, last_grad_norm = values.tolist()
        now = time.perf_counter()
        good_steps = self.steps - int(skipped)
        image_count = good_steps * self.images_per_step or math.nan
        self.skipped_before += int(skipped)
        self.skipped_in_a_row = 0 if good_steps else self.skipped_in_a_row + self.steps
        row = {
            "loss": loss / image_count,
            "eps_error": eps_error / image_count,
            "grad_norm": last_grad_norm,
            "images_per_second": self.steps_timed * self.images_per_step / (now - self.clock),
            "skipped_steps": self.skipped_before,
        }
        self.sums_of_losses.zero_()
        self.skipped.zero_()
        self.steps = 0
        self.steps_timed = 0
        self.clock = now
        return row

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock within the context, whose work is not training."""
        start = time.perf_counter()
        yield
        # `read` may have started the next window within the context.
        self.clock += time.perf_counter() - max(start, self.clock)


def plot_losses(metrics: Path, path: Path, title: str = "") -> None:
    """Plot the training and validation curves of a metrics.csv.

    The curves show the error of eps, so that runs with different objectives can be compared.
    """
    rows = read_metrics(metrics)
    figure = Figure(figsize=(8, 4.5))
    axis = figure.subplots()
    curves = {
        "eps_error": {
            "label": "training (raw weights, random t and noise)",
            "color": "0.7",
            "linewidth": 1.2,
        },
        "val_eps_error": {
            "label": "validation, raw weights",
            "color": "tab:orange",
            "marker": ".",
        },
        "val_eps_error_ema": {
            "label": "validation, EMA weights",
            "color": "tab:blue",
            "marker": ".",
        },
    }
    for column, style in curves.items():
        points = [(row["step"], row[column]) for row in rows if row[column] is not None]
        if points:
            axis.plot(*zip(*points, strict=True), **style)

    # The error starts near 1 and soon falls far below. On a linear axis the rest would look flat.
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(color="0.92")
    axis.set(xlabel="optimiser step", ylabel="mean squared error of the noise", title=title)
    axis.legend(frameon=False)
    figure.tight_layout()
    save_figure(figure, path)
