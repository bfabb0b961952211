"""The picture and the table of figures/experiments.py, from its results."""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into files; a run on a server has no screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import LogLocator

from figures.experiment_arms import Results, finished_run
from figures.experiment_measures import STARTED, picture_file
from functions.support.pictures import save_figure

OWN = "0.998"  # the average that the `faces` experiment keeps
ROWS = {  # label -> arm, weights
    "T = 200,\nbetas as is": ("T200-as-is", OWN),
    "as is, from\nnoised images": ("T200-as-is", OWN + STARTED),
    "T = 200,\nrescaled": ("T200-rescaled", OWN),
    "T = 1000": ("T1000", OWN),
    "T = 1000,\nraw weights": ("T1000", "raw"),
    "constant rate": ("T1000-constant", OWN),
    "constant rate,\nraw weights": ("T1000-constant", "raw"),
    "1 channel\na group": ("groups-of-1", OWN),
    "2 channels\na group": ("groups-of-2", OWN),
    "8 channels\na group": ("groups-of-8", OWN),
}
COLUMNS = 12
GROUPS = {1: "groups-of-1", 2: "groups-of-2", 4: "T1000", 8: "groups-of-8"}
NAMES = {
    "T200-as-is": "T = 200, betas as for 1000",
    "T200-rescaled": "T = 200, rescaled",
    "T1000": "T = 1000 (4 channels a group)",
    "T1000-constant": "T = 1000, constant rate",
    "groups-of-1": "T = 1000, 1 channel a group",
    "groups-of-2": "T = 1000, 2 channels a group",
    "groups-of-8": "T = 1000, 8 channels a group",
}


def draw(args: argparse.Namespace) -> None:
    """Write the picture and print the table."""
    results = Results(args.results).all()
    figure = plt.figure(figsize=(10, 14.5))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    draw_samples(top, args.runs, args.seeds[0])
    axes = bottom.subplots(2, 2)
    draw_averages(axes[0, 0], results)
    draw_colours(axes[0, 1], results)
    draw_sampler_errors(axes[1, 0], results["samplers"])
    draw_sampler_distances(axes[1, 1], results)
    bottom.subplots_adjust(0.07, 0.07, 0.985, 0.95, 0.2, 0.38)
    save_figure(figure, args.picture)
    print(table(results))
    print(f"wrote {args.picture}")


def draw_samples(figure: SubFigure, runs: Path, seed: int) -> None:
    """The first samples of each arm, one row each, all from the same noise; a row is empty where there are none."""
    axes = figure.subplots(len(ROWS), 1)
    for axis, (label, (arm, weights)) in zip(axes, ROWS.items(), strict=True):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_anchor("W")
        axis.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
        run = finished_run(runs, arm, seed)
        path = picture_file(run, weights) if run else None
        if path and path.exists():
            images = np.load(path)[:COLUMNS]  # (N, H, W, 3)
            gap = np.full((len(images), images.shape[1], 1, 3), 255, np.uint8)
            axis.imshow(np.concatenate([*np.concatenate([images, gap], axis=2)], axis=1), interpolation="bicubic")
    figure.subplots_adjust(0.12, 0.005, 0.995, 0.96, 0, 0.02)
    figure.suptitle(
        f"Samples from the same noise, none chosen (EMA {OWN} where nothing is said; seed {seed})", fontsize=10
    )


def draw_averages(axis: Axes, results: dict) -> None:
    """Feature distance by average, a line a seed."""
    arms = {"T1000": ("tab:blue", "cosine to 0"), "T1000-constant": ("tab:orange", "constant rate")}
    seeds = {arm: list(results["arms"].get(arm, {}).values()) for arm in arms}
    found = {name for rows in seeds.values() for row in rows for name in row if "distance" in row[name]}
    order = sorted(found, key=lambda name: (name != "raw", "no ramp" in name, name))
    for arm, (colour, label) in arms.items():
        for number, row in enumerate(seeds[arm]):
            points = [(order.index(name), row[name]["distance"]) for name in order if "distance" in row.get(name, {})]
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=None if number else label,
                      markersize=4, linewidth=1)  # fmt: skip
    axis.set_xticks(range(len(order)), [name.replace(", ", ",\n") for name in order])
    floor_of(axis, results, "arms")
    axis.set(
        xlabel="EMA decay (with the ramp at most 0.989 in 800 steps)",
        title="Which average? (a line a seed)",
        ylabel="feature distance",
        yscale="log",
    )
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.minorticks_off()
    finish(axis)


def floor_of(axis: Axes, results: dict, of: str) -> None:
    """The distance of as many real images to the others, which no sampler can be expected to be below."""
    found = results.get("data", {}).get(of, {}).get("distance")
    if found:
        axis.axhline(next(iter(found.values())), color="black", linewidth=0.8, linestyle=":", label="real images")


def draw_colours(axis: Axes, results: dict) -> None:
    """The error of the mean of each channel by the number of channels a group, a mark a seed."""
    for channel, (name, colour) in enumerate({"red": "tab:red", "green": "tab:green", "blue": "tab:blue"}.items()):
        label = name
        for place, arm in enumerate(GROUPS.values()):
            for number, row in enumerate(results["arms"].get(arm, {}).values()):
                found = row.get(OWN, {}).get("colours")
                if found:
                    x = place + 0.2 * (channel - 1) + 0.07 * number
                    axis.errorbar(x, found["error"][channel], found["error_se"][channel], fmt="o", color=colour,
                                  label=label, markersize=4)  # fmt: skip
                    label = None
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlim(-0.5, len(GROUPS) - 0.5)
    axis.set_xticks(range(len(GROUPS)), map(str, GROUPS))
    axis.set(xlabel="channels a group at the narrowest level", title="Tint: error of the samples' mean (a mark a seed)",
             ylabel="error of the mean, in 1/255")  # fmt: skip
    finish(axis)


STYLES = {"DDPM": "tab:gray", "DPM-Solver++ 2M SDE": "tab:red", "DDIM": "tab:blue", "DPM-Solver++ 2M": "tab:orange",
          "iPNDM": "tab:green"}  # fmt: skip


def sampler_lines(axis: Axes, samplers: dict, value: str) -> None:
    for key, rows in samplers.items():
        name, _, spacing = key.partition(", ")
        if name not in STYLES:
            continue
        points = [(int(calls), row[value]) for calls, row in rows.items() if value in row]
        if points:
            calls, values = zip(*points, strict=True)
            values = [found["rmse"] if isinstance(found, dict) else found for found in values]
            axis.plot(calls, values, "o-" if spacing == "trailing" else "o--", color=STYLES[name], markersize=4,
                      label=name if spacing == "trailing" else f"{name}, even in log-SNR", linewidth=1)  # fmt: skip
    ticks = sorted(
        {int(calls) for rows in samplers.values() if isinstance(rows, dict) for calls in rows if calls.isdigit()}
    )
    axis.set(xscale="log", yscale="log", xlabel="network calls")
    axis.set_xticks(ticks, map(str, ticks))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.minorticks_off()


def draw_sampler_errors(axis: Axes, samplers: dict) -> None:
    sampler_lines(axis, samplers, "error")
    axis.set(title="Samplers: error against 1000 steps of DDIM", ylabel="RMSE, in 1/255")
    axis.set_ylim(bottom=0.15)  # room for the legend
    finish(axis, loc="lower left")


def draw_sampler_distances(axis: Axes, results: dict) -> None:
    sampler_lines(axis, results["samplers"], "distance")
    floor_of(axis, results, "samplers")
    axis.set(title="Samplers: distance to the training images", ylabel="feature distance", ylim=(0.7, 20))
    finish(axis, loc="lower left", ncols=2)


def finish(axis: Axes, **legend: object) -> None:
    axis.title.set_fontsize(10)
    axis.grid(color="0.92")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=7.5, **legend)
    axis.yaxis.set_major_formatter("{x:g}")


def table(results: dict) -> str:
    """Markdown; each cell has one number a seed."""

    def cell(seeds: list[dict], weights: str, measure: str, text: Callable) -> str:
        return "; ".join(text(row[weights][measure]) for row in seeds if measure in row.get(weights, {}))

    def mean_of(values: list[float]) -> str:
        return f"{np.mean(values):.0f}"

    rows, spread_of_data = [], []
    for arm, label in NAMES.items():
        seeds = list(results["arms"].get(arm, {}).values())
        spread_of_data += [row[OWN]["colours"]["spread_of_data"] for row in seeds if "colours" in row.get(OWN, {})]
        rows.append((
            label,
            cell(seeds, OWN, "bits", lambda found: f"{found['total']:.2f}"),
            cell(seeds, "raw", "distance", "{:.1f}".format),
            cell(seeds, OWN, "distance", "{:.1f}".format),
            cell(seeds, OWN, "colours", lambda found: ", ".join(f"{value:.0f}" for value in found["error"])),
            cell(seeds, OWN, "colours", lambda found: mean_of(found["spread"])),
        ))  # fmt: skip
    head = (
        "arm", "bits/dim", "feature distance, raw", "the same, EMA", "error of the mean of R, G, B, in 1/255",
        f"spread of an image's mean (data: {mean_of(spread_of_data)})",
    )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
