"""FID, KID, precision and recall: how far features of generated images are from those of real ones.

    FID                 The Frechet distance of the Gaussians that have the features' means and
                        covariances (Heusel et al. 2017):
                        |mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2)).
                        Few images bias it upwards, so numbers of different counts don't compare.
    KID                 The squared maximum mean discrepancy with a cubic kernel, unbiased
                        (Binkowski et al. 2018), averaged over random subsets. For the same
                        distribution it is about 0, and as often just below.
    precision, recall   The fraction of generated features within the real ones' manifold of 3
                        nearest neighbours, and the other way round (Kynkaanniemi et al. 2019), in
                        the features of FID, as ADM's evaluator has it.

The metrics themselves and the network are torch-fidelity's. It gets images as uint8 tensors, never
as files. Images live for one batch; features, a float32 row of D numbers each, stay on the CPU.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pixels import to_uint8
from functions.sampling.generation import BatchLimit, ImageSampler, batches_of, generate_batches
from functions.support.errors import UserError
from functions.support.files import short
from functions.support.processes import SINGLE_PROCESS, Processes

INCEPTION = "inception-v3-compat"
LAYER = "2048"
# Published FIDs are of so many images.
FULL_COUNT = 50_000
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3
# Either side has at least so many images, so that each of them has its neighbours.
FEWEST = NEIGHBOURS + 1
# Distances of so many images to 50,000 others are computed at a time; they take 0.5 GB.
DISTANCE_ROWS = 2_500


@dataclass(frozen=True)
class Extractor:
    """A feature network."""

    # "extractor", the network's name, and "weights_hash" are part of every result.
    facts: dict[str, str]
    width: int  # D, the number of features
    # uint8 images (B, 3, H, W) on any device -> their features (B, D).
    features: Callable[[Tensor], Tensor]
    device: torch.device  # where the network is


@dataclass(frozen=True)
class Reference:
    """Real images as the metrics see them."""

    description: dict
    statistics: dict  # mu, sigma
    # (N, D) float32. A published file has no features, which is None here.
    features: Tensor | None = None


def load_inception(
    weights: Path | None, device: torch.device, processes: Processes = SINGLE_PROCESS
) -> Extractor:
    """Load torch-fidelity's InceptionV3, the original TensorFlow network, for its 2048 features.

    `weights` is a local file. For None rank 0 downloads it once into PyTorch's cache. Raises
    `UserError` when torch-fidelity is not installed, or when there are no weights.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise UserError(
            "FID and company need torch-fidelity: pip install -r requirements-eval.txt"
        ) from error
    path = weights or processes.on_main(lambda: downloaded(URL_INCEPTION_V3))

    # torch-fidelity itself lets a file run code. With this variable PyTorch reads tensors only, to
    # the end of the process.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        network = FeatureExtractorInceptionV3(
            INCEPTION, [LAYER], feature_extractor_weights_path=path
        )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except Exception as error:
        # torch-fidelity raises whatever it likes at a missing file, or at one of something else.
        raise UserError(
            f"{path}: not the weights that are at {URL_INCEPTION_V3} ({short(error)})"
        ) from error
    network.to(device)
    facts = {"extractor": f"{INCEPTION}/{LAYER}", "weights_hash": digest}
    return Extractor(facts, int(LAYER), lambda images: network(images.to(device))[0], device)


def downloaded(url: str) -> Path:
    """Return the file's place in PyTorch's cache, and download the file unless it is there.

    Raises `UserError` without a network.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # PyTorch checks the hash that the file's name ends with.
        torch.hub.download_url_to_file(url, path, hash_prefix=path.stem.rsplit("-", 1)[1])
    except (OSError, RuntimeError) as error:
        # A RuntimeError means that the downloaded file has another hash.
        raise UserError(
            f"InceptionV3's weights cannot be downloaded ({short(error)}): "
            f"get {url} where there is a network, and give --weights FILE"
        ) from error
    return path


def sample_features(
    sampler: ImageSampler, count: int, extractor: Extractor, processes: Processes
) -> Tensor:
    """Sample images and return their features (count, D) float32.

    Image i is the one that sample.py makes.
    """

    def pixels_of(batches):
        for samples in generate_batches(sampler, batches, progress=processes.is_main):
            yield to_uint8(samples.images)

    return collect_features(pixels_of, count, sampler.batch_size, extractor, processes)


def real_features(
    images: np.ndarray,
    indices: np.ndarray,
    batch_size: int,
    extractor: Extractor,
    processes: Processes,
) -> Tensor:
    """Return the features of the images at these indices, as they are: (len(indices), D) float32.

    The images are uint8 (N, H, W, 3).
    """

    def pixels_of(batches):
        for rows in tqdm(batches, "reference", unit="batch", disable=not processes.is_main):
            yield torch.from_numpy(images[indices[rows]])

    return collect_features(pixels_of, len(indices), batch_size, extractor, processes)


@torch.no_grad()
def collect_features(
    pixels_of: Callable[[list[range]], Iterable[Tensor]],
    count: int,
    batch_size: int,
    extractor: Extractor,
    processes: Processes,
) -> Tensor:
    """Extract the features of `count` images, (count, D) float32 on the CPU, in all processes.

    `pixels_of` gives the images of each batch, uint8 (B, H, W, 3), for batches of numbers below
    `count`. A batch that does not fit in memory is halved, and so are those after it. Raises
    `UserError` when a single image does not fit.
    """
    # All processes cut the same batches, and each takes every count-th of them.
    batches = batches_of(range(count), batch_size)[processes.rank :: processes.count]
    features = torch.zeros(count, extractor.width)
    limit = BatchLimit(extractor.device)
    for rows, images in zip(batches, pixels_of(batches), strict=True):
        channels_first = images.permute(0, 3, 1, 2)
        parts = limit.in_parts(lambda part: extractor.features(part).float().cpu(), channels_first)
        features[rows.start : rows.stop] = torch.cat(parts)

    # Each row is one process's and 0 in the others, so the sum over processes is exact.
    return processes.sum_(features)


def image_warnings(real: int, generated: int, width: int) -> list[str]:
    """Return why FID of so many images and D = `width` features must not be compared, loudly."""
    warnings = []
    if generated < FULL_COUNT:
        warnings.append(
            f"ONLY {generated:,} SAMPLES, NOT {FULL_COUNT:,}: "
            "FID IS BIASED UPWARDS and compares with no other count"
        )

    # The covariance of N images has a rank of at most N - 1.
    fewest = min(real, generated)
    if fewest <= width:
        warnings.append(
            f"{fewest:,} IMAGES FOR {width:,} FEATURES: "
            "THEIR COVARIANCE IS SINGULAR, and FID says little; KID is unbiased"
        )
    return warnings


def statistics(features: Tensor) -> dict:
    """Return mu (D,) and sigma (D, D), float64: all that FID needs of (N, D) features."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.double())


def compare(metrics: Collection[str], generated: Tensor, reference: Reference, seed: int) -> dict:
    """Return the metrics asked for, "fid", "kid" or "prc", of (N, D) features.

    They are numbers by name, with what they are over.
    """
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    results = {}
    real = reference.features
    if "fid" in metrics:
        fid = fid_statistics_to_metric(statistics(generated), reference.statistics, verbose=False)
        results["fid"] = fid["frechet_inception_distance"]
    if "kid" in metrics:
        # A subset cannot be larger than either side.
        subsets = {
            "kid_subsets": KID_SUBSETS,
            "kid_subset_size": min(KID_SUBSET_SIZE, len(generated), len(real)),
        }
        # NumPy's seeds have 32 bits.
        kid = kid_features_to_metric(
            generated.double(), real.double(), **subsets, rng_seed=seed % 2**32, verbose=False
        )
        results |= {
            "kid": kid["kernel_inception_distance_mean"],
            "kid_std": kid["kernel_inception_distance_std"],
            **subsets,
        }
    if "prc" in metrics:
        prc = prc_features_to_metric(
            generated,
            real,
            prc_neighborhood=NEIGHBOURS,
            prc_batch_size=DISTANCE_ROWS,
            save_cpu_ram=True,
            verbose=False,
        )
        results |= {
            "precision": prc["precision"],
            "recall": prc["recall"],
            "neighbours": NEIGHBOURS,
        }
    return results
