"""Evaluate a trained model: `python evaluate.py` measures bits/dim of the newest run.

`--metrics bpd,fid,kid,prc` measures everything:
    bpd               bits/dim, the variational bound on held-out images (Ho et al. 2020, Eq. 5)
    fid, kid, prc     FID, KID, and precision and recall of samples, compared with real images. They
                      need requirements-eval.txt and the weights of InceptionV3.

On several GPUs: `torchrun --nproc-per-node 8 evaluate.py RUN --metrics fid`. With torchrun write -n
instead of --n, because torchrun reads --n as its own flag.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.datasets import ImageSet, Split, hash_ids
from data.pixels import to_model_range
from functions.evaluation.bits_per_dim import (
    BoundOptions,
    evenly_spaced,
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
)
from functions.samplers import VARIANCES
from functions.sampling.calibration import with_calibration
from functions.sampling.generation import ImageSampler, open_sampler
from functions.sampling.guidance import with_guide
from functions.sampling.options import add_sampling_flags
from functions.support.command_line import Parser, exit_on_user_error, positive
from functions.support.errors import UserError
from functions.support.files import sha256, short, write_text
from functions.support.loading import load_and_split
from functions.support.processes import Processes, distributed
from functions.support.run_folder import results_folder

# Results and file names list the metrics in this order, whatever their order in --metrics.
METRICS = ("bpd", "fid", "kid", "prc")
# It loads the feature network onto a device, from a file of weights (None: download it).
LoadExtractor = Callable[[Path | None, torch.device, Processes], Extractor]


@dataclass(frozen=True)
class Subject:
    """The model to evaluate, and the real images to compare it with."""

    image_sampler: ImageSampler  # the model, its sampler and the seed
    image_set: ImageSet
    split: Split
    # The weights, the device and so on, for the settings of every result.
    facts: dict
    # The folder of the results, followed by the checkpoint's name, which begins all file names.
    path_prefix: Path

    def load_x_0(self, indices: np.ndarray) -> torch.Tensor:
        """Return the images at the indices (B,): (B, C, H, W) in [-1, 1], on the model's device."""
        pixels = torch.from_numpy(self.image_set.images[indices])
        return to_model_range(pixels.to(self.image_sampler.device))


def main(load_extractor: LoadExtractor = load_inception) -> None:
    """Read the command line, measure the metrics, and print the paths of the written files."""
    args = parse_flags()
    with distributed() as processes:
        if args.metrics != ["bpd"]:
            evaluate_images(args, open_subject(args, processes), load_extractor, processes)
        if "bpd" in args.metrics:
            # The bound is computed in float32, whatever the precision of sampling.
            args.precision = "float32"
            evaluate_bits(args, open_subject(args, processes), processes)


def parse_flags() -> argparse.Namespace:
    """Read the command line. Raises `UserError` for flags that contradict each other."""
    parser = Parser(description=__doc__, usage="%(prog)s [RUN] [flags]")
    add_sampling_flags(parser)
    parser.add_argument(
        "--metrics",
        type=metric_names,
        default="bpd",
        metavar="bpd,fid,kid,prc",
        help="The metrics to measure, comma-separated. Default: %(default)s.",
    )
    parser.add_argument(
        "--data",
        "--dataset-name",
        metavar="NAME|PATH",
        help="The name or path of the data set, for example if the training data have moved. "
        "Default: the data set that the model was trained on.",
    )

    group = parser.add_argument_group("bits/dim (bpd), on the validation split")
    group.add_argument(
        "--images",
        type=positive,
        metavar="N",
        help="How many images of the split to use, evenly spaced. Default: all.",
    )
    group.add_argument(
        "--t-stride",
        type=positive,
        default=20,
        metavar="N",
        help="The most timesteps that one network call represents, for bpd. Default: %(default)s.",
    )
    group.add_argument(
        "--bpd-variance",
        choices=VARIANCES,
        default="small",
        help="The variance of p(x_{t-1} | x_t), for bpd. Default: %(default)s.",
    )
    group.add_argument(
        "--no-clip",
        action="store_true",
        help="Do not clip the x_0 of bpd to [-1, 1]. Default: clip it, as in sampling.",
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
        help="How many of the real images to use, evenly spaced. Default: all.",
    )
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="The file of InceptionV3's weights. Default: it is downloaded once.",
    )

    args = parser.parse_args()
    # The bound needs the likelihood of a model, which the mix of two models does not have.
    if args.guide and "bpd" in args.metrics:
        raise UserError(
            "bpd measures a single model, so it does not work with --guide; fid, kid and prc do"
        )
    if args.n < FEWEST:
        raise UserError(f"--n is {args.n}; it must be {FEWEST} or more")
    return args


def metric_names(text: str) -> list[str]:
    """Return the metrics of a comma-separated list, in the order of METRICS."""
    names = {name.strip() for name in text.split(",")} - {""}
    if not names or not names.issubset(METRICS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of metrics; the metrics are {', '.join(METRICS)}"
        )
    return [name for name in METRICS if name in names]


def open_subject(args: argparse.Namespace, processes: Processes) -> Subject:
    """Open the checkpoint, its model and, if a metric needs them, the real images."""
    saved, image_sampler = open_sampler(args, processes)
    device = image_sampler.device
    provenance = saved.provenance

    # As in sample.py, the calibration is first, because it is fitted to the model alone.
    image_sampler = with_calibration(image_sampler, saved)
    image_sampler = with_guide(image_sampler, saved, processes)
    image_set, split = load_and_split(saved, args.data)
    processes.print_main(split.description)

    # If the model was trained on some of the validation images, its results on them are too good.
    ids_hash = provenance.get("train_ids_hash")
    if ids_hash != split.train_ids_hash and processes.is_main:
        problem = "THESE ARE NOT THE IMAGES" if ids_hash else "IT IS UNKNOWN WHICH IMAGES"
        print(
            f"WARNING: {problem} IT WAS TRAINED ON: "
            "some of the validation images may be among its training images",
            file=sys.stderr,
        )

    facts = {
        "experiment": provenance["experiment"],
        "step": provenance["step"],
        "weights": saved.kind,
        "weights_hash": saved.digest[:16],
        "device": device.type,
        "batch_size": image_sampler.batch_size,
        "seed": args.seed,
        **image_sampler.options.corrections,
    }
    folder = args.out or results_folder(saved, "evaluation")
    return Subject(image_sampler, image_set, split, facts, folder / saved.name)


def evaluate_bits(args: argparse.Namespace, subject: Subject, processes: Processes) -> None:
    """Measure bits/dim of the validation split; write and print it."""
    split = subject.split
    image_sampler = subject.image_sampler
    denoiser = image_sampler.denoiser
    # For some diffusers models, samplers do not clip x_0. The bound then does not clip it either.
    clip = image_sampler.options.clip_x_0 and not args.no_clip
    options = BoundOptions(
        args.t_stride, image_sampler.batch_size, args.seed, args.bpd_variance, clip
    )
    indices = evenly_spaced(split.val_indices, args.images)
    result = measure_bits_per_dim(
        denoiser, subject.load_x_0, indices, options, processes, processes.is_main
    )
    if not processes.is_main:
        return

    settings = {
        **subject.facts,
        "precision": "float32",
        "ids_hash": split.val_ids_hash,
        "split_images": len(split.val_indices),
        "images": len(indices),
        **vars(options),
    }
    calls = len(result.lengths)
    timesteps = denoiser.scheduler.timesteps
    t_draws = f"{calls} of {timesteps} t for each image, stratified at random"
    if calls == timesteps:
        t_draws = "every t"
    clipping = "clipped" if clip else "not clipped"

    # Two results can be compared only if their protocols agree.
    protocol = (
        f"{len(indices):,} of {len(split.val_indices):,} validation images "
        f"(ids {split.val_ids_hash}), {t_draws}; variance {options.variance}, x_0 {clipping}, "
        f"{settings['weights']} weights, {settings['precision']}, seed {args.seed}; "
        "the error is over images and choices of t"
    )
    contents = {"protocol": protocol, "settings": settings, **result.facts()}
    path = write_result(subject.path_prefix, "bpd", contents)
    picture = path.with_suffix(".png")
    plot_bits_per_dim(result, picture, f"{settings['experiment']}, step {settings['step']:,}")
    print(f"bits/dim {result.total:.4f}, standard error {result.standard_error:.4f}")
    print(f"    {protocol}")
    print(f"    rate {result.rate:.4f} + distortion {result.distortion:.4f}")
    print(f"wrote {path}\nwrote {picture}")


def evaluate_images(
    args: argparse.Namespace, subject: Subject, load_extractor: LoadExtractor, processes: Processes
) -> None:
    """Measure FID, KID, precision and recall of samples; write and print them."""
    image_sampler = subject.image_sampler
    # Sampling can take hours. So the weights and real images are loaded first, in case of errors.
    extractor = load_extractor(args.weights, image_sampler.device, processes)
    reference = open_reference(args, subject, extractor, processes)
    generated = sample_features(image_sampler, args.n, extractor, processes)
    if not processes.is_main:
        return

    options = image_sampler.options
    real = reference.description
    settings = {
        **subject.facts,
        **image_sampler.precision_facts,
        "n": args.n,
        **options.facts(image_sampler.scheduler.timesteps),
        "sampler_in_words": str(options),
        "reference": real,
    }

    # Two results can be compared only if their protocols agree.
    protocol = (
        f"{args.n:,} samples, {options}, {settings['weights']} weights, "
        f"{settings['precision']}, seed {args.seed}; "
        f"against {real['count']:,} {real['split']} images of {real['dataset']} "
        f"(ids {real['ids_hash']}, pixels {real['pixels_hash']}); "
        f"{real['image_size']} x {real['image_size']}, rounded to uint8, no JPEG, "
        "no resizing but the extractor's own; "
        f"{real['extractor']} (weights {real['weights_hash']})"
    )
    warnings = []
    if "fid" in args.metrics:
        warnings = image_warnings(real["count"], args.n, extractor.width)
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)

    metrics = [name for name in args.metrics if name != "bpd"]
    results = compare(metrics, generated, reference, args.seed)
    contents = {"protocol": protocol, "warnings": warnings, "settings": settings, **results}
    path = write_result(subject.path_prefix, "-".join(metrics), contents)
    for name, value in results.items():
        print(f"{name:16}{value:.6g}")
    print(f"    {protocol}\nwrote {path}")


def open_reference(
    args: argparse.Namespace, subject: Subject, extractor: Extractor, processes: Processes
) -> Reference | None:
    """Compute the features of the real images.

    All processes compute them, but only rank 0 returns them; the others return None.
    """
    split = args.reference_split
    indices_of = {"train": subject.split.train_indices, "val": subject.split.val_indices}
    indices = evenly_spaced(indices_of[split], args.reference_images)
    if len(indices) < FEWEST:
        raise UserError(
            f"too few real images: {len(indices)} in {split}; there must be {FEWEST} or more"
        )
    image_set = subject.image_set
    # It determines the features, because it has hashes of the images and of the network.
    description = {
        # A path may reveal who owns the data, so only its last part is published.
        "dataset": short(Path(image_set.name).name),
        "split": split,
        "count": len(indices),
        "image_size": image_set.images.shape[1],
        "ids_hash": hash_ids([image_set.ids[i] for i in indices]),
        "pixels_hash": image_set.pixels_hash,
        **extractor.facts,
    }
    batch_size = subject.image_sampler.batch_size
    real = real_features(image_set.images, indices, batch_size, extractor, processes)
    if not processes.is_main:
        return None

    return Reference(description, real)


def write_result(path_prefix: Path, metrics: str, contents: dict) -> Path:
    """Write <path_prefix>-<metrics>-<hash of the settings>.json, and return its path.

    Results with different settings have different names, so none overwrites another.
    """
    # With sorted keys the hash does not depend on the order of the settings.
    settings = json.dumps(contents["settings"], sort_keys=True)
    digest = sha256(settings)[:8]
    path = path_prefix.with_name(f"{path_prefix.name}-{metrics}-{digest}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(contents, indent=2))
    return path


if __name__ == "__main__":
    with exit_on_user_error():
        main()
