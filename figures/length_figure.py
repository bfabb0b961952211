"""Draw the distance of samples over the length of the average, for docs/evaluation.md.

`python -m figures.length_figure RUN ...`

Each RUN is the run folder of another seed, trained with `power_ema` and `snapshot_every`. The
numbers are kept in RUN/lengths-N.json, where N is the number of samples. A data set has a panel.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from figures.feature_distance import training_features
from figures.saved_model import sampler_of
from functions.sampling.generation import generate
from functions.sampling.guidance import with_guide
from functions.sampling.options import SamplerOptions
from functions.sampling.reconstruction import reconstruct
from functions.support.checkpoint import SavedModel, load_weights
from functions.support.command_line import Parser, exit_on_user_error, positive
from functions.support.errors import UserError
from functions.support.pictures import plt, save_figure
from functions.support.processes import SINGLE_PROCESS
from functions.support.run_folder import find_checkpoints

FIGURE = Path(__file__).resolve().parent / "ema_lengths.png"
LENGTHS = (0.03, 0.05, 0.1, 0.15, 0.2)
# The guide is from this fraction of the run, as in README's command for `faces-quick`.
GUIDE_AT = 0.4

# The distance by "plain" or "guided", and by length or "EMA", the average of training.
Distances = dict[str, dict[str, float]]


def main() -> None:
    """Measure the runs and draw the figure."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="A run folder.")
    parser.add_argument(
        "--images", type=positive, default=500, help="Samples per distance. Default: %(default)s."
    )
    args = parser.parse_args()

    panels = defaultdict(list)
    for run in args.runs:
        saved = load_weights(find_checkpoints(run)[0])
        facts = saved.provenance
        if facts["step"] != facts["total_steps"]:
            raise UserError(f"{run} is not finished; train.py --resume continues it")
        data = Path(saved.config["diffusion"]["dataset_name"]).stem
        panels[data].append(measure(run, saved, args.images))
    draw(panels)


def measure(run: Path, saved: SavedModel, count: int) -> Distances:
    """Return the distances of a run; those that are in the run's file are not measured again."""
    path = run / f"lengths-{count}.json"
    distances = {"plain": {}, "guided": {}}
    if path.exists():
        distances = json.loads(path.read_text())
    features = training_features(saved)
    guide = str(round(GUIDE_AT * saved.provenance["step"]))

    models = {"EMA": saved}
    models |= {str(length): load_weights(reconstruct(run, length)) for length in LENGTHS}
    for name, model in models.items():
        for key, options in (
            ("plain", SamplerOptions("dpm++", 20)),
            ("guided", SamplerOptions("dpm++", 20, guide=guide)),
        ):
            if name in distances[key]:
                continue
            sampler = with_guide(sampler_of(model, options), model, SINGLE_PROCESS)
            images = generate(sampler, range(count)).images
            distances[key][name] = features.distance(images)
            print(f"{run.name}, {key}, {name}: {distances[key][name]:.3f}", flush=True)
            path.write_text(json.dumps(distances))
    return distances


def draw(panels: dict[str, list[Distances]]) -> None:
    """Draw a dot for each run and length, lines through the means, and the EMA of training."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.4), squeeze=False, sharey=True
    )
    for axis, (data, runs) in zip(axes[0], panels.items(), strict=True):
        for key, colour in (("plain", "tab:blue"), ("guided", "tab:orange")):
            rows = np.array([[run[key][str(length)] for length in LENGTHS] for run in runs])
            for row in rows:
                axis.plot(LENGTHS, row, ".", color=colour)
            axis.plot(LENGTHS, rows.mean(0), color=colour, label=key)
            ema = np.mean([run[key]["EMA"] for run in runs])
            axis.axhline(ema, color=colour, linestyle=":", label=f"{key}, EMA of training")
        axis.set(title=data, xlabel="relative length of the average", xticks=LENGTHS)
        axis.grid(color="0.92")
    # All panels share this axis.
    axes[0, 0].set(ylabel="distance", ylim=(0, None))
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save_figure(figure, FIGURE)
    print(f"wrote {FIGURE}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
