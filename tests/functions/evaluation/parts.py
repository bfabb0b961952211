"""What tests of evaluation share: a small network in InceptionV3's place, and processes that are none."""

import torch

from functions.evaluation.features import Extractor, load_inception
from functions.support.processes import Processes


def small_features(images):
    """uint8 (B, 3, H, W) -> (B, 8): mean colours, contrasts, and the energy of fine detail."""
    x = images.double() / 255
    grey = x.mean(dim=1)
    detail = [6 * grey.diff(dim=dim).square().mean(dim=(1, 2)).sqrt()[:, None] for dim in (1, 2)]
    return torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3)), *detail], dim=1).float()


def small_extractor(weights=None, device=None, processes=None):
    if weights:
        return load_inception(weights, device)
    return Extractor({"extractor": "small", "weights_hash": "none"}, 8, small_features, torch.device("cpu"))


def of_each_process(count, work):
    """What `work(processes)` adds up over all processes, as each of them has it before."""
    parts = []

    class Part(Processes):
        def sum_(self, tensor):
            parts.append(tensor)
            return tensor

    for rank in range(count):
        work(Part(rank, count))
    return parts
