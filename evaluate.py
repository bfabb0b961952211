"""How good a trained model is: `python evaluate.py` states bits/dim of the newest run.

`--metrics bpd,bands,fid,kid,prc` measures all there is:
    bpd               bits/dim, the variational bound on held-out images (Ho et al. 2020, Eq. 5)
    bands             what the network knows of x_0 at each noise level, by spatial frequency
                      (docs/whole-before-detail.md)
    fid, kid, prc     samples compared with real images; prc is precision and recall. They need
                      requirements-eval.txt and the weights of InceptionV3.

On several GPUs: `torchrun --nproc-per-node 8 evaluate.py RUN --metrics fid`. There --n is written
-n, since torchrun takes --n for its own.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.datasets import ImageSet, Split, images_of_run
from data.pixels import to_model_range
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
    image_warnings,
    load_inception,
    real_features,
    sample_features,
    statistics,
)
from functions.evaluation.reference_statistics import describe, read_reference, write_reference
from functions.samplers import VARIANCES
from functions.sampling.calibration import calibrated
from functions.sampling.generation import ImageSampler, open_sampler
from functions.sampling.options import add_sampling_flags
from functions.support.command_line import Parser, exit_on_user_error, positive
from functions.support.device import set_deterministic
from functions.support.errors import UserError
from functions.support.files import sha256, write_text
from functions.support.processes import Processes, distributed
from functions.support.run_folder import results_folder

# Results have this order, whatever the order of the flag's names.
METRICS = ("bpd", "bands", "fid", "kid", "prc")
# The average image of `bands` is made from so many training images, evenly spaced.
AVERAGED = 2000
# The first argument is the file of weights. It is None for those that are downloaded.
LoadExtractor = Callable[[Path | None, torch.device, Processes], Extractor]


@dataclass(frozen=True)
class Subject:
    """What is evaluated, on what."""

    image_sampler: ImageSampler  # the model, its sampler and the seed
    # The real images. They are None where published statistics stand for them.
    image_set: ImageSet | None
    split: Split | None
    # Which weights, in which arithmetic; part of every result.
    facts: dict
    # The results' folder, with the checkpoint's name.
    place: Path

    def load_x_0(self, indices: np.ndarray) -> torch.Tensor:
        """Return the images at these indices, (B, C, H, W) in [-1, 1], on the model's device."""
        pixels = torch.from_numpy(self.image_set.images[indices])
        return to_model_range(pixels.to(self.image_sampler.device))


def main(load_extractor: LoadExtractor = load_inception) -> None:
    """Read the command line, evaluate, and say which files were written."""
    args = parse_flags()
    with distributed() as processes:
        subject = open_subject(args, processes)
        if "bands" in args.metrics:
            evaluate_bands(args, subject, processes)
        if {"fid", "kid", "prc"} & set(args.metrics):
            evaluate_images(args, subject, load_extractor, processes)
        if "bpd" in args.metrics:
            evaluate_bits(args, subject, processes)


def parse_flags() -> argparse.Namespace:
    """Read the command line. Raises `UserError` for flags that cannot go together."""
    parser = Parser(description=__doc__, usage="%(prog)s [RUN] [flags]")
    add_sampling_flags(parser)
    parser.add_argument(
        "--metrics",
        type=metric_names,
        default="bpd",
        metavar="bpd,bands,fid,kid,prc",
        help="What to measure, with commas between. Default: %(default)s.",
    )
    parser.add_argument(
        "--data",
        "--dataset-name",
        metavar="NAME|PATH",
        help="The name or path of a data set, such as the place where the training's is now. "
        "Default: that of the training.",
    )

    group = parser.add_argument_group("bits/dim (bpd) and bands, on the validation split")
    group.add_argument(
        "--images",
        type=positive,
        metavar="N",
        help="How many images of the split to take, evenly spaced. Default: all.",
    )
    group.add_argument(
        "--t-stride",
        type=positive,
        default=20,
        metavar="N",
        help="The most timesteps that a network call of bpd stands for. Default: %(default)s.",
    )
    group.add_argument(
        "--bpd-variance",
        choices=VARIANCES,
        default="small",
        help="The variance of p(x_{t-1} | x_t) for bpd. Default: %(default)s.",
    )
    group.add_argument(
        "--no-clip",
        action="store_true",
        help="Let the x_0 of bpd leave [-1, 1]. Default: it is clipped, as in sampling.",
    )

    group = parser.add_argument_group("FID, KID, precision and recall (fid, kid, prc)")
    group.add_argument(
        "--n",
        "-n",
        type=positive,
        default=FULL_COUNT,
        help=f"How many images to sample. Default: {FULL_COUNT:,}.",
    )
    group.add_argument(
        "--reference-split",
        choices=("train", "val"),
        default="train",
        help="The split of the real images to compare with. Default: %(default)s.",
    )
    group.add_argument(
        "--reference-images",
        type=positive,
        metavar="N",
        help="How many of the real images to take, evenly spaced. Default: all.",
    )
    group.add_argument(
        "--reference",
        type=Path,
        metavar="FILE.npz",
        help="Published statistics in place of real images, for fid alone. Default: none.",
    )
    group.add_argument(
        "--save-reference",
        type=Path,
        metavar="FILE.npz",
        help="Where to publish the real images' statistics. Default: nowhere.",
    )
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="The weights of InceptionV3. Default: they are downloaded once.",
    )

    args = parser.parse_args()
    if args.reference and (args.save_reference or {"kid", "prc"} & set(args.metrics)):
        raise UserError(
            "--reference has statistics for fid alone; "
            "kid, prc and --save-reference want real images"
        )
    if args.n < FEWEST:
        raise UserError(f"--n is {args.n}; {FEWEST} images are the fewest")
    return args


def metric_names(text: str) -> list[str]:
    """Read a flag's value: names of metrics with commas between. Return them in METRICS' order."""
    names = {name.strip() for name in text.split(",")} - {""}
    if not names or not names.issubset(METRICS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of metrics; there are {', '.join(METRICS)}"
        )
    return [name for name in METRICS if name in names]


def open_subject(args: argparse.Namespace, processes: Processes) -> Subject:
    """Open the checkpoint, its model and, if a metric needs them, its images."""
    # What is not the run's own data set has its own calibration.
    if args.calibrate == "data" and args.data:
        args.calibrate = args.data
    saved, image_sampler = open_sampler(args, processes)
    device = image_sampler.device
    run = saved.run
    # The CPU's kernels are deterministic in any case.
    set_deterministic(device.type == "cuda")

    image_sampler = calibrated(image_sampler, saved, processes)
    image_set, split = None, None
    # Published statistics stand for the images in fid alone; all other metrics need the images.
    if not args.reference or args.metrics != ["fid"]:
        image_set, split = images_of_run(saved, args.data)
        processes.print_main(split.description)

    # Results on images that were trained on are too good.
    if split and run.get("train_ids_hash") != split.train_ids_hash and processes.is_main:
        known = "NOBODY KNOWS WHICH IMAGES"
        if "train_ids_hash" in run:
            known = "THESE ARE NOT THE IMAGES"
        print(
            f"WARNING: {known} IT WAS TRAINED ON: it may have seen some of those for validation",
            file=sys.stderr,
        )

    facts = {
        "experiment": run["experiment"],
        "step": run["step"],
        "weights": saved.kind,
        "weights_hash": saved.digest[:16],
        "precision": str(image_sampler.denoiser.precision).removeprefix("torch."),
        "device": device.type,
        "batch_size": image_sampler.batch_size,
        "seed": args.seed,
        **image_sampler.options.calibration,
    }
    folder = args.out or results_folder(saved, "evaluation")
    return Subject(image_sampler, image_set, split, facts, folder / saved.name)


def evaluate_bands(args: argparse.Namespace, subject: Subject, processes: Processes) -> None:
    """Measure what the network knows of the validation split's x_0, and write and print it."""
    image_sampler = subject.image_sampler
    split = subject.split
    indices = evenly(split.val_indices, args.images)

    # The average image needs no more than a sample of the training images, which may take some
    # hundred MB and is not kept.
    sample = evenly(split.train_indices, AVERAGED)
    average_pixels = subject.image_set.images[sample].mean(axis=0)
    average = to_model_range(torch.from_numpy(average_pixels[None]))[0]
    result = measure_bands(
        image_sampler.denoiser,
        subject.load_x_0,
        indices,
        average,
        image_sampler.batch_size,
        args.seed,
        processes,
    )
    if not processes.is_main:
        return

    verdict = result.verdict()
    settings = {**subject.facts, "ids_hash": split.val_ids_hash, "images": len(indices)}
    contents = {"verdict": verdict, "settings": settings, **result.facts()}
    path = write_result(subject.place, "bands", contents)
    picture = path.with_suffix(".png")
    plot_bands(result, picture, f"{settings['experiment']}, step {settings['step']:,}")
    print("squared error of x_0 over the average image's, by t and cycles an image")
    print(f"{result.table()}\n{verdict}\nwrote {path}\nwrote {picture}")


def evaluate_bits(args: argparse.Namespace, subject: Subject, processes: Processes) -> None:
    """Measure bits/dim of the validation split, and write and print it."""
    split = subject.split
    image_sampler = subject.image_sampler
    denoiser = image_sampler.denoiser
    # Samplers of some models do not clip x_0, and then the bound does not either.
    clip = image_sampler.options.clip_x_0 and not args.no_clip
    options = BoundOptions(
        args.t_stride, image_sampler.batch_size, args.seed, args.bpd_variance, clip
    )
    indices = evenly(split.val_indices, args.images)
    result = measure_bits_per_dim(
        denoiser, subject.load_x_0, indices, options, processes, processes.is_main
    )
    if not processes.is_main:
        return

    settings = {
        **subject.facts,
        "ids_hash": split.val_ids_hash,
        "split_images": len(split.val_indices),
        "images": len(indices),
        **vars(options),
    }
    calls = len(result.lengths)
    timesteps = denoiser.scheduler.timesteps
    chosen = f"{calls} of {timesteps} t for each image, stratified at random"
    if calls == timesteps:
        chosen = "every t"
    clipped = "clipped" if clip else "not clipped"

    # The protocol has all that one must know of bits/dim to compare it with others.
    protocol = (
        f"{len(indices):,} of {len(split.val_indices):,} validation images "
        f"(ids {split.val_ids_hash}), {chosen}; variance {options.variance}, x_0 {clipped}, "
        f"{settings['weights']} weights, {settings['precision']}, seed {args.seed}; "
        "the error is over images and choices of t"
    )
    contents = {"protocol": protocol, "settings": settings, **result.facts()}
    path = write_result(subject.place, "bpd", contents)
    picture = path.with_suffix(".png")
    plot_bits_per_dim(result, picture, f"{settings['experiment']}, step {settings['step']:,}")
    print(f"bits/dim {result.total:.4f}, standard error {result.standard_error:.4f}")
    print(f"    {protocol}")
    print(f"    rate {result.rate:.4f} + distortion {result.distortion:.4f}")
    print(f"wrote {path}\nwrote {picture}")


def evaluate_images(
    args: argparse.Namespace, subject: Subject, load_extractor: LoadExtractor, processes: Processes
) -> None:
    """Measure FID, KID, precision and recall of samples, and write and print them."""
    image_sampler = subject.image_sampler
    # Weights and real images can be missing, so they are opened before hours of sampling.
    extractor = load_extractor(args.weights, image_sampler.device, processes)
    reference = open_reference(args, subject, extractor, processes)
    generated = sample_features(image_sampler, args.n, extractor, processes)
    if not processes.is_main:
        return

    options = image_sampler.options
    real = reference.description
    settings = {
        **subject.facts,
        "n": args.n,
        **options.facts(image_sampler.scheduler.timesteps),
        "sampler_in_words": str(options),
        "reference": real,
    }

    # The protocol has all that one must know of these numbers to compare them with others.
    protocol = (
        f"{args.n:,} samples, {options}, {settings['weights']} weights, "
        f"{settings['precision']}, seed {args.seed}; "
        f"against {real['count']:,} {real['split']} images of {real['dataset']} "
        f"(ids {real['ids_hash']}, pixels {real['pixels_hash']}); "
        f"{real['image_size']} x {real['image_size']}, rounded to uint8, no JPEG, "
        "no resizing but the extractor's own; "
        f"{real['extractor']} (weights {real['weights_hash']})"
    )
    warnings = image_warnings(real["count"], args.n, extractor.width)
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)

    metrics = [name for name in args.metrics if name not in ("bpd", "bands")]
    results = compare(metrics, generated, reference, args.seed)
    contents = {"protocol": protocol, "warnings": warnings, "settings": settings, **results}
    path = write_result(subject.place, "-".join(metrics), contents)
    for name, value in results.items():
        print(f"{name:16}{value:.6g}")
    print(f"    {protocol}\nwrote {path}")


def open_reference(
    args: argparse.Namespace, subject: Subject, extractor: Extractor, processes: Processes
) -> Reference | None:
    """Return the real images' side of the comparison; it is read from a file or computed.

    Where it is computed, all processes work on it, and rank 0 alone gets it.
    """
    if args.reference:
        return read_reference(args.reference, subject.image_sampler.shape[-1], extractor)

    split = args.reference_split
    indices_of = {"train": subject.split.train_indices, "val": subject.split.val_indices}
    indices = evenly(indices_of[split], args.reference_images)
    if len(indices) < FEWEST:
        raise UserError(
            f"an empty reference: {len(indices)} {split} image(s), {FEWEST} are the fewest"
        )
    image_set = subject.image_set
    description = describe(image_set, indices, split, extractor)
    batch_size = subject.image_sampler.batch_size
    real = real_features(image_set.images, indices, batch_size, extractor, processes)
    if not processes.is_main:
        return None

    # Rank 0 alone computes statistics and compares.
    reference = Reference(description, statistics(real), real)
    if args.save_reference:
        write_reference(args.save_reference, reference)
        print(f"wrote {args.save_reference}")
    return reference


def write_result(place: Path, what: str, contents: dict) -> Path:
    """Write <place>-<metrics>-<hash of all settings>.json, which no other settings overwrite."""
    # Sorted keys make the hash one of the settings alone, and not of their order.
    settings = json.dumps(contents["settings"], sort_keys=True)
    digest = sha256(settings)[:8]
    path = place.with_name(f"{place.name}-{what}-{digest}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(contents, indent=2))
    return path


if __name__ == "__main__":
    with exit_on_user_error():
        main()
