"""The reference's open questions, by experiment: `python figures/experiments.py train`; then the other words below.

    train     all ARMS with all SEEDS in turn, by the loop of train.py; two to three minutes each on two cores.
              Several averages of the weights are kept in the same run: an average never touches the training.
    measure   what figures/experiment_measures.py defines, of every arm, seed and average; into
              figures/experiments.json, from which the table of docs/experiments.md is made.
    samplers  the error of each sampler by network calls, on the newest finished `faces` run; into the same file.
    draw      figures/experiments.png, and the table in Markdown.

All skip what is there already, so any of them can be cut short and started again. Arms are the `faces`
experiment with fewer epochs and the fields named in ARMS; any field can be overridden for all arms, as with train.py.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the repository's modules are found from any folder

import train  # noqa: E402
from config import ConfigError, DiffusionConfig, ModelConfig  # noqa: E402
from figures import experiment_measures, experiment_pictures, experiment_samplers  # noqa: E402
from figures.experiment_arms import (  # noqa: E402
    ARMS,
    AVERAGES,
    Average,
    experiment_of,
    finished_run,
    own_average,
    run_name,
    weights_file,
)  # fmt: skip
from functions.ema import update_ema  # noqa: E402
from functions.support.checkpoint import SavedModel, check_whole, export_weights  # noqa: E402
from functions.support.command_line import Parser, add_config_flags, given_fields, plain_errors, positive  # noqa: E402
from functions.support.device import choose_device  # noqa: E402
from functions.support.processes import joined  # noqa: E402
from functions.support.run_folder import Run, find_checkpoints, runs_of  # noqa: E402

RESULTS = Path(__file__).resolve().with_name("experiments.json")
PICTURE = Path(__file__).resolve().with_name("experiments.png")
SEEDS = (0, 1)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=("train", "measure", "samplers", "draw"))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "experiments", metavar="FOLDER")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N")
    parser.add_argument("--faces", type=Path, metavar="RUN", help="the samplers' model; the newest finished faces run")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FILE", help="the numbers: measure's, for draw"
    )
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="FILE")
    parser.add_argument("--samples", type=positive, default=100, metavar="N", help="of each arm, seed, average (100)")
    parser.add_argument("--calls", nargs="+", type=positive, default=[5, 10, 20, 50, 100], metavar="N",
                        help="network calls of each sampler (5 10 20 50 100)")  # fmt: skip
    parser.add_argument("--sampler-images", type=positive, default=48, metavar="N", help="of each sampler (48)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add_config_flags(parser, "diffusion", DiffusionConfig)
    add_config_flags(parser, "model", ModelConfig)
    args = parser.parse_args()
    if args.what == "train":
        train_arms(args)
        return
    commands = {
        "measure": experiment_measures.measure,
        "samplers": experiment_samplers.measure,
        "draw": experiment_pictures.draw,
    }
    commands[args.what](args)


def train_arms(args: argparse.Namespace) -> None:
    """Train what is not trained yet: first all arms with the first seed."""
    device = choose_device(args.device)
    for seed in args.seeds:
        for arm in args.arms:
            if finished_run(args.runs, arm, seed):
                print(f"{arm}, seed {seed}: trained already", flush=True)
                continue
            experiment = experiment_of(arm, seed, given_fields(args, "diffusion", DiffusionConfig),
                                       given_fields(args, "model", ModelConfig))  # fmt: skip
            with joined() as processes, tracked(AVERAGES) as averages:
                train.train(Run(run_name(arm, seed), experiment, args.runs), device, processes)
            save_weights(runs_of(args.runs, run_name(arm, seed))[-1], averages)


@contextmanager
def tracked(averages: dict[str, Average]) -> Iterator[dict[str, nn.Module]]:
    """Within it train.py's `update_ema` moves further averages too; yields them by name, empty before the first step.

    They start, as the run's own, from the initial weights.
    """
    models: dict[str, nn.Module] = {}

    def update_all(ema_model: nn.Module, model: nn.Module, step: int, decay: float) -> None:
        if step == 0:  # the run's own average has not moved yet: these are the initial weights
            models.update({name: copy.deepcopy(ema_model) for name in averages})
        update_ema(ema_model, model, step, decay)
        for name, average in averages.items():
            average.update(models[name], model, step)

    train.update_ema = update_all
    try:
        yield models
    finally:
        train.update_ema = update_ema


def save_weights(run: Path, averages: dict[str, nn.Module]) -> None:
    """All weights of a finished run, the raw ones last: they mark it as finished."""
    checkpoint = check_whole(find_checkpoints(run)[0])
    config, facts = checkpoint.contents["config"], checkpoint.contents["run"]
    all_weights = {name: average.state_dict() for name, average in averages.items()}
    all_weights[own_average(config)] = checkpoint.tensors("ema.")
    (run / "weights").mkdir(exist_ok=True)
    for name, weights in {**all_weights, "raw": checkpoint.tensors("model.")}.items():
        kind = "raw" if name == "raw" else "EMA"
        export_weights(SavedModel(run, weights, kind, config, facts, digest=""), weights_file(run, name))


if __name__ == "__main__":
    with plain_errors(ConfigError):
        main()
