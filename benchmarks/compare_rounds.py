"""The rounds of benchmarks/compare.py: which workers stand beside each other, and take turns; readings and ratios."""

import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from benchmarks.compare_arms import Arm
from benchmarks.compare_worker import Worker, WorkerError

ROOM = 1.5  # times the largest peak so far, that has to be free before another worker is started


@dataclass
class Result:
    """What was measured of an arm; `readings` hold seconds, and the number of their round."""

    arm: Arm
    facts: dict = field(default_factory=dict)  # parameters, peak_bytes, first_seconds, flops_per_image, ...
    readings: list[dict] = field(default_factory=list)
    failure: str | None = None

    def median(self, name: str, rounds: set[int] | None = None) -> float:
        """Of pass, optimizer, step or call; in these rounds, or in all."""
        return statistics.median(r[name] for r in self.readings if rounds is None or r["round"] in rounds)


def ratio(result: Result, to: Result, name: str = "step") -> float:
    """Of medians over the rounds in which both took their turns."""
    rounds = {reading["round"] for reading in result.readings} & {reading["round"] for reading in to.readings}
    return result.median(name, rounds) / to.median(name, rounds)


@dataclass
class Rounds:
    """All rounds of a run. `after_ours` is called with the worker of `ours` after each of its turns in the first group.

    Ours stay from the first round to the last. The peers come in groups, as many at a time as there is memory for, and
    are compared with ours in the same rounds.
    """

    open_worker: Callable[[Arm], Worker]
    rounds: int
    warm_up: int  # rounds in each group before those that count
    turn_seconds: float
    after_ours: Callable[[Worker, bool], None]  # the bool: whether the round counts
    workers: dict[str, Worker] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    number: int = 0  # of the round
    stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Rounds":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def run(self, arms: list[Arm]) -> None:
        """Measure all arms; those of ours stay afterwards, for more to be asked of them."""
        ours = [arm for arm in arms if arm.package == "ours"]
        peers = [arm for arm in arms if arm.package != "ours"]
        for arm in ours:
            self.start(arm)
        first = True
        while first or peers:
            group = []
            while peers and (not group or self.has_room()):
                group.append(peers.pop(0))
                self.start(group[-1])
            for k in range(self.warm_up + self.rounds):
                self.one_round([*ours, *group], k >= self.warm_up, first)
            for arm in group:
                self.finish(arm)
            first = False
        for arm in ours:
            self.attempt(arm, lambda worker, arm=arm: self.results[arm.name].facts.update(worker.facts()))

    def start(self, arm: Arm) -> None:
        print(f"starting {arm.text}", file=sys.stderr, flush=True)
        self.results[arm.name] = Result(arm)
        self.workers[arm.name] = self.open_worker(arm)
        self.stack.callback(self.close, arm)
        self.attempt(arm, lambda worker: self.results[arm.name].facts.update(worker.start()))

    def has_room(self) -> bool:
        """Whether the free memory is surely enough for another worker."""
        peaks = [result.facts.get("peak_bytes", 0) for result in self.results.values()]
        for worker in self.workers.values():
            with suppress(WorkerError):
                return worker.free_bytes() > ROOM * max(peaks)
        return True

    def one_round(self, arms: list[Arm], counts: bool, first: bool) -> None:
        """Every arm's turn, one after the other; while one works the others wait."""
        self.number += 1
        for arm in arms:
            self.attempt(arm, lambda worker, arm=arm: self.one_turn(worker, arm, counts))
            if arm.name == "ours" and first:
                self.attempt(arm, lambda worker: self.after_ours(worker, counts))

    def one_turn(self, worker: Worker, arm: Arm, counts: bool) -> None:
        reading = worker.turn(self.turn_seconds)
        if counts:
            self.results[arm.name].readings.append({"round": self.number, **reading})

    def finish(self, arm: Arm) -> None:
        self.attempt(arm, lambda worker: self.results[arm.name].facts.update(worker.facts()))
        self.close(arm)

    def attempt(self, arm: Arm, act: Callable[[Worker], object]) -> object:
        """Do something with an arm's worker; what it cannot do is a result of the arm, and ends its part."""
        if arm.name not in self.workers:
            return None
        try:
            return act(self.workers[arm.name])
        except WorkerError as error:
            print(f"{arm.text} failed: {error}", file=sys.stderr, flush=True)
            self.results[arm.name].failure = str(error)
            self.close(arm)
            return None

    def close(self, arm: Arm) -> None:
        if arm.name in self.workers:
            self.workers.pop(arm.name).close()
