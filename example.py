"""DDPM on one page: Denoising Diffusion Probabilistic Models, Ho et al. 2020 (arXiv:2006.11239).

Noise is added to an image x_0 in T small steps, until hardly anything of the image is left. After
t steps it is called x_t. A network learns to predict the noise eps in x_t. With its predictions,
pure noise is turned into a new image, step by step. The comments name the paper's equations, and
README.md explains them.

    python example.py           trains on the emoji people in data/: 10 to 20 minutes on two cores
    python example.py FOLDER    trains on the images in a folder, of any size

Either writes new images to example.png, and the curve of the loss to example_loss.png. This file
imports no other file of the repository, so it can be copied and changed. train.py and sample.py do
this with the paper's network, checkpoints, mixed precision, several GPUs and many options.
"""

import copy
import math
import sys
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

SIZE = 32  # height and width of the images
DIMS = (32, 64, 128, 256)  # channels of the network at 32, 16, 8 and 4 pixels
TIME_DIM = 128  # channels of the embedded timestep
STEPS = 3000  # optimiser steps
BATCH_SIZE = 16
LEARNING_RATE = 1e-3  # at its peak: it rises for 5% of the steps, and then falls to 0
EMA_DECAY = 0.995  # of the moving average of the weights, per step

# Step t multiplies the image by sqrt(alpha), and adds noise of variance beta = 1 - alpha (Eq. 2).
# The paper has T = 1000, and betas from 1e-4 to 0.02. With 250 steps sampling takes a quarter of
# the time, and steps are still small (the comment above `sample` says why they must be). The betas
# are four times as large, so all steps together add as much noise as the paper's. beta[t] is that
# of step t, which leads from t - 1 to t.
T = 250
beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
beta = F.pad(beta, (1, 0))  # t = 0 is the clean image
alpha = 1 - beta
# The share of the image's variance that is left in x_t. It falls from 1 to nearly 0, where x_t is
# pure noise. It is float64, because 1 - alpha_bar would lose digits in float32; the network's
# input becomes float32 again.
alpha_bar = alpha.cumprod(0)


def loss_of(model, x_0):
    """Add noise to images x_0 (B, C, H, W), and return the loss of the network's prediction.

    Eq. 4 takes all t steps at once: their noises add up to one Gaussian noise.
    """
    t = torch.randint(1, T + 1, (len(x_0),))
    eps = torch.randn_like(x_0)
    a = alpha_bar[t].view(-1, 1, 1, 1)
    x_t = (a.sqrt() * x_0 + (1 - a).sqrt() * eps).float()  # Eq. 4
    return F.mse_loss(model(x_t, t), eps)  # Eq. 14


# Sampling goes the other way, from x_T, which is pure noise, to x_{T-1}, and on to x_0. The
# predicted noise in x_t gives an estimate x_0_hat of the image: Eq. 4, solved for x_0.
#
# Why may a step use x_0_hat? It is no image yet. The squared error is smallest for the average, so
# the network learns the average noise, and x_0_hat is the average of all images that could have
# become this x_t: a blur. If it were the image, x_{t-1} would be Gaussian, with the mean and the
# variance of Eq. 7. In fact x_{t-1} is a mixture of such Gaussians, one for each of these images.
# The mean of the mixture is exactly that of Eq. 7 with x_0_hat. In any direction the centres of the
# Gaussians spread by the order of beta, and each Gaussian is about sqrt(beta) wide. If beta is
# small, the width is far larger than the spread. So the mixture is nearly one Gaussian, with the
# variance of Eq. 7 (docs/why-sampling-works.md derives it). With the fresh noise, x_{t-1} is as
# noisy as in training, so the network knows such images. It predicts again, and there is a little
# less noise to predict.


@torch.no_grad()
def sample(model, x_t):
    """Turn pure noise x_t (B, C, H, W), at t = T, into images, at t = 0."""
    for t in range(T, 0, -1):
        a, a_before = alpha_bar[t], alpha_bar[t - 1]
        eps = model(x_t, torch.full((len(x_t),), t))
        x_0_hat = (x_t - (1 - a).sqrt() * eps) / a.sqrt()  # Eq. 15
        x_0_hat = x_0_hat.clamp(-1, 1)  # as images are
        # Eq. 7: where x_{t-1} would be if x_0_hat were the image. At t = 1 the variance is 0.
        mean = a_before.sqrt() * beta[t] * x_0_hat + alpha[t].sqrt() * (1 - a_before) * x_t
        mean = mean / (1 - a)
        variance = (1 - a_before) / (1 - a) * beta[t]
        x_t = mean + variance.sqrt() * torch.randn_like(x_t)
    return x_t


class Block(nn.Module):
    """Two convolutions, with the timestep added in between, beside a shortcut."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.first = norm_and_convolution(dim_in, dim_out)
        self.time = nn.Linear(TIME_DIM, dim_out)
        self.second = norm_and_convolution(dim_out, dim_out)
        self.shortcut = nn.Conv2d(dim_in, dim_out, 1)

    def forward(self, x, time):  # (B, dim_in, H, W), (B, TIME_DIM) -> (B, dim_out, H, W)
        h = self.first(x) + self.time(time)[:, :, None, None]
        return self.second(h) + self.shortcut(x)


def norm_and_convolution(dim_in, dim_out):
    """Return a norm, an activation and a convolution: the network consists of these."""
    convolution = nn.Conv2d(dim_in, dim_out, 3, padding=1)
    return nn.Sequential(nn.GroupNorm(8, dim_in), nn.SiLU(), convolution)


class UNet(nn.Module):
    """Predict the noise in x_t (B, 3, SIZE, SIZE) at timesteps t (B,).

    On the way down each block but the first works at half the size of the one before. On the way up
    the size doubles again. There each block also gets the output of the block that had its size on
    the way down, the skip. The paper's network is larger, and also has attention.
    """

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(TIME_DIM, TIME_DIM), nn.SiLU())
        self.first = nn.Conv2d(3, DIMS[0], 3, padding=1)
        # The channels after `first`, after each block on the way down, and after `middle`:
        # 32, 32, 64, 128, 256, 256.
        widths = (DIMS[0], *DIMS, DIMS[-1])
        self.down = nn.ModuleList(Block(widths[i], widths[i + 1]) for i in range(len(DIMS)))
        self.middle = Block(DIMS[-1], DIMS[-1])
        # These are listed from large images to small ones, too, and run in reverse: block i runs
        # after block i + 1, the last one after `middle`. It gets the widths[i + 2] channels of
        # that, and dim channels from the skip.
        self.up = nn.ModuleList(Block(widths[i + 2] + dim, dim) for i, dim in enumerate(DIMS))
        self.last = norm_and_convolution(DIMS[0], 3)

    def forward(self, x_t, t):
        # The network gets t as sines and cosines of many frequencies, from 1 to 1 / 10,000.
        frequencies = torch.exp(-math.log(10_000) * torch.linspace(0, 1, TIME_DIM // 2))
        angles = t[:, None] * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))

        h = self.first(x_t)
        skips = []
        for block in self.down:
            h = block(F.avg_pool2d(h, 2) if skips else h, time)
            skips.append(h)
        h = self.middle(h, time)
        for block, skip in zip(reversed(self.up), reversed(skips), strict=True):
            h = F.interpolate(h, skip.shape[2:])
            h = block(torch.cat([h, skip], dim=1), time)
        return self.last(h)


def train(model, images):
    """Run the loop of training. Return the averaged network (EMA), and each step's loss.

    model: any module (x_t, t) -> eps, on the CPU. images: any tensor (N, C, H, W) in [-1, 1].
    """
    ema_model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    learning_rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, STEPS, pct_start=0.05, cycle_momentum=False
    )
    losses = []
    for _ in tqdm(range(STEPS), "training"):
        x_0 = images[torch.randint(len(images), (BATCH_SIZE,))]
        loss = loss_of(model, x_0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning_rate.step()
        losses.append(loss.item())
        # EMA, the exponential moving average of the weights: batches are random, so the weights
        # jitter, and their average draws better images than the last ones.
        with torch.no_grad():
            for average, weight in zip(ema_model.parameters(), model.parameters(), strict=True):
                average.lerp_(weight, 1 - EMA_DECAY)
    return ema_model, losses


def load_images(folder=None):
    """Return a folder's images, or the emoji people, each also mirrored: (N, 3, SIZE, SIZE)."""
    if folder:
        files = Path(folder).iterdir()
    else:
        emoji = zipfile.Path(Path(__file__).parent / "data" / "emoji_faces.zip")
        files = [file for file in emoji.iterdir() if file.name.startswith("people")]
    images = []
    for file in files:
        if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            with file.open("rb") as stream:
                # Cameras may save a photo on its side, with a note on how to turn it.
                image = ImageOps.exif_transpose(Image.open(stream)).convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image).convert("RGB")
            images.append(np.array(ImageOps.fit(image, (SIZE, SIZE))))
    if not images:
        sys.exit(f"{folder} has no images")
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1  # in [-1, 1]
    return torch.cat([images, images.flip(-1)])


def main():
    """Train a network; draw the curve of its loss, and a grid of 6 x 6 samples."""
    torch.manual_seed(0)
    images = load_images(*sys.argv[1:])
    ema_model, losses = train(UNet(), images)
    plt.semilogy(losses)
    plt.xlabel("step")
    plt.ylabel("loss")
    plt.savefig("example_loss.png")

    print(f"sampling 36 images in {T} steps, which takes a minute")
    samples = sample(ema_model, torch.randn(36, 3, SIZE, SIZE))
    # In rows of 6, three times as large: (6, 6, 3, H, W) -> (6 H, 6 W, 3).
    samples = F.interpolate(samples, scale_factor=3).unflatten(0, (6, 6)) / 2 + 0.5
    grid = samples.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    plt.imsave("example.png", grid.clamp(0, 1).numpy())


if __name__ == "__main__":
    main()
