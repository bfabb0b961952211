"""Networks of diffusers."""

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

# Nothing of ours is of this shape: attention at the full resolution, but not in the bottleneck,
# other blocks and another activation, and t scales features.
OTHER = dict(
    sample_size=16,
    block_out_channels=[16, 32],
    down_block_types=["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
    up_block_types=["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
    norm_num_groups=4,
    resnet_time_scale_shift="scale_shift",
    layers_per_block=1,
    attention_head_dim=4,
    add_attention=False,
    time_embedding_dim=24,
    act_fn="gelu",
)
FEW = dict(num_train_timesteps=20, beta_start=0.001, beta_end=0.5)


def random_unet(fields=OTHER):
    """Return a network of diffusers in which no weight is as in a fresh one."""
    torch.manual_seed(0)
    unet = UNet2DModel(**fields).eval()
    for parameter in unet.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return unet


def write_pipeline(folder, unet=None, scheduler=None):
    """Write a pipeline, by default of OTHER and FEW; return its folder."""
    pipeline = DDPMPipeline(unet or random_unet(), scheduler or DDPMScheduler(**FEW))
    pipeline.save_pretrained(folder)
    return folder
