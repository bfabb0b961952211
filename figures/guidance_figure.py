"""Draw the same noise with rising weights of a guide, for docs/better-than-the-model.md.

`python figures/guidance_figure.py RUN [--guide STEP|MODEL]`

RUN is a run folder of `faces-v`, or a checkpoint of it.
"""

import sys
from dataclasses import replace
from pathlib import Path

# Python looks for modules in this script's folder, not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.pixels import to_uint8
from functions.sampling.generation import generate, open_sampler
from functions.sampling.guidance import with_guide
from functions.sampling.options import SamplerOptions, add_sampling_flags
from functions.support.command_line import Parser, exit_on_user_error
from functions.support.pictures import save_strip
from functions.support.processes import SINGLE_PROCESS

FIGURE = Path(__file__).resolve().parent / "guidance.png"
WEIGHTS = (1, 1.25, 1.5, 2, 3)
IMAGE_COUNT = 8


def main() -> None:
    """Draw the figure."""
    parser = Parser(description=__doc__)
    add_sampling_flags(parser)
    parser.set_defaults(guide="1000")
    args = parser.parse_args()
    saved, image_sampler = open_sampler(args, SINGLE_PROCESS)

    columns = {}
    for weight in WEIGHTS:
        options = SamplerOptions("dpm++", 20, eta=0.0, guide=args.guide, guidance=weight)
        guided = with_guide(replace(image_sampler, options=options), saved, SINGLE_PROCESS)
        images = generate(guided, range(IMAGE_COUNT)).images
        columns[f"w = {weight:g}"] = to_uint8(images).numpy()
    save_strip(list(columns.values()), list(columns), FIGURE)
    print(f"wrote {FIGURE}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
