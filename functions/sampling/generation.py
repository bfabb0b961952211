"""From a trained model to images in memory: for the scripts and for training's grids.

The reverse loops of functions/samplers.py are called here, for as many images at a time as fit in
memory.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import LARGEST
from data.pixels import to_uint8
from functions.noise_scheduler import NoiseScheduler
from functions.prediction import Denoiser
from functions.samplers import SAMPLERS, VARIANCES, OnStep
from functions.sampling.options import SamplerOptions
from functions.support.checkpoint import SavedModel, load_into
from functions.support.device import (
    choose_device,
    choose_precision,
    is_out_of_memory,
    room_on_the_cpu,
)
from functions.support.diffusers_folder import load_model
from functions.support.errors import CheckpointError, UserError
from functions.support.files import READ_ERRORS, short
from functions.support.processes import Processes
from functions.support.random_numbers import ImageNoise
from functions.support.run_folder import find_checkpoints, first_intact, newest_checkpoints
from models.unet import UNet

Result = TypeVar("Result")
# ("x", k) is the state after k network calls, and ("x", 0) the noise. ("x_0", k) is the x_0 that
# the k-th call predicts.
Frame = tuple[str, int]


@dataclass
class Samples:
    """Images, and the frames of the way to them that were asked for."""

    # (N, C, H, W) in [-1, 1], on the CPU
    images: Tensor
    # uint8 (N, H, W, C) each
    frames: dict[Frame, np.ndarray]

    @staticmethod
    def concatenated(batches: Sequence["Samples"]) -> "Samples":
        """Put the samples of several batches together, in their order."""
        images = torch.cat([batch.images for batch in batches])
        frames = {}
        for frame in batches[0].frames:
            frames[frame] = np.concatenate([batch.frames[frame] for batch in batches])
        return Samples(images, frames)


@dataclass(frozen=True)
class ImageSampler:
    """All that decides what image i is.

    Raises UserError when the options ask for more steps than the model has.
    """

    denoiser: Denoiser
    options: SamplerOptions
    shape: tuple[int, int, int]  # (C, H, W)
    seed: int
    device: torch.device
    # The most images at a time. This and what follows decide nothing but rounding.
    batch_size: int = 64
    # It sees every step.
    watch: OnStep | None = None
    # On CUDA the network is recorded as a CUDA graph, and replayed.
    use_cuda_graph: bool = True

    def __post_init__(self) -> None:
        self.options.times(self.scheduler)

    @property
    def scheduler(self) -> NoiseScheduler:
        return self.denoiser.scheduler

    @property
    def times(self) -> list[int]:
        """Return the timesteps that are visited on the whole way, down to -1."""
        return self.options.times(self.scheduler)

    def quick(self, seed: int) -> "ImageSampler":
        """Return this sampler with another seed and 20 steps of dpm++.

        The fresh noise of dpm++ keeps samples sound in so few steps.
        """
        steps = min(20, self.scheduler.timesteps)
        options = SamplerOptions("dpm++", steps, clip_x_0=self.options.clip_x_0)
        return replace(self, options=options, seed=seed)

    def noise(self, indices: Sequence[int], purpose: str = "image") -> ImageNoise:
        """Return the noise of the images with these indices: x_T first, then that of each step.

        Another purpose has other noise.
        """
        return ImageNoise(self.seed, indices, self.shape, self.device, purpose)

    def denoise(self, x_t: Tensor, t: int, noise: Callable[[], Tensor]) -> Tensor:
        """Take states (B, C, H, W) at timestep t to images, in the sampler's steps from there on.

        States at t = -1 are images already.
        """
        if t < 0:
            return x_t
        return self.run(x_t, self.options.times(self.scheduler, t), noise)

    def run(self, x: Tensor, times: list[int], noise: Callable[[], Tensor]) -> Tensor:
        """Take states (B, C, H, W) at the first of falling timesteps to the last of them.

        `noise()` draws (B, C, H, W) of standard normal noise, for each step that adds some.
        """
        return SAMPLERS[self.options.sampler].function(
            self.denoiser,
            self.scheduler,
            x,
            times,
            **self.options.chosen,
            clip_x_0=self.options.clip_x_0,
            step_noise=lambda k: noise(),
            on_step=self.watch,
        )

    def sample(self, indices: Sequence[int], frames: Collection[Frame], bar: tqdm) -> Samples:
        """Sample the images with these indices, all at once; the bar counts a step for each."""
        noise = self.noise(indices)
        kept = {}

        def keep(frame, x):
            if frame in frames:
                kept[frame] = to_uint8(x).cpu().numpy()

        def on_step(k, t, x, x_0):
            keep(("x", k + 1), x)
            keep(("x_0", k + 1), x_0)
            bar.update(len(indices))
            if self.watch:
                self.watch(k, t, x, x_0)

        x_T = noise.draw()
        keep(("x", 0), x_T)
        watched = replace(self, watch=on_step)
        x_0 = watched.denoise(x_T, self.scheduler.timesteps - 1, noise.draw)
        return Samples(x_0.cpu(), kept)


def open_sampler(
    args: argparse.Namespace, processes: Processes, experiments: str = ""
) -> tuple[SavedModel, ImageSampler]:
    """Return the checkpoint that the flags of `add_sampling_flags` mean, and its sampler.

    That is the newest sound one of the run; without a run, of the newest run whose name begins
    with `experiments`. The sampler is not calibrated. On a CPU its network takes as many images
    at a time as memory has room for. Raises UserError for flags that cannot be.
    """
    # Several processes have a GPU each.
    index = processes.local_rank if processes.count > 1 else None
    device = choose_device(args.device, index)
    precision = choose_precision(args.precision, device)
    # Options that fit no model are refused here, before anything is read.
    SamplerOptions.from_args(args, {})

    def find():
        if args.checkpoint:
            return find_checkpoints(args.checkpoint)
        return newest_checkpoints(args.runs, experiments)

    saved = load_intact(find, processes)
    processes.print_main(f"{saved.path}: {saved}")
    denoiser = rebuild(saved, device, precision)
    options = SamplerOptions.from_args(args, saved.config["diffusion"])

    shape = saved.model.image_shape
    if device.type == "cpu":
        # On GPUs memory that is short raises an error, and `BatchLimit` halves the batch.
        one = torch.zeros(1, *shape)
        room = room_on_the_cpu(partial(denoiser, one, torch.zeros(1, dtype=torch.int64)))
        # The processes share the memory.
        denoiser = replace(denoiser, at_a_time=max(room // processes.count, 1))
    return saved, ImageSampler(denoiser, options, shape, args.seed, device, args.batch_size)


def load_intact(find: Callable[[], list[Path]], processes: Processes) -> SavedModel:
    """Load the first sound one of the checkpoints that `find` gives, the same in all processes."""
    # Rank 0 reads checkpoints to find a sound one. The cache saves it a second reading.
    read = cache(load_model)
    return read(processes.on_main(lambda: first_intact(find(), read).path))


def rebuild(
    saved: SavedModel, device: torch.device, precision: torch.dtype = torch.float32
) -> Denoiser:
    """Rebuild network and schedule from a checkpoint alone; for use without gradients.

    Raises CheckpointError when its config describes no model, or its weights do not fit the config.
    """
    try:
        diffusion = saved.config["diffusion"]
        timesteps = diffusion["timesteps_diff"]
        # The tables of more would take all memory.
        if timesteps > LARGEST["timesteps_diff"]:
            raise ValueError(f"timesteps_diff is above {LARGEST['timesteps_diff']:,}")
        scheduler = NoiseScheduler(
            timesteps,
            diffusion["beta_start"],
            diffusion["beta_end"],
            diffusion["rescale_betas"],
            # Older checkpoints do not name it.
            diffusion.get("beta_schedule", "linear"),
        )
        # On the meta device the network has shapes alone, so no time goes into initial weights
        # that are overwritten at once.
        with torch.device("meta"):
            model = UNet(**vars(saved.model))
        denoiser = Denoiser(model, scheduler, precision, diffusion.get("objective", "eps"))
        variance = diffusion.get("variance", "small")
        if variance not in VARIANCES:
            raise ValueError(f"variance is {variance!r}; it can be small or large")
    except (*READ_ERRORS, ArithmeticError) as error:
        what = f"{type(error).__name__}: {short(error)}"
        raise CheckpointError(
            f"{saved.path}: its config describes no model of this version: {what}"
        ) from error

    load_into(model, saved)
    # Without gradients this layout is faster on 2 CPU cores too: in float32 a face took 3.5 ms,
    # against 4.7 ms.
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return denoiser


def generate(
    image_sampler: ImageSampler, indices: Sequence[int], frames: Collection[Frame] = ()
) -> Samples:
    """Sample images by their indices i, in batches of the sampler's size.

    The noise of image i depends on (seed, i) alone, and with other batches its pixels agree up to
    rounding.
    """
    batches = batches_of(indices, image_sampler.batch_size)
    with image_sampler.denoiser.evaluating():
        return Samples.concatenated(list(generate_batches(image_sampler, batches, frames)))


def batches_of(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Cut the indices into batches; the last may be smaller."""
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def generate_batches(
    image_sampler: ImageSampler,
    batches: list[Sequence[int]],
    frames: Collection[Frame] = (),
    progress: bool = False,
) -> Iterator[Samples]:
    """Yield the `Samples` of each batch of indices, made when they are asked for.

    A batch that does not fit in memory is sampled by halves, and so are those after it.
    """
    denoiser = image_sampler.denoiser
    if image_sampler.device.type == "cuda" and image_sampler.use_cuda_graph:
        denoiser = replace(denoiser, network=CudaGraphed(denoiser.network))
        image_sampler = replace(image_sampler, denoiser=denoiser)
    limit = BatchLimit(image_sampler.device)
    calls = len(image_sampler.times) - 1
    total = calls * sum(map(len, batches))
    with tqdm(
        desc="sampling", total=total, unit="step", unit_scale=True, disable=not progress
    ) as bar:
        sample = partial(image_sampler.sample, frames=frames, bar=bar)
        for batch in batches:
            yield Samples.concatenated(limit.in_parts(sample, batch))


class CudaGraphed:
    """A network on CUDA, recorded as a CUDA graph.

    The host launches one graph, not a thousand kernels. The graph is recorded anew for each size
    of a batch. Filled up to the recorded size, a smaller batch would have other bits than on its
    own. Where recording fails, the network is called as it is from then on.
    """

    # One network that cannot be recorded is enough not to try again in this process.
    can_record = True

    def __init__(self, network: nn.Module):
        self.network = network
        # The graph, and the tensors that it reads (x_t and t) and writes.
        self.recorded = None

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return what the network does, without gradients; the result is the caller's to keep."""
        if self.can_record and (not self.recorded or len(self.recorded[1]) != len(x_t)):
            # The memory of the graph before is freed first.
            self.recorded = None
            self.record(x_t, t)
        if not self.recorded:
            return self.network(x_t, t)
        graph, graph_x_t, graph_t, output = self.recorded
        graph_x_t.copy_(x_t)
        graph_t.copy_(t)
        graph.replay()
        # The next replay overwrites the graph's own output.
        return output.clone()

    def record(self, x_t: Tensor, t: Tensor) -> None:
        """Record the network for batches of this size, or find that it cannot be recorded."""
        # cuDNN tries its kernels in this call; it cannot while a graph is recorded.
        self.network(x_t, t)
        inputs = (x_t.clone(), t.clone())
        graph = torch.cuda.CUDAGraph()
        # A recording that fails leaves its own stream as the current one.
        stream = torch.cuda.current_stream()
        try:
            # In this mode other threads may go on using the GPU meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self.network(*inputs)
            self.recorded = (graph, *inputs, output)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            # The end of a failed recording raises an error of its own. What failed is its context.
            reason = error
            if isinstance(error.__context__, (RuntimeError, KeyboardInterrupt)):
                reason = error.__context__
            if isinstance(reason, KeyboardInterrupt) or is_out_of_memory(reason):
                raise reason from None
            CudaGraphed.can_record = False
            tqdm.write(
                "the network cannot be recorded as a CUDA graph, and is called without one, which "
                f"is slower: {short(reason)}",
                file=sys.stderr,
            )


@dataclass
class BatchLimit:
    """The number of images that fit in memory, at first `most`.

    When memory runs out, work is halved, and so is all work that follows.
    """

    device: torch.device
    most: int = sys.maxsize

    def in_parts(
        self, work: Callable[[Sequence[int]], Result], indices: Sequence[int]
    ) -> list[Result]:
        """Return what `work` returns for each part of the indices, of at most `most`.

        Raises UserError when there is no memory for a single image.
        """
        results = []
        done = 0
        while done < len(indices):
            part = indices[done : done + self.most]
            try:
                results.append(work(part))
                done += len(part)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise UserError(
                        f"no memory for a single image at a time on {self.device}: {short(error)}"
                    ) from error
            # The memory is freed here, outside of `except`: there the error still holds on to
            # what did not fit.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.most = len(part) // 2
            tqdm.write(
                f"out of memory with {len(part)} images at a time: going on with {self.most}",
                file=sys.stderr,
            )
        return results
