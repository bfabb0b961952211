"""DDPM on one page: Denoising Diffusion Probabilistic Models, Ho et al. 2020 (arXiv:2006.11239).

Noise is added to an image x_0 in T small steps, until hardly anything of the image is left. A
network learns to predict the noise eps in a noisy image x_t. Then it turns pure noise into an
image, step by step. The comments name the paper's equations, and the lines of its algorithms.

`python example.py` trains on emoji faces in 8 minutes on two CPU cores, and writes new ones to
example.png and its curve to example_loss.png. train.py does the same with checkpoints, mixed
precision, several GPUs and many options.
"""

import copy

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

from data.datasets import load_images
from data.pixels import to_model_range
from functions.optimizers import Muon
from models.unet import UNet

T = 250  # noising steps; the paper has 1000
STEPS = 1200  # optimiser steps
BATCH_SIZE = 16
LEARNING_RATE = 2e-3  # the highest: it rises over 5% of the steps, then falls to 0
EMA_DECAY = 0.995  # of the moving average of the weights, per step
NETWORK = {
    "image_size": 32,
    "channels": 3,
    "base_dim": 32,  # channels of the first level
    "dim_multiply": (1, 2, 4, 4),  # times base_dim: of four levels, of 32, 16, 8 and 4 pixels
    "lowest_resolution_size": 4,
    "transformer_layers": (2,),  # self-attention at 8 pixels; the bottleneck always has it
    "norm_groups": 8,
}

# Step t keeps sqrt(alpha_t) of the image, and adds noise of variance beta_t = 1 - alpha_t (Eq. 2).
# Betas rise linearly. The paper's are for 1000 steps; times 1000 / T, T steps add as much noise.
# In code t = 0 is the paper's t = 1. In float32, 1 - alpha_bar would lose digits.
beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T  # (T,)
alpha = 1 - beta
alpha_bar = alpha.cumprod(0)  # the product of alpha up to t: from about 1 to nearly 0, pure noise


def main() -> None:
    """Train a small network; draw its loss curve and a grid of its samples."""
    torch.manual_seed(0)
    pixels = load_images("emoji_people", NETWORK["image_size"]).images  # uint8 (N, 32, 32, 3)
    images = to_model_range(pixels)  # (N, 3, 32, 32) in [-1, 1]
    ema_model, losses = train(UNet(**NETWORK), images)

    x_T = torch.randn(36, *images.shape[1:])
    samples = sample(ema_model, x_T)
    enlarged = F.interpolate(samples, scale_factor=3)
    save_image(enlarged, "example.png", nrow=6, normalize=True, value_range=(-1, 1), pad_value=1)
    plt.semilogy(losses)
    plt.xlabel("step")
    plt.ylabel("loss")
    plt.savefig("example_loss.png")


def train(model: nn.Module, images: Tensor) -> tuple[nn.Module, list[float]]:
    """Run Algorithm 1 of the paper. Return the averaged network, and the loss of each step.

    model: any module (x_t, t) -> eps, on the CPU. images: any tensor (N, C, H, W) in [-1, 1].
    """
    ema_model = copy.deepcopy(model).requires_grad_(False).eval()
    # Why Muon? With the paper's Adam clear faces take about twice the time. It computes in float32.
    optimizer = Muon(model.parameters(), LEARNING_RATE, torch.float32)
    learning_rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, STEPS, pct_start=0.05, cycle_momentum=False
    )
    losses = []
    # Line 1: repeat.
    for _ in tqdm(range(STEPS), "training"):
        # Line 2: a batch of images x_0, half of them mirrored.
        x_0 = images[torch.randint(len(images), (BATCH_SIZE,))]
        mirrored = torch.rand(BATCH_SIZE, 1, 1, 1) < 0.5
        x_0 = torch.where(mirrored, x_0.flip(-1), x_0)
        # Line 3: a timestep for each image.
        t = torch.randint(T, (BATCH_SIZE,))
        # Line 4: noise.
        eps = torch.randn_like(x_0)
        # Line 5: a gradient step on the squared error of the noise that the network predicts. A
        # sum of Gaussians is Gaussian, so all steps up to x_t are made at once (Eq. 4).
        a = alpha_bar[t].view(-1, 1, 1, 1)
        x_t = (a.sqrt() * x_0 + (1 - a).sqrt() * eps).float()
        loss = F.mse_loss(model(x_t, t), eps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        learning_rate.step()
        losses.append(loss.item())
        # EMA: each batch moves the weights by some chance of its own. In a moving average of the
        # weights this cancels out, so the average makes better samples than the last weights.
        for average, weight in zip(ema_model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight.detach(), 1 - EMA_DECAY)
    # Line 6: until converged. Here it is a fixed number of steps.
    return ema_model, losses


@torch.no_grad()
def sample(model: nn.Module, x_T: Tensor) -> Tensor:
    """Run Algorithm 2, from any noise x_T (B, C, H, W), by any module such as `train` takes."""
    # Line 1: pure noise, which the caller draws.
    x_t = x_T
    # Line 2: for each timestep, from the last to the first.
    for t in tqdm(range(T - 1, -1, -1), "sampling"):
        # Line 3: fresh noise. Without it, the states would have less noise than in training.
        z = torch.randn_like(x_t)
        # Line 4: the network predicts the noise in x_t. Eq. 4, solved for x_0, gives the image
        # (Eq. 15). It is clipped to the range of images, because later steps would build on what is
        # outside of it. (The paper inserts Eq. 15 into Eq. 7, which leaves no x_0 to clip.)
        eps = model(x_t, torch.full((len(x_t),), t))
        x_0 = (x_t - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        x_0 = x_0.clamp(-1, 1)
        # If x_0 were known, x_{t-1} would be Gaussian, with this mean and variance (Eq. 7). The
        # last step leads to the clean image, where alpha_bar is 1: mean x_0, variance 0.
        previous = alpha_bar[t - 1] if t > 0 else torch.tensor(1.0)
        x_0_weight = previous.sqrt() * beta[t] / (1 - alpha_bar[t])
        x_t_weight = alpha[t].sqrt() * (1 - previous) / (1 - alpha_bar[t])
        mean = x_0_weight * x_0 + x_t_weight * x_t
        variance = (1 - previous) / (1 - alpha_bar[t]) * beta[t]
        # At high t the best x_0 is only a blurred average of all images that fit x_t, because the
        # average has the smallest squared error. It may take the place of the true one: x_{t-1} is
        # a mixture of such Gaussians, one for each image that fits. The mean is linear in x_0, so
        # the mixture's is exactly that at the average image. If the step is small, the mixture is
        # nearly Gaussian, with this variance. Then x_0 is estimated again.
        x_t = mean + variance.sqrt() * z
    # Lines 5 and 6: the loop ends with the images x_0.
    return x_t


if __name__ == "__main__":
    main()
