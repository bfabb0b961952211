"""Put a trained model into pretrained/, with a card that says where it comes from.

`python -m figures.pretrained RUN`

RUN is the folder of a finished run of a preset with the embedded faces. Its last snapshot is
copied, so the weights are float16. The card, pretrained/README.md, has the hash of the file and the
distance of 100 samples; tests/test_pretrained.py checks both.
"""

import hashlib
import shutil
from pathlib import Path

from torch import Tensor

from config import EXPERIMENTS, Experiment
from figures.saved_model import open_saved
from functions.evaluation.feature_distance import spoilt, training_features
from functions.sampling.generation import generate
from functions.sampling.options import SamplerOptions
from functions.saved.checkpoint import SavedModel
from functions.saved.loading import load_and_split
from functions.saved.run_folder import PRETRAINED
from functions.support.command_line import Parser, exit_on_user_error
from functions.support.errors import UserError
from functions.support.files import write_text
from functions.training.metrics import read_metrics

# The samples of the card: the first images of seed 0, with this sampler.
SAMPLE_COUNT = 100
OPTIONS = SamplerOptions("dpm++", 20)


def main() -> None:
    """Copy the last snapshot of the run, and write the card and its picture."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="The folder of a finished run.")
    run = parser.parse_args().run

    source, _ = open_saved(run, OPTIONS, "cpu")
    facts = source.provenance
    name = facts["experiment"]
    if facts["step"] != facts["total_steps"]:
        raise UserError(f"{run} is not finished; train.py --resume continues it")
    snapshot = run / "snapshots" / source.path.name
    if not snapshot.exists():
        raise UserError(f"{run} has no snapshot of its last step")
    # The card names the command, so the command has to give the same run.
    if Experiment.from_dict(source.config) != EXPERIMENTS.get(name):
        raise UserError(f"{run} differs from the presets; the card needs a run of a preset")

    PRETRAINED.parent.mkdir(exist_ok=True)
    shutil.copyfile(snapshot, PRETRAINED)
    write_text(PRETRAINED.with_name("README.md"), card(run, PRETRAINED, source))
    print(f"wrote {PRETRAINED} and its README.md")


def draw(path: Path) -> tuple[SavedModel, Tensor]:
    """Return the model and the samples that the card describes: (SAMPLE_COUNT, C, H, W)."""
    saved, sampler = open_saved(path, OPTIONS, "cpu")
    return saved, generate(sampler, range(SAMPLE_COUNT))


def card(run: Path, path: Path, source: SavedModel) -> str:
    """Return the text of the card for the file at `path`, whose weights are those of `source`."""
    rows = read_metrics(run / "metrics.csv")
    lowest = min((row for row in rows if row["val_loss_ema"]), key=lambda row: row["val_loss_ema"])

    saved, images = draw(path)
    features = training_features(*load_and_split(saved))
    facts = source.provenance
    arithmetic = facts["arithmetic"]
    return f"""# The model in the box

`python sample.py`, `python evaluate.py` and `python demo.py` use this model until there is a run in
`runs/`.

| | |
|---|---|
| file | `{path.name}`: {source.kind} weights in float16, {facts["parameters"]:,} parameters |
| SHA-256 of the file | `{hashlib.sha256(path.read_bytes()).hexdigest()}` |
| command | `python train.py {facts["experiment"]}` |
| steps | {facts["step"]:,} |
| processor | {arithmetic["processor"]}, {arithmetic["threads"]} threads |
| arithmetic | {arithmetic["precision"]}, PyTorch {arithmetic["torch"]} |
| source | `{source.path.name}`, whose weights have the hash `{source.digest[:16]}` |
| training loss at the end | {rows[-1]["loss"]:.4f} |
| held-out loss of the EMA at the end | {rows[-1]["val_loss_ema"]:.4f} |
| lowest held-out loss of the EMA | {lowest["val_loss_ema"]:.4f}, at step {lowest["step"]:,} |
| samples that are dark or speckled | {int(spoilt(images).sum())} of {SAMPLE_COUNT} |
| distance | {features.distance(features([images])):.2f} |

The last two rows are measured on {SAMPLE_COUNT} samples: {OPTIONS}, seed 0.
[whole-before-detail](../docs/whole-before-detail.md#measured) explains both. 100 random real images
have distances of 1.2 to 2.0 to the training images.

**Good at:** heads and shoulders of emoji people on white, at 32 x 32 pixels, in 20 steps.

**Bad at:** everything else, because it has seen nothing else. With only 811 training images, it
memorises: some samples are almost copies ([evaluation](../docs/evaluation.md)). It has no earlier
snapshots, which `--guide STEP` needs.

**Licence.** The training images are Noto Emoji, under the Apache License 2.0
([licence](../data/LICENSE-emoji_faces.txt), [notice](../data/README.md#the-embedded-set)).

Written by `python -m figures.pretrained RUN`.
"""


if __name__ == "__main__":
    with exit_on_user_error():
        main()
