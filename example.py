"""DDPM on one page; the betas, Eqs. 4, 7 and 15 and the network are imported.

Denoising Diffusion Probabilistic Models, Ho et al. 2020 (arXiv:2006.11239). Noise is added to an
image x_0 in T small steps, until hardly anything of the image is left. A network learns to predict
the noise eps in a noisy image x_t. Then it turns pure noise into an image, step by step. The
comments name the lines of the paper's Algorithms 1 and 2.

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
from functions.noise_scheduler import NoiseScheduler
from functions.optimizers import Muon
from models.unet import UNet

T = 250  # noising steps; the paper has 1000
STEPS = 1200  # optimiser steps
BATCH_SIZE = 16
LEARNING_RATE = 2e-3  # the highest; `train` has its schedule
EMA_DECAY = 0.995  # of the moving average of the weights, per step
NETWORK = {
    "image_size": 32,
    "channels": 3,
    "base_dim": 32,  # channels of the first level
    "dim_multiply": (1, 2, 4, 4),  # times base_dim: of four levels, of 32, 16, 8 and 4 pixels
    "lowest_resolution_size": 4,
    "transformer_layers": (2,),  # self-attention at level 2, counted from 0, of 8 pixels
    "norm_groups": 8,
}


def main() -> None:
    """Train a small network; draw its loss curve and a grid of its samples."""
    torch.manual_seed(0)
    pixels = load_images("emoji_people", NETWORK["image_size"]).images  # uint8 (N, 32, 32, 3)
    images = to_model_range(pixels)  # (N, 3, 32, 32) in [-1, 1]
    # beta, the variance of the noise of a step, rises linearly. It is the paper's, times 1000 / T,
    # so that x_T is pure noise. alpha is 1 - beta, and alpha_bar, the product of alpha up to a
    # timestep, falls from 1 to 0.
    scheduler = NoiseScheduler(T)
    model = UNet(**NETWORK)
    ema_model, losses = train(model, scheduler, images)

    x_T = torch.randn(36, *images.shape[1:])
    samples = sample(ema_model, scheduler, x_T)
    enlarged = F.interpolate(samples, scale_factor=3)
    save_image(enlarged, "example.png", nrow=6, normalize=True, value_range=(-1, 1), pad_value=1)
    plt.semilogy(losses)
    plt.xlabel("step")
    plt.ylabel("loss")
    plt.savefig("example_loss.png")


def train(
    model: nn.Module, scheduler: NoiseScheduler, images: Tensor
) -> tuple[nn.Module, list[float]]:
    """Run Algorithm 1 of the paper. Return the averaged network, and the loss of each step."""
    ema_model = copy.deepcopy(model).requires_grad_(False)
    # Muon replaces the paper's Adam, which needs about twice the time for clear faces. Its
    # third argument is the precision in which it orthogonalises the momentum of a weight matrix.
    optimizer = Muon(model.parameters(), LEARNING_RATE, torch.float32)
    # The learning rate rises over the first 5% of the steps, and then falls to 0.
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
        # Line 3: a timestep for each image; t = 0 is the paper's t = 1.
        t = torch.randint(scheduler.timesteps, (BATCH_SIZE,))
        # Line 4: noise.
        eps = torch.randn_like(x_0)
        # Line 5: a gradient step on the squared error of the noise that the network predicts. No
        # steps of noise are simulated, because x_t follows from x_0 directly (Eq. 4):
        # x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps.
        x_t = scheduler.q_sample(x_0, t, eps)
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
def sample(model: nn.Module, scheduler: NoiseScheduler, x_T: Tensor) -> Tensor:
    """Run Algorithm 2 of the paper, from noise x_T (B, C, H, W) to images in [-1, 1]."""
    # Line 1: pure noise, which the caller draws.
    x_t = x_T
    # Line 2: for each timestep, from the last to the first.
    for t in tqdm(range(scheduler.timesteps - 1, -1, -1), "sampling"):
        # Line 3: fresh noise. Without it, the states would have less noise than in training.
        z = torch.randn_like(x_t)
        # Line 4: the network predicts the noise in x_t. Eq. 4, solved for x_0, gives the image:
        # x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar) (Eq. 15). It is clipped to the
        # range of images, because later steps would build on what is outside of it.
        eps = model(x_t, torch.full((len(x_t),), t))
        x_0 = scheduler.predict_x_0(x_t, t, eps).clamp(-1, 1)
        # If x_0 and x_t were known, x_{t-1} would be Gaussian (Eq. 7). With a = alpha_bar_t and
        # b = alpha_bar_{t-1},
        # mean = (sqrt(b) beta_t x_0 + sqrt(alpha_t) (1 - b) x_t) / (1 - a),
        # variance = (1 - b) / (1 - a) beta_t.
        # For large t our x_0 is only a blurred average of all images that fit x_t, because the
        # average has the smallest squared error. It may take the place of the true one: x_{t-1} is
        # a mixture of such Gaussians, one for each image that fits. The mean is linear in x_0, so
        # the mean of the mixture is exactly that at the average image. If the step is small, the
        # mixture is nearly Gaussian, with this variance. Then x_0 is estimated again. The paper's
        # line 4 is the same with Eq. 15 inserted, where x_0 cannot be clipped. t - 1 = -1 means the
        # clean image: in the last step the mean is x_0, and the variance is 0.
        mean, variance = scheduler.q_posterior(x_0, x_t, t, t - 1)
        x_t = mean + variance**0.5 * z
    # Lines 5 and 6: the loop ends with the image x_0.
    return x_t


if __name__ == "__main__":
    main()
