"""Draw images from a trained model: `python sample.py` takes the newest run and writes a grid.

Ancestral sampling (Algorithm 2 of Ho et al. 2020) from pure noise with the EMA weights, rebuilt from the checkpoint
alone. The reverse loop itself is in functions/samplers.py.
"""

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
    add_sampling_flags(parser, n=36)
    args = parser.parse_args()
    checkpoint = find_checkpoint(args.checkpoint) if args.checkpoint else newest_checkpoint(args.runs)
    sample_to_files(args, checkpoint, UNet, to_uint8)


if __name__ == "__main__":
    with plain_errors(CheckpointError, DeviceError, SamplingError, OSError):
        main()
