"""The reference's open questions, by experiment: `python figures/experiments.py train`; then the other words below.

    train     all ARMS with all SEEDS in turn, by the loop of train.py; two to three minutes each on two cores.
              Several averages of the weights are kept in the same run: an average never touches the training.
    measure   what figures/experiment_measures.py defines, of every arm, seed and average; into
              figures/experiments.json, from which README's table is made.
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
from dataclasses import dataclass
from pathlib import Path

from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that the repository's modules are found from any folder

import train  # noqa: E402
from config import EXPERIMENTS, ConfigError, DiffusionConfig, Experiment, ModelConfig  # noqa: E402
from functions.ema import update_ema  # noqa: E402
from functions.support.checkpoint import SavedModel, check_whole, export_weights  # noqa: E402
from functions.support.command_line import Parser, add_config_flags, given_fields, plain_errors, positive  # noqa: E402
from functions.support.device import choose_device  # noqa: E402
from functions.support.processes import joined  # noqa: E402
from functions.support.run_folder import Run, find_checkpoints, runs_of  # noqa: E402

RESULTS = Path(__file__).resolve().with_name("experiments.json")
PICTURE = Path(__file__).resolve().with_name("experiments.png")
SEEDS = (0, 1)

# What an arm changes of the base, which is `faces` with BASE. The narrowest level has 32 channels.
BASE = {"epochs": 16, "validate_every": 200, "sample_every": 10**6, "checkpoint_every": 10**6, "grid_steps": 20}
ARMS: dict[str, tuple[dict, dict]] = {
    "T200-as-is": ({"timesteps_diff": 200, "rescale_betas": False}, {}),
    "T200-rescaled": ({"timesteps_diff": 200}, {}),
    "T1000": ({}, {}),  # 8 groups: 4 channels a group
    # The reference's rate was constant; the cosine's fall to 0 does part of an average's work.
    "T1000-constant": ({"lr_schedule": "constant"}, {}),
    "groups-of-1": ({}, {"norm_groups": 32}),
    "groups-of-2": ({}, {"norm_groups": 16}),
    "groups-of-8": ({}, {"norm_groups": 4}),
}


@dataclass(frozen=True)
class Average:
    """An exponential moving average that is kept beside the run's own.

    `ramp`: functions/ema.py's min(decay, (1 + n) / (10 + n)). In a short run it decides alone: after 800 steps it is
    at 0.989, so that every larger decay gives the same weights. Without it the initial weights are remembered.
    """

    decay: float
    ramp: bool = True

    def update(self, average: nn.Module, model: nn.Module, step: int) -> None:
        # From so late a step on, the ramp is above any decay.
        update_ema(average, model, step if self.ramp else 10**12, self.decay)


AVERAGES = {
    "0.9": Average(0.9),
    "0.97": Average(0.97),
    "0.995, no ramp": Average(0.995, ramp=False),
    "0.998, no ramp": Average(0.998, ramp=False),
}


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
    from figures import experiment_measures, experiment_pictures, experiment_samplers  # they import names from here

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


def run_name(arm: str, seed: int) -> str:
    return f"{arm}-seed{seed}"


def experiment_of(arm: str, seed: int, diffusion: dict, model: dict) -> Experiment:
    """An arm's experiment; what the arm itself is about comes last."""
    own_diffusion, own_model = ARMS[arm]
    return EXPERIMENTS["faces"].override({**BASE, **diffusion, **own_diffusion, "seed": seed}, {**model, **own_model})


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


def weights_file(run: Path, name: str) -> Path:
    """Where a run's weights of this name lie: "raw", or an average's decay. sample.py reads these files too."""
    return run / "weights" / f"{name.replace(', ', '-').replace(' ', '-')}.safetensors"


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


def own_average(config: dict) -> str:
    """The name of the average that the run itself keeps."""
    return f"{config['diffusion']['ema_decay']:g}"


def finished_run(runs: Path, arm: str, seed: int) -> Path | None:
    """The newest finished run of an arm; one that was cut short is trained anew, as its averages are lost."""
    finished = [run for run in runs_of(runs, run_name(arm, seed)) if weights_file(run, "raw").exists()]
    return finished[-1] if finished else None


if __name__ == "__main__":
    with plain_errors(ConfigError):
        main()
