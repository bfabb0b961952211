"""Why colours go wrong, and two cures: the arms of docs/whole-before-detail.md. `python figures/experiments.py WORD`.

train     a run of every arm and seed, a quarter of an hour each on two cores; one that was stopped goes on
measure   each run's numbers, with and without calibration, into JSON files in its folder, in as long again
draw      those into figures/experiments.json, the table of all that is there, and a picture
"""

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the repository's modules are found from any folder

import train  # noqa: E402
from config import EXPERIMENTS  # noqa: E402
from data.datasets import images_of_run  # noqa: E402
from data.pixels import to_model_range, to_uint8  # noqa: E402
from figures.feature_distance import Features, spoilt  # noqa: E402
from functions.evaluation.bands import BandErrors, measure_bands, plot_bands  # noqa: E402
from functions.evaluation.bits_per_dim import BoundOptions, measure_bits_per_dim  # noqa: E402
from functions.sampling.calibration import calibrated  # noqa: E402
from functions.sampling.generation import ImageSampler, generate, rebuild  # noqa: E402
from functions.sampling.options import SamplerOptions  # noqa: E402
from functions.support.checkpoint import load_weights  # noqa: E402
from functions.support.command_line import Parser, plain_errors  # noqa: E402
from functions.support.device import choose_device  # noqa: E402
from functions.support.pictures import grid_of, plt, save_figure, save_image  # noqa: E402
from functions.support.processes import SINGLE_PROCESS  # noqa: E402
from functions.support.run_folder import Run, checkpoints_of, find_checkpoints, runs_of, step_of  # noqa: E402
from models.unet import UNet  # noqa: E402

RESULTS = ROOT / "figures" / "experiments.json"
# At 2e-3, uniform t mostly did not learn
V = {"objective": "v", "t_sampling": "mixed", "learning_rate": 1e-3}
FACES_V = V | {"t_sampling": "uniform", "beta_schedule": "cosine"}
LARGE, SHORT = {"image_size": 64, "lowest_resolution_size": 8}, {"epochs": 16}
ARMS = {  # name: what differs from `faces` in diffusion and model, and how many seeds
    "eps": ({}, {}, 3),
    "v, mixed t": (V, {}, 3),
    "v, uniform t": (V | {"t_sampling": "uniform"}, {}, 3),
    "eps, mixed t": ({"t_sampling": "mixed"}, {}, 1),
    "eps, rate 1e-3": ({"learning_rate": 1e-3}, {}, 1),
    "v, mixed t, cosine": (V | {"beta_schedule": "cosine"}, {}, 1),
    "v, uniform t, cosine": (FACES_V, {}, 3),
    "v, mixed t, min-SNR": (V, {}, 1),
    "eps, 800 steps": (SHORT, {}, 1),
    "v, mixed t, 800 steps": (V | SHORT, {}, 1),
    "eps, 800 steps, 64 px": (SHORT, LARGE, 1),
    "v, mixed t, 800 steps, 64 px": (V | SHORT, LARGE, 1),
    "eps, photos": ({}, {}, 1),
    "v, mixed t, photos": (V, {}, 1),
    "v, uniform t, cosine, photos": (FACES_V, {}, 1),
}
KINDS = ("plain", "data", "own")  # of calibration
DISTANCES = {
    "20 DDIM": SamplerOptions("ddim", 20),
    "20 2M": SamplerOptions("dpm++", 20, eta=0.0),
    "50 DDIM": SamplerOptions("ddim", 50),
    "20 SDE": SamplerOptions("dpm++", 20),
    "200 DDPM": SamplerOptions("ddpm", 200),
}
PRESETS = ("eps", "v, uniform t, cosine")  # `faces` and `faces-v`
MAPS = {
    "eps": "bands-eps.png",
    PRESETS[1]: "bands-v.png",
    "eps, calibrated (data)": "bands-calibrated.png",
}
SOLVERS = {
    "DDPM": ("ddpm", None),
    "DDIM": ("ddim", 0.0),
    "2M": ("dpm++", 0.0),
    "SDE": ("dpm++", 1.0),
    "iPNDM": ("ipndm", None),
}
GRID = {  # measured on the first run of `faces-v` alone
    f"{name} {spacing} {calls}": SamplerOptions(sampler, calls, spacing, eta=eta)
    for name, (sampler, eta) in SOLVERS.items()
    for spacing in ("trailing", "logsnr")
    for calls in (10, 20, 50)
}
# So many samples are kept of each arm, and are in the picture of all
SPOILT_WITH, SHOWN, COLUMNS = "20 DDIM", 36, 12


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("word", choices=("train", "measure", "draw"))
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help="which (all)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="which (as many as ARMS says)"
    )
    parser.add_argument(
        "--photos",
        metavar="PATH",
        help="what the arms of photos are trained on (without: left out)",
    )
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "experiments", help="where the runs are"
    )
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="of calibration (all)"
    )
    parser.add_argument(
        "--distances",
        nargs="+",
        default=list(DISTANCES),
        choices=DISTANCES,
        metavar="D",
        help="(all)",
    )
    parser.add_argument("--images", type=int, default=100, help="samples for a distance")
    parser.add_argument(
        "--spoilt",
        type=int,
        default=1000,
        help=f"samples for the share that is spoilt, {SPOILT_WITH}",
    )
    parser.add_argument(
        "--picture",
        default="whole_before_detail.png",
        help="in figures/, of the arms and runs given",
    )
    args = parser.parse_args()
    for arm in args.arms:
        for seed in args.seeds or range(ARMS[arm][2]):
            run = finished(args.runs, arm, seed)
            if args.word == "train" and not run and ("photos" not in arm or args.photos):
                train_arm(args, arm, seed)
            elif args.word == "measure" and run:
                measure(run, args)
    if args.word == "draw":
        draw(args)


def slug(arm: str, seed: int) -> str:
    return f"{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def newest(runs: Path, arm: str, seed: int) -> Path | None:
    """The newest run of an arm that has a checkpoint."""
    return next(
        (run for run in reversed(runs_of(runs, f"{slug(arm, seed)}-")) if checkpoints_of(run)), None
    )


def finished(runs: Path, arm: str, seed: int) -> Path | None:
    """The newest run of an arm, if it has reached its last step."""
    run = newest(runs, arm, seed)
    total = run and json.loads((run / "config.json").read_text())["run"]["total_steps"]
    return run if run and step_of(find_checkpoints(run)[0]) == total else None


def train_arm(args: argparse.Namespace, arm: str, seed: int) -> None:
    """By `train.train`; the arm of min-SNR with that weight of the loss (Hang et al. 2023, arXiv:2303.09556)."""
    diffusion, model, _ = ARMS[arm]
    photos = {"dataset_name": args.photos} if "photos" in arm else {}
    before, name = newest(args.runs, arm, seed), slug(arm, seed)
    experiment = EXPERIMENTS["faces"].override({**photos, **diffusion, "seed": seed}, model)
    run = (
        train.open_run(before, None, ({}, {}), SINGLE_PROCESS)
        if before
        else Run(name, experiment, args.runs)
    )
    with patch("train.denoising_loss", min_snr_loss) if "min-SNR" in arm else nullcontext():
        train.train(run, choose_device("auto"), SINGLE_PROCESS)


def min_snr_loss(
    model, scheduler, x_0: Tensor, t: Tensor, noise: Tensor, loss=train.denoising_loss
) -> Tensor:
    """The squared error of x_0 times min(SNR, 5); it is (1 - alpha_bar) of v's."""
    a = scheduler.alpha_bar(t).to(x_0)
    return (1 - a) * (a / (1 - a)).clamp(max=5) * loss(model, scheduler, x_0, t, noise)


def measure(run: Path, args: argparse.Namespace) -> None:
    """All numbers of a run that are not there yet."""
    device, saved = choose_device("auto"), load_weights(find_checkpoints(run)[0])
    load = lambda name: images_of_run(saved.config["diffusion"], saved.image_shape[-1], name)
    image_set, split = load(None)
    x_0_of = lambda indices: to_model_range(torch.from_numpy(image_set.images[indices])).to(device)
    train_images = x_0_of(split.train_indices)
    features = Features(torch.cat([train_images, train_images.flip(3)]))
    denoiser = rebuild(UNet, saved, device)
    for kind in args.kinds:
        path, options = (
            run / f"measured-{kind}.json",
            SamplerOptions(calibrate=None if kind == "plain" else kind),
        )
        if path.exists():
            continue
        uncalibrated = ImageSampler(denoiser, options, saved.image_shape, 0, device)
        sampler = calibrated(uncalibrated, saved, 64, load, SINGLE_PROCESS)
        bands = measure_bands(
            sampler.denoiser, x_0_of, split.val_indices, train_images.mean(dim=0), 64, 0
        )
        found = {"bands": bands.facts(), "distance": {}}
        grid = GRID if kind == "plain" and run.name.startswith(slug(PRESETS[1], 0)) else {}
        for name, options in ({name: DISTANCES[name] for name in args.distances} | grid).items():
            many = args.spoilt if name == SPOILT_WITH else args.images
            images = generate(replace(sampler, options=options), range(many), 64).images.to(device)
            found["distance"][name] = features.distance(images[: args.images])
            if name == SPOILT_WITH:
                if "photos" not in run.name:  # which have no white corners
                    found["spoilt"] = spoilt(images).double().mean().item()
                np.save(path.with_suffix(".npy"), to_uint8(images[:SHOWN]).cpu().numpy())
            print(f"{path}: {found['distance']}, spoilt {found.get('spoilt')}", flush=True)
        if kind == "plain":
            bound = measure_bits_per_dim(
                denoiser, x_0_of, split.val_indices, BoundOptions(t_stride=50)
            )
            found["bits_per_dim"] = [bound.total, bound.standard_error]
        path.write_text(json.dumps(found))


def draw(args: argparse.Namespace) -> None:
    """The results of the runs that are here into those that are known; a picture of the runs, the table of all."""
    results, pictures = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}, {}
    for arm in args.arms:
        for seed in args.seeds or range(ARMS[arm][2]):
            run = newest(args.runs, arm, seed)
            for kind in KINDS:
                path = run / f"measured-{kind}.json" if run else None
                if path and path.exists():
                    label = arm if kind == "plain" else f"{arm}, calibrated ({kind})"
                    found = json.loads(
                        path.read_text(), parse_float=lambda text: float(f"{float(text):.5g}")
                    )
                    results.setdefault(label, {})[str(seed)] = found
                    if label not in pictures and "photos" not in arm:
                        pictures[label] = np.load(path.with_suffix(".npy"))
                        if label in MAPS:
                            bands = BandErrors(
                                **{name: np.array(value) for name, value in found["bands"].items()}
                            )
                            plot_bands(bands, RESULTS.with_name(MAPS[label]), label)
    lines = ",\n".join(
        f"{json.dumps(label)}: {json.dumps(found)}" for label, found in results.items()
    )
    RESULTS.write_text(f"{{\n{lines}\n}}\n")
    print(table(results))
    figure, axes = plt.subplots(len(pictures), 1, figsize=(10, 0.8 * len(pictures)), squeeze=False)
    for axis, (label, images) in zip(axes[:, 0], pictures.items(), strict=True):
        axis.imshow(grid_of(images[:COLUMNS], COLUMNS), interpolation="bicubic")
        axis.set_ylabel(
            label.replace(", calibrated", ",\ncalibrated"),
            rotation=0,
            ha="right",
            va="center",
            fontsize=8,
        )
        axis.set(xticks=[], yticks=[])
    figure.subplots_adjust(0.18, 0.01, 0.995, 0.99, 0, 0.05)
    save_figure(figure, RESULTS.with_name(args.picture))
    if pictures.keys() >= set(PRESETS):
        grids = [
            np.pad(grid_of(pictures[key], 6), ((0, 0), (0, 36), (0, 0)), constant_values=255)
            for key in PRESETS
        ]
        save_image(np.concatenate(grids, axis=1), RESULTS.with_name("faces_and_faces_v.png"))


def table(results: dict) -> str:
    """Markdown: the mean over seeds, and in brackets the lowest and the highest."""
    cells = {
        "mean, t = 999": lambda found: found["bands"]["ratio"][-1][0],
        "mean, t = 920": lambda found: found["bands"]["ratio"][-3][0],
        **{
            name: lambda found, name=name: found["distance"].get(name, np.nan) for name in DISTANCES
        },
        "spoilt, %": lambda found: 100 * found.get("spoilt", np.nan),
        "bits/dim": lambda found: found.get("bits_per_dim", [np.nan])[0],
    }
    lines = [["arm", "seeds", *cells], ["---"] * (len(cells) + 2)]
    for label, seeds in results.items():
        numbers = [of_seeds([cell(found) for found in seeds.values()]) for cell in cells.values()]
        lines.append([label, str(len(seeds)), *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_seeds(values: list[float]) -> str:
    """Such as "2.1 (1.9-2.4)"; nothing where there is no number."""
    spread = f" ({min(values):.3g}-{max(values):.3g})" if len(values) > 1 else ""
    return "" if np.isnan(values[0]) else f"{np.mean(values):.3g}{spread}"


if __name__ == "__main__":
    with plain_errors():
        main()
