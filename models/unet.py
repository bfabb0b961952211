"""The denoising network of DDPM: a U-Net that predicts the noise in x_t, or v (Ho et al. 2020, Appendix B)."""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from functions.support.dialects import DIALECTS
from models.blocks import (
    Downsample,
    ResidualBlock,
    SelfAttention,
    TimeEmbedding,
    Upsample,
    recomputing,
)
from models.group_norm import GroupNorm

# Residual blocks a level; one more on the way up, for the skip that downsampling leaves
BLOCKS_DOWN, BLOCKS_UP = 2, 3


class UNet(nn.Module):
    """eps_theta(x_t, t): the noise that was added to an image, or v, as the objective wants.

    Level 0 is the full resolution; each further level halves it and has base_dim * dim_multiply[level] channels.
    A level is two residual blocks on the way down and three on the way up, each followed by self-attention at the
    levels named in `transformer_layers`; between them lies a bottleneck of block, attention, block. What each block
    and each downsampling gives on the way down is kept and concatenated on the way up.

    Args:
        image_size: height and width of the images; lowest_resolution_size * 2^(levels - 1) (`ValueError` otherwise).
        channels: colour channels of the images.
        lowest_resolution_size: height and width at the last level.
        dim_multiply: multiplier of `base_dim`, one for each level.
        transformer_layers: levels with self-attention, counted from 0.
        base_dim: channels at multiplier 1; the time embedding has 4 times as many.
        dropout: probability inside each residual block.
        norm_groups: groups of each GroupNorm; must divide every level's channels.
        dialect: "ho", the paper's network; or "diffusers", with other details that functions/support/dialects.py lists.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        lowest_resolution_size: int,
        dim_multiply: Sequence[int],
        transformer_layers: Sequence[int],
        base_dim: int,
        dropout: float = 0.0,
        norm_groups: int = 32,
        dialect: str = "ho",
    ):
        super().__init__()
        levels = len(dim_multiply)
        lowest = image_size / 2 ** (levels - 1)
        if lowest != lowest_resolution_size:
            what = f"{levels} levels lead from {image_size} to {lowest:g} pixels"
            raise ValueError(f"{what}, not to lowest_resolution_size = {lowest_resolution_size}")
        if dialect not in DIALECTS:
            raise ValueError(f"dialect is {dialect!r}; it can be {' or '.join(DIALECTS)}")
        self.image_size, self.channels = image_size, channels
        details = DIALECTS[dialect]
        norm = partial(GroupNorm, norm_groups, eps=details.norm_eps)
        dims = [base_dim * multiplier for multiplier in dim_multiply]
        block = partial(ResidualBlock, time_dim=4 * base_dim, dropout=dropout, norm=norm)
        attend = partial(SelfAttention, norm=norm, head_dim=details.attention_head_dim)
        attention = lambda level: (
            attend(dims[level]) if level in transformer_layers else nn.Identity()
        )

        self.time_embedding = TimeEmbedding(base_dim, details)
        self.conv_in = nn.Conv2d(channels, base_dim, 3, padding=1)

        dim, skip_dims = base_dim, [base_dim]
        self.down = nn.ModuleList()
        for level in range(levels):
            stage = nn.ModuleDict({"blocks": nn.ModuleList(), "attentions": nn.ModuleList()})
            for _ in range(BLOCKS_DOWN):
                stage["blocks"].append(block(dim, dims[level]))
                stage["attentions"].append(attention(level))
                dim = dims[level]
                skip_dims.append(dim)
            if level < levels - 1:
                stage["downsample"] = Downsample(dim, details.downsample_padding)
                skip_dims.append(dim)
            self.down.append(stage)

        self.middle_block_1 = block(dim, dim)
        self.middle_attention = attend(dim)
        self.middle_block_2 = block(dim, dim)

        self.up = nn.ModuleList()  # from the lowest resolution to the full one
        for level in reversed(range(levels)):
            stage = nn.ModuleDict({"blocks": nn.ModuleList(), "attentions": nn.ModuleList()})
            for _ in range(BLOCKS_UP):
                stage["blocks"].append(block(dim + skip_dims.pop(), dims[level]))
                stage["attentions"].append(attention(level))
                dim = dims[level]
            if level > 0:
                stage["upsample"] = Upsample(dim)
            self.up.append(stage)
        assert not skip_dims, "every skip connection is used exactly once"

        self.norm_out = norm(dim)
        self.conv_out = nn.Conv2d(dim, channels, 3, padding=1)
        self.reset_parameters()
        self.set_recompute("none")

    def reset_parameters(self) -> None:
        """Initial weights as in Ho's code: Glorot's (uniform, fan average), zero biases.

        The last layer of each residual branch is zero, so that a block starts as the identity; so is the network's.
        """
        modules = list(self.modules())
        zero = {self.conv_out, *(m.conv_2 for m in modules if isinstance(m, ResidualBlock))}
        zero |= {m.out for m in modules if isinstance(m, SelfAttention)}
        for layer in modules:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.zeros_(layer.bias)
                initialise = nn.init.zeros_ if layer in zero else nn.init.xavier_uniform_
                initialise(layer.weight)

    def set_recompute(self, recompute: str) -> None:
        """Choose what backward computes again instead of keeping it from the forward pass; the gradients are the same.

        "none"; "norms", what precedes a convolution in residual blocks (concatenation, norm, activation, dropout),
        attention (norm) and output, but no convolution, nearly free at 128 pixels; or "blocks", everything between the
        inputs of the blocks, for most of another forward pass. `ValueError` for another.
        """
        if recompute not in ("none", "norms", "blocks"):
            raise ValueError(f"recompute is {recompute!r}; it can be none, norms or blocks")
        if self.conv_in.weight.device.type == "mps" and self.middle_block_1.dropout.p > 0:
            recompute = "none"  # on MPS a checkpoint does not draw the same dropout again
        self.recompute = recompute
        for module in self.modules():
            if isinstance(module, (ResidualBlock, SelfAttention)):
                module.recompute_norms = recompute == "norms"

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise, or v, in images x_t (B, channels, image_size, image_size) at timesteps t (B,) int64, 0 .. T-1.

        It has the shape of x_t, and the precision of the last layer (autocast's when it is on).
        """
        time_embedding = self.time_embedding(t)  # (B, 4 base_dim)
        h = self.conv_in(x_t)  # (B, base_dim, H, W)

        run = partial(recomputing, self.recompute == "blocks")
        skips = [h]
        for stage in self.down:
            for block, attention in zip(stage["blocks"], stage["attentions"], strict=True):
                h = run(block_and_attention, None, block, attention, time_embedding, h)
                skips.append(h)  # (B, dims[level], H / 2^level, W / 2^level)
            if "downsample" in stage:
                h = run(stage["downsample"], h)  # half the height and width
                skips.append(h)

        h = run(
            block_and_attention, None, self.middle_block_1, self.middle_attention, time_embedding, h
        )
        h = run(self.middle_block_2, time_embedding, h)

        upsample = None
        for stage in self.up:
            for block, attention in zip(stage["blocks"], stage["attentions"], strict=True):
                # The upsampling is run with the block behind it, so that "blocks" keeps the small image, not the large
                h = run(
                    block_and_attention, upsample, block, attention, time_embedding, h, skips.pop()
                )
                upsample = None
            if "upsample" in stage:  # to twice the height and width
                upsample = stage["upsample"]

        return recomputing(
            self.recompute != "none", lambda h: self.conv_out(F.silu(self.norm_out(h))), h
        )


def block_and_attention(
    upsample: Upsample | None,
    block: nn.Module,
    attention: nn.Module,
    time_embedding: Tensor,
    h: Tensor,
    *skip: Tensor,
) -> Tensor:
    """What a level repeats: on the way up with a skip connection, and at first with the upsampling into the level."""
    if upsample is not None:
        h = upsample(h)
    return attention(block(time_embedding, h, *skip))
