"""The values of config.py's fields for tests/fuzz.py."""

import json
import random
from pathlib import Path

import torch

from config import EXPERIMENTS, ConfigError, Experiment
from functions.noise_scheduler import NoiseScheduler
from models.unet import UNet
from tests.fuzz_kinds import Case, Fault, tiny_experiment
from tests.fuzz_mutations import hostile_value, spoil_tree

TOO_LARGE = "accepted, too large to build here"


def check_works(experiment: Experiment) -> bool:
    """Whether an accepted experiment could be built; `Fault` when it turns out not to work."""
    model, diffusion = experiment.model, experiment.diffusion
    if Experiment.from_dict(json.loads(json.dumps(experiment.to_dict()))) != experiment:
        raise Fault("the config does not come back out of JSON as it was")
    torch.manual_seed(diffusion.seed)
    if diffusion.timesteps_diff > 10**5 or max(model.dims) > 4096 or len(model.dims) > 8:
        return False
    scheduler = NoiseScheduler(
        diffusion.timesteps_diff, diffusion.beta_start, diffusion.beta_end, diffusion.rescale_betas
    )
    if not all(table.isfinite().all() for table in vars(scheduler).values() if isinstance(table, torch.Tensor)):
        raise Fault("an accepted config gives a schedule that is not finite")
    with torch.device("meta"):
        UNet(**vars(model))
    return True


class Configs:
    """Values of config.py's fields."""

    name, errors = "config", (ConfigError,)

    def __init__(self, folder: Path):
        self.results = [tiny_experiment()]

    def make(self, folder: Path, rng: random.Random) -> Case:
        tree = rng.choice((tiny_experiment(), *EXPERIMENTS.values())).to_dict()
        part = rng.choice(("diffusion", "model"))
        for _ in range(rng.choice((1, 1, 2, 3))):
            field = rng.choice(sorted(tree[part]))
            near = tree[part][field]
            numbers = (near * 2, near * 10**9, -near, near + 1) if isinstance(near, (int, float)) else ()
            tree[part][field] = rng.choice(numbers) if numbers and rng.random() < 0.3 else hostile_value(rng)
        if rng.random() < 0.1:
            spoil_tree(tree, rng)
        return Case(folder, value=tree)

    def read(self, case: Case) -> Experiment:
        tree = case.value
        keys = {part: fields.keys() for part, fields in self.results[0].to_dict().items()}
        parts = [tree.get(part) for part in keys]
        if [part.keys() if isinstance(part, dict) else None for part in parts] == list(keys.values()):
            return self.results[0].override(*parts)  # as the command line's fields are taken
        return Experiment.from_dict(tree)

    def judge(self, case: Case, result: Experiment) -> str:
        asked, got = case.value, result.to_dict()
        for part in got:
            for field, value in got[part].items():
                given = asked[part].get(field, value)
                if (tuple(given) if isinstance(value, tuple) else given) != value:
                    raise Fault(f"{field} was given as {given!r} and became {value!r}")
        return "accepted, and works" if check_works(result) else TOO_LARGE
