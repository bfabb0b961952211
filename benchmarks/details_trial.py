"""Trial: a network that is given the small image, and draws the details of twice its size.

    PYTHONPATH=. python benchmarks/details_trial.py NAME DATA.zip --minutes 105 --lr 4e-3 --ema 0.999

NAME is grid-64-122-16 (it works at the small size; width, multipliers, norm groups), full-... (at
the full size) or init64 (the weights of pretrained/ffhq-64 with three more channels, and v). It
prints the errors of details of photos 3600 to 3679 at log-SNR -1.4, 0, 1, 2, 3 and 4.
"""

import argparse, io, json, math, os, time, zipfile, copy
import numpy as np, torch, torch.nn.functional as F
from torch import nn
from PIL import Image
from functions.enlarging import shrinking
from functions.noise_scheduler import NoiseScheduler
from functions.optimizers import muon, Adam
from models.unet import UNet

torch.set_num_threads(1)
SIGMA_D = 0.07
CACHE = "out/ffhq128.npy"


def photos(path=None):
    if not os.path.exists(CACHE):
        z = zipfile.ZipFile(path)
        names = sorted(n for n in z.namelist() if n.endswith(".jpg"))
        a = np.stack([np.asarray(Image.open(io.BytesIO(z.read(n))).convert("RGB")) for n in names])
        np.save(CACHE, a)
    return np.load(CACHE, mmap_mode="r")


MATS = {}


def mats(size):
    if size not in MATS:
        s = shrinking(size)
        p = torch.linalg.pinv(s)
        MATS[size] = s.float(), p.float()
    return MATS[size]


def shrink(x):
    s, _ = mats(x.shape[-1] // 2)
    return s @ x @ s.mT


def stretch(x):
    _, p = mats(x.shape[-1])
    return p @ x @ p.mT


def details(x):
    return x - stretch(shrink(x))


class Residual(nn.Module):
    """Returns F with x_0 = up + c_skip r + c_out F; r = x_t / a - up."""

    def __init__(self, net, grid, sigma_d=SIGMA_D):
        super().__init__()
        self.net, self.grid, self.sigma_d = net, grid, sigma_d

    def coefficients(self, sigma):
        d = self.sigma_d
        q = sigma**2 + d**2
        return d**2 / q, sigma * d / q.sqrt(), q.rsqrt()

    def forward(self, x_t, a, s, t, low):
        """x_t (B,3,2S,2S), low (B,3,S,S). Returns F (B,3,2S,2S), and x_0."""
        sh = (-1, 1, 1, 1)
        sigma = (s / a).view(sh)
        skip, out, cin = self.coefficients(sigma)
        up = stretch(low)
        r = x_t / a.view(sh) - up
        if self.grid:  # work at the small size
            x = torch.cat([F.pixel_unshuffle(r * cin, 2), F.pixel_unshuffle(up, 2)], 1)
            f = F.pixel_shuffle(self.net(x, t), 2)
        else:
            f = self.net(torch.cat([r * cin, up], 1), t)
        f = f.float()
        return f, up + skip * r + out * f


class VNet(nn.Module):
    """The issue's: six channels in, v out."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x_t, a, s, t, low):
        sh = (-1, 1, 1, 1)
        v = self.net(torch.cat([x_t, stretch(low)], 1), t).float()
        return v, a.view(sh) * x_t - s.view(sh) * v


def widened(net, c_in, c_out):
    """UNet with other numbers of channels in and out."""
    base = net.conv_in.out_channels
    net.conv_in = nn.Conv2d(c_in, base, 3, padding=1)
    nn.init.xavier_uniform_(net.conv_in.weight)
    nn.init.zeros_(net.conv_in.bias)
    old = net.conv_out
    net.conv_out = nn.Conv2d(old.in_channels, c_out, 3, padding=1)
    nn.init.zeros_(net.conv_out.weight)
    nn.init.zeros_(net.conv_out.bias)
    return net


def make(name):
    torch.manual_seed(0)
    if name == "init64":
        from functions.saved.loading import load_denoiser

        net = load_denoiser("pretrained/ffhq-64.safetensors").network.requires_grad_(True).train()
        w = net.conv_in.weight.data
        conv = nn.Conv2d(6, w.shape[0], 3, padding=1)
        conv.weight.data = torch.cat([w, torch.zeros_like(w)], 1)
        conv.bias.data = net.conv_in.bias.data
        net.conv_in = conv
        return VNet(net)
    kind, base, mult, groups = name.split("-")
    mult = [int(m) for m in mult]
    size = 32 if kind == "grid" else 64
    net = UNet(size, 3, size // 2 ** (len(mult) - 1), mult, (), int(base), norm_groups=int(groups))
    net = widened(net, 24, 12) if kind == "grid" else widened(net, 6, 3)
    return Residual(net, kind == "grid")


scheduler = NoiseScheduler(1000, beta_schedule="cosine")
A = scheduler.alphas_cumprod.float()
LOGSNR = torch.logit(scheduler.alphas_cumprod)


def t_of(lam):
    return (LOGSNR - lam).abs().argmin().item()


def batch_of(data, rng, n, size=64):
    """n images (n,3,64,64) in [-1,1]: half crops, half shrunk."""
    idx = rng.integers(0, 3600, n)
    x = torch.from_numpy(np.stack([data[i] for i in idx])).permute(0, 3, 1, 2).float() / 127.5 - 1
    flip = torch.from_numpy(rng.random(n) < 0.5)
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    half = n // 2
    crops = []
    for k in range(half):
        i, j = 8 * rng.integers(0, 9, 2)
        crops.append(x[k, :, i : i + 64, j : j + 64])
    whole = shrink(x[half:]).clamp(-1, 1)
    return torch.cat([torch.stack(crops), whole])


@torch.no_grad()
def errors(model, data, which=128, lams=(-1.4, 0, 1, 2, 3, 4), ids=range(3600, 3680), bf16=True):
    x = torch.from_numpy(np.stack([data[i] for i in ids])).permute(0, 3, 1, 2).float() / 127.5 - 1
    if which == 64:
        x = shrink(x).clamp(-1, 1)
    low = shrink(x)
    out = []
    g = torch.Generator().manual_seed(5)
    noise = torch.randn(x.shape, generator=g)
    for lam in lams:
        t = t_of(lam)
        a, s = A[t].sqrt(), (1 - A[t]).sqrt()
        e = 0.0
        for k in range(0, len(x), 16):
            xb = x[k : k + 16]
            n = len(xb)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                _, x0 = model(
                    a * xb + s * noise[k : k + 16],
                    a.expand(n),
                    s.expand(n),
                    torch.full((n,), t),
                    low[k : k + 16],
                )
            e += details(x0.float() - xb).square().mean((1, 2, 3)).sum().item()
        out.append(math.sqrt(e / len(x)))
    return out


def restore(opt, saved):
    with torch.no_grad():
        for i, p in enumerate(opt.param_groups[0]["params"]):
            for k, v in saved["state"].get(i, {}).items():
                opt.state[p][k].copy_(v)


def train(a):
    os.makedirs("out", exist_ok=True)
    data = photos(a.data)
    model = make(a.name).to(memory_format=torch.channels_last)
    params = sum(p.numel() for p in model.parameters())
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    start_step, spent = 0, 0.0
    rng = np.random.default_rng(0)
    opt = Adam(model.parameters(), a.lr) if a.adam else muon(model, a.lr, torch.bfloat16)
    path = f"out/{a.tag or a.name}.pt"
    log = open(f"out/{a.tag or a.name}.log", "a")
    if os.path.exists(path):
        z = torch.load(path, weights_only=False)
        model.load_state_dict(z["model"])
        ema.load_state_dict(z["ema"])
        restore(opt, z["opt"])
        start_step, spent = z["step"], z["spent"]
        rng = np.random.default_rng([1, start_step])
        torch.manual_seed(start_step)
        print("resumed at", start_step, spent, file=log, flush=True)
    total = a.minutes * 60
    step, last, saved = start_step, time.process_time(), time.time()
    hi_t = t_of(-1.41)
    losses = []
    while spent < total and (not a.steps or step < a.steps):
        frac = spent / total
        lr = a.lr * min(1, (step + 1) / a.warmup) * 0.5 * (1 + math.cos(math.pi * frac))
        for g in opt.param_groups:
            g["lr"] = lr
        x = batch_of(data, rng, a.batch)
        low = shrink(x)
        n = len(x)
        u = torch.from_numpy(rng.random((3, n))).float()
        # conditioning augmentation
        std = torch.where(u[0] < 0.5, u[1] * 0.06, 0.0)
        low_in = low + std[:, None, None, None] * torch.randn(low.shape)
        low_in = torch.where((u[2] < 0.1)[:, None, None, None], 0.0, low_in)
        if a.uniform:
            t = torch.from_numpy(rng.integers(0, hi_t + 1, n))
        else:
            lam = torch.from_numpy(
                np.where(rng.random(n) < 0.25, rng.uniform(-1.45, 1.0, n), rng.uniform(1.0, 6.5, n))
            )
            t = (LOGSNR[None] - lam[:, None]).abs().argmin(1)
        al = A[t]
        ca, cs = al.sqrt(), (1 - al).sqrt()
        sh = (-1, 1, 1, 1)
        x_t = ca.view(sh) * x + cs.view(sh) * torch.randn(x.shape)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            f, x0 = model(x_t, ca, cs, t, low_in)
        d = details(x0 - x)
        if isinstance(model, Residual):
            _, out, _ = model.coefficients((cs / ca).view(sh))
            loss = (d / out).square().mean() + a.plain * ((x0 - x) / out).clamp(
                -3, 3
            ).square().mean()
        else:
            loss = (d / cs.view(sh)).square().mean() + 0.1 * (
                (x0 - x) / cs.view(sh)
            ).square().mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        decay = min(a.ema, (1 + step) / (10 + step)) if a.name != "init64" else a.ema
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        step += 1
        now = time.process_time()
        spent += now - last
        last = now
        if step % 25 == 0 and a.verbose or step % 250 == 0:
            print(
                f"{step} {np.mean(losses[-100:]):.4f} lr {lr:.2g} spent {spent / 60:.1f} min",
                file=log,
                flush=True,
            )
        if step % a.check == 0:
            e = errors(ema, data)
            e64 = errors(ema, data, 64)
            print(
                f"step {step} spent {spent / 60:.1f} 128: {' '.join(f'{v:.4f}' for v in e)}  64: {' '.join(f'{v:.4f}' for v in e64)}",
                file=log,
                flush=True,
            )
            last = time.process_time()
        if time.time() - saved > 120 or os.path.exists("out/stop"):
            torch.save(
                dict(
                    model=model.state_dict(),
                    ema=ema.state_dict(),
                    opt=opt.state_dict(),
                    step=step,
                    spent=spent,
                ),
                path + "~",
            )
            os.replace(path + "~", path)
            saved = time.time()
            while os.path.exists("out/stop"):
                time.sleep(1)
            last = time.process_time()
    torch.save(
        dict(
            model=model.state_dict(),
            ema=ema.state_dict(),
            opt=opt.state_dict(),
            step=step,
            spent=spent,
        ),
        path,
    )
    e = errors(ema, data)
    e64 = errors(ema, data, 64)
    print(
        f"END step {step} spent {spent / 60:.1f} params {params} 128: {' '.join(f'{v:.4f}' for v in e)}  64: {' '.join(f'{v:.4f}' for v in e64)}",
        file=log,
        flush=True,
    )


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("name")
    p.add_argument("data")
    p.add_argument("--minutes", type=float, default=10)
    p.add_argument("--steps", type=int, default=0)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--adam", action="store_true")
    p.add_argument("--warmup", type=int, default=100)
    p.add_argument("--ema", type=float, default=0.998)
    p.add_argument("--check", type=int, default=1000)
    p.add_argument("--uniform", action="store_true")
    p.add_argument("--plain", type=float, default=0.0)
    p.add_argument("--verbose", action="store_true")
    p.add_argument("--tag", default="")
    train(p.parse_args())
