"""Networks of diffusers, as its own training makes them."""

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


def trained(fields, scheduler):
    """Return a network of diffusers after three steps as in its training script."""
    torch.manual_seed(0)
    unet = UNet2DModel(**fields)
    size, channels = unet.config.sample_size, unet.config.in_channels
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    for _ in range(3):
        x_0 = (2 * torch.rand(4, channels, 1, 1) - 1).expand(-1, -1, size, size)
        noise = torch.randn_like(x_0)
        t = torch.randint(scheduler.config.num_train_timesteps, (4,))
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(x_0, noise, t)
        output = unet(scheduler.add_noise(x_0, noise, t), t).sample
        (output - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return unet.eval()


def write_pipeline(folder, unet=None, scheduler=None):
    """Write a pipeline, by default of OTHER and FEW; return its folder."""
    scheduler = scheduler or DDPMScheduler(**FEW)
    DDPMPipeline(unet or trained(OTHER, scheduler), scheduler).save_pretrained(folder)
    return folder
