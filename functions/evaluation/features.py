"""FID, KID, precision and recall: how far the features of generated images are from those of real ones.

    FID                 Frechet distance of the Gaussians that have the features' means and covariances (Heusel et al.
                        2017): |mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2)). It is biased upwards
                        by few images, so numbers of different counts don't compare.
    KID                 squared maximum mean discrepancy with a cubic kernel, unbiased (Binkowski et al. 2018), averaged
                        over random subsets; about 0, and as often just below, for the same distribution
    precision, recall   the share of generated features within the real ones' manifold of 3 nearest neighbours, and the
                        other way round (Kynkaanniemi et al. 2019), in the features of FID as ADM's evaluator has it

The metrics themselves and the network are torch-fidelity's; images are handed to it as uint8 tensors, never as files.
Images live for one batch; features, a float32 row of D numbers each, are kept on the CPU.
"""

import hashlib
import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from functions.support.errors import UserError
from functions.support.files import READ_ERRORS, short
from functions.support.processes import SINGLE_PROCESS, Processes

INCEPTION, LAYER = "inception-v3-compat", "2048"
FULL_COUNT = 50_000  # images that published FIDs are of
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
DISTANCE_ROWS = 2_500  # at a time: 0.5 GB of distances to 50,000 others
PATIENCE = 30  # seconds that a server may be silent


@dataclass(frozen=True)
class Extractor:
    """A feature network: what it is called, the hash of its weights, and the function itself."""

    name: str
    weights_hash: str
    features: Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W), on any device -> (B, D)


def load_inception(weights: Path | None, device: torch.device, processes: Processes = SINGLE_PROCESS) -> Extractor:
    """torch-fidelity's InceptionV3, with the weights of the original TensorFlow network, at its 2048 pooled features.

    Args:
        weights: a local file; None: downloaded once into PyTorch's cache, by rank 0.

    Raises:
        UserError: torch-fidelity is not installed, or there are no weights.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torch_fidelity.utils import create_feature_extractor
    except ImportError as error:
        raise UserError(
            "FID, KID, precision and recall need torch-fidelity: pip install -r requirements-eval.txt"
        ) from error
    path = weights or processes.from_main(lambda: downloaded(URL_INCEPTION_V3))
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; it should hold the weights of {URL_INCEPTION_V3}")
    try:
        with plain_data_only():
            network = create_feature_extractor(
                INCEPTION, [LAYER], cuda=False, feature_extractor_weights_path=str(path), verbose=False
            )
    except READ_ERRORS as error:
        raise UserError(
            f"{path}: not the weights of torch-fidelity's InceptionV3 ({short(error)}); they are at {URL_INCEPTION_V3}"
        ) from error
    network.to(device)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Extractor(f"{INCEPTION}/{LAYER}", digest, lambda images: network(images.to(device))[0])


def downloaded(url: str) -> Path:
    """The file's place in PyTorch's cache, where it is downloaded to unless it is there.

    Raises:
        UserError: there is no network.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # or a network that swallows everything would be waited for without end
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hash_prefix = path.stem.rsplit("-", 1)[1]
        torch.hub.download_url_to_file(url, str(path), hash_prefix)
    except (OSError, RuntimeError) as error:  # RuntimeError: what came has another hash
        raise UserError(
            f"FID, KID, precision and recall need the weights of InceptionV3, and they cannot be downloaded "
            f"({short(getattr(error, 'reason', error))}): get {url} where there is a network, and give --weights FILE"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return path


@contextmanager
def plain_data_only() -> Iterator[None]:
    """torch.load takes tensors only, whatever the caller says: torch-fidelity would let a file run code."""
    name, before = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@torch.no_grad()
def collect_features(
    make: Callable[[list[range]], Iterable[Tensor]],
    count: int,
    batch_size: int,
    extractor: Extractor,
    image_size: int,
    processes: Processes = SINGLE_PROCESS,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """The features of `count` images, (count, D) float32 on the CPU. No more than a batch of images is held.

    Args:
        make: given the numbers of each batch's images, hands out the batches one by one, uint8 (B, H, W, 3).
        image_size: H and W that they must have: nothing is resized but by the extractor.
        processes: those that share the work, by batches; all get all features.
        on_batch: told how many images are done, after each batch.

    Raises:
        UserError: images of another size, or fewer than two of them.
    """
    if count < 2:
        raise UserError(f"{count} image(s) have no covariance: at least 2 are needed, on either side")
    features = None
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    mine = batches[processes.rank :: processes.count]
    for numbers, images in zip(mine, make(mine), strict=True):
        if images.dtype != torch.uint8 or images.shape[1:] != (image_size, image_size, 3):
            what = f"{' x '.join(map(str, images.shape[1:]))} {images.dtype}"
            raise UserError(f"images are {what}; they must be {image_size} x {image_size} x 3 torch.uint8")
        rows = extractor.features(images.permute(0, 3, 1, 2)).float().cpu()
        if features is None:
            features = torch.zeros(count, rows.shape[1])
        features[numbers.start : numbers.stop] = rows
        on_batch(len(numbers))
    width = max(processes.gather(0 if features is None else features.shape[1]))
    # Each row is one process's and 0 in the others, so that their sum is exact
    return processes.sum_(torch.zeros(count, width) if features is None else features)


def statistics(features: Tensor) -> dict:
    """mu (D,) and sigma (D, D), float64: all that FID needs of (N, D) features."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.double())


def frechet_distance(generated: dict, real: dict) -> dict:
    """FID of two sets of statistics."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    widths = len(generated["mu"]), len(real["mu"])
    if len(set(widths)) > 1:
        raise UserError(f"the reference has {widths[1]} features an image, the samples have {widths[0]}")
    return {"fid": fid_statistics_to_metric(generated, real, verbose=False)["frechet_inception_distance"]}


def kernel_distance(generated: Tensor, real: Tensor, seed: int) -> dict:
    """KID of (N, D) and (M, D) features, its deviation over subsets, and their size: smaller when images are fewer."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    found = kid_features_to_metric(
        generated.double(), real.double(), kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=seed % 2**32,
        verbose=False,
    )  # fmt: skip
    return {
        "kid": found["kernel_inception_distance_mean"], "kid_std": found["kernel_inception_distance_std"],
        "kid_subsets": KID_SUBSETS, "kid_subset_size": size,
    }  # fmt: skip


def precision_recall(generated: Tensor, real: Tensor) -> dict:
    """Precision and recall of (N, D) and (M, D) features."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    fewest = min(len(generated), len(real))
    if fewest <= NEIGHBOURS:
        raise UserError(f"{fewest} images have no {NEIGHBOURS} nearest neighbours: precision needs more of them")
    found = prc_features_to_metric(
        generated, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=DISTANCE_ROWS, save_cpu_ram=True, verbose=False
    )
    assert all(math.isfinite(value) for value in found.values())
    return {"precision": found["precision"], "recall": found["recall"]}
