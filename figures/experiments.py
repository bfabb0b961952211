"""Train, measure and draw the arms of docs/whole-before-detail.md.

`python -m figures.experiments WORD`, where WORD is one of:

train     train a run of every arm and seed in runs/experiments/, a quarter of an hour each on two
          cores; a stopped run is resumed
measure   measure each run, with and without calibration, in another quarter of an hour each, and
          write JSON files into its folder
draw      add these measurements to figures/experiments.json, print that file as a table, and draw
          the pictures whose arms are measured
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import train
from config import EXPERIMENTS
from data.pixels import to_model_range, to_uint8
from figures.bands import BandErrors, measure_bands, plot_bands
from figures.feature_distance import Features, spoilt, training_features
from figures.saved_model import open_saved
from functions.evaluation.bits_per_dim import BoundOptions, measure_bits_per_dim
from functions.sampling.calibration import with_calibration
from functions.sampling.generation import ImageSampler, generate
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import open_checkpoint
from functions.support.command_line import Parser, exit_on_user_error
from functions.support.device import choose_device
from functions.support.errors import EXIT_STOPPED
from functions.support.loading import load_and_split
from functions.support.pictures import grid_of, save_figure, save_image
from functions.support.processes import SINGLE_PROCESS
from functions.support.run_folder import checkpoints_of, find_checkpoints, is_finished, runs_of
from functions.training.run import TrainingRun, resume_run

ROOT = Path(train.__file__).parent
RUNS = ROOT / "runs" / "experiments"
RESULTS = ROOT / "figures" / "experiments.json"

# At 2e-3, the rate of `faces`, two of three runs with v and linear betas did not learn.
V = {"objective": "v", "learning_rate": 1e-3}
FACES_V = V | {"beta_schedule": "cosine"}
LARGE = {"image_size": 64, "lowest_resolution_size": 8}
SHORT = {"epochs": 16}

# The name of an arm -> its changes to the diffusion config and to the model config of `faces`, and
# its number of seeds. Names say "uniform t" because arms of earlier versions had another
# distribution (docs/tried.md). RESULTS has these, too.
ARMS = {
    "eps": ({}, {}, 3),
    "v, uniform t": (V, {}, 3),
    "v, uniform t, cosine": (FACES_V, {}, 3),
    # Arms with v differ from `faces` in the learning rate, too.
    "eps, rate 1e-3": ({"learning_rate": 1e-3}, {}, 1),
    # At 64 px the 3,500 steps of `faces` take over an hour, so these two have fewer.
    "eps, 800 steps": (SHORT, {}, 1),
    "eps, 800 steps, 64 px": (SHORT, LARGE, 1),
    # Another kind of images. The photos do not come with the repository.
    "eps, photos": ({}, {}, 1),
    "v, uniform t, cosine, photos": (FACES_V, {}, 1),
}

# These two arms are the presets `faces` and `faces-v`.
PRESETS = ("eps", "v, uniform t, cosine")
# The kinds of calibration: none, fitted to the training images, fitted to the model's samples.
KINDS = ("plain", "data", "own")
# docs/whole-before-detail.md shows this picture, with a row for each of these arms.
PICTURES = {
    "whole_before_detail.png": (
        "eps",
        "eps, calibrated (data)",
        "eps, calibrated (own)",
        PRESETS[1],
    ),
}
# It also shows a heat map of the bands for these arms.
MAPS = {
    "eps": "bands-eps.png",
    PRESETS[1]: "bands-v.png",
    "eps, calibrated (data)": "bands-calibrated.png",
}

# Distances are measured with these samplers, named in the table by their network calls.
DISTANCES = {
    "20 DDIM": SamplerOptions("ddim", 20),
    "20 2M": SamplerOptions("dpm++", 20, eta=0.0),
    "50 DDIM": SamplerOptions("ddim", 50),
    "20 SDE": SamplerOptions("dpm++", 20),
    "200 DDPM": SamplerOptions("ddpm", 200),
}
# Each distance is that of this many samples.
IMAGE_COUNT = 100
# Spoilt samples are counted with this sampler: few steps without fresh noise spoil the most.
SPOILT_SAMPLER = "20 DDIM"
SPOILT_COUNT = 1000
# The first samples of that sampler are saved for the pictures, which show COLUMNS of them in a row.
SAVED_SAMPLES, COLUMNS = 36, 12


def main() -> None:
    """Train or measure the runs one after the other, or draw them all together."""
    parser = Parser(description=__doc__)
    parser.add_argument("word", choices=("train", "measure", "draw"))
    parser.add_argument(
        "--arms",
        nargs="+",
        default=ARMS,
        choices=ARMS,
        metavar="ARM",
        help="The arms to train, measure or draw. Default: all.",
    )
    parser.add_argument(
        "--photos",
        help="The images that the arms of photos train on. Default: these arms are skipped.",
    )
    args = parser.parse_args()

    pairs = [(arm, seed) for arm in args.arms for seed in range(ARMS[arm][2])]
    if args.word == "draw":
        draw(pairs)
        return

    for arm, seed in pairs:
        run = finished_run(arm, seed)
        trainable = "photos" not in arm or args.photos
        if args.word == "train" and trainable and not run:
            train_arm(arm, seed, args.photos)
        elif args.word == "measure" and run:
            measure(run)


def run_name(arm: str, seed: int) -> str:
    """Return the name of an arm's runs, such as "v-mixed-t-seed0"."""
    return f"{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def newest_run(arm: str, seed: int) -> Path | None:
    """Return the newest run of an arm that has a checkpoint, or None."""
    runs = runs_of(RUNS, f"{run_name(arm, seed)}-")
    return next((run for run in reversed(runs) if checkpoints_of(run)), None)


def finished_run(arm: str, seed: int) -> Path | None:
    """Return the newest run of an arm if it has reached its last step, or None."""
    run = newest_run(arm, seed)
    if not run:
        return None
    return run if is_finished(open_checkpoint(find_checkpoints(run)[0])) else None


def train_arm(arm: str, seed: int, photos: str | None) -> None:
    """Train a run of an arm with train.py, or resume one that was stopped."""
    device = choose_device("auto")
    stopped_run = newest_run(arm, seed)
    if stopped_run:
        args = argparse.Namespace(experiment=None, init=None)
        run = resume_run(stopped_run, args, device, SINGLE_PROCESS)
    else:
        diffusion, model, _ = ARMS[arm]
        changes = {**diffusion, "seed": seed}
        if "photos" in arm:
            changes["dataset_name"] = photos
        experiment = EXPERIMENTS["faces"].override(changes, model)
        run = TrainingRun(run_name(arm, seed), experiment, RUNS, device)

    print(run.describe())
    if not train.train(run):
        sys.exit(EXIT_STOPPED)


def measure(run: Path) -> None:
    """Measure a run with each kind of calibration whose file does not exist yet."""
    saved, plain = open_saved(run, SamplerOptions())
    image_set, split = load_and_split(saved)

    def load_x_0(indices):
        images = torch.from_numpy(image_set.images[indices])
        return to_model_range(images).to(plain.device)

    average = load_x_0(split.train_indices).mean(dim=0)
    features = training_features(saved, plain.device)

    for kind in KINDS:
        path = run / f"measured-{kind}.json"
        if path.exists():
            continue
        options = SamplerOptions(calibrate=None if kind == "plain" else kind)
        sampler = with_calibration(replace(plain, options=options), saved)

        bands = measure_bands(sampler.denoiser, load_x_0, split.val_indices, average, 64, 0)
        numbers = {"bands": bands.facts(), **measure_samples(sampler, features, path)}

        # Only the bound of the uncalibrated network is reported.
        if kind == "plain":
            bound = measure_bits_per_dim(
                plain.denoiser, load_x_0, split.val_indices, BoundOptions(t_stride=50)
            )
            numbers["bits_per_dim"] = [bound.total, bound.standard_error]
        path.write_text(json.dumps(numbers))


def measure_samples(sampler: ImageSampler, features: Features, path: Path) -> dict:
    """Return the distance with each sampler, and the share of spoilt samples.

    The first samples are saved next to `path`, the file with the run's numbers.
    """
    numbers = {"distance": {}}
    for name, options in DISTANCES.items():
        # The denoiser has the calibration, so replacing the options does not change it.
        count = SPOILT_COUNT if name == SPOILT_SAMPLER else IMAGE_COUNT
        samples = generate(replace(sampler, options=options), range(count))
        images = samples.images.to(sampler.device)

        numbers["distance"][name] = features.distance(images[:IMAGE_COUNT])
        if name == SPOILT_SAMPLER:
            # `spoilt` looks for white corners, which photos do not have.
            if "photos" not in path.parent.name:
                numbers["spoilt"] = spoilt(images).double().mean().item()
            np.save(path.with_suffix(".npy"), to_uint8(images[:SAVED_SAMPLES]).cpu().numpy())
        print(f"{path}: {numbers['distance']}, spoilt {numbers.get('spoilt')}", flush=True)
    return numbers


def draw(pairs: list[tuple[str, int]]) -> None:
    """Add the numbers of the runs to RESULTS, print all of RESULTS, and draw the runs.

    `pairs` has the arm and the seed of each run. Missing runs are skipped.
    """
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    samples = {}
    for arm, seed in pairs:
        run = newest_run(arm, seed)
        for kind in KINDS if run else ():
            path = run / f"measured-{kind}.json"
            if not path.exists():
                continue

            # Results of different seeds agree in fewer than five digits, so five are enough.
            numbers = json.loads(path.read_text(), parse_float=lambda x: float(f"{float(x):.5g}"))
            label = arm if kind == "plain" else f"{arm}, calibrated ({kind})"
            results.setdefault(label, {})[str(seed)] = numbers

            # The first seed of each arm is drawn.
            if label in samples:
                continue
            samples[label] = np.load(path.with_suffix(".npy"))
            if label in MAPS:
                arrays = {name: np.array(value) for name, value in numbers["bands"].items()}
                plot_bands(BandErrors(**arrays), RESULTS.with_name(MAPS[label]), label)

    # One line for each arm makes diffs of the file readable.
    lines = [f"{json.dumps(label)}: {json.dumps(seeds)}" for label, seeds in results.items()]
    text = ",\n".join(lines)
    RESULTS.write_text(f"{{\n{text}\n}}\n")
    print(table(results))
    draw_samples(samples)


def draw_samples(samples: dict[str, np.ndarray]) -> None:
    """Draw each of PICTURES, and the samples of `faces` and `faces-v` side by side.

    `samples` has those of each label. A picture without all of its samples stays as it is.
    """
    for file, labels in PICTURES.items():
        missing = [label for label in labels if label not in samples]
        if missing:
            print(f"{file} is not drawn, because these are not measured: {'; '.join(missing)}")
            continue
        figure = Figure(figsize=(10, 0.8 * len(labels)))
        axes = figure.subplots(len(labels), 1)
        for axis, label in zip(axes, labels, strict=True):
            axis.imshow(grid_of(samples[label][:COLUMNS], COLUMNS), interpolation="bicubic")
            axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
            axis.set(xticks=[], yticks=[])
        figure.subplots_adjust(0.18, 0.01, 0.995, 0.99, 0, 0.05)
        save_figure(figure, RESULTS.with_name(file))

    if samples.keys() >= set(PRESETS):
        left, right = (np.array(grid_of(samples[preset], 6)) for preset in PRESETS)
        # A white margin separates the two.
        both = np.concatenate([left, np.full_like(left[:, :36], 255), right], axis=1)
        save_image(both, RESULTS.with_name("faces_and_faces_v.png"))


def table(results: dict) -> str:
    """Return a Markdown table of the means over seeds; brackets have the lowest and the highest."""
    titles = ["arm", "seeds", "mean, t = 999", "mean, t = 920", *DISTANCES, "spoilt, %", "bits/dim"]
    lines = [titles, ["---"] * len(titles)]

    for label, seeds in results.items():
        rows = [columns_of_run(numbers) for numbers in seeds.values()]
        cells = [table_cell(values) for values in zip(*rows, strict=True)]
        lines.append([label, str(len(seeds)), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns_of_run(numbers: dict) -> list[float]:
    """Return a run's numbers in the order of the table's columns; NaN for a missing one."""
    ratio = numbers["bands"]["ratio"]
    return [
        ratio[-1][0],
        ratio[-3][0],
        *(numbers["distance"].get(name, np.nan) for name in DISTANCES),
        100 * numbers.get("spoilt", np.nan),
        numbers.get("bits_per_dim", [np.nan])[0],
    ]


def table_cell(values: tuple[float, ...]) -> str:
    """Return the text for the values of all seeds, such as "2.1 (1.9-2.4)"; "" for NaN."""
    if np.isnan(values[0]):
        return ""
    spread = f" ({min(values):.3g}-{max(values):.3g})" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{spread}"


if __name__ == "__main__":
    with exit_on_user_error():
        main()
