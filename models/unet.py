"""The denoising network of DDPM: a U-Net that predicts the noise in x_t, or v.

The architecture is that of Ho et al. 2020, Appendix B.
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import (
    Downsample,
    GroupNorm,
    ResidualBlock,
    SelfAttention,
    TimeEmbedding,
    Upsample,
)

# Each level has this many residual blocks on the way down. On the way up it has one more, because
# one more skip connection leads there: from the downsampling into the level or, at the full
# resolution, from the first layer.
BLOCKS_DOWN = 2
BLOCKS_UP = 3


class UNet(nn.Module):
    """A network that predicts the noise in an image, eps_theta(x_t, t); or v, if trained for v.

    Level 0 is the full resolution. Each further level halves it. A level has two residual blocks on
    the way down and three on the way up. Between the two ways is a bottleneck of block, attention,
    block. The output of the first layer, of each block (and its attention) and of each downsampling
    is a skip connection: it is concatenated to the input of a block on the way up.

    Args:
        image_size: height and width of the images.
        channels: their colour channels.
        lowest_resolution_size: height and width at the last level, image_size / 2^(levels - 1), or
            None. Raises ValueError for another number.
        dim_multiply: multipliers of `base_dim`, one per level.
        transformer_layers: levels with self-attention, counted from 0.
        base_dim: channels at multiplier 1. The time embedding has 4 times as many.
        dropout: probability inside each residual block.
        norm_groups: groups of each GroupNorm. They must divide every level's channels.
        label_count: the number of labels; 0 for the paper's network, which gets none.
    """

    # The value of each input that stands for none. Training drops such inputs of some images.
    no_inputs: ClassVar[dict[str, float | Tensor]] = {}

    def __init__(
        self,
        image_size: int,
        channels: int,
        lowest_resolution_size: int | None,
        dim_multiply: Sequence[int],
        transformer_layers: Sequence[int],
        base_dim: int,
        dropout: float = 0.0,
        norm_groups: int = 32,
        label_count: int = 0,
    ):
        super().__init__()
        levels = len(dim_multiply)
        lowest = image_size / 2 ** (levels - 1)
        if lowest_resolution_size not in (None, lowest):
            raise ValueError(
                f"{levels} levels lead from {image_size} to {lowest:g} pixels, "
                f"not to lowest_resolution_size = {lowest_resolution_size}"
            )
        self.image_shape = (channels, image_size, image_size)  # (C, H, W)

        dims = [base_dim * multiplier for multiplier in dim_multiply]
        # The epsilon is TensorFlow's.
        norm = partial(GroupNorm, norm_groups, eps=1e-6)
        block = partial(ResidualBlock, time_dim=4 * base_dim, dropout=dropout, norm=norm)
        attention = partial(SelfAttention, norm=norm)

        def attention_at(level):
            """Return a new self-attention, or the identity at a level without it."""
            if level in transformer_layers:
                return attention(dims[level])
            return nn.Identity()

        self.time_embedding = TimeEmbedding(base_dim)
        self.conv_in = nn.Conv2d(channels, base_dim, 3, padding=1)

        # `dim` is the number of output channels of the last layer so far. `skip_dims` has the
        # numbers of channels of the skip connections that no block on the way up uses yet.
        dim = base_dim
        skip_dims = [dim]
        self.down = nn.ModuleList()
        # A level: blocks, each with attention or nothing after it; then halving, but for the last.
        for level in range(levels):
            stage = nn.ModuleDict({"blocks": nn.ModuleList(), "attentions": nn.ModuleList()})
            for _ in range(BLOCKS_DOWN):
                stage["blocks"].append(block(dim, dims[level]))
                stage["attentions"].append(attention_at(level))
                dim = dims[level]
                skip_dims.append(dim)
            if level < levels - 1:
                stage["downsample"] = Downsample(dim)
                skip_dims.append(dim)
            self.down.append(stage)

        self.middle_block_1 = block(dim, dim)
        self.middle_attention = attention(dim)
        self.middle_block_2 = block(dim, dim)

        # The way up leads from the lowest resolution to the full one.
        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            stage = nn.ModuleDict({"blocks": nn.ModuleList(), "attentions": nn.ModuleList()})
            for _ in range(BLOCKS_UP):
                stage["blocks"].append(block(dim + skip_dims.pop(), dims[level]))
                stage["attentions"].append(attention_at(level))
                dim = dims[level]
            if level > 0:
                stage["upsample"] = Upsample(dim)
            self.up.append(stage)

        self.norm_out = norm(dim)
        self.conv_out = nn.Conv2d(dim, channels, 3, padding=1)
        self.label_embedding = None
        if label_count:
            # The last row is for no label.
            self.label_embedding = nn.Embedding(label_count + 1, 4 * base_dim)
            self.no_inputs = self.no_inputs | {"label": label_count}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights as Ho's code does: Glorot's (uniform, fan average), zero biases."""
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                # The last layer of each residual branch starts at zero, so that the branch adds
                # nothing at first. The last layer of the network starts at zero, too.
                is_last = name.endswith(("conv_2", ".out", "conv_out"))
                initialise = nn.init.zeros_ if is_last else nn.init.xavier_uniform_
                initialise(layer.weight)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Embedding):
                nn.init.zeros_(layer.weight)

    def embed(self, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Embed timesteps t (B,), and what conditions the network: (B, 4 base_dim).

        A network with labels gets them as (B,) int64, or (1,) for all; None means no label. A
        subclass with other inputs has them here as arguments, and in `no_inputs`.
        """
        embedding = self.time_embedding(t)
        if self.label_embedding:
            # As in ADM (Dhariwal and Nichol 2021), a label's embedding is added to that of t.
            label = t.new_full((1,), self.no_inputs["label"]) if label is None else label
            embedding = embedding + self.label_embedding(label)
        return embedding

    def forward(self, x_t: Tensor, t: Tensor, **inputs: Tensor) -> Tensor:
        """Predict the noise, or v, in x_t (B, channels, H, W) at timesteps t (B,) int64, 0 .. T-1.

        The inputs are those of `embed`. The result has the shape of x_t, and the dtype of the last
        layer, which autocast may lower.
        """
        time_embedding = self.embed(t, **inputs)  # (B, 4 base_dim)
        h = self.conv_in(x_t)  # (B, base_dim, H, W)

        skips = [h]
        for stage in self.down:
            for block, attention in zip(stage["blocks"], stage["attentions"], strict=True):
                h = attention(block(h, time_embedding))
                skips.append(h)  # (B, dims[level], H / 2^level, W / 2^level)
            if "downsample" in stage:
                h = stage["downsample"](h)
                skips.append(h)

        h = self.middle_block_1(h, time_embedding)
        h = self.middle_attention(h)
        h = self.middle_block_2(h, time_embedding)

        for stage in self.up:
            for block, attention in zip(stage["blocks"], stage["attentions"], strict=True):
                h = torch.cat([h, skips.pop()], dim=1)
                h = attention(block(h, time_embedding))
            if "upsample" in stage:
                h = stage["upsample"](h)

        h = F.silu(self.norm_out(h))
        return self.conv_out(h)  # (B, channels, H, W)


def with_other_labels(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights for a network whose labels are others than those of `weights`, or none.

    `own` are its weights now. With any label it then does what the old network did without one.
    """
    table, bias = "label_embedding.weight", "time_embedding.linear_2.bias"
    result = {name: weight for name, weight in weights.items() if name != table}
    # A network without labels adds nothing for them.
    no_label = weights[table][-1] if table in weights else torch.zeros(())
    if table in own:
        result[table] = no_label.expand_as(own[table])
    elif table in weights:
        # The embedding of a label is added to that of t.
        result[bias] = weights[bias] + no_label
    return result
