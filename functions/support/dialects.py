"""List the details in which the two dialects of the network differ.

The weights of both dialects have the same names and shapes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dialect:
    """Hold fields of the config of `UNet2DModel`, which is diffusers' class of both dialects."""

    # Every GroupNorm has this epsilon.
    norm_eps: float
    # 0 pads the right and the bottom only, as TensorFlow's 'SAME' does for an even size. 1 pads all
    # sides.
    downsample_padding: int
    # True puts the cosines first in the time embedding.
    flip_sin_to_cos: bool
    # The frequencies of the time embedding are 10000^(-i / (dim/2 - freq_shift)).
    freq_shift: int
    # This is the number of channels of each attention head. None makes a single head.
    attention_head_dim: int | None


DIALECTS = {
    # The code of Ho et al. 2020 has these values, so their weights need them. The epsilon is
    # TensorFlow's default.
    "ho": Dialect(1e-6, 0, False, 1, None),
    # These are the defaults of diffusers, which its training script uses.
    "diffusers": Dialect(1e-5, 1, True, 0, 8),
}
