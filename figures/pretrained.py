"""Put a trained model of FFHQ into pretrained/, with a card that says where it
comes from.

`python -m figures.pretrained RUN [GUIDE]`

RUN is the folder of a finished run, and needs its photos. Its last snapshot is
copied. A run of `ffhq-32` or `ffhq-64` has a guide, too: the snapshot GUIDE,
or else an early one of its own. A run of `ffhq-details` takes the place of the
models that enlarge in pretrained/people.toml. The card is pretrained/NAME.md.
Its table is written. The text under it, from the first heading on, is written
by hand, and stays.
"""

import hashlib
import shlex
import shutil
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import EXPERIMENTS, Experiment
from data.datasets import ImageSet, Split
from data.pixels import to_model_range, to_uint8
from figures.make_figures import nearest
from figures.saved_model import GUIDE_STEPS, GUIDED, open_saved
from functions.denoiser import Denoiser
from functions.evaluation.bits_per_dim import evenly_spaced
from functions.evaluation.fidelity import frechet_distance, training_features
from functions.evaluation.training_images import load_and_split
from functions.sampling.generation import Pipeline, generate
from functions.sampling.models import guide_path
from functions.sampling.settings import PRETRAINED, SamplingConfig, read_recipe
from functions.saved.checkpoint import SavedModel, load_model, load_weights
from functions.saved.loading import load_denoiser
from functions.super_resolution.details import LOG_SNR_SHIFT, STD, details, shrink
from functions.support.command_line import run_script
from functions.support.errors import UserError
from functions.support.files import write_text
from functions.support.random_numbers import image_noise
from functions.timesteps import nearest_timesteps
from functions.training.metrics import read_metrics

# The samples of the card are the first images of seed 0, in float32.
SAMPLE_COUNT = 400
# The errors of details are those of so many photos, at these log-SNRs.
DETAILS_COUNT = 80
DETAILS_LOG_SNRS = (-1.4, 0.0, 1.0, 2.0, 3.0, 4.0)


def main() -> None:
    """Copy a run's last snapshot, with a guide if it draws, and write the table of the card."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("guide", type=Path, nargs="?")
    run, given_guide = vars(parser.parse_args()).values()

    source = load_model(run)
    facts = source.provenance
    if facts["step"] != facts["total_steps"]:
        raise UserError(f"{run} is not finished; train.py --resume continues it")
    snapshot = run / "snapshots" / source.path.name
    if not snapshot.exists():
        raise UserError(f"{run} has no snapshot of its last step")
    source = load_weights(snapshot)
    image_set, split = load_and_split(source)
    pixels_hash = split.hashes["pixels_hash"]
    if facts["pixels_hash"] != pixels_hash:
        raise UserError(f"{run} was trained on other images than {image_set.name} has now")

    boxed = PRETRAINED.with_name(f"{facts['experiment']}.safetensors")
    files = {"file": (snapshot, boxed)}
    rows = {}
    # What cannot draw or enlarge is refused before it is copied.
    recipe = read_recipe(PRETRAINED)
    if boxed.stem in GUIDE_STEPS:
        step = GUIDE_STEPS[boxed.stem]
        path = given_guide or guide_path(step, source)
        guide = load_weights(path)
        origin = path.parent.name, guide.provenance["step"], guide.provenance["pixels_hash"]
        # A checkpoint has the optimiser's state, too.
        if origin != ("snapshots", step, pixels_hash):
            raise UserError(f"{path} is no snapshot of step {step} and of the images of {run}")
        boxed_guide = boxed.with_stem(f"{boxed.stem}-guide")
        files["guide"] = path, boxed_guide
        rows["command of the guide"] = f"`{command_of(guide)}`, after {step:,} steps"
        flags = GUIDED
        if boxed.stem == Path(recipe.model).stem:
            flags = flags_of(replace(recipe, guide=None, guidance=None, enlarge=()))
        command = f"{boxed.name} {flags} --guide pretrained/{boxed_guide.name}"
        pipeline = open_saved(snapshot, f"{flags} --guide {shlex.quote(str(path))} --device cpu")
    elif given_guide:
        raise UserError(f"{boxed.stem} enlarges, without a guide")
    else:
        parts = ["--enlarge", *[str(snapshot)] * len(recipe.enlarge)]
        pipeline = open_saved(PRETRAINED, f"{shlex.join(parts)} --device cpu")
        command = PRETRAINED.name
        photos = image_set.images[evenly_spaced(split.val_indices, DETAILS_COUNT)]
        rows |= detail_errors(load_denoiser(snapshot), to_model_range(photos))

    boxed.parent.mkdir(exist_ok=True)
    copied = {}
    for kind, (file, path) in files.items():
        shutil.copyfile(file, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        copied |= {kind: f"`{path.name}`", f"SHA-256 of the {kind}": f"`{digest}`"}
    rows = copied | rows | facts_of_run(run, source)
    rows |= measured(image_set, split, pipeline, f"python sample.py pretrained/{command}")
    card = boxed.with_suffix(".md")
    write_table(card, rows)
    print(f"wrote {boxed} and {card}")


def flags_of(config: SamplingConfig) -> str:
    """Return the flags of settings that have no guide and no enlargers."""
    return shlex.join(
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(config).items()
        if name != "model" and value != getattr(SamplingConfig, name)
    )


def command_of(source: SavedModel) -> str:
    """Return the command that trained a model."""
    facts = source.provenance
    preset = EXPERIMENTS[facts["experiment"]].override(lowest_resolution_size=None)
    command = f"python train.py {facts['experiment']}"
    # The lowest resolution follows from the other fields.
    own = Experiment.from_dict(source.config).override(lowest_resolution_size=None)
    for name, (value, _) in own.differences(preset).items():
        text = " ".join(map(str, value)) if isinstance(value, list) else value
        command += f" --{name.replace('_', '-')} {text}"
    if facts["initial"]:
        command += f" --init {facts['initial'].partition(': ')[0]}"
    return command


def facts_of_run(run: Path, source: SavedModel) -> dict[str, str]:
    """Return what a run says of itself: {name: value}."""
    facts = source.provenance
    arithmetic = facts["arithmetic"]
    rows = read_metrics(run / "metrics.csv")
    # A machine that does other things, too, slows some steps down.
    speed = np.median([row["images_per_second"] for row in rows])
    image_count = facts["step"] * Experiment.from_dict(source.config).diffusion.effective_batch
    hours = image_count / speed / 3600
    cores = arithmetic["processes"] * arithmetic["threads"]
    last = [row["loss"] for row in rows if row["step"] > facts["step"] - 100]
    return {
        "weights": f"{source.kind} in float16, {facts['parameters']:,} parameters",
        "command": f"`{command_of(source)}`",
        "begins as": facts["initial"] or "random weights",
        "length": f"{facts['step']:,} steps, {image_count:,} images",
        "time": f"{hours:.1f} hours at the median speed, {hours * cores:.0f} CPU-hours",
        "processor": f"{arithmetic['processor']}, {cores} threads",
        "arithmetic": f"{arithmetic['precision']}, PyTorch {arithmetic['torch']}",
        "source": f"`{source.path.name}`, whose weights have the hash `{source.digest[:16]}`",
        "training loss at the end": f"{np.mean(last):.4f}",
        "held-out loss of the EMA at the end": f"{rows[-1]['val_loss_ema']:.4f}",
    }


def measured(image_set: ImageSet, split: Split, pipeline: Pipeline, command: str) -> dict[str, str]:
    """Return what is measured on samples, by this command, and on as many held-out images."""
    ids = image_set.ids
    trained, held_out = split.train_indices, split.val_indices
    real = image_set.images[evenly_spaced(held_out, SAMPLE_COUNT)]
    samples = generate(pipeline, range(len(real)), progress=True)

    features = training_features(image_set, split)
    distances = [frechet_distance(features([images])) for images in (samples, to_model_range(real))]
    similarities = [
        nearest(images, image_set.images[trained])[1].mean() for images in (to_uint8(samples), real)
    ]
    return {
        "training images": f"{len(trained):,} of {image_set.name}: {ids[trained[0]]} to "
        f"{ids[trained[-1]]}",
        "held-out images": f"{len(held_out):,}: {ids[held_out[0]]} to {ids[held_out[-1]]}",
        "measured on": f"{len(samples)} samples of seed 0: `{command} --precision float32 -n "
        f"{len(samples)} --individual`",
        "distance": f"{distances[0]:.2f}; held-out images {distances[1]:.2f}",
        "correlation with the most similar training image, of grey levels": (
            f"{similarities[0]:.3f}; held-out images {similarities[1]:.3f}"
        ),
    }


@torch.no_grad()
def detail_errors(denoiser: Denoiser, photos: Tensor) -> dict[str, str]:
    """Return the RMS errors of the details of photos (B, C, S, S), and of them at half the size."""
    rows = {}
    scheduler = denoiser.scheduler
    for photo in (photos, shrink(photos).clamp(-1, 1)):
        given = denoiser.given(low=shrink(photo))
        x_0 = details(photo) / STD
        noise = image_noise(0, range(len(photo)), photo.shape[1:], photo.device, "detail errors")()
        errors = []
        for log_snr in DETAILS_LOG_SNRS:
            shifted = torch.tensor([log_snr + LOG_SNR_SHIFT], dtype=torch.float64)
            [t] = nearest_timesteps(scheduler, shifted)
            estimate, _ = given.predict(scheduler.q_sample(x_0, t, details(noise)), t)
            error = STD * details(estimate - x_0)
            errors.append(f"{error.square().mean().sqrt():.4f}")
        levels = ", ".join(f"{log_snr:g}" for log_snr in DETAILS_LOG_SNRS)
        name = f"RMS error of the details of {len(photo)} held-out photos of {photo.shape[-1]} px"
        rows[f"{name}, at log-SNR {levels}"] = ", ".join(errors)
    return rows


def write_table(path: Path, rows: dict[str, str]) -> None:
    """Write a card with this table, {name: value}, and the title and text that it has by hand."""
    text = path.read_text() if path.exists() else f"# `{rows['file']}`\n"
    title, _, rest = text.partition("\n")
    _, heading, by_hand = rest.partition("\n## ")
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    written = "This table was written by `python -m figures.pretrained`."
    head = f"{title}\n\n| | |\n|---|---|\n{table}\n{written}\n"
    write_text(path, head + heading + by_hand)


if __name__ == "__main__":
    run_script(main)
