"""Work on images that may not all fit in memory at once."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from tqdm import tqdm

from functions.support.device import is_out_of_memory
from functions.support.errors import UserError

Result = TypeVar("Result")


class BatchLimit:
    """Does work on images in parts: what does not fit in memory is halved, and so is all that follows."""

    def __init__(self, device: torch.device, most: int = sys.maxsize):
        self.device, self.most = device, most

    def in_parts(self, work: Callable[[Sequence[int]], Result], images: Sequence[int]) -> list[Result]:
        """What `work` returns for each part, at most `most` of the images.

        Raises:
            UserError: there is no memory for a single image.
        """
        results, done = [], 0
        while done < len(images):
            some = images[done : done + self.most]
            try:
                results.append(work(some))
                done += len(some)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(some) == 1:
                    why = str(error).splitlines()[0]
                    raise UserError(f"no memory for a single image at a time on {self.device}: {why}") from error
            # Here, where the error no longer holds on to what did not fit
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.most = len(some) // 2
            text = f"out of memory with {len(some)} images at a time: going on with {self.most}"
            tqdm.write(text, file=sys.stderr)
        return results
