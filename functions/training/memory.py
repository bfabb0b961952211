"""Say how a run that has run out of memory fits."""

from collections.abc import Iterator
from contextlib import contextmanager

from functions.saved.run_folder import checkpoints_of
from functions.support.device import is_out_of_memory
from functions.support.errors import UserError
from functions.support.files import quoted, short
from functions.training.run import TrainingRun


@contextmanager
def explain_lack_of_memory(run: TrainingRun) -> Iterator[None]:
    """Turn a lack of memory within the context into a UserError with flags that need half of it."""
    try:
        yield
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = short(error)

    effective = run.config.effective_batch
    image_count = min(run.config.batch_size, len(run.share))
    if image_count == 1:
        raise UserError(f"out of memory with one image ({reason}): use a smaller base_dim")
    # With the same effective batch the result is the same.
    smaller = max(size for size in range(1, image_count // 2 + 1) if effective % size == 0)
    flags = (
        f"--diffusion.batch-size {smaller} --diffusion.gradient-accumulation {effective // smaller}"
    )
    advice = f"{smaller} at a time give the same result: {flags}"
    if run.folder and checkpoints_of(run.folder):
        advice += f"; continue with: python train.py --resume {quoted(run.folder)} {flags}"
    raise UserError(f"out of memory with {image_count} images at a time ({reason}). {advice}")
