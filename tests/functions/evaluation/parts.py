"""What tests of evaluation share.

That is a small network in InceptionV3's place, harm in a pickle, and processes that are none.
"""

import torch

from functions.evaluation.features import Extractor, load_inception
from functions.support.processes import Processes


def small_features(images):
    """Return features (B, 8) of uint8 images (B, 3, H, W).

    They are mean colours, contrasts, and the brightness of two corners.
    """
    x = images.double() / 255
    means = x.mean(dim=(2, 3))
    contrasts = x.std(dim=(2, 3))
    corners = [x[:, 0, 0, :1], x[:, 1, -1, -1:]]
    return torch.cat([means, contrasts, *corners], dim=1).float()


def small_extractor(weights=None, device=None, processes=None):
    """Stand in for `load_inception`; with a file of weights, be the real one."""
    if weights:
        return load_inception(weights, device)
    facts = {"extractor": "small", "weights_hash": "none"}
    return Extractor(facts, 8, small_features, torch.device("cpu"))


class Harm:
    """An object whose pickle runs code: whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def of_each_process(count, work):
    """Call `work(processes)` once for each of `count` processes, one after the other.

    Returns what each of them would add to the sum over all processes.
    """
    parts = []

    class Part(Processes):
        def sum_(self, tensor):
            parts.append(tensor)
            return tensor

    for rank in range(count):
        work(Part(rank, count))
    return parts
