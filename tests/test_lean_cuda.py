"""The fast U-Net on CUDA: the plain one's numbers, and as much memory as is counted. Needs a GPU."""

import pytest
import torch
from torch.testing import assert_close

from functions.device import autocast
from functions.losses import noise_prediction_loss
from functions.noise_scheduler import NoiseScheduler
from functions.pass_memory import kept_for_backward
from tests.plain_unet import PlainUNet
from tests.test_lean_unet import CUDA, MODES, network, output_and_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_the_plain_network(compiled, dtype):
    """In half precision against the plain one's own error."""
    net = network().to(CUDA)
    plain = lambda dtype: {
        name.removeprefix("net."): value for name, value in output_and_gradients(PlainUNet(net), dtype, CUDA).items()
    }
    truth, theirs = plain(torch.float32), plain(dtype)
    net.set_execution("norms", compiled)
    ours = output_and_gradients(net, dtype, CUDA)
    if dtype == torch.float32:
        for name, value in ours.items():
            assert_close(value, truth[name], rtol=2e-2, atol=1e-3)  # tf32 convolutions
        return
    error = lambda found: sum(((found[n] - truth[n]).norm() / truth[n].norm()).item() for n in truth) / len(truth)
    assert error(ours) < 1.2 * error(theirs)


def test_all_sizes_compile():
    network().to(CUDA).check_compiled(CUDA, torch.bfloat16)


@pytest.mark.parametrize("mode", MODES)
def test_on_cuda_as_much_is_kept_as_is_counted(mode):
    net, scheduler = network(size=128).to(CUDA), NoiseScheduler(1000).to(CUDA)
    net.set_execution(mode)

    def allocated(images):
        x_0, noise = (torch.randn(images, 3, 128, 128, device=CUDA) for _ in range(2))
        t = torch.zeros(images, dtype=torch.int64, device=CUDA)
        before = torch.cuda.memory_allocated()
        with autocast(CUDA, torch.bfloat16):
            loss = noise_prediction_loss(net, scheduler, x_0, t, noise).sum()
        kept = torch.cuda.memory_allocated() - before
        del loss
        return kept

    allocated(1)
    counted = [kept_for_backward(net, scheduler, images, torch.bfloat16, CUDA) for images in (4, 12)]
    assert allocated(12) - allocated(4) == pytest.approx(counted[1] - counted[0], rel=0.05)
