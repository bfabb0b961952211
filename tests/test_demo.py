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
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH"),
]

from demo import Demo
from tests import browser
from tests.browser import (
    DRAW,
    MIX,
    PAINT,
    click,
    control,
    fill,
    paint,
    picture,
    sentence,
    served,
    tab,
    upload,
)

SIZE = 96  # pixels: not enlarged in grids
MODEL = [
    "--model.image-size",
    SIZE,
    "--model.lowest-resolution-size",
    12,
    "--model.dim-multiply",
    "1,1,1,1",
    "--model.transformer-layers",
    3,
    "--diffusion.epochs",
    1,
    "--diffusion.checkpoint-every",
    2,
]


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
    note = lambda request: asked.append(request.url)
    chromium.on("request", note)
    chromium.goto(served_run)
    yield chromium
    chromium.remove_listener("request", note)
    assert asked and all(url.startswith((served_run, "data:", "blob:")) for url in asked)


def cut(grid):
    """The images of a grid."""
    step = SIZE + 2
    rows, columns = (grid.shape[0] - 2) // step, (grid.shape[1] - 2) // step
    return [
        grid[2 + r * step :, 2 + c * step :][:SIZE, :SIZE]
        for r in range(rows)
        for c in range(columns)
    ]


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
    args = Namespace(checkpoint=run, runs=None, device="cpu")
    return Demo(args).open(None, *flags)[1]


def test_draw(page, run, tmp_path):
    """The downloaded grid is that of sample.py, to the bit; and the slider shows x_0 as it was."""
    fill(page, Seed=3, How_many=4, Steps=60)
    page.get_by_label("ddim").check()
    click(page, DRAW)
    command = ["--seed", 3, "--n", 4, "--sampler", "ddim", "--steps", 60]
    grid = picture(
        page,
        " ".join(
            map(str, ["sample.py", run / "checkpoints" / "step-00000005.safetensors", *command])
        ),
    )
    sample_py(run, *command, "--out", tmp_path)
    np.testing.assert_array_equal(grid, np.asarray(Image.open(tmp_path / "grid.png")))
    assert all(image.std() > 10 for image in cut(grid))
    frames = generate(sampler_of(run, 3, "ddim", 60), range(4), 4, {("x_0", 1), ("x_0", 58)}).frames
    for place, call, t in ((1, 1, 100), (20, 58, 5)):
        fill(page, Look_back=place)
        shown = picture(page, f"after {call} of 60 network calls, at t = {t}")
        np.testing.assert_array_equal(cut(shown), frames["x_0", call])
    control(page, "Look back").press("Home")
    page.keyboard.press("Shift+End")
    control(page, "Look back").press_sequentially("17", delay=20)  # of which the last counts
    picture(page, "after 49 of 60 network calls")


def test_clicks_wait_for_each_other(page, run, served_run):
    """Another page's click is served as it was given, when the first is done: is stopped here, or its page closed."""
    twelfth = to_uint8(generate(sampler_of(run, 0, "dpm++", 2), [12], 1).images).numpy()[0]
    for end in ("stop", "close"):
        first, second = (page.context.browser.new_page() for _ in range(2))
        first.goto(served_run)
        fill(first, How_many=64, Steps=100)
        click(first, DRAW)
        first.get_by_text("of 100 network calls").wait_for()
        second.goto(served_run)
        tab(second, "Mix")
        fill(second, Steps=2, Depth=1, Share=1)
        control(second, "Number of the second image").press("Backspace")
        control(second, "Number of the second image").press_sequentially("12", delay=20)
        click(second, MIX)
        second.get_by_text("queue: ").first.wait_for()
        assert not second.get_by_test_id("download-link").count()
        assert not first.get_by_text("sample.py").count()
        first.close() if end == "close" else click(first, "Stop")
        np.testing.assert_array_equal(picture(second, "The mixture"), twelfth)
        second.close()
        first.close()


def test_mix(page, run, pictures, tmp_path):
    """Two images of a seed are those of sample.py, and mixed as it does; an upload comes back with neither depth nor
    share."""
    tab(page, "Mix")
    fill(page, Seed=3, Steps=5, Depth=0.5, Share=0.3)
    control(page, "Number of the second image").press("Backspace")
    control(page, "Number of the second image").press_sequentially("12", delay=20)
    click(page, MIX)
    image_sampler, weights = sampler_of(run, 3, "dpm++", 5), torch.tensor([0.3])
    ends = generate(image_sampler, [0, 12], 1).images
    expected = to_uint8(
        torch.cat([ends, mixtures(image_sampler, [0, 12], ends, 49, weights)])
    ).numpy()
    for label, image in zip(
        ("The first image", "The second image", "The mixture"), expected, strict=True
    ):
        np.testing.assert_array_equal(picture(page, label), image)
    flags = [
        "--seed",
        3,
        "--n",
        13,
        "--sampler",
        "dpm++",
        "--steps",
        5,
        "--batch-size",
        1,
        "--individual",
    ]
    sample_py(run, *flags, "--out", tmp_path)
    for image, i in zip(expected, (0, 12), strict=False):
        np.testing.assert_array_equal(image, np.asarray(Image.open(tmp_path / f"{i:05d}.png")))
    assert expected[2].std() > 10
    fill(page, Depth=0, Share=0)
    upload(page, pictures / "00003.png")
    photo = read_image(pictures / "00003.png", SIZE, fit=True)
    large = np.asarray(Image.fromarray(photo).resize((512, 512), Image.Resampling.BICUBIC))
    await_picture(page, "The first image", large)
    click(page, MIX)
    await_picture(page, "The mixture", photo)


def test_paint(page, run, tmp_path):
    """What was drawn is painted over and made anew, as sample.py makes it; what is not painted over stays."""
    fill(page, How_many=2, Steps=5)
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
    assert 0.02 < anew.mean() < 0.4 and anew[SIZE // 2, SIZE // 2] and len(answers) == 4
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(np.uint8(255) * anew).save(tmp_path / "mask.png")
    sample_py(
        run,
        "--inpaint",
        tmp_path / "image.png",
        "--mask",
        tmp_path / "mask.png",
        "--resample",
        2,
        "--steps",
        6,
        "--seed",
        3,
        "--n",
        4,
        "--individual",
        "--out",
        tmp_path,
    )
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
    sentence(page, "There are 0 images in the tab Draw")
    for file, reason in (("text", "not a PNG, JPEG, WEBP, BMP image"), ("bomb", "too many pixels")):
        upload(page, tmp_path / f"{file}.png")
        sentence(page, reason)
    tab(page, "Draw")
    fill(page, How_many=1, Steps=2)
    click(page, DRAW)
    picture(page, "--n 1")


def test_a_run_comes_goes_on_and_vanishes(chromium, run, tmp_path):
    """Without a model page and terminal say the command; then each click takes the newest checkpoint there is."""
    runs, printed = tmp_path / "runs", tmp_path / "printed"
    with served(printed, "--runs", runs) as address:
        chromium.goto(address)
        missing = (
            f"no run with a checkpoint here yet; train one first (python train.py --runs {runs})"
        )
        sentence(chromium, missing)
        assert missing in printed.read_text()
        checkpoints = runs / run.name / "checkpoints"
        checkpoints.mkdir(parents=True)
        fill(chromium, How_many=1, Steps=2)
        for step in (4, 5):
            shutil.copy(run / "checkpoints" / f"step-0000000{step}.safetensors", checkpoints)
            click(chromium, DRAW)
            picture(chromium, f"step-0000000{step}.safetensors --seed 0")
        shutil.rmtree(checkpoints)
        click(chromium, DRAW)
        sentence(chromium, missing)
        shutil.copytree(run / "checkpoints", checkpoints)
        fill(chromium, How_many=64, Steps=100)
        click(chromium, DRAW)
        # In the middle of which Ctrl-C ends it
        chromium.get_by_text("of 100 network calls").wait_for()


def test_it_listens_to_this_machine_alone(served_run):
    port = f"{int(served_run.strip('/').split(':')[-1]):04X}"
    lines = [
        line
        for file in ("tcp", "tcp6")
        for line in Path("/proc/net", file).read_text().splitlines()
    ]
    addresses = [line.split()[1] for line in lines]
    assert {address for address in addresses if address.endswith(f":{port}")} == {
        f"0100007F:{port}"
    }


def test_a_wrong_device_ends_the_script(run):
    done = script("demo.py", run, "--device", "tpu")
    assert done.returncode == 2 and done.stderr.startswith("error: device is 'tpu'; it must be")
