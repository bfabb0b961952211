"""Reconstruct an average of a run's weights with another length, after training.

A run with `power_ema` keeps snapshots of power averages. A weighted sum of them is, up to a small
error, the average of any other length from SHORTEST to LONGEST (Karras et al. 2024,
arXiv:2312.02696, Section 3.2). functions/ema.py has the mathematics.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from functions.ema import mixing_weights
from functions.support.checkpoint import (
    check_fit,
    digest_of,
    export_weights,
    load_weights,
    open_checkpoint,
    verify_checkpoint,
)
from functions.support.errors import CheckpointError, UserError
from functions.support.run_folder import power_snapshots

# The error grows outside of the lengths that are averaged in training, which are 0.05 and 0.1 in
# the presets. Within these limits it is small.
SHORTEST, LONGEST = 0.03, 0.2
# With snapshots of fewer steps, the error at some lengths can be seen (docs/evaluation.md).
FEWEST_STEPS = 15


def reconstruct(run: Path, length: float, at: int | None = None) -> Path:
    """Return the file of a run's average of a relative length; write it unless it exists.

    The average is that after the snapshot nearest to step `at`, or after the last one. The file is
    a model like any other, in reconstructed/ of the run. Raises UserError for a length outside of
    the limits and for a run without power averages, and CheckpointError for a damaged snapshot.
    """
    if not SHORTEST <= length <= LONGEST:
        raise UserError(f"--ema-length is {length:g}; it must be from {SHORTEST} to {LONGEST}")
    snapshots = power_snapshots(run)
    if not snapshots:
        raise UserError(
            f"{run} has no power averages for --ema-length; name a run folder that was trained "
            "with --diffusion.power-ema 0.05,0.1 and --diffusion.snapshot-every"
        )
    saved_steps = [step for step, _ in snapshots.values()]
    step = saved_steps[-1] if at is None else min(saved_steps, key=lambda step: abs(step - at))
    snapshots = {path: value for path, value in snapshots.items() if value[0] <= step}

    # The checksums in their headers identify the snapshots, and no tensor is read.
    origin = {}
    for path in snapshots:
        file = open_checkpoint(path)
        origin[path.name] = digest_of(file.contents["config"], file.checksums)
    target = run / "reconstructed" / f"step-{step:08d}-length-{length:g}.safetensors"
    # A file that is missing, damaged or of other snapshots is written anew.
    with suppress(CheckpointError):
        if verify_checkpoint(target).contents["run"].get("reconstructed_from") == origin:
            return target

    steps, lengths = zip(*snapshots.values(), strict=True)
    if len(set(steps)) < FEWEST_STEPS and length not in lengths:
        print(
            f"WARNING: there are snapshots of only {len(set(steps))} steps up to step {step}, so "
            "this may be an average of another length; train with a smaller snapshot_every"
        )
    factors = mixing_weights(lengths, steps, length, step).tolist()
    total = {}
    for path, factor in zip(tqdm(snapshots, "averaging", unit="file"), factors, strict=True):
        saved = load_weights(path)
        if total:
            check_fit(total, saved.weights, path)
        # The sum is in float32, as large terms of both signs nearly cancel.
        for name, weight in saved.weights.items():
            total[name] = weight.mul_(factor).add_(total.get(name, 0))

    # The last snapshot is from the step of the average, so config and facts are the same.
    note = f"average of relative length {length:g}, from {len(snapshots)} snapshots"
    provenance = saved.provenance | {"note": note, "reconstructed_from": origin}
    target.parent.mkdir(exist_ok=True)
    export_weights(replace(saved, weights=total, provenance=provenance), target)
    print(f"wrote {target}")
    return target
