"""What `evaluate.py` is told and tells: its flags, the protocol that goes with each number, and the files it writes.

A result is <run>/evaluation/<checkpoint>-<metrics>-<hash of all settings>.json, so that other settings never overwrite
it and the same ones write the same bytes.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from functions.evaluation.bits_per_dim import BitsPerDim
from functions.evaluation.features import (
    FULL_COUNT,
    NEIGHBOURS,
    Extractor,
    collect_features,
    frechet_distance,
    kernel_distance,
    precision_recall,
    statistics,
)
from functions.evaluation.reference_statistics import Reference
from functions.likelihood import VARIANCES
from functions.sampling.generation import ImageSampler, generate_batches, image_bar
from functions.sampling.options import add_sampler_flags
from functions.support.command_line import positive
from functions.support.device import DTYPES
from functions.support.errors import UserError
from functions.support.files import write_whole
from functions.support.processes import Processes

METRICS = ("bpd", "fid", "kid", "prc")


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of evaluate.py."""
    # fmt: off
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, metavar="RUN",
        help="a run folder, a checkpoint or an exported .safetensors; the newest run's when left out")
    add("--metrics", type=metric_names, default=("bpd",), metavar="M,M,...",
        help="bpd (bits/dim), fid, kid, prc (precision and recall); all but bpd want requirements-eval.txt (bpd)")
    add("--seed", type=int, default=0, help="of all noise (0)")
    add("--batch-size", type=positive, default=64, metavar="N", help="images at a time (64)")
    add("--dataset-name", metavar="NAME|PATH", help="where the data set is now; as in training when left out")
    add("--out", type=Path, metavar="FOLDER", help="where results go; evaluation/ in the run's folder")
    add("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--precision", default="float32", choices=("auto", *DTYPES), help="of the network (float32)")

    add = parser.add_argument_group("bits/dim, on the validation split").add_argument
    add("--images", type=positive, metavar="N", help="how many, evenly spaced; all when left out")
    add("--t-stride", type=positive, default=20, metavar="N",
        help="one network call for up to N timesteps, at random for each image; 1: for each (20)")
    add("--bpd-variance", choices=VARIANCES, default="small", help="of p(x_{t-1} | x_t) (small)")
    add("--no-clip", action="store_true", help="leave the predicted x_0 as it is, also outside [-1, 1]")

    add = parser.add_argument_group("FID, KID, precision and recall").add_argument
    add("--n", "-n", type=positive, default=FULL_COUNT, metavar="N", help=f"how many images to draw ({FULL_COUNT:,})")
    add("--reference-split", choices=("train", "val"), default="train", help="the real images (train)")
    add("--reference-images", type=positive, metavar="N", help="how many, evenly spaced; all when left out")
    add("--reference", type=Path, metavar="FILE.npz", help="published statistics instead of real images; for fid")
    add("--save-reference", type=Path, metavar="FILE.npz", help="write the reference's statistics there, to publish")
    add("--weights", type=Path, metavar="FILE", help="of InceptionV3; downloaded once when left out")
    add("--cache", type=Path, metavar="FOLDER", help="of reference features; .evaluation in the folder of runs")
    # fmt: on
    add_sampler_flags(parser)


def metric_names(text: str) -> tuple[str, ...]:
    """A flag's type: names of metrics with commas between, in the order of METRICS."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of metrics; there are {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in names)


def check_flags(args: argparse.Namespace) -> None:
    """`UserError` for flags that contradict each other."""
    of_features = [name for name in ("kid", "prc") if name in args.metrics]
    if args.reference and of_features:
        raise UserError(f"--reference has statistics for fid alone; {' and '.join(of_features)} want real images")
    if args.reference and not args.reference.is_file():  # told before anything is downloaded or drawn
        raise UserError(f"{args.reference}: there is no such file")
    if args.reference and args.save_reference:
        raise UserError("--save-reference would only copy --reference")
    if args.save_reference and args.save_reference.suffix != ".npz":
        raise UserError(f"{args.save_reference}: its name must end in .npz")
    if args.n < 2:
        raise UserError("--n is 1; a single sample has no covariance")
    if "prc" in args.metrics and args.n <= NEIGHBOURS:
        raise UserError(f"--n is {args.n}; precision and recall look at the {NEIGHBOURS} nearest of the others")
    if args.metrics == ("bpd",) and (args.reference or args.save_reference):
        raise UserError("--reference and --save-reference go with --metrics fid")


def evenly(indices: np.ndarray, count: int | None) -> np.ndarray:
    """`count` of the indices, evenly spaced; all when there are no more."""
    count = min(count or len(indices), len(indices))
    return indices[np.arange(count) * len(indices) // max(count, 1)]


def bpd_protocol(result: BitsPerDim, timesteps: int, settings: dict) -> str:
    calls, count = len(result.strata), len(result.prior)
    which = "every t" if calls == timesteps else f"{calls} of {timesteps} t for each image, stratified at random"
    return (
        f"{count:,} of {settings['split_images']:,} validation images (ids {settings['ids_hash']}), {which}; variance "
        f"{settings['variance']}, x_0 {'clipped' if settings['clip_x_0'] else 'not clipped'}, {settings['weights']} "
        f"weights, {settings['precision']}, seed {settings['seed']}; the error is over images and choices of t"
    )


def image_protocol(reference: dict, settings: dict) -> str:
    r, s, side = reference, settings, reference["image_size"]
    return (
        f"{s['n']:,} samples, {s['sampler_in_words']}, {s['weights']} weights, {s['precision']}, seed {s['seed']}; "
        f"against {r['count']:,} {r['split']} images of {r['dataset']} (ids {r['ids_hash']}, "
        f"pixels {r['pixels_hash']}); {side} x {side}, rounded to uint8, no JPEG, no resizing but the extractor's own; "
        f"{r['extractor']} (weights {r['weights_hash']})"
    )


def image_warnings(reference: dict, count: int, width: int) -> list[str]:
    """What makes a number one that must not be compared with others, loudly."""
    warnings = []
    if count < FULL_COUNT:
        warnings.append(
            f"ONLY {count:,} SAMPLES, NOT {FULL_COUNT:,}: FID IS BIASED UPWARDS and compares with no other count"
        )
    if min(reference["count"], count) <= width:
        warnings.append(
            f"{min(reference['count'], count):,} IMAGES FOR {width:,} FEATURES: THEIR COVARIANCE IS SINGULAR, and FID "
            "says little; KID is unbiased"
        )
    return warnings


def sample_features(
    drawing: ImageSampler,
    n: int,
    batch_size: int,
    extractor: Extractor,
    to_pixels: Callable[[Tensor], Tensor],
    processes: Processes,
) -> Tensor:
    """Draw n images and keep their features, (n, D) float32; image i is the one that sample.py draws."""
    with image_bar(math.ceil(n / processes.count), processes.is_main) as bar:

        def make(batches: list[range]) -> Iterator[Tensor]:
            for drawn in generate_batches(drawing, batches, on_progress=bar.update):
                yield to_pixels(drawn.images)

        return collect_features(make, n, batch_size, extractor, drawing.shape[1], processes)


def real_features(
    images: np.ndarray, indices: np.ndarray, batch_size: int, extractor: Extractor, processes: Processes
) -> Tensor:
    """The features of real images, as they are."""
    make = lambda batches: (torch.from_numpy(images[indices[batch.start : batch.stop]]) for batch in batches)
    with progress_bar("reference", len(indices), processes) as bar:
        return collect_features(make, len(indices), batch_size, extractor, images.shape[1], processes, bar.update)


def progress_bar(what: str, images: int, processes: Processes) -> tqdm:
    """A bar over this process's part of the images, which are as many as the others' up to a batch."""
    total = math.ceil(images / processes.count)
    return tqdm(total=total, desc=what, unit="img", dynamic_ncols=True, disable=not processes.is_main)


def compare(metrics: tuple[str, ...], generated: Tensor, reference: Reference, seed: int) -> dict:
    """The metrics asked for, by name."""
    found = {}
    if "fid" in metrics:
        found |= frechet_distance(statistics(generated), reference.statistics)
    if "kid" in metrics:
        found |= kernel_distance(generated, reference.features, seed)
    if "prc" in metrics:
        found |= precision_recall(generated, reference.features) | {"neighbours": NEIGHBOURS}
    return found


def image_table(results: dict, protocol: str) -> str:
    """Each number with the protocol that it is of."""
    lines = {
        "fid": lambda: f"FID        {results['fid']:.4f}",
        "kid": lambda: f"KID        {results['kid']:.6f}, deviation {results['kid_std']:.6f} over "
                       f"{results['kid_subsets']} subsets of {results['kid_subset_size']:,}",
        "precision": lambda: f"precision  {results['precision']:.4f}",
        "recall": lambda: f"recall     {results['recall']:.4f}",
    }  # fmt: skip
    return "\n".join(f"{line()}\n    {protocol}" for name, line in lines.items() if name in results)


def bpd_table(result: BitsPerDim, protocol: str) -> str:
    error = "" if math.isnan(result.standard_error) else f" +- {result.standard_error:.4f} (standard error)"
    return (
        f"bits/dim   {result.total:.4f}{error}\n    {protocol}\n"
        f"    rate {result.rate:.4f} (prior {result.prior.mean():.2g}) + distortion {result.distortion:.4f}; "
        f"RMSE of the last x_0 {result.curves()['rmse'][0]:.2f} of 255"
    )


def result_path(folder: Path, checkpoint: Path, what: str, settings: dict) -> Path:
    """Where the result of these settings goes: the same for the same, another for others."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{checkpoint.stem}-{what}-{digest}.json"


def write_result(path: Path, contents: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(contents, indent=2)
    write_whole(path, lambda file: file.write(text.encode()))
