"""Draw faces from the newest FFHQ run: the reference's grid of 20 and its animation, in one command.

The same as sample.py, with `--n 20 --gif` and FFHQ's runs alone.
"""

from pathlib import Path

from data.pixels import to_uint8
from functions.checkpoint import CheckpointError
from functions.command_line import Parser, plain_errors
from functions.device import DeviceError
from functions.run_folder import find_checkpoint, newest_checkpoint
from functions.samplers import SamplingError
from functions.sampling import add_sampling_flags, sample_to_files
from models.unet import UNet


def main() -> None:
    """Read the command line, sample, and say which files were written."""
    parser = Parser(description=__doc__)
    add_sampling_flags(parser, n=20)
    parser.set_defaults(gif=True)
    args = parser.parse_args()
    checkpoint = find_checkpoint(args.checkpoint) if args.checkpoint else newest_ffhq_checkpoint(args.runs)
    sample_to_files(args, checkpoint, UNet, to_uint8)


def newest_ffhq_checkpoint(runs: Path) -> Path:
    """That of the newest FFHQ run; when there is none, a `CheckpointError` that says how to get one."""
    try:
        return newest_checkpoint(runs, "ffhq")
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nput FFHQ at data/FFHQ and run: python train.py ffhq-run2") from error


if __name__ == "__main__":
    with plain_errors(CheckpointError, DeviceError, SamplingError, OSError):
        main()
