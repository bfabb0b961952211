"""Measure the samples of a model without a downloaded network.

    python -m functions.evaluation.feature_distance RUN --sampler dpm++ --steps 20 --n 1000

It prints the share of dark or speckled samples, which is meant for the embedded people, and the
distance between the samples and the training images. It takes the flags of sample.py that say how
images are sampled, and writes no files.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.pixels import to_model_range
from functions.sampling.calibration import with_calibration
from functions.sampling.generation import generate, open_sampler
from functions.sampling.guides import with_guide
from functions.sampling.options import add_sampling_flags
from functions.saved.checkpoint import SavedModel
from functions.saved.loading import load_and_split
from functions.support.command_line import Parser, exit_on_user_error, positive
from functions.support.processes import SINGLE_PROCESS

DIMENSIONS, FILTERS = 16, 16
# The seed of these filters. With another one, distances differ from those in docs/.
FILTER_SEED = 1057978271
# A corner is white if its RMS distance from white is at most this, on the scale 0 to 255.
WHITE = 10


def main() -> None:
    """Draw the first images of a seed, and print what is measured on them."""
    parser = Parser(description=__doc__)
    add_sampling_flags(parser)
    parser.add_argument(
        "--n",
        type=positive,
        default=100,
        help="The number of samples. Only distances of equal numbers can be compared. "
        "Default: %(default)s.",
    )
    args = parser.parse_args()
    if args.n < 2:
        parser.error("--n must be at least 2, because the distance compares variances")

    saved, image_sampler = open_sampler(args, SINGLE_PROCESS)
    image_sampler = with_calibration(image_sampler, saved)
    image_sampler = with_guide(image_sampler, saved, SINGLE_PROCESS)
    features = training_features(saved)
    images = generate(image_sampler, range(args.n), progress=True)

    print(f"{args.n} samples: {image_sampler.options}, seed {args.seed}")
    print(f"dark or speckled: {spoilt(images).double().mean():.2%}")
    print(f"distance: {features.distance(images):.4g}")


class Features:
    """Fixed, untrained features of images, and the Fréchet distance between them; it is not FID.

    The unit of the distance is the variance of the real images. 100 of the embedded people have a
    distance of 1.1 to the others. If these 100 are tinted by 10/255 the distance is 1.5, and if
    they are blurred it is 4. For noise it is 106.

    Args:
        real: (N, 3, H, W) in [-1, 1].
    """

    def __init__(self, real: Tensor):
        # Standardised features have equal weight, whatever their scale.
        raw = raw_features(real)
        self.mean = raw.mean(0)
        self.std = raw.std(0).clamp(min=1e-6)
        standardised = (raw - self.mean) / self.std

        # These are the principal axes of largest variance. Dividing by the standard deviation along
        # each axis gives all axes equal weight.
        values, vectors = torch.linalg.eigh(standardised.T.cov())
        deviations = values[-DIMENSIONS:].clamp(min=1e-9).sqrt()
        self.axes = vectors[:, -DIMENSIONS:] / deviations
        self.real = self(real)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of images (N, 3, H, W): (N, DIMENSIONS) float64."""
        standardised = (raw_features(images) - self.mean) / self.std
        return standardised @ self.axes

    def distance(self, images: Tensor) -> float:
        """Return the distance of images (N, C, H, W) from the real ones."""
        return frechet_distance(self(images), self.real)


def training_features(saved: SavedModel) -> Features:
    """Return the features of the images that a model was trained on, as they are and mirrored."""
    image_set, split = load_and_split(saved)
    images = image_set.images[split.train_indices]
    real = to_model_range(torch.from_numpy(images))
    # Training flips images, so samples may face either way.
    return Features(torch.cat([real, real.flip(3)]))


def raw_features(images: Tensor) -> Tensor:
    """Return F features of images (N, C, H, W): (N, F) float64.

    They are the image shrunk to 4 x 4 pixels, and the responses of random filters at three scales.
    """
    generator = torch.Generator().manual_seed(FILTER_SEED)
    filters = torch.randn(FILTERS, 3, 3, 3, generator=generator, dtype=torch.float64)
    # Filters of mean 0 ignore the brightness of a region, which the 4 x 4 pixels already have.
    filters = filters - filters.mean((1, 2, 3), keepdim=True)
    filters = F.normalize(filters, dim=(1, 2, 3))

    # Averages over 2 x 2 regions tell where in the image the responses are strong.
    # Grey is repeated to three channels.
    images = images.double().expand(-1, 3, -1, -1)
    parts = [F.adaptive_avg_pool2d(images, 4)]
    for scale in (1, 2, 4):
        shrunk = F.avg_pool2d(images, scale)
        responses = F.conv2d(shrunk, filters).abs()
        parts.append(F.adaptive_avg_pool2d(responses, 2))
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance of the Gaussians fitted to the rows of a and of b.

    It is |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).
    """
    means = (a.mean(0) - b.mean(0)).square().sum()
    cov_a = a.T.cov()
    cov_b = b.T.cov()

    # With root = C_a^(1/2), root C_b root has the eigenvalues of C_a C_b and is symmetric, as
    # eigvalsh requires. Rounding can leave an eigenvalue below zero.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    products = torch.linalg.eigvalsh(root @ cov_b @ root)
    cross = products.clamp(min=0).sqrt().sum()

    # Rounding can bring the distance of equal Gaussians below zero, too.
    distance = means + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def spoilt(images: Tensor) -> Tensor:
    """Return whether each of the images (N, 3, H, W) is dark or speckled: (N,) bool.

    In such an image every corner (2 x 2 pixels at 32 px) differs from white by more than 10/255
    RMS. Each of the 901 embedded people has a corner that differs by at most 2.5/255.
    """
    k = images.shape[-1] // 16
    # (N, 3, 2 k, 2 k): an image of the four corners alone
    rows = torch.cat([images[:, :, :k], images[:, :, -k:]], dim=2)
    corners = torch.cat([rows[..., :k], rows[..., -k:]], dim=3)

    # (N, 2, 2): the mean squared distance of each corner from white
    distances = (1 - corners).square()
    squares = F.avg_pool2d(distances, k).mean(dim=1)
    rms = 127.5 * squares.sqrt()
    return rms.amin(dim=(1, 2)) > WHITE


if __name__ == "__main__":
    with exit_on_user_error():
        main()
