"""Draw images from a trained model: `python sample.py` takes the newest run and writes a grid.

From pure noise, with the EMA weights, rebuilt from the checkpoint alone: by ancestral sampling over all timesteps
(Algorithm 2 of Ho et al. 2020), or with --sampler and --steps in fewer; the reverse loops are in functions/samplers.py.
--interpolate and --variations draw images between two, or like one, by way of noise.

Many images, on several GPUs; started again after a kill, only what is missing is made:

    torchrun --nproc-per-node 8 sample.py -n 50000 --individual --out FOLDER
"""

from data.decode import BadImage, decode_rgb, fit_square
from data.pixels import to_model_range, to_uint8
from functions.sampling.latent_pictures import Pixels
from functions.sampling.script import add_sampling_flags, sample_to_files
from functions.support.command_line import Parser, plain_errors
from functions.support.run_folder import find_checkpoints, newest_checkpoints
from models.unet import UNet

PIXELS = Pixels(decode_rgb, fit_square, BadImage, to_model_range, to_uint8)


def main() -> None:
    """Read the command line, sample, and say which files were written."""
    parser = Parser(description=__doc__)
    add_sampling_flags(parser, n=36)
    args = parser.parse_args()
    candidates = lambda: find_checkpoints(args.checkpoint) if args.checkpoint else newest_checkpoints(args.runs)
    sample_to_files(args, candidates, UNet, PIXELS)


if __name__ == "__main__":
    with plain_errors():
        main()
