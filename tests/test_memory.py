"""The memory estimate: what is kept for backward, counted by hand for a small network, and a real training's peak."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import train
from functions.noise_scheduler import NoiseScheduler
from functions.support.errors import UserError
from functions.training.memory import smaller_batch, training_memory, weights_must_fit
from functions.training.pass_memory import kept_for_backward, peak_of_a_pass
from models.unet import UNet
from tests.conftest import TINY, call

CPU = torch.device("cpu")


class Square(nn.Module):
    """(w x)^2: backward needs x (3 x 8 x 8 float32), w x, and nothing else of this size."""

    def __init__(self):
        super().__init__()
        self.channels, self.image_size = 3, 8
        self.weight = nn.Parameter(torch.ones(3, 8, 8))

    def forward(self, x_t, t):
        return (self.weight * x_t).square()


def test_what_is_kept_is_counted_exactly():
    image = 3 * 8 * 8 * 4
    # The model keeps x_t and w x_t; the loss keeps eps - noise. All are (B, 3, 8, 8).
    per_image = [kept_for_backward(Square(), NoiseScheduler(1000), b, torch.float32, CPU) for b in (1, 2, 3)]
    assert per_image[1] - per_image[0] == per_image[2] - per_image[1] == 3 * image


class Exponential(nn.Module):
    """e = exp(w x): backward needs x and e."""

    def __init__(self):
        super().__init__()
        self.channels, self.image_size = 3, 8
        self.weight = nn.Parameter(torch.ones(3, 8, 8))

    def forward(self, x_t, t):
        return (self.weight * x_t).exp()


def test_the_peak_of_a_pass_is_counted_by_hand():
    """At most seven images: x_t, e and d = e - noise, kept; and for the square's gradient that of the mean, d^1, 2 d^1,
    and their product.
    """
    image = 3 * 8 * 8 * 4
    peaks = [peak_of_a_pass(Exponential(), NoiseScheduler(1000), b, torch.float32, CPU) for b in (2, 3, 4)]
    assert peaks[1] - peaks[0] == peaks[2] - peaks[1]
    assert peaks[1] - peaks[0] == pytest.approx(7 * image, abs=100)


def test_the_parts_add_up():
    model = UNet(16, 3, 8, [1, 2], [1], 8, norm_groups=2)
    weights = 4 * sum(p.numel() for p in model.parameters())
    estimate = training_memory(model, NoiseScheduler(1000), 16, 4, True, torch.float32, CPU, baseline=1000)
    parts = estimate(4)
    assert parts["weights"] == parts["gradients"] == parts["EMA"] == parts["Adam"] / 2 == weights
    assert parts["Python and PyTorch"] == 1000
    four = peak_of_a_pass(model, NoiseScheduler(1000), 4, torch.float32, CPU)
    assert parts["passes"] == four
    assert all(
        estimate(images)["passes"] >= peak_of_a_pass(model, NoiseScheduler(1000), images, torch.float32, CPU)
        for images in (1, 2, 3)
    )


PEAK = """
import sys
from functions.training.memory import STATUS, kilobytes
from tests.conftest import call
import train
call(train.main, *sys.argv[1:])
print("peak", kilobytes(STATUS)["VmHWM"])
"""


def test_the_advice_is_the_largest_batch_that_fits_and_keeps_the_effective_one():
    estimate = lambda batch_size: {"weights": 10, "activations": batch_size}
    text = smaller_batch(estimate, 5, 12, 18)  # a process's largest pass need not divide the effective batch
    assert "--diffusion.batch-size 4 --diffusion.gradient-accumulation 3" in text
    assert "Even batch_size = 1" in smaller_batch(estimate, 5, 12, 10)


def test_weights_that_do_not_fit_are_one_sentence():
    with pytest.raises(UserError, match="out of memory for weights"), weights_must_fit():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_estimate_is_within_20_percent_of_a_real_peak(pictures, tmp_path):
    """A network large enough that its own memory counts, trained for a step in a process of its own."""
    flags = ["faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY, "--model.image-size", "64",
             "--model.lowest-resolution-size", "16", "--model.dim-multiply", "1,2,4", "--model.base-dim", "48",
             "--model.norm-groups", "8", "--diffusion.batch-size", "12", "--diffusion.epochs", "1",
             "--diffusion.grid-images", "1", "--diffusion.grid-steps", "1", "--diffusion.validation-samples", "1",
             "--diffusion.validate-every", "1000", "--diffusion.checkpoint-every", "1000"]  # fmt: skip
    outputs = []
    for extra in (["--dry-run"], []):
        command = [sys.executable, "-c", PEAK, *map(str, flags), *extra]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    estimate = float(outputs[0].split("about ")[1].split(" GB")[0])
    peak = int(outputs[1].split("peak ")[1]) / 1e9
    assert peak > 1
    assert estimate == pytest.approx(peak, rel=0.2)


@pytest.mark.parametrize("name", ["ffhq-run1", "ffhq-run2", "ffhq-full"])
def test_the_ffhq_runs_are_ready_at_their_real_size(name, pictures, tmp_path, capsys):
    """Real network and config on few pictures; the batch fits 45 of them."""
    call(train.main, name, "--dry-run", "--runs", tmp_path, "--diffusion.dataset-name", pictures, "--device", "cpu",
         "--diffusion.gradient-accumulation", "2")  # fmt: skip
    printed = capsys.readouterr().out
    parameters = {"ffhq-run1": "60,372,867", "ffhq-run2": "60,372,867", "ffhq-full": "241,348,355"}[name]
    assert f"{parameters} parameters" in printed
    assert ("x_T still carries the image" in printed) == (name == "ffhq-run1")
    assert "1 steps" in printed


def test_a_dry_run_says_everything_and_starts_nothing(pictures, tmp_path, capsys):
    call(train.main, "ffhq-full", "--dry-run", "--runs", tmp_path / "runs", "--diffusion.dataset-name", pictures, *TINY)
    printed = capsys.readouterr().out
    for part in (
        "50 images at 16x16",
        "45 images train, 5 validate",
        "10 steps of 8 images: 2 epochs of 5 steps",
        "parameters",
        "terminal SNR",
        "memory     about",
        "goes to",
    ):
        assert part in printed  # fmt: skip
    assert not (tmp_path / "runs").exists()
