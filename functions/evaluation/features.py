"""Compare the features of generated and real images: FID, KID, precision and recall.

    FID                 The Frechet distance between two Gaussians with the means and covariances of
                        the features (Heusel et al. 2017):
                        |mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2)).
                        Its bias depends on the number of images, so two FIDs can be compared only
                        if they use the same number.
    KID                 The squared maximum mean discrepancy with a cubic kernel, averaged over
                        random subsets (Binkowski et al. 2018). It is unbiased: for two samples of
                        the same distribution it is about 0, and can be negative.
    precision, recall   Precision is the fraction of generated features inside the manifold of the
                        real ones. The manifold consists of a ball around each real feature, which
                        reaches to its 3rd nearest neighbour. Recall is the same with real and
                        generated exchanged (Kynkaanniemi et al. 2019). The features are those of
                        FID, as in ADM's evaluator.

torch-fidelity computes the metrics and has the network. It gets uint8 tensors instead of image
files. Images are freed after each batch. The features stay on the CPU, as (N, D) float32.
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
from functions.sampling.generation import ImageSampler, batches_of, generate_batches
from functions.support.errors import UserError
from functions.support.files import short
from functions.support.processes import SINGLE_PROCESS, Processes

INCEPTION = "inception-v3-compat"
LAYER = "2048"
# Published FIDs use this many generated images.
FULL_COUNT = 50_000
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3
# There must be at least this many real and generated images, as each needs 3 neighbours.
FEWEST = NEIGHBOURS + 1
# Precision and recall compute the distances of this many images at a time. Their distances to
# 50,000 others need 0.5 GB.
DISTANCE_ROWS = 2_500


@dataclass(frozen=True)
class Extractor:
    """A network that computes the features of images."""

    # "extractor" (the network's name) and "weights_hash", which are written into every result.
    facts: dict[str, str]
    width: int  # D, the number of features
    # uint8 images (B, 3, H, W) on any device -> their features (B, D).
    features: Callable[[Tensor], Tensor]
    device: torch.device  # the network's device


@dataclass(frozen=True)
class Reference:
    """The features of real images, with which generated ones are compared."""

    # The data set, its hashes and the network, as plain values.
    description: dict
    # (N, D) float32
    features: Tensor


def load_inception(
    weights: Path | None, device: torch.device, processes: Processes = SINGLE_PROCESS
) -> Extractor:
    """Load torch-fidelity's InceptionV3, a copy of the original TensorFlow network; D is 2048.

    `weights` is a local file. With None, rank 0 downloads the file once into PyTorch's cache.
    Raises `UserError` when torch-fidelity is not installed, or when the weights cannot be loaded.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise UserError(
            "fid, kid and prc need torch-fidelity: pip install -r requirements-eval.txt"
        ) from error
    path = weights or processes.on_main(lambda: downloaded(URL_INCEPTION_V3))

    # torch-fidelity unpickles the file, which could run code in it. With this variable set, PyTorch
    # reads only tensors, until the process ends.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        network = FeatureExtractorInceptionV3(
            INCEPTION, [LAYER], feature_extractor_weights_path=path
        )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except Exception as error:
        # For a missing file or wrong contents, torch-fidelity raises errors of many types.
        raise UserError(
            f"{path} cannot be loaded as the file from {URL_INCEPTION_V3} ({short(error)})"
        ) from error
    network.to(device)
    facts = {"extractor": f"{INCEPTION}/{LAYER}", "weights_hash": digest}
    return Extractor(facts, int(LAYER), lambda images: network(images.to(device))[0], device)


def downloaded(url: str) -> Path:
    """Return the path of the URL's file in PyTorch's cache; download it if it is missing.

    Raises `UserError` when the download fails.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # PyTorch compares the file's hash with the end of the file's name.
        torch.hub.download_url_to_file(url, path, hash_prefix=path.stem.rsplit("-", 1)[1])
    except (OSError, RuntimeError) as error:
        # A RuntimeError means that the downloaded file has another hash.
        raise UserError(
            f"InceptionV3's weights cannot be downloaded ({short(error)}): "
            f"get {url} on a machine with internet access, and give --weights FILE"
        ) from error
    return path


def sample_features(
    sampler: ImageSampler, count: int, extractor: Extractor, processes: Processes
) -> Tensor:
    """Sample `count` images and return their features, (count, D) float32.

    Sample i is image i of sample.py with the same options and seed.
    """

    def load(batches):
        for samples in generate_batches(sampler, batches, progress=processes.is_main):
            yield to_uint8(samples.images)

    return collect_features(load, count, sampler.batch_size, extractor, processes)


def real_features(
    images: np.ndarray,
    indices: np.ndarray,
    batch_size: int,
    extractor: Extractor,
    processes: Processes,
) -> Tensor:
    """Return the features of the images at the indices: (len(indices), D) float32.

    `images` are uint8 (N, H, W, C), and are not augmented.
    """

    def load(batches):
        for rows in tqdm(batches, "reference", unit="batch", disable=not processes.is_main):
            yield torch.from_numpy(images[indices[rows]])

    return collect_features(load, len(indices), batch_size, extractor, processes)


@torch.no_grad()
def collect_features(
    load: Callable[[list[range]], Iterable[Tensor]],
    count: int,
    batch_size: int,
    extractor: Extractor,
    processes: Processes,
) -> Tensor:
    """Extract the features of `count` images: (count, D) float32, on the CPU, in all processes.

    `load` gets a list of batches, which are ranges in 0 .. count-1, and yields the uint8 images
    (B, H, W, C) of each. Grey is repeated to three channels.
    """
    # All processes form the same batches, and each computes every `processes.count`-th one.
    batches = batches_of(range(count), batch_size)[processes.rank :: processes.count]
    features = torch.zeros(count, extractor.width)
    for rows, images in zip(batches, load(batches), strict=True):
        # The network wants (B, 3, H, W). `expand` repeats one channel, and leaves three unchanged.
        rgb = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        features[rows.start : rows.stop] = extractor.features(rgb).float().cpu()

    # Each row is computed by one process and is 0 in the others, so the sum is exact.
    return processes.sum_(features)


def image_warnings(real: int, generated: int, width: int) -> list[str]:
    """Return warnings for an FID that cannot be compared with others.

    `real` and `generated` are numbers of images, and `width` is D.
    """
    warnings = []
    if generated < FULL_COUNT:
        warnings.append(
            f"ONLY {generated:,} SAMPLES, NOT {FULL_COUNT:,}: "
            "FID IS BIASED UPWARDS and compares only with FIDs of the same count"
        )

    # The covariance of N images' features has a rank of at most N - 1.
    fewest = min(real, generated)
    if fewest <= width:
        warnings.append(
            f"{fewest:,} IMAGES FOR {width:,} FEATURES: "
            "THEIR COVARIANCE IS SINGULAR, and FID says little; KID is unbiased"
        )
    return warnings


def statistics(features: Tensor) -> dict:
    """Return mu (D,) and sigma (D, D), float64, of the features (N, D), for FID."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.double())


def compare(metrics: Collection[str], generated: Tensor, reference: Reference, seed: int) -> dict:
    """Compute the named metrics, of "fid", "kid" and "prc", for generated features (N, D).

    Returns a dict of scalars: the metrics and their settings.
    """
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    results = {}
    real = reference.features
    if "fid" in metrics:
        fid = fid_statistics_to_metric(statistics(generated), statistics(real), verbose=False)
        results["fid"] = fid["frechet_inception_distance"]
    if "kid" in metrics:
        # A subset cannot be larger than the number of generated or real images.
        subsets = {
            "kid_subsets": KID_SUBSETS,
            "kid_subset_size": min(KID_SUBSET_SIZE, len(generated), len(real)),
        }
        # NumPy's seeds have at most 32 bits.
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
