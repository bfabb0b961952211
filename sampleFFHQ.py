"""Draw faces from the newest FFHQ run: the reference's grid of 20 and its animation, in one command.

The same as sample.py, with `--n 20 --gif` and FFHQ's runs alone.
"""

from pathlib import Path

from data.decode import BadImage, decode_rgb, fit_square
from data.pixels import to_model_range, to_uint8
from functions.sampling.latent_pictures import Pixels
from functions.sampling.script import add_sampling_flags, sample_to_files
from functions.support.command_line import Parser, plain_errors
from functions.support.errors import CheckpointError
from functions.support.run_folder import find_checkpoints, newest_checkpoints
from models.unet import UNet

PIXELS = Pixels(decode_rgb, fit_square, BadImage, to_model_range, to_uint8)


def main() -> None:
    """Read the command line, sample, and say which files were written."""
    parser = Parser(description=__doc__)
    add_sampling_flags(parser, n=20)
    parser.set_defaults(gif=True)
    args = parser.parse_args()
    candidates = lambda: find_checkpoints(args.checkpoint) if args.checkpoint else newest_ffhq_checkpoints(args.runs)
    sample_to_files(args, candidates, UNet, PIXELS)


def newest_ffhq_checkpoints(runs: Path) -> list[Path]:
    """Those of the newest FFHQ run; when there is none, a `CheckpointError` that says how to get one."""
    try:
        return newest_checkpoints(runs, "ffhq")
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nput FFHQ at data/FFHQ and run: python train.py ffhq-run2") from error


if __name__ == "__main__":
    with plain_errors():
        main()
