"""Draw the pictures of README that sample.py makes from a run, each with one command."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from data.datasets import load_images
from functions.support.pictures import save_image

ROOT = Path(__file__).resolve().parent.parent

# The queen and the cook are training images. The wizard is held out, so the network cannot
# have memorised him.
QUEEN = "people_1f478-1f3fd.png"
COOK = "people_1f9d1-1f3fb-200d-1f373.png"
WIZARD = "people_1f9d9-1f3fd-200d-2642-fe0f.png"

# The name of a picture -> the flags of sample.py, and a pattern of the file that it writes.
COMMANDS = {
    "few_steps.png": ("--sampler dpm++ --steps 20", "grid.png"),
    "progressive.png": ("--steps 50 --progressive", "progressive.png"),
    "interpolation.png": (f"--steps 50 --interpolate {QUEEN} {COOK}", "interpolation-*.png"),
    "variations.png": (f"--steps 50 --variations {QUEEN}", "variations-*.png"),
    "inpainting.png": (
        f"--steps 50 --inpaint {WIZARD} --mask mask.png --n 5",
        "inpainting-*.png",
    ),
}


def draw_sampling(checkpoint: Path, figures: Path, size: int, temporary: Path) -> None:
    """Run the commands in a temporary folder, and copy their pictures into `figures`."""
    # sample.py reads the images and the mask from files.
    people = load_images("emoji_people", size)
    for name in (QUEEN, COOK, WIZARD):
        image = people.images[people.ids.index(name)]
        save_image(image, temporary / name)

    # White marks the pixels that inpainting replaces: the lower half.
    mask = np.zeros((size, size), np.uint8)
    mask[size // 2 :] = 255
    save_image(mask, temporary / "mask.png")

    for figure, (flags, pattern) in COMMANDS.items():
        out = temporary / Path(figure).stem
        command = [
            sys.executable,
            ROOT / "sample.py",
            checkpoint.resolve(),
            *flags.split(),
            "--out",
            out,
        ]
        subprocess.run(command, check=True, cwd=temporary)
        [file] = out.glob(pattern)
        shutil.copyfile(file, figures / figure)
