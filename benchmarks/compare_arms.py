"""The arms of benchmarks/compare.py: which network, in which setting; and how each is built and called."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from models.unet import UNet

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
Network = Callable[[Tensor, Tensor], Tensor]  # x_t (B, 3, H, W), t (B,) -> eps (B, 3, H, W)


@dataclass(frozen=True)
class Shape:
    """What all networks have in common, and the batch they see."""

    image_size: int = 128
    dim_multiply: tuple[int, ...] = (1, 2, 2, 4, 8)
    attention_levels: tuple[int, ...] = (3,)
    base_dim: int = 64
    norm_groups: int = 32
    batch_size: int = 4

    @property
    def lowest_resolution_size(self) -> int:
        return self.image_size // 2 ** (len(self.dim_multiply) - 1)


TINY = Shape(16, (1, 2), (1,), 8, 2, 2)


@dataclass(frozen=True)
class Arm:
    """A network in a setting. `name` is for --arms, `text` for people."""

    name: str
    text: str
    package: str  # "ours", "diffusers" or "lucidrains"
    dtype: str  # of autocast; "float32" is none
    layout: str  # a key of LAYOUTS
    recompute: str = "none"  # ours: none, norms, blocks; diffusers: none, or blocks, its gradient checkpointing
    compiled: bool = False
    keeps_heap: bool = False  # glibc's freed blocks stay with the process: functions.support.device.keep_heap

    def to_dict(self) -> dict:
        return asdict(self)


def all_arms(dtype: str, device: str) -> list[Arm]:
    """Every arm, ours first; `dtype` is that of the comparison, beside which stand the peers' own float32 defaults."""
    on_cpu = device == "cpu"
    ours = Arm("ours", "ours: norms recomputed, the default", "ours", dtype, "channels_last", "norms", False, on_cpu)
    arms = [
        ours,
        replace(ours, name="ours-none", text="ours, nothing recomputed", recompute="none"),
        replace(ours, name="ours-blocks", text="ours, blocks recomputed", recompute="blocks"),
    ]
    if not on_cpu:
        arms.append(replace(ours, name="ours-compiled", text="ours, compiled", compiled=True))
    for package in ("diffusers", "lucidrains"):
        text = f"{package} as shipped: float32, contiguous, eager"
        arms.append(Arm(f"{package}-default", text, package, "float32", "contiguous"))
        for layout in LAYOUTS:
            eager = Arm(f"{package}-{layout}", f"{package}, {layout}", package, dtype, layout)
            kept = replace(eager, name=f"{eager.name}-heap", text=f"{eager.text}, heap kept", keeps_heap=True)
            if package == "diffusers" or not on_cpu:
                arms.append(eager)
            if on_cpu:  # glibc's heap plays no part in a GPU's memory
                arms.append(kept)
        for layout in LAYOUTS:
            text = f"{package}, compiled, {layout}{', heap kept' if on_cpu else ''}"
            name = f"{package}-compiled-{layout}"
            arms.append(Arm(name, text, package, dtype, layout, compiled=True, keeps_heap=on_cpu))
    text = f"diffusers, gradient checkpointing, channels_last{', heap kept' if on_cpu else ''}"
    arms.append(Arm("diffusers-checkpointing", text, "diffusers", dtype, "channels_last", "blocks", keeps_heap=on_cpu))
    return arms


def build(arm: Arm, shape: Shape, device: torch.device) -> nn.Module:
    """The arm's network in its layout, with weights none of which is zero.

    Fresh weights are zero at the ends of our residual branches and not in the peers'; zeros, and the tiny gradients
    that follow from them, take other times than the numbers of a training.
    """
    torch.manual_seed(0)
    module = {"ours": build_ours, "diffusers": build_diffusers, "lucidrains": build_lucidrains}[arm.package](shape)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return module.to(device, memory_format=LAYOUTS[arm.layout])


def build_ours(shape: Shape) -> nn.Module:
    return UNet(
        shape.image_size, 3, shape.lowest_resolution_size, shape.dim_multiply, shape.attention_levels, shape.base_dim,
        norm_groups=shape.norm_groups,
    )  # fmt: skip


def build_diffusers(shape: Shape) -> nn.Module:
    """diffusers' U-Net with our architecture: to the parameter, and the same function (tests/test_unet.py)."""
    from diffusers import UNet2DModel

    kinds = ["Attn" if level in shape.attention_levels else "" for level in range(len(shape.dim_multiply))]
    return UNet2DModel(
        sample_size=shape.image_size, in_channels=3, out_channels=3, layers_per_block=2,
        block_out_channels=[shape.base_dim * multiplier for multiplier in shape.dim_multiply],
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        norm_num_groups=shape.norm_groups, norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        attention_head_dim=None,
    )  # fmt: skip


def build_lucidrains(shape: Shape) -> nn.Module:
    """lucidrains' U-Net of the same width and multipliers; blocks and attention are its own defaults, and others."""
    from denoising_diffusion_pytorch import Unet

    return Unet(dim=shape.base_dim, dim_mults=shape.dim_multiply)


def configure(arm: Arm, module: nn.Module, plain: bool = False) -> Network:
    """The network as the arm calls it; with `plain` eager and without recomputation, as its operations are counted."""
    recompute, compiled = ("none", False) if plain else (arm.recompute, arm.compiled)
    if arm.package == "ours":
        module.set_recompute(recompute)
    network = torch.compile(module) if compiled else module
    if arm.package != "diffusers":
        return network
    if recompute == "blocks":
        module.enable_gradient_checkpointing()
    else:
        module.disable_gradient_checkpointing()
    return lambda x_t, t: network(x_t, t, return_dict=False)[0]
