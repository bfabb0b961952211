"""Images drawn by one process or several: the grid and its company, and any number of single files.

The work is shared by batches, which are the same however many processes there are and wherever an earlier start was
interrupted: so are the images then, bit for bit where the hardware is the same.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from functions.sampling.files import (
    MANIFEST,
    ImageWriter,
    check_manifest,
    existing,
    image_path,
    open_folder,
    wait_for_all,
)
from functions.sampling.generation import (
    NOTHING,
    ImageSampler,
    Record,
    Samples,
    frame_steps,
    generate_batches,
    image_bar,
)
from functions.support import pictures
from functions.support.processes import Processes

MOST_IN_GRID = 100
GIF_FRAMES = 40
STRIP_COLUMNS = 9
STRIP_ROWS = 6


def draw_images(
    args: argparse.Namespace,
    drawing: ImageSampler,
    folder: Path,
    facts: Callable[[], dict],
    to_uint8: Callable[[Tensor], Tensor],
    processes: Processes,
) -> None:
    """Images 0 .. n-1 as the flags ask for them.

    First those that are to be seen, of which something is kept in memory; then, with --individual, all that are
    missing. No process waits for another there until it has done its part.

    Args:
        facts: for the manifest; called in rank 0 alone, if at all.
    """
    steps = len(drawing.settings.times(drawing.scheduler)) - 1
    keep = frames_to_keep(args, steps, to_uint8)
    batches = [range(start, min(start + args.batch_size, args.n)) for start in range(0, args.n, args.batch_size)]
    seen = min(args.n, MOST_IN_GRID) if not args.individual or keep is not NOTHING else 0
    first = [batch for batch in batches if batch.start < seen]

    def missing() -> list[range]:
        there = existing(folder)
        return [batch for batch in batches[len(first) :] if not there.issuperset(batch)] if args.individual else []

    with ExitStack() as stack:
        processes.from_main(lambda: stack.enter_context(opened(folder, facts, args.individual)))
        rest = processes.from_main(missing)
        announce(args, drawing, first, rest, processes)
        writer = stack.enter_context(ImageWriter(folder)) if args.individual else None
        seen_by_me, rest_of_me = ([part[i] for i in processes.own_range(len(part))] for part in (first, rest))
        total, mine = count(first) + count(rest), count(seen_by_me) + count(rest_of_me)
        bar = stack.enter_context(image_bar(total, processes.is_main and mine > 0))
        update = lambda images: bar.update(images * total / mine)  # as if all were as fast as this one

        def drawn(batches: Sequence[range], keep: Record) -> Iterator[Samples]:
            """As bytes, and on their way to the disk."""
            for batch, part in zip(batches, generate_batches(drawing, batches, keep, update), strict=True):
                part = replace(part, images=to_uint8(part.images))
                if writer:
                    writer.write(batch, part.images.numpy())
                yield part

        samples = processes.gather(list(drawn(seen_by_me, keep))) if first else []
        for _ in drawn(rest_of_me, NOTHING):
            pass
        if writer:
            writer.finish()
        if processes.is_main:
            if writer:
                wait_for_all(folder, args.n)
                processes.say(
                    f"all {args.n} images are there: {image_path(folder, 0)} .. {image_path(folder, args.n - 1).name}"
                )
            draw_pictures(args, drawing, Samples.joined([*chain(*samples)]) if first else None, folder)


def draw_pictures(args: argparse.Namespace, drawing: ImageSampler, samples: Samples | None, folder: Path) -> None:
    """The grid of the first images, and of their denoising what was asked for.

    Args:
        samples: the first images and what was kept of their way, as uint8; None: they are files, and nothing was.
    """
    shown = min(args.n, MOST_IN_GRID)
    if samples is None:
        images = np.stack([np.asarray(Image.open(image_path(folder, i))) for i in range(shown)])
    else:
        images = samples.images[:shown].numpy()
    columns = 5 if args.n == 20 else None  # the reference's grid
    pictures.save_grid(images, folder / "grid.png", columns)
    print(f"wrote {folder / 'grid.png'}")
    times = drawing.settings.times(drawing.scheduler)
    if args.gif:
        frames = [samples.states[k][:shown].numpy() for k in frame_steps(len(times) - 1, GIF_FRAMES)]
        pictures.save_gif(frames, folder / "denoising.gif", columns)
        print(f"wrote {folder / 'denoising.gif'}")
    if args.strip:
        steps = frame_steps(len(times) - 1, STRIP_COLUMNS)
        titles = [f"t = {times[k] + 1}" for k in steps]  # the paper's t, which is 0 for an image
        pictures.save_strip([samples.states[k][:STRIP_ROWS].numpy() for k in steps], titles, folder / "strip.png")
        print(f"wrote {folder / 'strip.png'}")
    if args.progressive:
        calls = even_calls(len(times) - 1)
        titles = [*(f"t = {times[k - 1] + 1}" for k in calls), "image"]
        frames = [*(samples.predictions[k] for k in calls), samples.images]
        pictures.save_strip([frame[:STRIP_ROWS].numpy() for frame in frames], titles, folder / "progressive.png")
        print(f"wrote {folder / 'progressive.png'}")


def frames_to_keep(args: argparse.Namespace, calls: int, to_uint8: Callable[[Tensor], Tensor]) -> Record:
    """What --gif, --strip and --progressive show, as bytes."""
    states = [
        *(frame_steps(calls, GIF_FRAMES) if args.gif else []),
        *(frame_steps(calls, STRIP_COLUMNS) if args.strip else []),
    ]
    predictions = even_calls(calls) if args.progressive else []
    return Record(sorted(set(states)), predictions, to_uint8) if states or predictions else NOTHING


def even_calls(calls: int) -> list[int]:
    """STRIP_COLUMNS - 1 of the numbers 1 .. `calls`, evenly spaced, without the last, whose x_0 is the image."""
    columns = min(STRIP_COLUMNS - 1, max(calls - 1, 1))
    return [1 + round(i * (calls - 1) / columns) for i in range(columns)]


def opened(folder: Path, facts: Callable[[], dict], individual: bool) -> AbstractContextManager:
    """The folder, ready to be written into; single images are never mixed with those of other settings."""
    if individual:
        return open_folder(folder, facts())
    if (folder / MANIFEST).exists():
        check_manifest(folder, facts())
    folder.mkdir(parents=True, exist_ok=True)
    return nullcontext()


def announce(
    args: argparse.Namespace, drawing: ImageSampler, first: Sequence[range], rest: Sequence[range], processes: Processes
) -> None:
    """What is going to be drawn, and how."""
    to_draw, batches = count(first) + count(rest), len(first) + len(rest)
    there = f" of {args.n}; the others are there" if args.individual and to_draw < args.n else ""
    processes.say(f"drawing {to_draw} images{there}: {drawing.settings}, seed {args.seed}")
    if 0 < batches < processes.count:
        fitting = math.ceil(to_draw / processes.count)
        processes.say(
            f"note: that is {batches} batches for {processes.count} processes; --batch-size {fitting} gives all work"
        )


def count(batches: Sequence[range]) -> int:
    """How many images are in them."""
    return sum(map(len, batches))
