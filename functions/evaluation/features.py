"""FID, KID, precision and recall: how far the features of generated images are from those of real ones.

    FID                 Frechet distance of the Gaussians that have the features' means and covariances (Heusel et al.
                        2017): |mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2)). It is biased upwards
                        by few images, so numbers of different counts don't compare.
    KID                 squared maximum mean discrepancy with a cubic kernel, unbiased (Binkowski et al. 2018), averaged
                        over random subsets; about 0, and as often just below, for the same distribution
    precision, recall   the fraction of generated features within the real ones' manifold of 3 nearest neighbours, and
                        the other way round (Kynkaanniemi et al. 2019), in the features of FID as ADM's evaluator has it

The metrics themselves and the network are torch-fidelity's; images are handed to it as uint8 tensors, never as files.
Images live for one batch; features, a float32 row of D numbers each, are kept on the CPU.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
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

INCEPTION, LAYER = "inception-v3-compat", "2048"
FULL_COUNT = 50_000  # images that published FIDs are of
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
FEWEST = NEIGHBOURS + 1  # images on either side: each has so many neighbours
DISTANCE_ROWS = 2_500  # at a time: 0.5 GB of distances to 50,000 others


@dataclass(frozen=True)
class Extractor:
    """A feature network."""

    facts: dict[str, str]  # "extractor": what it is called, "weights_hash": part of every result
    width: int  # D, the number of features
    features: Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W), on any device -> (B, D)
    device: torch.device  # where the network is


@dataclass(frozen=True)
class Reference:
    """Real images as the metrics see them."""

    description: dict
    statistics: dict  # mu, sigma
    features: Tensor | None = None  # (N, D) float32; None out of a published file


def load_inception(
    weights: Path | None, device: torch.device, processes: Processes = SINGLE_PROCESS
) -> Extractor:
    """Load torch-fidelity's InceptionV3, the original TensorFlow network, for its 2048 pooled features.

    `weights` is a local file; None: downloaded once into PyTorch's cache, by rank 0. Raises UserError when
    torch-fidelity is not installed, or there are no weights.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torch_fidelity.utils import create_feature_extractor
    except ImportError as error:
        raise UserError(
            "FID and company need torch-fidelity: pip install -r requirements-eval.txt"
        ) from error
    path = weights or processes.from_main(lambda: downloaded(URL_INCEPTION_V3))
    # torch-fidelity itself lets a file run code; with this PyTorch reads tensors only, to the end of the process
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        network = create_feature_extractor(
            INCEPTION, [LAYER], cuda=False, feature_extractor_weights_path=str(path), verbose=False
        )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except Exception as error:
        # Whatever others' code raises at a file that is missing or something else
        raise UserError(
            f"{path}: not the weights that are at {URL_INCEPTION_V3} ({short(error)})"
        ) from error
    network.to(device)
    facts = {"extractor": f"{INCEPTION}/{LAYER}", "weights_hash": digest}
    return Extractor(facts, int(LAYER), lambda images: network(images.to(device))[0], device)


def downloaded(url: str) -> Path:
    """Return the file's place in PyTorch's cache; download it unless it is there. `UserError` without a network."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
    except (OSError, RuntimeError) as error:  # RuntimeError: what came has another hash
        why = (
            f"InceptionV3's weights cannot be downloaded ({short(getattr(error, 'reason', error))})"
        )
        raise UserError(
            f"{why}: get {url} where there is a network, and give --weights FILE"
        ) from error
    return path


def sample_features(
    sampler: ImageSampler, count: int, batch_size: int, extractor: Extractor, processes: Processes
) -> Tensor:
    """Sample images and keep their features, (count, D) float32; image i is the one that sample.py makes."""
    own = batches_of(range(count), batch_size)[processes.rank :: processes.count]
    pixels = (
        to_uint8(samples.images)
        for samples in generate_batches(sampler, own, progress=processes.is_main)
    )
    return collect_features(zip(own, pixels, strict=True), count, extractor, processes)


def real_features(
    images: np.ndarray,
    indices: np.ndarray,
    batch_size: int,
    extractor: Extractor,
    processes: Processes,
) -> Tensor:
    """The features of some of the images, uint8 (N, H, W, 3), as they are; (len(indices), D) float32."""
    own = batches_of(range(len(indices)), batch_size)[processes.rank :: processes.count]
    bar = tqdm(own, "reference", unit="batch", disable=not processes.is_main)
    batches = ((rows, torch.from_numpy(images[indices[rows.start : rows.stop]])) for rows in bar)
    return collect_features(batches, len(indices), extractor, processes)


@torch.no_grad()
def collect_features(
    batches: Iterable[tuple], count: int, extractor: Extractor, processes: Processes
) -> Tensor:
    """Extract the features of `count` images, (count, D) float32 on the CPU, the same in all processes.

    `batches` are those of this process: rows of the result, and their images, uint8 (B, H, W, 3). One that does not fit
    in memory is halved, and so are those after it; `UserError` when a single image does not.
    """
    features, limit = torch.zeros(count, extractor.width), BatchLimit(extractor.device)
    for rows, images in batches:
        parts = limit.in_parts(
            lambda some: extractor.features(some.permute(0, 3, 1, 2)).float().cpu(), images
        )
        features[rows.start : rows.stop] = torch.cat(parts)
    # Each row is one process's and 0 in the others, so that their sum is exact
    return processes.sum_(features)


def image_warnings(real: int, generated: int, width: int) -> list[str]:
    """What makes FID of so many images and D = `width` features one that must not be compared, loudly."""
    fewest, singular = (
        min(real, generated),
        "THEIR COVARIANCE IS SINGULAR, and FID says little; KID is unbiased",
    )
    few = f"ONLY {generated:,} SAMPLES, NOT {FULL_COUNT:,}: FID IS BIASED UPWARDS and compares with no other count"
    warnings = [few] if generated < FULL_COUNT else []
    return warnings + (
        [f"{fewest:,} IMAGES FOR {width:,} FEATURES: {singular}"] if fewest <= width else []
    )


def statistics(features: Tensor) -> dict:
    """mu (D,) and sigma (D, D), float64: all that FID needs of (N, D) features."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.double())


def compare(metrics: tuple[str, ...], generated: Tensor, reference: Reference, seed: int) -> dict:
    """The metrics asked for, "fid", "kid" or "prc", of (N, D) features: numbers by name, with what they are over."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    found, real = {}, reference.features
    if "fid" in metrics:
        fid = fid_statistics_to_metric(statistics(generated), reference.statistics, verbose=False)
        found["fid"] = fid["frechet_inception_distance"]
    if "kid" in metrics:
        of = {
            "kid_subsets": KID_SUBSETS,
            "kid_subset_size": min(KID_SUBSET_SIZE, len(generated), len(real)),
        }
        kid = kid_features_to_metric(
            generated.double(), real.double(), **of, rng_seed=seed % 2**32, verbose=False
        )
        found |= {
            "kid": kid["kernel_inception_distance_mean"],
            "kid_std": kid["kernel_inception_distance_std"],
            **of,
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
        found |= {"precision": prc["precision"], "recall": prc["recall"], "neighbours": NEIGHBOURS}
    return found
