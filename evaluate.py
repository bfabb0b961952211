"""Measure a trained model, or a folder of samples.

    python evaluate.py [bits] [RUN]           bits/dim, the variational bound on
                                              held-out images (Ho et al. 2020,
                                              Eq. 5), of RUN or the newest run
    python evaluate.py distance FOLDER DATA   the distance of samples, and of as
                                              many held-out images, from the
                                              training images of a data set
    python evaluate.py images FOLDER DATA     FID, KID, precision and recall of
                                              samples, compared with training
                                              images of a data set

`python evaluate.py bits --help`, `distance --help` and `images --help` list
the flags of these. RUN is as in sample.py; of a recipe the model alone is
used. FOLDER is what `sample.py --individual --out FOLDER` has written. DATA is
a data set, by name or path; for images it may be another such folder.
"""

if __name__ == "__main__":
    from functions.support.start import prepare

    prepare()

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.batches import gather
from data.pixels import to_model_range
from functions.evaluation.bits_per_dim import BoundOptions, evenly_spaced, measure_bits_per_dim
from functions.evaluation.fidelity import (
    folder_images,
    frechet_distance,
    load_like,
    measure_fidelity,
    model_batches,
    set_images,
    training_features,
)
from functions.evaluation.training_images import load_and_split
from functions.samplers import VARIANCES
from functions.sampling.generation import Pipeline
from functions.sampling.models import open_models
from functions.sampling.samples_folder import MANIFEST, results_folder
from functions.sampling.settings import SamplingConfig, default_settings, find_run
from functions.saved.run_folder import DeviceFlags, PlaceFlags
from functions.support.command_line import NoFlags, read_flags, run_script, split_words
from functions.support.device import choose_device
from functions.support.errors import UserError, warn
from functions.support.files import read_json, sha256, write_text

# With fewer images, FID is far above that of many images.
FEW_IMAGES = 10_000


def main() -> None:
    """Read the command line, measure, and print the results."""
    verb, *words = sys.argv[1:] or ["bits"]
    if verb in VERBS:
        VERBS[verb](words)
    else:
        # The first word is a run, or a flag.
        evaluate_bits([verb, *words])


@dataclass(frozen=True)
class BitsFlags(PlaceFlags):
    """The flags of bits."""

    # The name or path of the data set, for example if the training data have moved. None: the data
    # set that the model was trained on.
    data: str | None = None
    # How many held-out images to use, evenly spaced. None: all.
    images: int | None = None
    # The most timesteps that one network call represents.
    t_stride: int = 20
    # The variance of p(x_{t-1} | x_t).
    bpd_variance: Literal[*VARIANCES] = "small"
    # The most timesteps in a network call. None: 64, or 16 on a CPU.
    batch_size: int | None = None
    # The folder for the results. None: the run's.
    out: Path | None = None


@dataclass(frozen=True)
class ImagesFlags(DeviceFlags):
    """The flags of images."""

    # The images of the data set: those for training, the held-out ones, or all. None: train.
    part: Literal["train", "val", "all"] | None = None


def evaluate_bits(words: list[str]) -> None:
    """Measure bits/dim of held-out images; print and write it."""
    [run], words = split_words("[RUN]", words)
    flags = read_flags(BitsFlags(), words, "[bits] [RUN]", __doc__)
    # The bound is computed in float32, whatever the precision of sampling, and is that of a single
    # model, which the mix of a guided one is not.
    config = SamplingConfig(
        model=default_settings(find_run(run, words)).model,
        precision="float32",
        batch_size=flags.batch_size,
    )
    models = open_models(config, flags.device)
    saved = models.saved
    device = models.device
    if device.type == "mps":
        raise UserError("bits/dim needs float64, which mps does not have; use --device cpu")
    # On a GPU, float32 would otherwise mean TF32.
    torch.backends.cudnn.allow_tf32 = False
    image_set, split = load_and_split(saved, flags.data)
    print(split.description)
    # If the model was trained on some of the held-out images, its result is too good.
    differences = split.differences(saved.provenance)
    if differences or "train_ids_hash" not in saved.provenance:
        warn(
            "WARNING: THESE MAY NOT BE THE DATA IT WAS TRAINED ON: it was "
            f"{', '.join(differences) or 'trained elsewhere'}; some of the validation images may "
            "be among its training images"
        )
    folder = flags.out or results_folder(saved, "evaluation")
    # The measurement may take hours. So an error of the folder comes first.
    folder.mkdir(parents=True, exist_ok=True)

    def load(index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, inputs = gather(image_set.images, image_set.inputs, device, np.array([index]))
        return to_model_range(images), inputs

    options = BoundOptions(
        flags.t_stride,
        Pipeline(models, config).batch_size,
        flags.bpd_variance,
        # For some diffusers models, samplers do not clip x_0. The bound then does not either.
        models.clip_x_0,
    )
    indices = evenly_spaced(split.val_indices, flags.images)
    result = measure_bits_per_dim(models.denoiser, load, indices, options)
    numbers = result.numbers()
    # Two results that differ in one of these cannot be compared.
    settings = {
        "experiment": saved.provenance["experiment"],
        "step": saved.provenance["step"],
        "weights": saved.kind,
        "weights_hash": saved.digest[:16],
        "ids_hash": split.hashes["val_ids_hash"],
        "pixels_hash": split.hashes["pixels_hash"],
        "labels_hash": split.hashes["labels_hash"],
        "images": len(indices),
        **vars(options),
    }
    settings_text = json.dumps(settings)
    print("bits/dim {bits_per_dim:.4f}, standard error {standard_error:.4f}".format(**numbers))
    print("    rate {rate:.4f} + distortion {distortion:.4f}".format(**numbers))
    print(f"    {len(result.lengths)} t for each image; {settings_text}")
    # Results of other settings are never overwritten.
    path = folder / f"{saved.name}-bpd-{sha256(settings_text)[:8]}.json"
    write_text(path, json.dumps({"settings": settings, **numbers}, indent=2))
    print(f"wrote {path}")


def evaluate_distance(words: list[str]) -> None:
    """Print how far samples are from the training images, and how far as many held-out ones are."""
    (folder, data), words = split_words("FOLDER DATA", words)
    read_flags(NoFlags(), words, "distance FOLDER DATA", __doc__)
    folder = Path(folder)
    samples = folder_images(folder)
    image_set, split = load_like(folder, data)
    features = training_features(image_set, split)
    drawn = features(model_batches(samples))
    print(f"{len(samples)} images of {folder}\ndistance: {frechet_distance(drawn):.4g}")

    # The distance falls with the number of images, so the numbers are equal.
    indices = evenly_spaced(split.val_indices, len(drawn))
    if len(indices) < 2:
        print("no distance of held-out images: there is one, and a distance needs two")
        return
    held_out = features(model_batches(set_images(image_set, indices)))
    count = len(held_out)
    if count < len(drawn):
        print(
            f"distance of the first {count} samples, as only {count} are held out: "
            f"{frechet_distance(drawn[:count]):.4g}"
        )
    print(f"distance of {count} held-out images: {frechet_distance(held_out):.4g}")


def evaluate_images(words: list[str]) -> None:
    """Measure FID, KID, precision and recall of a folder of images, and print them."""
    (folder, data), words = split_words("FOLDER DATA", words)
    flags = read_flags(ImagesFlags(), words, "images FOLDER DATA", __doc__)
    folder = Path(folder)
    samples = folder_images(folder)
    if not Path(data, MANIFEST).exists():
        image_set, split = load_like(folder, data)
        all_indices = np.arange(len(image_set.images))
        parts = {"train": split.train_indices, "val": split.val_indices, "all": all_indices}
        real = set_images(image_set, parts[flags.part or "train"])
    elif flags.part:
        raise UserError("--part is for a data set; a folder of samples has no parts")
    else:
        real = folder_images(Path(data))
    results = measure_fidelity(samples, real, choose_device(flags.device))
    print(f"{len(samples):,} images of {folder}, and {len(real):,} of {data}")
    manifest = folder / MANIFEST
    if manifest.exists():
        print(f"    {json.dumps(read_json(manifest))}")
    for name, value in results.items():
        print(f"{name:34} {value:.6g}")
    if len(samples) < FEW_IMAGES:
        warn(
            f"WARNING: ONLY {len(samples):,} SAMPLES: FID IS BIASED UPWARDS, "
            "and can be compared only with FIDs of as many"
        )


# The verbs of the command line.
VERBS = {"bits": evaluate_bits, "distance": evaluate_distance, "images": evaluate_images}

if __name__ == "__main__":
    run_script(main)
