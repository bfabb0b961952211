"""Draw the same noise with rising weights of a guide, for docs/better-than-the-model.md.

`python -m figures.guidance_figure RUN [--guide STEP|MODEL]`

RUN is a run folder of `faces-v`, or a checkpoint of it.
"""

from dataclasses import replace
from pathlib import Path

from data.pixels import to_uint8
from figures.saved_model import open_saved
from functions.sampling.generation import generate
from functions.sampling.guidance import with_guide
from functions.sampling.options import SamplerOptions
from functions.support.command_line import Parser, exit_on_user_error
from functions.support.pictures import save_strip
from functions.support.processes import SINGLE_PROCESS

FIGURE = Path(__file__).resolve().parent / "guidance.png"
WEIGHTS = (1, 1.25, 1.5, 2, 3)
IMAGE_COUNT = 8


def main() -> None:
    """Draw the figure."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="A run folder or a checkpoint.")
    parser.add_argument(
        "--guide",
        default="1000",
        metavar="STEP|MODEL",
        help="The guide, as for sample.py. Default: %(default)s.",
    )
    args = parser.parse_args()

    options = SamplerOptions("dpm++", 20, eta=0.0, guide=args.guide)
    saved, sampler = open_saved(args.run, options)
    sampler = with_guide(sampler, saved, SINGLE_PROCESS)

    columns = {}
    for weight in WEIGHTS:
        denoiser = replace(sampler.denoiser, weight=weight)
        images = generate(replace(sampler, denoiser=denoiser), range(IMAGE_COUNT)).images
        columns[f"w = {weight:g}"] = to_uint8(images).numpy()
    save_strip(list(columns.values()), list(columns), FIGURE)
    print(f"wrote {FIGURE}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
