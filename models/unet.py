"""The denoising network of DDPM: a U-Net that predicts the noise in x_t (Ho et al. 2020, Appendix B)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.blocks import (
    Downsample,
    ResidualBlock,
    SelfAttention,
    Upsample,
    init_fan_average,
    init_zero,
    norm_silu_conv,
)
from models.norm_silu import EAGER, NORM_EPS, check_compiled, compiled_kernels
from models.residual import Settings
from models.time_embedding import TimeEmbedding

BLOCKS_DOWN, BLOCKS_UP = 2, 3  # residual blocks a level; one more on the way up, for the skip that downsampling leaves


class UNet(nn.Module):
    """eps_theta(x_t, t): the noise that was added to an image.

    Level 0 is the full resolution; each further level halves it and has base_dim * dim_multiply[level] channels.
    A level is two residual blocks on the way down and three on the way up, each followed by self-attention at the
    levels named in `transformer_layers`; between them lies a bottleneck of block, attention, block. What each block
    and each downsampling gives on the way down is kept and concatenated on the way up.

    Args:
        image_size: height and width of the images; lowest_resolution_size * 2^(levels - 1).
        channels: colour channels of the images.
        lowest_resolution_size: height and width at the last level.
        dim_multiply: multiplier of `base_dim`, one for each level.
        transformer_layers: levels with self-attention, counted from 0.
        base_dim: channels at multiplier 1; the time embedding has 4 times as many.
        dropout: probability inside each residual block.
        norm_groups: groups of each GroupNorm; must divide every level's channels.

    Raises:
        ValueError: the sizes do not fit together.
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
    ):
        super().__init__()
        levels = len(dim_multiply)
        if image_size != lowest_resolution_size * 2 ** (levels - 1):
            raise ValueError(
                f"{levels} levels lead from {image_size} to {image_size / 2 ** (levels - 1):g} pixels, "
                f"not to lowest_resolution_size = {lowest_resolution_size}"
            )
        self.image_size, self.channels = image_size, channels
        dims = [base_dim * multiplier for multiplier in dim_multiply]
        time_dim = 4 * base_dim

        def block(in_channels: int, out_channels: int) -> ResidualBlock:
            return ResidualBlock(in_channels, out_channels, time_dim, dropout, norm_groups)

        def attention(level: int) -> nn.Module:
            return SelfAttention(dims[level], norm_groups) if level in transformer_layers else nn.Identity()

        self.time_embedding = TimeEmbedding(base_dim)
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
                stage["downsample"] = Downsample(dim)
                skip_dims.append(dim)
            self.down.append(stage)

        self.middle_block_1 = block(dim, dim)
        self.middle_attention = SelfAttention(dim, norm_groups)
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

        self.norm_out = nn.GroupNorm(norm_groups, dim, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(dim, channels, 3, padding=1)
        self.settings = Settings(norm_groups, dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights as in Ho's code: fan-average uniform, zero biases, residual branches and output at zero."""
        for layer in (self.time_embedding.linear_1, self.time_embedding.linear_2, self.conv_in):
            init_fan_average(layer)
        for module in self.modules():
            if isinstance(module, (ResidualBlock, SelfAttention, Downsample, Upsample)):
                module.reset_parameters()
        init_zero(self.conv_out)

    @property
    def recompute(self) -> str:
        """What `set_execution` was asked for."""
        return self.settings.recompute

    def set_execution(self, recompute: str = "norms", compiled: bool = False) -> None:
        """How the same function is computed: in more or less memory and time.

        With any `recompute` and the kernels of the CPU gradients are the same bit for bit, else up to rounding.

        Args:
            recompute: what backward makes again instead of keeping it from the forward pass: "none"; "norms", all norms
                and activations, which is nearly free; or "blocks", the whole network from the inputs of its blocks,
                for most of another forward pass.
            compiled: with norms and activations compiled (`torch.compile`), which pays on CUDA.
        """
        kernels = compiled_kernels() if compiled else EAGER
        for module in self.modules():
            if isinstance(module, (ResidualBlock, UNet)):
                module.settings = module.settings._replace(recompute=recompute, kernels=kernels)
        if recompute == "blocks":  # the blocks behind an upsampling are made again together with it, by `run`
            for stage in self.up[1:]:
                stage["blocks"][0].settings = stage["blocks"][0].settings._replace(recompute="norms")

    def check_compiled(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compile for the sizes of all norms, and compare the results: `ArithmeticError`, or any of the compiler's."""
        sizes, size = set(), self.image_size
        for stage in [*self.down, *self.up]:
            for block in stage["blocks"]:
                sizes |= {(norm.num_channels, size) for norm in (block.norm_1, block.norm_2)}
            size = size // 2 if "downsample" in stage else size * 2 if "upsample" in stage else size
        for channels, size in sorted(sizes):
            check_compiled(channels, size, self.settings.groups, device, dtype)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x_t: (B, channels, image_size, image_size), the noised images.
            t: (B,) int64, their timesteps, 0 .. T-1.

        Returns:
            (B, channels, image_size, image_size), in the precision of the last layer (autocast's when it is on).
        """
        time_embedding = self.time_embedding(t)  # (B, 4 base_dim)
        h = self.conv_in(x_t)  # (B, base_dim, H, W)

        skips = [h]
        for stage in self.down:
            for block, attention in zip(stage["blocks"], stage["attentions"], strict=True):
                h = block(time_embedding, h)  # (B, dims[level], H / 2^level, W / 2^level)
                h = self.run(attention, h)
                skips.append(h)
            if "downsample" in stage:
                h = self.run(stage["downsample"], h)  # half the height and width
                skips.append(h)

        h = self.middle_block_1(time_embedding, h)
        h = self.run(self.middle_attention, h)
        h = self.middle_block_2(time_embedding, h)

        upsample = None
        for stage in self.up:
            for block, attention in zip(stage["blocks"], stage["attentions"], strict=True):
                if upsample:  # to twice the height and width
                    h = self.run(partial(upsampled, upsample, block), time_embedding, h, skips.pop())
                else:
                    h = block(time_embedding, h, skips.pop())
                h, upsample = self.run(attention, h), None
            if "upsample" in stage:
                upsample = stage["upsample"]
        assert not skips, "every skip connection is used exactly once"

        return norm_silu_conv(self.norm_out, self.conv_out, h, self.settings)  # (B, channels, H, W)

    def run(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """A part of the network; with "blocks" backward has its inputs alone and runs it again."""
        if self.recompute != "blocks" or not torch.is_grad_enabled() or isinstance(part, nn.Identity):
            return part(*inputs)
        random = self.training and self.settings.dropout > 0  # dropout has to be the same again
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=random)


def upsampled(upsample: Upsample, block: ResidualBlock, time_embedding: Tensor, h: Tensor, skip: Tensor) -> Tensor:
    """The block of an upsampled input: one part, so that the larger image need not be kept."""
    return block(time_embedding, upsample(h), skip)
