"""The arms of figures/experiments.py, where their runs' weights lie, and the file of their numbers."""

import json
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from torch import nn

from config import EXPERIMENTS, Experiment
from functions.ema import update_ema
from functions.support.files import write_whole
from functions.support.run_folder import runs_of

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


def run_name(arm: str, seed: int) -> str:
    return f"{arm}-seed{seed}"


def experiment_of(arm: str, seed: int, diffusion: dict, model: dict) -> Experiment:
    """An arm's experiment; what the arm itself is about comes last."""
    own_diffusion, own_model = ARMS[arm]
    return EXPERIMENTS["faces"].override({**BASE, **diffusion, **own_diffusion, "seed": seed}, {**model, **own_model})


def weights_file(run: Path, name: str) -> Path:
    """Where a run's weights of this name lie: "raw", or an average's decay. sample.py reads these files too."""
    return run / "weights" / f"{name.replace(', ', '-').replace(' ', '-')}.safetensors"


def own_average(config: dict) -> str:
    """The name of the average that the run itself keeps."""
    return f"{config['diffusion']['ema_decay']:g}"


def finished_run(runs: Path, arm: str, seed: int) -> Path | None:
    """The newest finished run of an arm; one that was cut short is trained anew, as its averages are lost."""
    finished = [run for run in runs_of(runs, run_name(arm, seed)) if weights_file(run, "raw").exists()]
    return finished[-1] if finished else None


class Results:
    """The numbers in one JSON file, which several measuring processes may fill at once.

    Values by a path of keys: `results.put(1.5, "arms", "T1000", "0", "raw", "distance")`, and `get` alike.
    """

    def __init__(self, path: Path):
        self.path = path

    def get(self, *keys: str) -> object:
        """The value, a dict of what lies below, or None."""
        value = self.all()
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def all(self) -> dict:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def put(self, value: object, *keys: str) -> None:
        """Set one value and write the file, whatever other processes have written meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock.tmp")):  # *.tmp is not committed
            contents = below = self.all()
            for key in keys[:-1]:
                below = below.setdefault(key, {})
            below[keys[-1]] = rounded(value)
            write_whole(self.path, lambda file: file.write((json.dumps(contents, indent=1) + "\n").encode()))


def rounded(value: object) -> object:
    """Five digits: more would pretend to an accuracy that there is not."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
