"""Draw the distance of samples over the length of the average, for docs/evaluation.md.

`python figures/length_figure.py RUN ...`

Each RUN is the run folder of another seed, trained with `power_ema` and `snapshot_every`. The
numbers are kept in RUN/lengths-N.json, where N is the number of samples.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

# Python looks for modules in this script's folder, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import load_and_split
from data.pixels import to_model_range
from figures.feature_distance import Features
from functions.sampling.generation import ImageSampler, generate, rebuild
from functions.sampling.guidance import with_guide
from functions.sampling.options import SamplerOptions
from functions.sampling.reconstruction import reconstruct
from functions.support.checkpoint import load_weights
from functions.support.command_line import Parser, exit_on_user_error, positive
from functions.support.device import choose_device
from functions.support.errors import UserError
from functions.support.pictures import plt, save_figure
from functions.support.processes import SINGLE_PROCESS
from functions.support.run_folder import find_checkpoints

FIGURE = Path(__file__).resolve().parent / "ema_lengths.png"
LENGTHS = (0.03, 0.05, 0.1, 0.15, 0.2)
# The guide is from this fraction of the run.
GUIDE_AT = 0.25


def main() -> None:
    """Measure the runs and draw the figure."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="A run folder.")
    parser.add_argument(
        "--images", type=positive, default=500, help="Samples per distance. Default: %(default)s."
    )
    args = parser.parse_args()
    draw([measure(run, args.images) for run in args.runs])


def measure(run: Path, count: int) -> dict[str, dict[str, float]]:
    """Return the distance by "plain" or "guided", and by length or "EMA", the average of training.

    Distances that are already in the run's file are not measured again.
    """
    facts = load_weights(find_checkpoints(run)[0]).provenance
    if facts["step"] != facts["total_steps"]:
        raise UserError(f"{run} is not finished; train.py --resume continues it")
    path = run / f"lengths-{count}.json"
    distances = json.loads(path.read_text()) if path.exists() else {}
    models = {"EMA": find_checkpoints(run)[0]}
    models |= {str(length): reconstruct(run, length) for length in LENGTHS}

    device = choose_device("auto")
    image_set, split = load_and_split(load_weights(models["EMA"]))
    pixels = torch.from_numpy(image_set.images[split.train_indices])
    real = to_model_range(pixels).to(device)
    # Training flips images, so samples may face either way.
    features = Features(torch.cat([real, real.flip(3)]))

    for name, model in models.items():
        saved = load_weights(model)
        denoiser = rebuild(saved, device)
        early = str(round(GUIDE_AT * saved.provenance["step"]))
        for key, guide in (("plain", None), ("guided", early)):
            if name in distances.setdefault(key, {}):
                continue
            options = SamplerOptions("dpm++", 20, guide=guide)
            sampler = ImageSampler(denoiser, options, saved.model.image_shape, 0, device)
            sampler = with_guide(sampler, saved, SINGLE_PROCESS)
            images = generate(sampler, range(count)).images
            distances[key][name] = features.distance(images.to(device))
            print(f"{key}, {name}: {distances[key][name]:.3f}", flush=True)
            path.write_text(json.dumps(distances))
    return distances


def draw(runs: list[dict[str, dict[str, float]]]) -> None:
    """Draw a dot for each run and length, lines through the means, and the EMA of training."""
    figure, axis = plt.subplots(figsize=(5, 3.4))
    for key, colour in (("plain", "tab:blue"), ("guided", "tab:orange")):
        rows = np.array([[run[key][str(length)] for length in LENGTHS] for run in runs])
        for row in rows:
            axis.plot(LENGTHS, row, ".", color=colour)
        axis.plot(LENGTHS, rows.mean(0), color=colour, label=key)
        ema = np.mean([run[key]["EMA"] for run in runs])
        axis.axhline(ema, color=colour, linestyle=":", label=f"{key}, EMA of training")
    axis.set(xlabel="relative length of the average", ylabel="distance", ylim=(0, None))
    axis.grid(color="0.92")
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, FIGURE)
    print(f"wrote {FIGURE}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
