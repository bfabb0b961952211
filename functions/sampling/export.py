"""Write a model alone, to be published: a file for sample.py, or a folder for diffusers."""

from pathlib import Path

from functions.saved.checkpoint import SavedModel, diffusers_folder, write_tensors
from functions.support.errors import UserError


def export(saved: SavedModel, path: Path) -> None:
    """Write a model as a .safetensors file, which sample.py reads, or as a folder for diffusers.

    Raises UserError for a path that exists or has another extension, and CheckpointError for a
    model that diffusers does not have.
    """
    if path.exists():
        raise UserError(f"{path} exists, and --export does not overwrite")
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        # The file can be published. Dtype and identity of the weights stay.
        contents = {"config": saved.config, "run": saved.provenance}
        part = "ema" if saved.kind == "EMA" else "model"
        write_tensors(path, {part: saved.weights}, contents)
        return
    if path.suffix:
        raise UserError(
            f"{path}: --export needs NAME.safetensors, or NAME without an extension for a folder"
        )
    diffusers_folder().write_folder(saved, path)
