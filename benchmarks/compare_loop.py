"""train.py itself, with a clock around what computes: the share of each step that is something else, in %.

    python -m benchmarks.compare_loop STEPS EXPERIMENT [train.py's flags]

Prints a JSON list, one share for each 5 steps, since a row of metrics is written every 5 (by default every 50).
"""

import contextlib
import itertools
import json
import sys
import time

import torch

import train
from benchmarks.compare_alone import timing
from functions.support.device import choose_device
from functions.training.book_keeping import BookKeeper

WARM_UP, LOG_EVERY = 5, 5


class Enough(Exception):
    """As many steps were timed as were wanted."""


def loop_shares(steps: int, device: torch.device) -> list[float]:
    """Run train.main with the command line in sys.argv up to so many steps."""
    computing, ends = [], []
    for owner, name in (
        (train, "noise_prediction_loss"), (train, "augment"), (train, "update_ema"), (torch.Tensor, "backward"),
        (torch.optim.Adam, "step"), (torch.nn.utils, "clip_grad_norm_"),
    ):  # fmt: skip
        setattr(owner, name, timing(getattr(owner, name), computing, device))
    after_step = BookKeeper.after_step

    def counting(books: BookKeeper, *args) -> None:
        after_step(books, *args)
        ends.append((time.perf_counter(), sum(computing)))
        if len(ends) > WARM_UP + steps:
            raise Enough

    BookKeeper.after_step = counting
    with contextlib.suppress(Enough):
        train.main()
    chosen = ends[WARM_UP::LOG_EVERY]
    return [
        100 * (1 - (computed - computed_before) / (now - before))
        for (before, computed_before), (now, computed) in itertools.pairwise(chosen)
    ]


def main() -> None:
    steps = int(sys.argv.pop(1))
    sys.argv += [f"--diffusion.log-every={LOG_EVERY}"]
    sys.argv += [f"--diffusion.{name}-every={10**6}" for name in ("validate", "sample", "checkpoint")]
    device = next(flag.partition("=")[2] for flag in sys.argv if flag.startswith("--device="))
    print(json.dumps(loop_shares(steps, choose_device(device))))


if __name__ == "__main__":
    main()
