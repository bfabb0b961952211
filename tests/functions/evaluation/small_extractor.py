"""A feature network for tests, in InceptionV3's place: nothing is downloaded; 8 numbers say what an image is like."""

import torch
import torch.nn.functional as F

from functions.evaluation.features import Extractor


def small_features(images):
    """uint8 (B, 3, H, W) -> (B, 8): mean colours, contrasts, and the energy of fine detail."""
    x = images.double() / 255
    grey = x.mean(dim=1)
    return torch.cat([
        x.mean(dim=(2, 3)), x.std(dim=(2, 3)),
        *(6 * grey.diff(dim=dim).square().mean(dim=(1, 2)).sqrt()[:, None] for dim in (1, 2)),
    ], dim=1).float()  # fmt: skip


def small_extractor(weights=None, device=None, processes=None):
    return Extractor({"extractor": "small", "weights_hash": "none"}, 8, small_features, torch.device("cpu"))


def blurred(images):
    """uint8 (N, H, W, 3), each pixel the mean of 5 x 5."""
    x = F.pad(images.permute(0, 3, 1, 2).double(), (2, 2, 2, 2), mode="reflect")
    return F.avg_pool2d(x, 5, stride=1).round().to(torch.uint8).permute(0, 2, 3, 1)
