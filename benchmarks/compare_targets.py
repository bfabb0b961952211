"""The targets of benchmarks/compare.py: what was measured, the limit, and whether it is met."""

import operator
from dataclasses import dataclass

from benchmarks.compare_rounds import Result, ratio

GB = 1e9
MEMORY_TARGETS = ((128, 20, 10 * GB), (256, 4, 24 * GB))  # base_dim, batch, bytes; images of 128 px, EMA on the GPU


@dataclass(frozen=True)
class Target:
    """One row. `bound` is "at most", "at least", or "reported" for what has no limit."""

    name: str
    bound: str
    limit: float | None
    value: float | None  # None: not measured, and `text` says why
    text: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if self.bound == "reported":
            return "reported"
        holds = operator.le if self.bound == "at most" else operator.ge
        return "met" if holds(self.value, self.limit) else "MISSED"

    def to_dict(self) -> dict:
        return {**vars(self), "verdict": self.verdict}


@dataclass
class Judge:
    """Makes the rows out of the results."""

    results: dict[str, Result]  # by the arm's name
    replay: list[dict]  # {"round", "seconds"} of ours' own convolutions and matrix products alone
    ceilings: dict[str, dict[str, float]]  # by dtype: FLOPs a second
    alone: list[dict]
    memory: dict[tuple[int, int], tuple[int, str]]  # (base_dim, batch) -> peak bytes, and how
    dtype: str
    cuda: bool

    def good(self, package: str, **wanted: object) -> list[Result]:
        """The arms of a package that ran to the end, in settings that are wanted."""
        return [
            result
            for result in self.results.values()
            if result.arm.package == package
            and result.failure is None
            and all(getattr(result.arm, name) == value for name, value in wanted.items())
        ]

    def one(self, name: str) -> list[Result]:
        return [self.results[name]] if name in self.results and self.results[name].failure is None else []

    def fastest(self, candidates: list[Result]) -> Result:
        """By the step, in units of ours in the same rounds."""
        return min(candidates, key=lambda result: ratio(result, self.results["ours"]))

    def compared(self, name: str, limit: float, mine: list[Result], theirs: list[Result]) -> Target:
        """The step of my fastest over that of their fastest."""
        missing = "; ".join(f"no {who} arm" for who, arms in (("such", theirs), ("such own", mine)) if not arms)
        if missing or not self.one("ours"):
            return Target(name, "at most", limit, None, missing or "no reference arm")
        a, b = self.fastest(mine), self.fastest(theirs)
        text = f"{a.arm.name} / {b.arm.name}; the pass alone {ratio(a, b, 'pass'):.3f}"
        return Target(name, "at most", limit, ratio(a, b), text)

    def kept(self, name: str, limit: float, mine: list[Result]) -> Target:
        """Bytes kept for backward over the least that diffusers keeps, without checkpointing, in this dtype."""
        theirs = self.good("diffusers", dtype=self.dtype, recompute="none", compiled=False)
        if not mine or not theirs:
            return Target(name, "at most", limit, None, "no such arm")
        kept = lambda result: result.facts["kept_bytes_per_image"]
        least = min(map(kept, theirs))
        text = f"{kept(mine[0]) / 2**20:.1f} of {least / 2**20:.1f} MiB"
        return Target(name, "at most", limit, kept(mine[0]) / least, text)

    def targets(self) -> list[Target]:
        by_device = lambda cpu, cuda: cuda if self.cuda else cpu
        ours, reference = self.good("ours"), self.one("ours")
        eager = self.good("diffusers", dtype=self.dtype, recompute="none", compiled=False)
        none, blocks = self.one("ours-none"), self.one("ours-blocks")
        return [
            self.compared("step, fastest of ours / diffusers eager", by_device(0.93, 0.65), ours,
                          self.good("diffusers", dtype=self.dtype, recompute="none", compiled=False, keeps_heap=False)),
            *([] if self.cuda else [
                self.compared("the same, our setting of the heap given to diffusers", 0.93, ours, eager)]),
            self.compared("step, fastest of ours / diffusers compiled", by_device(1.0, 0.9), ours,
                          self.good("diffusers", compiled=True)),
            *(self.compared(f"step out of the box, ours / {package}", 0.5, reference, self.one(f"{package}-default"))
              for package in ("diffusers", "lucidrains")),
            self.own_work(by_device(0.88, 0.75)),
            *self.shares(),
            self.kept("kept for backward, norms recomputed / diffusers", 0.42, reference),
            self.compared("step, norms recomputed / nothing recomputed", by_device(1.08, 1.03), reference, none),
            self.kept("kept for backward, blocks recomputed / diffusers", 0.15, blocks),
            self.compared("step, blocks recomputed / nothing recomputed", 1.35, blocks, none),
            self.agreement(),
            *(self.peak(*target) for target in MEMORY_TARGETS),
            *(self.beside(row) for row in self.alone if row["unit"] == "%"),
        ]  # fmt: skip

    def own_work(self, limit: float) -> Target:
        """Convolutions and matrix products alone over the whole step of our fastest mode."""
        name = "own convolutions and matmuls alone / step"
        if not self.replay or not self.one("ours"):
            return Target(name, "at least", limit, None, "ours failed")
        fastest, alone = self.fastest(self.good("ours")), Result(self.results["ours"].arm, readings=self.replay)
        passes = Result(fastest.arm, readings=[{**r, "seconds": r["pass"]} for r in fastest.readings])
        steps = Result(fastest.arm, readings=[{**r, "seconds": r["step"]} for r in fastest.readings])
        text = f"{fastest.arm.name}; over the pass alone {ratio(alone, passes, 'seconds'):.3f}"
        return Target(name, "at least", limit, ratio(alone, steps, "seconds"), text)

    def shares(self) -> list[Target]:
        """Of the machine's ceilings, by the step of our fastest mode."""
        if not self.one("ours") or self.dtype not in self.ceilings:
            return [Target("share of the machine's ceiling", "reported", None, None, "ours failed")]
        fastest = self.fastest(self.good("ours"))
        rate = fastest.facts["flops_per_second"]
        return [
            Target(f"share of the {kind} ceiling", "reported", None, rate / ceiling,
                   f"{rate / 1e12:.3f} of {ceiling / 1e12:.3f} TFLOP/s; {fastest.arm.name}")
            for kind, ceiling in self.ceilings[self.dtype].items()
        ]  # fmt: skip

    def agreement(self) -> Target:
        """How far the two ways to count kept bytes are apart, the worst of our arms."""
        name = "kept for backward, counted against memory_allocated"
        pairs = [
            result.facts["allocated_bytes_per_image"] / result.facts["kept_bytes_per_image"]
            for result in self.good("ours", compiled=False)
            if "allocated_bytes_per_image" in result.facts
        ]
        if not pairs:
            return Target(name, "at most", 0.05, None, "CUDA only")
        return Target(name, "at most", 0.05, max(abs(pair - 1) for pair in pairs), "worst of our arms")

    def peak(self, base_dim: int, batch: int, limit: float) -> Target:
        name = f"max_memory_reserved, base {base_dim}, batch {batch}, in GB"
        if (base_dim, batch) not in self.memory:
            return Target(name, "at most", limit / GB, None, "CUDA only")
        peak, how = self.memory[base_dim, batch]
        return Target(name, "at most", limit / GB, peak / GB, how) if peak else Target(
            name, "at most", limit / GB, None, how)  # fmt: skip

    def beside(self, row: dict) -> Target:
        return Target(f"{row['what']}, in %", "at most", 2.0, row["value"], row["text"])
