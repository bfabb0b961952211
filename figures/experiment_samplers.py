"""How far each sampler is from where it would end, by number of network calls: on a fully trained `faces` model.

DDIM with eta = 0, DPM-Solver++ 2M and iPNDM all solve the same differential equation, so from one x_T they go to one
image. The reference is DDIM with all 1000 timesteps; how converged it is itself is said by DPM-Solver++ with 500. The
error is the root of the mean squared difference, in units of 1/255 of the range; without and with clipping of x_0, each
to a reference of its own kind, since clipping changes the equation. `ddpm_sample` and the SDE form of DPM-Solver++ have
no such error, as they draw noise. The feature distance is that of experiment_features.py, with clipping, as the scripts
sample; of those that draw noise for both spacings, of the others for even spacing alone.
"""

import argparse
import json
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from config import ConfigError
from figures.experiment_arms import Results, rounded
from figures.experiment_features import data_numbers, data_of
from figures.experiment_measures import in_batches
from functions.samplers import ddim_sample, ddpm_sample, dpm_solver_sample, ipndm_sample
from functions.sampling.generation import rebuild
from functions.support.checkpoint import load_weights
from functions.support.device import choose_device
from functions.support.run_folder import find_checkpoints, runs_of, step_of
from models.unet import UNet

RUNS = Path(__file__).resolve().parents[1] / "runs"

DETERMINISTIC = {"DDIM": ddim_sample, "DPM-Solver++ 2M": dpm_solver_sample, "iPNDM": ipndm_sample}
SAMPLERS = {"DDPM": ddpm_sample, "DPM-Solver++ 2M SDE": partial(dpm_solver_sample, eta=1.0), **DETERMINISTIC}
SPACINGS = ("trailing", "logsnr")
ODE_IMAGES = 16  # whose error is measured, of the samplers' images


def measure(args: argparse.Namespace) -> None:
    """Errors and distances of every sampler, spacing and number of calls, as far as there are none yet."""
    device, results = choose_device(args.device), Results(args.results)
    checkpoint, *_ = find_checkpoints(args.faces or newest_finished())
    saved = load_weights(checkpoint)
    denoiser = rebuild(UNet, saved, device)
    data, whole = data_of(saved.config, device), denoiser.scheduler.timesteps
    few = min(ODE_IMAGES, args.sampler_images)
    made_with = {"step": saved.run["step"], "weights": saved.kind, "images": args.sampler_images, "error_images": few}
    if results.get("samplers", "of") != made_with:  # another model or other counts: none of it compares
        results.put({"of": made_with}, "samplers")
        results.put(data_numbers(data, args.sampler_images), "data", "samplers")

    def images_of(name: str, calls: int, spacing: str, clip: bool, count: int) -> Tensor:
        return in_batches(
            lambda x_T, noise: SAMPLERS[name](
                denoiser, denoiser.scheduler, x_T, calls, spacing=spacing, clip_x_0=clip,
                step_noise=lambda k: noise.draw(),
            ),
            range(count), data.train.shape[1:], device,
        )  # fmt: skip

    @cache  # a minute or more each, so only when something is to be measured
    def reference(clip: bool) -> Tensor:
        return images_of("DDIM", whole, "trailing", clip, few)

    for spacing in SPACINGS:
        for name in SAMPLERS:
            for calls in [calls for calls in args.calls if calls <= whole]:
                place = ("samplers", f"{name}, {spacing}", str(calls))
                if results.get(*place):
                    continue
                with_distance = spacing == "trailing" or name not in DETERMINISTIC
                images = images_of(name, calls, spacing, True, args.sampler_images if with_distance else few)
                found = {"distance": data.distance(images)} if with_distance else {}
                if name in DETERMINISTIC:
                    found["error"] = rmse(images[:few], reference(True))
                    found["error_unclipped"] = rmse(images_of(name, calls, spacing, False, few), reference(False))
                results.put(found, *place)
                print(f"{name}, {spacing}, {calls}: {rounded(found)}", flush=True)
    for key, clip in {"error": True, "error_unclipped": False}.items():
        if results.get("samplers", "reference_check", key) is None:
            half = images_of("DPM-Solver++ 2M", max(1, whole // 2), "trailing", clip, few)
            results.put(rmse(half, reference(clip)), "samplers", "reference_check", key)


def newest_finished() -> Path:
    """The newest `faces` run that has reached its last step."""
    for run in reversed(runs_of(RUNS, "faces")):
        try:
            if step_of(find_checkpoints(run)[0]) == json.loads((run / "config.json").read_text())["run"]["total_steps"]:
                return run
        except OSError:
            continue
    raise ConfigError("the samplers want a finished `faces` run: `python train.py`, or --faces RUN")


def rmse(images: Tensor, reference: Tensor) -> dict[str, float]:
    """The root mean squared difference in units of 1/255, and its standard error over the images."""
    squared = (127.5 * (images - reference).double()).square().flatten(1).mean(1)  # (N,)
    root = squared.mean().sqrt()
    spread = squared.std() / len(squared) ** 0.5 if len(squared) > 1 else torch.zeros(())
    return {"rmse": root.item(), "se": (spread / (2 * root)).item() if root > 0 else 0.0}  # the delta method
