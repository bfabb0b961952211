"""The details in which two families of the same network differ; both have the same weights, by name and shape."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dialect:
    """Fields and values are those of the config of a `UNet2DModel`, diffusers' class of both families."""

    norm_eps: float  # of every GroupNorm
    # 0: right and bottom only, TensorFlow's 'SAME' for an even size; 1: all round
    downsample_padding: int
    flip_sin_to_cos: bool  # the time embedding has the cosines first
    freq_shift: int  # its frequencies are 10000^(-i / (dim/2 - freq_shift))
    attention_head_dim: int | None  # channels of a head of attention; None: one head


DIALECTS = {
    # Ho et al. 2020, in their code and so in their weights; TensorFlow's epsilon
    "ho": Dialect(1e-6, 0, False, 1, None),
    # What diffusers has when one says nothing, as its training script does
    "diffusers": Dialect(1e-5, 1, True, 0, 8),
}
