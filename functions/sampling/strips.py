"""Draw strips, which are figures of columns of images: for edit.py, and for README's figures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from functions.sampling.samples_folder import Frames
from functions.support.pictures import save_figure

# A figure of the denoising has at most this many columns and rows.
STRIP_COLUMNS = 9
STRIP_ROWS = 4


def save_columns(frames: Frames, path: Path) -> None:
    """Write a figure with a column for each of STRIP_COLUMNS frames, from the first to the last."""
    times = list(frames)
    # An image forms at low t, so the columns are closer there.
    wanted = times[0] * np.linspace(1, 0, STRIP_COLUMNS) ** 1.5
    nearest = [min(times, key=lambda t: abs(t - wanted_t)) for wanted_t in wanted]
    # With few frames, several columns would show the same one.
    shown = dict.fromkeys(nearest)
    save_strip({f"t = {t}": frames[t][:STRIP_ROWS] for t in shown}, path)
    print(f"wrote {path}")


def save_strip(columns: dict[str, np.ndarray], path: Path, row_titles: Sequence[str] = ()) -> None:
    """Draw a figure of columns of images, {title: (N, H, W, C)}, with titles left of the rows."""
    # The images fill the figure, 1.1 inches each. `save_figure` adds room for the titles.
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.1 * len(columns), 1.1 * rows))
    figure.subplots_adjust(left=0, bottom=0, right=1, top=1, wspace=0.04, hspace=0.04)
    no_frame = {"xticks": [], "yticks": [], "frame_on": False}
    axes = figure.subplots(rows, len(columns), squeeze=False, subplot_kw=no_frame)

    for column, (title, images) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for ax, image in zip(column, images, strict=True):
            # The colour map and its range are only used for grey.
            ax.imshow(image, "gray", vmin=0, vmax=255, interpolation="bicubic")
    for ax, title in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(title, fontsize=9, rotation=0, ha="right", va="center")
    save_figure(figure, path)
