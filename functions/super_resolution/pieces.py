"""Train a network of details: what its steps get, pieces of photos, each also at half its size."""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.batches import augment
from data.pixels import to_model_range
from functions.denoiser import Denoiser
from functions.noise_scheduler import broadcast, build_scheduler
from functions.super_resolution.details import LOG_SNR_SHIFT, STD, details, shrink
from functions.super_resolution.enlarging import enlarge
from functions.support.random_numbers import generator_of, image_noise
from functions.support.settings import ConfigError
from functions.training.data import TrainingData, cut

# The share of pieces that are parts of photos; the others are whole photos, shrunk.
PARTS = 0.25
# Parts begin at multiples of this. The 8 x 8 blocks of photos that were JPEG files then always lie
# alike. With other corners the errors were larger (docs/ffhq.md).
CORNER = 8
# The log-SNR of images is even in each of these two intervals. The noisier one, where it is decided
# what the details show, has these shares of the draws; whole photos need more of them.
LOG_SNRS = -1.45, 1.0, 6.5
NOISY_PARTS, NOISY_WHOLES = 0.2, 0.5
# In half of the draws the small image has noise of a standard deviation of up to this, because
# samples are not as clean as shrunk photos (Ho et al. 2022, arXiv:2106.15282, Section 4).
LOW_NOISE = 0.06


class PieceDraws(NamedTuple):
    """The random numbers of B pieces of P x P pixels."""

    t: Tensor  # (B,) int64
    noise: Tensor  # (B, C, P, P) float32, the details of standard normal noise
    flip: Tensor  # (B,) bool, True with probability 1/2
    is_part: Tensor  # (B,) bool
    corner: Tensor  # (B, 2) int64: the row and the column at which a part begins
    low_std: Tensor  # (B,) float32: the standard deviation of the small image's noise
    low_noise: Tensor  # (B, C, P/2, P/2) float32, standard normal
    # (B,) float32, uniform in [0, 1). Below condition_dropout, the network gets zeros as `low`.
    low_drop: Tensor


class DetailsData(TrainingData):
    """The data of a training of details: pieces of half the size of the images.

    From small images, which it sees whole, and from parts of larger ones, one network learns to
    double both. The arguments are those of `TrainingData`. Raises ConfigError for labels, and for a
    size that is no multiple of 4.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        channels, size, _ = self.image_shape
        if size % 4 or self.config.labels:
            raise ConfigError(
                "a network of details needs an image_size that is a multiple of 4, without labels"
            )
        self.piece_shape = channels, size // 2, size // 2
        scheduler = build_scheduler(vars(self.config))
        log_snr = torch.logit(scheduler.alphas_cumprod) - LOG_SNR_SHIFT
        self.log_snr = log_snr.to(self.device, torch.float32)  # (T,)

    def draw(self, step: int) -> PieceDraws:
        """Draw what decides this process's pieces of a step."""
        generator = generator_of(self.device, self.config.seed, "training details", step)
        count = self.config.effective_batch
        options = {"generator": generator, "device": self.device}
        return cut(self.draw_pieces(torch.rand(count, **options), options), self.share)

    def draw_pieces(self, u: Tensor, options: dict) -> PieceDraws:
        """Draw what decides B pieces, whose log-SNR is at the fraction u (B,) of its draws."""
        count = len(u)
        channels, size, _ = self.piece_shape

        def uniform():
            return torch.rand(count, **options)

        is_part = uniform() < PARTS
        corners = (self.image_shape[1] - size) // CORNER + 1
        return PieceDraws(
            t=self.times_at(u, is_part),
            noise=details(torch.randn(count, *self.piece_shape, **options)),
            flip=uniform() < 0.5,
            is_part=is_part,
            corner=CORNER * torch.randint(corners, (count, 2), **options),
            low_std=torch.where(uniform() < 0.5, LOW_NOISE * uniform(), 0.0),
            low_noise=torch.randn(count, channels, size // 2, size // 2, **options),
            low_drop=uniform(),
        )

    def times_at(self, u: Tensor, is_part: Tensor) -> Tensor:
        """Return the timesteps (B,) of log-SNRs at the fractions u (B,) of their draws."""
        low, middle, high = LOG_SNRS
        noisy = torch.where(is_part, NOISY_PARTS, NOISY_WHOLES)
        log_snr = torch.where(
            u < noisy,
            low + (middle - low) * u / noisy,
            middle + (high - middle) * (u - noisy) / (1 - noisy),
        )
        return (self.log_snr - log_snr[:, None]).abs().argmin(dim=1)

    def augment(
        self, x_0: Tensor, inputs: dict[str, Tensor], draws: PieceDraws, done: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return details of pieces, of unit variance, and each piece at half the size as `low`.

        The images x_0 are (B, C, 2P, 2P), the details (B, C, P, P), and `low` (B, C, P/2, P/2).
        """
        if self.config.use_augmentation:
            x_0 = augment(x_0, draws.flip)
        # Indices, and not slices, because the corners are on the device.
        places = torch.arange(self.piece_shape[1], device=x_0.device)
        rows = draws.corner[:, 0, None, None] + places[:, None]  # (B, P, 1)
        columns = draws.corner[:, 1, None, None] + places  # (B, 1, P)
        images = torch.arange(len(x_0), device=x_0.device)[:, None, None]
        parts = x_0[images, :, rows, columns].movedim(-1, 1)
        wholes = shrink(x_0).clamp(-1, 1)
        pieces = torch.where(draws.is_part[:, None, None, None], parts, wholes)

        low = shrink(pieces) + broadcast(draws.low_std, draws.low_noise) * draws.low_noise
        is_absent = draws.low_drop < self.config.condition_dropout
        low = low.masked_fill(is_absent[:, None, None, None], 0)
        return details(pieces) / STD, inputs | {"low": low}

    @cached_property
    def held_out_draws(self) -> PieceDraws:
        """What decides the pieces of a validation."""
        seed = self.config.seed
        options = {"generator": generator_of("cpu", seed, "validation details"), "device": "cpu"}
        u = (2 * self.held_out_order + 1) / (2 * len(self.held_out_order))
        return PieceDraws(*(draw.to(self.device) for draw in self.draw_pieces(u, options)))

    def held_out(self, places: range) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Return triples of a validation, and the inputs, as `TrainingData` does, of pieces."""
        draws = cut(self.held_out_draws, places)
        x_0, inputs = self.augment(*self.held_out_images(places), draws, 0.0)
        return x_0, draws.t, draws.noise, inputs

    def sample(self, denoiser: Denoiser, places: range) -> Tensor:
        """Shrink held-out images to a quarter of their size, and enlarge them twice."""
        images, _ = self.grid_images(places)
        images = shrink(shrink(to_model_range(images))).clamp(-1, 1)
        for shape, purpose in ((self.piece_shape, "image"), (self.image_shape, "details")):
            noise = image_noise(self.config.seed, places, shape, self.device, purpose)
            images = enlarge(denoiser, images, noise)
        return images
