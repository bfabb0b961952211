"""Write the results of a measurement under a name that only the same measurement has."""

import json
from pathlib import Path

from data.datasets import Split
from functions.saved.checkpoint import SavedModel
from functions.support.files import sha256, write_text


def common_settings(saved: SavedModel, split: Split, image_count: int) -> dict:
    """Return what two results must have in common, or they cannot be compared.

    These are the model, the data set and the number of held-out images. A measurement adds its own
    options.
    """
    return {
        "experiment": saved.provenance["experiment"],
        "step": saved.provenance["step"],
        "weights": saved.kind,
        "weights_hash": saved.digest[:16],
        "ids_hash": split.val_ids_hash,
        "pixels_hash": split.pixels_hash,
        "images": image_count,
    }


def write_results(prefix: Path, kind: str, settings: dict, facts: dict) -> Path:
    """Write settings and facts to PREFIX-KIND-<hash of the settings>.json, and return this path.

    Results with different settings have different names, so none overwrites another.
    """
    digest = sha256(json.dumps(settings))[:8]
    path = Path(f"{prefix}-{kind}-{digest}.json")
    write_text(path, json.dumps({"settings": settings, **facts}, indent=2))
    return path
