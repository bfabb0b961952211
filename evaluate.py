"""How good a trained model is: `python evaluate.py` for bits/dim, `--metrics bpd,bands,fid,kid,prc` for all there is.

bpd is bits/dim, the variational bound on held-out images (Ho et al. 2020, Eq. 5). bands is what the network knows of
x_0 at each noise level, by spatial frequency (docs/whole-before-detail.md). fid, kid and prc (precision and
recall) compare samples with real images and need requirements-eval.txt and the weights of InceptionV3. On several GPUs:
`torchrun --nproc-per-node 8 evaluate.py RUN --metrics fid` (with -n, since torchrun takes --n for its own).
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.datasets import ImageSet, Split, hash_ids, images_of_run
from data.pixels import to_model_range
from functions.evaluation import features
from functions.evaluation.bands import measure_bands, plot_bands
from functions.evaluation.bits_per_dim import (
    BoundOptions,
    evenly,
    measure_bits_per_dim,
    plot_bits_per_dim,
)
from functions.evaluation.features import (
    FEWEST,
    FULL_COUNT,
    Extractor,
    Reference,
    compare,
    load_inception,
)
from functions.evaluation.reference_statistics import describe, read_reference, write_reference
from functions.likelihood import VARIANCES
from functions.sampling.calibration import calibrated
from functions.sampling.generation import ImageSampler, open_sampler
from functions.sampling.options import add_sampling_flags
from functions.support.command_line import Parser, plain_errors, positive
from functions.support.device import set_deterministic
from functions.support.errors import UserError
from functions.support.files import write_text
from functions.support.processes import Processes, joined
from functions.support.run_folder import results_folder
from models.unet import UNet

METRICS = ("bpd", "bands", "fid", "kid", "prc")
AVERAGED = 2000  # training images, evenly spaced, that the average image of `bands` is made from


@dataclass(frozen=True)
class Subject:
    """What is evaluated, on what."""

    image_sampler: ImageSampler  # the model, its sampler and the seed
    image_set: ImageSet
    split: Split
    facts: dict  # which weights, in which arithmetic: part of every result
    place: Path  # of the results: their folder and the checkpoint's name

    def x_0_of(self, indices: np.ndarray) -> torch.Tensor:
        """(B, C, H, W) in [-1, 1], on the model's device."""
        return to_model_range(
            torch.from_numpy(self.image_set.images[indices]).to(self.image_sampler.device)
        )


def main(
    load_extractor: Callable[[Path | None, torch.device, Processes], Extractor] = load_inception,
) -> None:
    """Read the command line, evaluate, and say which files were written."""
    args = parse_flags()
    with joined() as processes:
        subject = open_subject(args, processes)
        if "bands" in args.metrics:
            evaluate_bands(args, subject, processes)
        if {"fid", "kid", "prc"} & set(args.metrics):
            evaluate_images(args, subject, load_extractor, processes)
        if "bpd" in args.metrics:
            evaluate_bits(args, subject, processes)


def parse_flags() -> argparse.Namespace:
    """Read the command line; `UserError` for flags that cannot go together."""
    parser = Parser(description=__doc__, usage="%(prog)s [RUN] [flags]")
    add_sampling_flags(parser)
    add = parser.add_argument
    add(
        "--metrics",
        type=metric_names,
        default=("bpd",),
        metavar="bpd,bands,fid,kid,prc",
        help="what to measure (bpd)",
    )
    data = "the data set, by name or path; also where the training's is now (that of the training)"
    add("--data", "--dataset-name", dest="dataset_name", metavar="NAME|PATH", help=data)

    add = parser.add_argument_group(
        "bits/dim (bpd) and bands, on the validation split"
    ).add_argument
    add(
        "--images",
        type=positive,
        metavar="N",
        help="how many images of the split, evenly spaced (all)",
    )
    add(
        "--t-stride",
        type=positive,
        default=20,
        metavar="N",
        help="of bpd: timesteps to a network call, at most (20)",
    )
    add(
        "--bpd-variance",
        choices=VARIANCES,
        default="small",
        help="variance of p(x_{t-1} | x_t) (small)",
    )
    add(
        "--no-clip",
        action="store_true",
        help="of bpd: let x_0 leave [-1, 1] (it is clipped, as in sampling)",
    )

    add = parser.add_argument_group("FID, KID, precision and recall (fid, kid, prc)").add_argument
    add(
        "--n",
        "-n",
        type=positive,
        default=FULL_COUNT,
        metavar="N",
        help=f"how many images to sample ({FULL_COUNT:,})",
    )
    add(
        "--reference-split",
        choices=("train", "val"),
        default="train",
        help="the real images to compare with (train)",
    )
    add(
        "--reference-images",
        type=positive,
        metavar="N",
        help="how many of them, evenly spaced (all)",
    )
    add(
        "--reference",
        type=Path,
        metavar="FILE.npz",
        help="published statistics to compare with; fid alone (none)",
    )
    add(
        "--save-reference",
        type=Path,
        metavar="FILE.npz",
        help="publish the real images' statistics there (nowhere)",
    )
    add("--weights", type=Path, metavar="FILE", help="weights of InceptionV3 (downloaded once)")

    args = parser.parse_args()
    if args.reference and (args.save_reference or {"kid", "prc"} & set(args.metrics)):
        raise UserError(
            "--reference has statistics for fid alone; kid, prc and --save-reference want real images"
        )
    if args.n < FEWEST:
        raise UserError(f"--n is {args.n}; {FEWEST} images are the fewest")
    return args


def metric_names(text: str) -> tuple[str, ...]:
    """A flag's type: names of metrics with commas between, in the order of METRICS."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(METRICS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of metrics; there are {', '.join(METRICS)}"
        )
    return tuple(name for name in METRICS if name in names)


def open_subject(args: argparse.Namespace, processes: Processes) -> Subject:
    """The checkpoint, its model and its data."""
    saved, image_sampler = open_sampler(args, processes, UNet)
    device, precision = image_sampler.device, image_sampler.denoiser.precision
    set_deterministic(device.type == "cuda")  # the CPU's kernels are
    load = lambda name: images_of_run(
        saved.config["diffusion"], saved.image_shape[-1], name or args.dataset_name
    )
    image_sampler, run = (
        calibrated(image_sampler, saved, args.batch_size, load, processes),
        saved.run,
    )
    image_set, split = load(None)
    processes.say(split.description)
    if run.get("train_ids_hash") != split.train_ids_hash and processes.is_main:
        known = (
            "THESE ARE NOT THE IMAGES" if "train_ids_hash" in run else "NOBODY KNOWS WHICH IMAGES"
        )
        print(
            f"WARNING: {known} IT WAS TRAINED ON: it may have seen some of those for validation",
            file=sys.stderr,
        )
    weights = {"step": run["step"], "weights": saved.kind, "weights_hash": saved.digest[:16]}
    computing = {"precision": str(precision).removeprefix("torch."), "device": device.type}
    asked = {"batch_size": args.batch_size, "seed": args.seed, **image_sampler.options.calibration}
    facts = {"experiment": run["experiment"], **weights, **computing, **asked}
    folder = args.out or results_folder(saved, "evaluation")
    return Subject(image_sampler, image_set, split, facts, folder / saved.name)


def evaluate_bands(args: argparse.Namespace, subject: Subject, processes: Processes) -> None:
    """What the network knows of the validation split's x_0, by noise level and spatial frequency."""
    images, split, denoiser = (
        subject.image_set.images,
        subject.split,
        subject.image_sampler.denoiser,
    )
    indices = evenly(split.val_indices, args.images)
    average = to_model_range(
        torch.from_numpy(images[evenly(split.train_indices, AVERAGED)].mean(axis=0)[None])
    )[0]
    result = measure_bands(
        denoiser, subject.x_0_of, indices, average, args.batch_size, args.seed, processes
    )
    if not processes.is_main:
        return
    settings = {**subject.facts, "ids_hash": split.val_ids_hash, "images": len(indices)}
    path = write_result(
        subject.place,
        "bands",
        {"verdict": result.verdict(), "settings": settings, **result.facts()},
    )
    plot_bands(
        result, path.with_suffix(".png"), f"{settings['experiment']}, step {settings['step']:,}"
    )
    print(
        f"squared error of x_0 over the average image's, by t and cycles an image\n{result.table()}"
    )
    print(f"{result.verdict()}\nwrote {path}\nwrote {path.with_suffix('.png')}")


def evaluate_bits(args: argparse.Namespace, subject: Subject, processes: Processes) -> None:
    """bits/dim of the validation split, with all that one must know of it to compare it with others."""
    split, denoiser = subject.split, subject.image_sampler.denoiser
    clip = subject.image_sampler.options.clip_x_0 and not args.no_clip
    options = BoundOptions(args.t_stride, args.batch_size, args.seed, args.bpd_variance, clip)
    indices = evenly(split.val_indices, args.images)
    result = measure_bits_per_dim(
        denoiser, subject.x_0_of, indices, options, processes, processes.is_main
    )
    if not processes.is_main:
        return
    of_images = {
        "ids_hash": split.val_ids_hash,
        "split_images": len(split.val_indices),
        "images": len(indices),
    }
    settings = {**subject.facts, **of_images, **vars(options)}
    calls, timesteps = len(result.lengths), denoiser.scheduler.timesteps
    which = (
        "every t"
        if calls == timesteps
        else f"{calls} of {timesteps} t for each image, stratified at random"
    )
    protocol = (
        f"{len(indices):,} of {len(split.val_indices):,} validation images (ids {split.val_ids_hash}), {which}; "
        f"variance {options.variance}, x_0 {'clipped' if options.clip_x_0 else 'not clipped'}, {settings['weights']} "
        f"weights, {settings['precision']}, seed {args.seed}; the error is over images and choices of t"
    )
    path = write_result(
        subject.place, "bpd", {"protocol": protocol, "settings": settings, **result.facts()}
    )
    plot_bits_per_dim(
        result, path.with_suffix(".png"), f"{settings['experiment']}, step {settings['step']:,}"
    )
    print(
        f"bits/dim {result.total:.4f}, standard error {result.standard_error:.4f}\n    {protocol}"
    )
    print(f"    rate {result.rate:.4f} + distortion {result.distortion:.4f}")
    print(f"wrote {path}\nwrote {path.with_suffix('.png')}")


def evaluate_images(
    args: argparse.Namespace, subject: Subject, load_extractor: Callable, processes: Processes
) -> None:
    """FID, KID, precision and recall of samples, with all that one must know of them to compare them with others."""
    image_sampler = subject.image_sampler
    # What can be missing is asked for before the work of hours
    extractor = load_extractor(args.weights, image_sampler.device, processes)
    reference = open_reference(args, subject, extractor, processes)
    generated = features.sample_features(
        image_sampler, args.n, args.batch_size, extractor, processes
    )
    if not processes.is_main:
        return
    options, real = image_sampler.options, reference.description
    of_samples = {
        "n": args.n,
        **options.facts(image_sampler.scheduler.timesteps),
        "sampler_in_words": str(options),
    }
    settings = {**subject.facts, **of_samples, "reference": real}
    protocol = (
        f"{args.n:,} samples, {options}, {settings['weights']} weights, {settings['precision']}, seed {args.seed}; "
        f"against {real['count']:,} {real['split']} images of {real['dataset']} (ids {real['ids_hash']}, pixels "
        f"{real['pixels_hash']}); {real['image_size']} x {real['image_size']}, rounded to uint8, no JPEG, no resizing "
        f"but the extractor's own; {real['extractor']} (weights {real['weights_hash']})"
    )
    warnings = features.image_warnings(real["count"], args.n, extractor.width)
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    metrics = tuple(name for name in args.metrics if name not in ("bpd", "bands"))
    results = compare(metrics, generated, reference, args.seed)
    contents = {"protocol": protocol, "warnings": warnings, "settings": settings, **results}
    path = write_result(subject.place, "-".join(metrics), contents)
    for name, value in results.items():
        print(f"{name:16}{value:.6g}")
    print(f"    {protocol}\nwrote {path}")


def open_reference(
    args: argparse.Namespace, subject: Subject, extractor: Extractor, processes: Processes
) -> Reference | None:
    """The real images' side of the comparison; None but in rank 0."""
    images, split = subject.image_set.images, subject.split
    if args.reference:
        return read_reference(args.reference, images.shape[1], extractor)
    of_split = {"train": split.train_indices, "val": split.val_indices}[args.reference_split]
    indices = evenly(of_split, args.reference_images)
    if len(indices) < FEWEST:
        raise UserError(
            f"an empty reference: {len(indices)} {args.reference_split} image(s), {FEWEST} are the fewest"
        )
    ids = hash_ids([subject.image_set.ids[i] for i in indices])
    # a path is nobody's business, and the pixels have their hash
    name = Path(subject.image_set.name).name
    description = describe(images, indices, ids, name, args.reference_split, extractor)
    real = features.real_features(images, indices, args.batch_size, extractor, processes)
    if not processes.is_main:
        return None
    reference = Reference(description, features.statistics(real), real)
    if args.save_reference:
        write_reference(args.save_reference, reference)
        print(f"wrote {args.save_reference}")
    return reference


def write_result(place: Path, what: str, contents: dict) -> Path:
    """Write <place>-<metrics>-<hash of all settings>.json, which no other settings overwrite."""
    digest = hashlib.sha256(json.dumps(contents["settings"], sort_keys=True).encode()).hexdigest()[
        :8
    ]
    path = place.with_name(f"{place.name}-{what}-{digest}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(contents, indent=2))
    return path


if __name__ == "__main__":
    with plain_errors():
        main()
