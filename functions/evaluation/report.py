"""What `evaluate.py` tells: the protocol that goes with each number, and the files with the results.

A result is <run>/evaluation/<checkpoint>-<metrics>-<hash of all settings>.json, so that other settings never overwrite
it and the same ones write the same bytes.
"""

import hashlib
import json
import math
from pathlib import Path

from functions.evaluation.bits_per_dim import BitsPerDim
from functions.evaluation.features import FULL_COUNT
from functions.support.files import write_whole

IMAGE_LINES = {
    "fid": "FID        {fid:.4f}",
    "kid": "KID        {kid:.6f}, deviation {kid_std:.6f} over {kid_subsets} subsets of {kid_subset_size:,}",
    "precision": "precision  {precision:.4f}",
    "recall": "recall     {recall:.4f}",
}


def bpd_protocol(result: BitsPerDim, timesteps: int, settings: dict) -> str:
    """All that one must know of a bound to compare it with another."""
    calls, count = len(result.lengths), len(result.prior)
    which = "every t" if calls == timesteps else f"{calls} of {timesteps} t for each image, stratified at random"
    return (
        f"{count:,} of {settings['split_images']:,} validation images (ids {settings['ids_hash']}), {which}; variance "
        f"{settings['variance']}, x_0 {'clipped' if settings['clip_x_0'] else 'not clipped'}, {settings['weights']} "
        f"weights, {settings['precision']}, seed {settings['seed']}; the error is over images and choices of t"
    )


def bpd_table(result: BitsPerDim, protocol: str) -> str:
    """The bound with its protocol, and what it is the sum of."""
    error = "" if math.isnan(result.standard_error) else f" +- {result.standard_error:.4f} (standard error)"
    return (
        f"bits/dim   {result.total:.4f}{error}\n    {protocol}\n"
        f"    rate {result.rate:.4f} (prior {result.prior.mean():.2g}) + distortion {result.distortion:.4f}; "
        f"RMSE of the last x_0 {result.curves()['rmse'][0]:.2f} of 255"
    )


def image_protocol(reference: dict, settings: dict) -> str:
    """All that one must know of FID and company to compare them with others; `reference`: its description."""
    r, s, side = reference, settings, reference["image_size"]
    return (
        f"{s['n']:,} samples, {s['sampler_in_words']}, {s['weights']} weights, {s['precision']}, seed {s['seed']}; "
        f"against {r['count']:,} {r['split']} images of {r['dataset']} (ids {r['ids_hash']}, "
        f"pixels {r['pixels_hash']}); {side} x {side}, rounded to uint8, no JPEG, no resizing but the extractor's own; "
        f"{r['extractor']} (weights {r['weights_hash']})"
    )


def image_warnings(reference: dict, count: int, width: int) -> list[str]:
    """What makes a number one that must not be compared with others, loudly."""
    fewest = min(reference["count"], count)
    few = f"ONLY {count:,} SAMPLES, NOT {FULL_COUNT:,}: FID IS BIASED UPWARDS and compares with no other count"
    singular = f"{fewest:,} IMAGES FOR {width:,} FEATURES: THEIR COVARIANCE IS SINGULAR, and FID says little"
    return ([few] if count < FULL_COUNT else []) + ([f"{singular}; KID is unbiased"] if fewest <= width else [])


def image_table(results: dict) -> str:
    """A line for each metric that was measured."""
    return "\n".join(line.format(**results) for name, line in IMAGE_LINES.items() if name in results)


def write_result(place: Path, what: str, contents: dict) -> Path:
    """Write the file that is called after `place`, what was measured, and a hash of `contents["settings"]`."""
    digest = hashlib.sha256(json.dumps(contents["settings"], sort_keys=True).encode()).hexdigest()[:8]
    path = place.with_name(f"{place.name}-{what}-{digest}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(json.dumps(contents, indent=2).encode()))
    return path
