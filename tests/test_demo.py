"""The page of demo.py, in a real browser: what it shows is what sample.py writes, and bad input is a sentence."""

import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.decode import read_image
from data.pixels import to_uint8
from functions.sampling.generation import generate
from functions.sampling.interpolation import mixtures
from tests.conftest import script, train_tiny
from tests.data.test_decode import png

pytest.importorskip("gradio", reason="requirements-demo.txt is not installed")
pytest.importorskip("playwright", reason="requirements-dev.txt is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH")]

from demo import Demo  # noqa: E402
from tests import browser  # noqa: E402
from tests.browser import DRAW, MIX, PAINT, click, fill, paint, picture, sentence, served, tab, upload  # noqa: E402

SIZE = 96  # pixels: not enlarged in grids
MODEL = ["--model.image-size", SIZE, "--model.lowest-resolution-size", 12, "--model.dim-multiply", "1,1,1,1",
         "--model.transformer-layers", 3, "--diffusion.epochs", 1, "--diffusion.checkpoint-every", 2]  # fmt: skip


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A run of 5 steps on images of SIZE, with checkpoints of steps 2, 4 and 5."""
    return train_tiny(pictures, tmp_path_factory.mktemp("runs"), *MODEL)


@pytest.fixture(scope="module")
def served_run(run, tmp_path_factory):
    with served(tmp_path_factory.mktemp("printed") / "log", "--runs", run.parent) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as page:
        yield page


@pytest.fixture
def page(chromium, served_run):
    """The page of the run, fresh, which asked no other machine for anything."""
    asked = []
    chromium.on("request", lambda request: asked.append(request.url))
    chromium.goto(served_run)
    yield chromium
    assert asked and all(url.startswith((served_run, "data:", "blob:")) for url in asked)


def cut(grid):
    """The images of a grid."""
    step = SIZE + 2
    rows, columns = (grid.shape[0] - 2) // step, (grid.shape[1] - 2) // step
    return [grid[2 + r * step :, 2 + c * step :][:SIZE, :SIZE] for r in range(rows) for c in range(columns)]


def sample_py(*flags):
    done = script("sample.py", "--device", "cpu", *flags)
    assert done.returncode == 0, done.stderr


def await_picture(page, label, expected):
    """Until what was shown there before is gone."""
    for _ in range(30):
        if np.array_equal(picture(page, label), expected):
            return
        page.wait_for_timeout(500)
    np.testing.assert_array_equal(picture(page, label), expected)


def sampler_of(run, *flags):
    """The `ImageSampler` for a seed, sampler and steps."""
    args = Namespace(checkpoint=run, runs=None, device="cpu", precision="float32")
    return Demo(args).open(*flags)[1]


def test_draw(page, run, tmp_path):
    """The downloaded grid is that of sample.py, to the bit; and the slider shows x_0 as it was."""
    fill(page, Seed=3, Number=4, Steps=60)
    page.get_by_label("ddim").check()
    click(page, DRAW)
    page.get_by_text("network calls, at t = ").wait_for()  # meanwhile
    grid = picture(page, "step-00000005, as of sample.py --seed 3 --n 4 --sampler ddim --steps 60")
    sample_py(run, "--seed", 3, "--n", 4, "--sampler", "ddim", "--steps", 60, "--out", tmp_path)
    np.testing.assert_array_equal(grid, np.asarray(Image.open(tmp_path / "grid.png")))
    assert grid.std() > 10
    frames = generate(sampler_of(run, 3, "ddim", 60), range(4), 4, {("x_0", 1), ("x_0", 58)}).frames
    for place, call, t in ((1, 1, 100), (20, 58, 5)):
        fill(page, Look_back=place)
        shown = picture(page, f"x_0 after {call} of 60 network calls, at t = {t}")
        np.testing.assert_array_equal(cut(shown), frames["x_0", call])


def test_clicks_wait_for_each_other(page, served_run):
    """Another page's click is served when the first is done: here, when it is stopped."""
    fill(page, Number=64, Steps=100)
    click(page, DRAW)
    page.get_by_text("of 100 network calls").wait_for()
    other = page.context.browser.new_page()
    other.goto(served_run)
    tab(other, "Mix")
    fill(other, Steps=2)
    click(other, MIX)
    other.wait_for_timeout(2000)
    assert not other.get_by_test_id("download-link").count()
    assert not page.get_by_text("as of sample.py").count()
    click(page, "Stop drawing")
    picture(other, "The mixture")
    other.close()


def test_mix(page, run, pictures, tmp_path):
    """Two seeds give what sample.py mixes; an upload with a share of 0 and no depth comes back as it is."""
    tab(page, "Mix")
    fill(page, Seed=3, Steps=5, Depth=0.5, Share=0.3, Number_of_the_second_image=4)
    click(page, MIX)
    image_sampler, weights = sampler_of(run, 3, "dpm++", 5), torch.tensor([0.3])
    ends = generate(image_sampler, [0, 4], 1).images
    expected = to_uint8(torch.cat([ends, mixtures(image_sampler, [0, 4], ends, 49, weights)])).numpy()
    for label, image in zip(("The first image", "The second image", "The mixture"), expected, strict=True):
        np.testing.assert_array_equal(picture(page, label), image)
    assert expected[2].std() > 10
    fill(page, Depth=0, Share=0)
    upload(page, pictures / "00003.png")
    photo = read_image(pictures / "00003.png", SIZE, fit=True)
    await_picture(
        page, "The first image", np.asarray(Image.fromarray(photo).resize((512, 512), Image.Resampling.BICUBIC))
    )
    click(page, MIX)
    await_picture(page, "The mixture", photo)


def test_paint(page, run, tmp_path):
    """What was drawn is painted over and made anew, as sample.py makes it; what is not painted over stays."""
    fill(page, Number=2, Steps=5)
    click(page, DRAW)
    drawn = cut(picture(page, "--n 2"))
    tab(page, "Paint")
    click(page, PAINT)
    sentence(page, "take an image, and paint over a part of it")
    fill(page, Number_of_the_image=1)
    click(page, "Take the image of this number")
    paint(page)
    fill(page, Seed=3, Steps=6, Repeats=2)
    click(page, PAINT)
    image, kept, *answers = cut(picture(page, "The image, what is kept of it, and the answers"))
    np.testing.assert_array_equal(image, drawn[1])
    anew = (kept == 128).all(axis=2)
    assert 0.02 < anew.mean() < 0.4 and anew[SIZE // 2, SIZE // 2]
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(np.uint8(255) * anew).save(tmp_path / "mask.png")
    sample_py(run, "--inpaint", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--resample", 2, "--steps", 6,
              "--seed", 3, "--n", 4, "--individual", "--out", tmp_path)  # fmt: skip
    for i, answer in enumerate(answers):
        np.testing.assert_array_equal(answer, np.asarray(Image.open(tmp_path / f"{i:05d}.png")))
        np.testing.assert_array_equal(answer[~anew], image[~anew])
        assert abs(answer[anew].astype(int) - image[anew]).mean() > 5


def test_bad_input_is_a_sentence_and_the_page_goes_on(page, tmp_path):
    (tmp_path / "text.png").write_text("<html>Quota exceeded</html>")
    (tmp_path / "bomb.png").write_bytes(png(20_000, 20_000, 8, 2, b""))
    fill(page, Steps=101)
    click(page, DRAW)
    sentence(page, "steps is 101; a model with 100 timesteps takes 1 to 100")
    tab(page, "Paint")
    click(page, "Take the image of this number")
    sentence(page, "there are 0 images in the tab Draw")
    for file, reason in (("text", "not a PNG, JPEG, WEBP, BMP image"), ("bomb", "too many pixels")):
        upload(page, tmp_path / f"{file}.png")
        sentence(page, reason)
    tab(page, "Draw")
    fill(page, Number=1, Steps=2)
    click(page, DRAW)
    picture(page, "--n 1")


def test_a_run_comes_goes_on_and_vanishes(chromium, run, tmp_path):
    """Without a model page and terminal say the command; then each click takes the newest checkpoint there is."""
    runs, printed = tmp_path / "runs", tmp_path / "printed"
    with served(printed, "--runs", runs) as address:
        chromium.goto(address)
        missing = "no run with a checkpoint here yet; python train.py makes one"
        chromium.get_by_text(missing).wait_for()
        assert missing in printed.read_text()
        click(chromium, DRAW)
        sentence(chromium, missing)
        checkpoints = shutil.copytree(run, runs / run.name) / "checkpoints"
        fill(chromium, Number=1, Steps=2)
        for step in (5, 4):
            click(chromium, DRAW)
            picture(chromium, f"step-0000000{step}, as of")
            (checkpoints / f"step-0000000{step}.safetensors").unlink()
        shutil.rmtree(checkpoints)
        click(chromium, DRAW)
        sentence(chromium, missing)
        shutil.copytree(run / "checkpoints", checkpoints)
        fill(chromium, Number=64, Steps=100)
        click(chromium, DRAW)
        chromium.get_by_text("of 100 network calls").wait_for()  # in the middle of which Ctrl-C ends it


def test_it_listens_to_this_machine_alone(served_run):
    port = f"{int(served_run.strip('/').split(':')[-1]):04X}"
    lines = [line for file in ("tcp", "tcp6") for line in Path("/proc/net", file).read_text().splitlines()]
    addresses = [line.split()[1] for line in lines]
    assert {address for address in addresses if address.endswith(f":{port}")} == {f"0100007F:{port}"}


def test_what_is_wrong_ends_the_script(run, served_run):
    port = served_run.strip("/").split(":")[-1]
    for flags, reason in ((["nowhere"], "nowhere: "), ([run, "--port", port], f"in range: {port}")):
        done = script("demo.py", *flags)
        assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr
