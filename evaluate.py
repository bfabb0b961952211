"""How good a trained model is: `python evaluate.py` for bits/dim, `--metrics bpd,fid,kid,prc` for all there is.

bits/dim is the variational bound on held-out images (Ho et al. 2020, Eq. 5; functions/evaluation/bits_per_dim.py) and
needs nothing but the data. FID, KID, precision and recall compare samples with real images
(functions/evaluation/features.py) and need `pip install -r requirements-eval.txt` and the weights of InceptionV3. On
several GPUs:
`torchrun --nproc-per-node 8 evaluate.py RUN --metrics fid` (with -n, since torchrun takes --n for its own).
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.datasets import ImageSet, Split, hash_ids, load_images, split_images
from data.pixels import to_model_range, to_uint8
from functions.evaluation.bits_per_dim import measure_bits_per_dim
from functions.evaluation.features import Extractor, load_inception
from functions.evaluation.figures import plot_bits_per_dim
from functions.evaluation.reference_statistics import (
    Reference,
    cached_reference,
    describe,
    published_reference,
    write_reference,
)
from functions.evaluation.report import (
    add_evaluation_flags,
    bpd_protocol,
    bpd_table,
    check_flags,
    compare,
    evenly,
    image_protocol,
    image_table,
    image_warnings,
    real_features,
    result_path,
    sample_features,
    write_result,
)
from functions.prediction import Denoiser
from functions.sampling.generation import ImageSampler, rebuild
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import load_weights
from functions.support.command_line import Parser, plain_errors
from functions.support.device import choose_device, choose_precision, set_deterministic
from functions.support.errors import UserError
from functions.support.processes import Processes, joined
from functions.support.run_folder import find_checkpoints, first_sound, folder_of, newest_checkpoints
from models.unet import UNet


@dataclass(frozen=True)
class Subject:
    """What is evaluated, on what."""

    checkpoint: Path
    denoiser: Denoiser
    facts: dict  # which weights, in which arithmetic: part of every result
    device: torch.device
    image_set: ImageSet
    split: Split
    folder: Path  # for results


def main(load_extractor: Callable[[Path | None, torch.device, Processes], Extractor] = load_inception) -> None:
    """Read the command line, evaluate, and say which files were written."""
    parser = Parser(description=__doc__)
    add_evaluation_flags(parser)
    args = parser.parse_args()
    check_flags(args)
    settings = SamplerOptions.from_args(args)
    with joined() as processes:
        device = choose_device(args.device, processes.local_rank if processes.count > 1 else None)
        set_deterministic(device.type == "cuda")  # the CPU's kernels are
        subject = open_subject(args, device, processes)
        settings.times(subject.denoiser.scheduler)  # refuses numbers of steps that the model does not have
        # What can be missing is asked for before the work of hours
        extractor = load_extractor(args.weights, device, processes) if args.metrics != ("bpd",) else None
        reference = open_reference(args, subject, extractor, processes) if extractor else None
        if "bpd" in args.metrics:
            evaluate_bits(args, subject, processes)
        if extractor:
            evaluate_images(args, subject, settings, extractor, reference, processes)


def open_subject(args: argparse.Namespace, device: torch.device, processes: Processes) -> Subject:
    """The checkpoint, its model and its data."""
    candidates = find_checkpoints(args.checkpoint) if args.checkpoint else newest_checkpoints(args.runs)
    precision = choose_precision(args.precision, device)
    saved = first_sound(candidates, load_weights)
    denoiser = rebuild(UNet, saved, device, precision)
    processes.say(str(saved))
    diffusion, run = saved.config["diffusion"], saved.run
    image_set = load_images(
        args.dataset_name or diffusion["dataset_name"], saved.config["model"]["image_size"], diffusion["max_bad_images"]
    )
    split = split_images(image_set, diffusion["split"])
    processes.say(split.description)
    if run.get("train_ids_hash") != split.train_ids_hash:
        warn(processes, "THESE ARE NOT THE IMAGES IT WAS TRAINED ON: it may have seen some of those for validation")
    facts = {
        "experiment": run["experiment"], "step": run["step"], "weights": saved.kind,
        "weights_hash": saved.digest[:16], "precision": str(precision).removeprefix("torch."),
        "device": device.type, "batch_size": args.batch_size, "seed": args.seed,
    }  # fmt: skip
    folder = args.out or folder_of(saved.path) / "evaluation"
    return Subject(saved.path, denoiser, facts, device, image_set, split, folder)


def warn(processes: Processes, text: str) -> None:
    if processes.is_main:
        print(f"WARNING: {text}", file=sys.stderr)


def evaluate_bits(args: argparse.Namespace, subject: Subject, processes: Processes) -> None:
    """bits/dim of the validation split."""
    images, split = subject.image_set.images, subject.split

    def x_0_of(indices: np.ndarray) -> torch.Tensor:
        return to_model_range(torch.from_numpy(images[indices]).to(subject.device))

    result = measure_bits_per_dim(
        subject.denoiser, x_0_of, split.val_indices, args.t_stride, args.images, args.batch_size,
        args.seed, args.bpd_variance, not args.no_clip, processes, progress=processes.is_main,
    )  # fmt: skip
    if not processes.is_main:
        return
    settings = {
        **subject.facts, "ids_hash": split.val_ids_hash, "split_images": len(split.val_indices),
        "images": len(result.prior), "t_stride": args.t_stride, "variance": args.bpd_variance,
        "clip_x_0": not args.no_clip,
    }  # fmt: skip
    protocol = bpd_protocol(result, subject.denoiser.scheduler.timesteps, settings)
    path = result_path(subject.folder, subject.checkpoint, "bpd", settings)
    write_result(path, {"protocol": protocol, "settings": settings, **result.facts()})
    name = f"{subject.facts['experiment']}, step {subject.facts['step']:,}"
    plot_bits_per_dim(result, path.with_suffix(".png"), name)
    print(f"{bpd_table(result, protocol)}\nwrote {path}\nwrote {path.with_suffix('.png')}")


def open_reference(
    args: argparse.Namespace, subject: Subject, extractor: Extractor, processes: Processes
) -> Reference | None:
    """The real images' side of the comparison; None but in rank 0."""
    images, split = subject.image_set.images, subject.split
    if args.reference:
        return published_reference(args.reference, images.shape[1], extractor)
    of_split = {"train": split.train_indices, "val": split.val_indices}[args.reference_split]
    indices = evenly(of_split, args.reference_images)
    if len(indices) < 2:
        raise UserError(f"an empty reference: {len(indices)} {args.reference_split} image(s), 2 are the fewest")
    ids = hash_ids([subject.image_set.ids[i] for i in indices])
    name = Path(subject.image_set.name).name  # a path is nobody's business, and the pixels have their hash
    description = describe(images, indices, ids, name, args.reference_split, extractor)
    reference = cached_reference(
        args.cache or args.runs / ".evaluation", description,
        lambda: real_features(images, indices, args.batch_size, extractor, processes), processes,
    )  # fmt: skip
    if args.save_reference and processes.is_main:
        write_reference(args.save_reference, reference)
        print(f"wrote {args.save_reference}")
    return reference


def evaluate_images(
    args: argparse.Namespace,
    subject: Subject,
    sampler: SamplerOptions,
    extractor: Extractor,
    reference: Reference | None,
    processes: Processes,
) -> None:
    """FID, KID, precision and recall of samples."""
    metrics = tuple(name for name in args.metrics if name != "bpd")
    shape = (3, *subject.image_set.images.shape[1:3])
    drawing = ImageSampler(subject.denoiser, sampler, shape, args.seed, subject.device)
    generated = sample_features(drawing, args.n, args.batch_size, extractor, to_uint8, processes)
    if not processes.is_main:
        return
    settings = {
        **subject.facts, "n": args.n, **sampler.facts(subject.denoiser.scheduler.timesteps),
        "sampler_in_words": str(sampler), "reference": reference.description,
    }  # fmt: skip
    protocol = image_protocol(reference.description, settings)
    warnings = image_warnings(reference.description, args.n, generated.shape[1])
    for warning in warnings:
        warn(processes, warning)
    results = compare(metrics, generated, reference, args.seed)
    path = result_path(subject.folder, subject.checkpoint, "-".join(metrics), settings)
    write_result(path, {"protocol": protocol, "warnings": warnings, "settings": settings, **results})
    print(f"{image_table(results, protocol)}\nwrote {path}")


if __name__ == "__main__":
    with plain_errors():
        main()
