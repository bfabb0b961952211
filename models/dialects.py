"""List the details in which the two dialects of the network differ.

The weights of both dialects have the same names and shapes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dialect:
    """Fields of the config of diffusers' `UNet2DModel`, which implements both dialects."""

    # Every GroupNorm uses this epsilon.
    norm_eps: float
    # 0 pads only the right and the bottom, as TensorFlow's 'SAME' does for an even size. 1 pads all
    # sides.
    downsample_padding: int
    # True puts the cosines before the sines in the time embedding.
    flip_sin_to_cos: bool
    # The frequencies of the time embedding are 10000^(-i / (dim/2 - freq_shift)).
    freq_shift: int
    # Each attention head has this number of channels. None means a single head.
    attention_head_dim: int | None


DIALECTS = {
    # The code of Ho et al. 2020 uses these values, so their published weights need them. The
    # epsilon is TensorFlow's default.
    "ho": Dialect(1e-6, 0, False, 1, None),
    # These are diffusers' defaults, which its training script uses.
    "diffusers": Dialect(1e-5, 1, True, 0, 8),
}
