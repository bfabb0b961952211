"""Pictures that anyone can make with sample.py from a run, for README: each is one command."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from data.datasets import load_images
from functions.support.pictures import save_image

ROOT = Path(__file__).resolve().parent.parent
# Of the embedded training images
QUEEN, COOK = "people_1f478-1f3fd.png", "people_1f9d1-1f3fb-200d-1f373.png"
WIZARD = "people_1f9d9-1f3fd-200d-2642-fe0f.png"  # held out

COMMANDS = {  # flags of sample.py, the file they write, and its name here
    "few_steps.png": (["--sampler", "dpm++", "--steps", "20"], "grid.png"),
    "progressive.png": (["--steps", "50", "--progressive"], "progressive.png"),
    "interpolation.png": (["--steps", "50", "--interpolate", QUEEN, COOK], "interpolation.png"),
    "variations.png": (["--steps", "50", "--variations", QUEEN], "variations.png"),
    "inpainting.png": (
        ["--steps", "50", "--inpaint", WIZARD, "--mask", "mask.png", "--n", "5"],
        "inpainting.png",
    ),
}


def draw_sampling(checkpoint: Path, figures: Path, size: int, temporary: Path) -> None:
    """Run the commands in a temporary folder, and keep their pictures."""
    images = load_images("emoji_people", size)
    for name in (QUEEN, COOK, WIZARD):
        save_image(images.images[list(images.ids).index(name)], temporary / name)
    save_image(
        np.repeat([np.uint8(0), np.uint8(255)], size // 2)[:, None].repeat(size, 1),
        temporary / "mask.png",
    )
    for figure, (flags, file) in COMMANDS.items():
        out = temporary / Path(figure).stem
        command = [sys.executable, ROOT / "sample.py", checkpoint.resolve(), *flags, "--out", out]
        subprocess.run(list(map(str, command)), check=True, cwd=temporary)
        shutil.copyfile(out / file, figures / figure)
