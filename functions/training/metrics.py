"""A run's numbers: metrics.csv for people and scripts, and the same in TensorBoard beside its config and grids."""

import csv
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from matplotlib.ticker import LogLocator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from functions.support.files import write_text
from functions.support.pictures import plt, save_figure

COLUMNS = (
    "step",  # optimiser steps done
    "epoch",  # passes over the training images done, as a fraction
    "loss",  # training loss, the mean of the steps since the row before
    "eps_error",  # the squared error of eps that belongs to it: for objective = "eps" the same
    "val_loss",  # on held-out images, raw weights; empty where it was not measured
    "val_eps_error",
    "val_loss_ema",  # the same, EMA weights
    "val_eps_error_ema",
    # Variational bound on held-out images, EMA weights if there are any; empty likewise
    "bits_per_dim",
    "grad_norm",  # of the last step, before clipping
    "learning_rate",
    "images_per_second",  # training alone, without validation and samples
    "skipped_steps",  # so far, as their loss or gradients were not finite numbers
)


class MetricsLog:
    """Appends rows to metrics.csv and TensorBoard; each is on the disk, before any checkpoint, when `write` returns.

    What an interrupted run logged after `resume_step` is dropped, since those steps are done again.
    """

    def __init__(self, run: Path, resume_step: int = 0):
        self.path = run / "metrics.csv"
        kept = (
            [row for row in read_metrics(self.path) if row["step"] <= resume_step]
            if self.path.exists()
            else []
        )
        lines = [",".join(COLUMNS), *(",".join(map(format_number, row.values())) for row in kept)]
        write_text(self.path, "\n".join(lines) + "\n")
        self.tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1)

    def write(self, **values: float) -> None:
        """One row; columns that are not given stay empty."""
        with open(self.path, "a") as file:
            file.write(",".join(format_number(values.get(column)) for column in COLUMNS) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for column, value in values.items():
            if column != "step":
                self.tensorboard.add_scalar(column, value, values["step"])
        self.tensorboard.flush()


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The rows of a metrics.csv, as numbers; None where a cell is empty.

    A last row cut short is left out, and rows that are damaged, these with a loud line.
    """
    with open(path, newline="", errors="replace") as file:
        whole = [line for line in file if line.endswith("\n")]
    rows = []
    for number, row in enumerate(csv.DictReader(whole), 2):
        try:
            # Without the columns of eps it is an older run, whose loss that was
            cells = {
                column: row.get(column, row.get(column.replace("eps_error", "loss")))
                for column in COLUMNS
            }
            values = {column: float(cell) if cell else None for column, cell in cells.items()}
            rows.append({**values, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError):
            print(f"WARNING: {path}: line {number} is damaged and left out", file=sys.stderr)
    return rows


def format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


class TrainingWindow:
    """Loss, error of eps and speed of the steps since the last row, without waiting for the device."""

    def __init__(self, device: torch.device, images_a_step: int):
        self.sums, self.steps = torch.zeros(2, device=device), torch.zeros((), device=device)
        self.images_a_step, self.steps_timed = images_a_step, 0  # the first is the effective batch
        self.clock = time.perf_counter()  # when these steps began, or would have without pauses

    def state(self) -> dict[str, float]:
        """What a checkpoint between two rows has to remember, so that a resumed run's next row misses no step."""
        return {"sums": self.sums.tolist(), "steps": int(self.steps.item())}

    def load(self, state: dict[str, float]) -> None:
        """Go on from what `state` gave; the time of those steps is not known."""
        # Of older ones, all eps
        loss, eps_error = state["sums"] if "sums" in state else [state["loss_sum"]] * 2
        self.sums.copy_(torch.tensor([float(loss), float(eps_error)]))
        self.steps.fill_(int(state["steps"]))

    def add(self, sums: Tensor, skipped: Tensor) -> None:
        """A step's loss and error of eps (2,), summed over images; one that was skipped (1, not 0) does not count."""
        self.sums += torch.where(skipped > 0, 0.0, sums)
        self.steps += 1 - skipped
        self.steps_timed += 1

    def numbers(self) -> Tensor:
        """(3,) on the device: sums of the loss and of the error of eps, and steps."""
        return torch.stack([*self.sums, self.steps])

    def read(self, numbers: list[float]) -> dict[str, float]:
        """Means over images, nan if all steps were skipped, and the images a second; starts the next window.

        It takes what `numbers` gives now: who has them has waited for the device, so the clock is right.
        """
        *sums, steps = numbers
        images, now = steps * self.images_a_step, time.perf_counter()
        loss, eps_error = [value / images for value in sums] if steps else (math.nan, math.nan)
        speed = self.steps_timed * self.images_a_step / (now - self.clock)
        self.sums.zero_()
        self.steps.zero_()
        self.steps_timed, self.clock = 0, now
        return {"loss": loss, "eps_error": eps_error, "images_per_second": speed}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock: for what is not training."""
        start = time.perf_counter()
        yield
        # `read` may have begun anew meanwhile
        self.clock = time.perf_counter() - max(start - self.clock, 0.0)


def plot_losses(metrics: Path, path: Path, title: str = "") -> None:
    """The training and validation curves of a metrics.csv: the error of eps, whatever the objective."""
    rows = read_metrics(metrics)
    figure, axis = plt.subplots(figsize=(8, 4.5))
    curves = {
        "eps_error": (
            "training (raw weights, random t and noise)",
            {"color": "0.7", "linewidth": 1.2},
        ),
        "val_eps_error": (
            "validation, raw weights",
            {"color": "tab:orange", "marker": ".", "linewidth": 1.5},
        ),
        "val_eps_error_ema": (
            "validation, EMA weights",
            {"color": "tab:blue", "marker": ".", "linewidth": 1.5},
        ),
    }
    for column, (label, style) in curves.items():
        points = [(row["step"], row[column]) for row in rows if row[column] is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)
    # The first steps start near 1, where nothing is learned yet, and would flatten the rest on a linear axis.
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(color="0.92")
    axis.set(xlabel="optimiser step", ylabel="mean squared error of the noise", title=title)
    axis.legend(frameon=False)
    figure.tight_layout()
    save_figure(figure, path)
