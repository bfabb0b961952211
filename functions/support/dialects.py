"""The details in which two families of the same network differ.

Both families have the same weights, by name and shape.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dialect:
    """Hold fields of the config of a `UNet2DModel`, diffusers' class of both families."""

    # This is the epsilon of every GroupNorm.
    norm_eps: float
    # 0 pads the right and the bottom only, as TensorFlow's 'SAME' does for an even size; 1 pads
    # all sides.
    downsample_padding: int
    # True puts the cosines first in the time embedding.
    flip_sin_to_cos: bool
    # The frequencies of the time embedding are 10000^(-i / (dim/2 - freq_shift)).
    freq_shift: int
    # A head of attention has so many channels; None means one head.
    attention_head_dim: int | None


DIALECTS = {
    # Ho et al. 2020 wrote these into their code, and so into their weights. The epsilon is
    # TensorFlow's.
    "ho": Dialect(1e-6, 0, False, 1, None),
    # diffusers takes these when one says nothing, as its training script does.
    "diffusers": Dialect(1e-5, 1, True, 0, 8),
}
