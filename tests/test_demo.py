"""The page of demo.py in a real browser.

It shows what sample.py writes, and answers bad input with a sentence.
"""

import importlib.util
import runpy
import shlex
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image

import edit
import sample
from data.decode import read_image
from data.pixels import to_uint8
from functions.sampling.generation import generate
from functions.sampling.interpolation import interpolate_images
from tests.conftest import ROOT, call, train_tiny
from tests.data.test_decode import png

pytest.importorskip("playwright", reason="requirements-dev.txt is not installed")
# Gradio takes seconds to import, which tests that are not slow need not wait for.
no_gradio = importlib.util.find_spec("gradio") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(no_gradio, reason="requirements-demo.txt is not installed"),
    pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH"),
]

from tests import browser
from tests.browser import (
    DRAW,
    MIX,
    PAINT,
    UNPAINTED,
    click,
    control,
    fill,
    inpaint,
    picture,
    sentence,
    served,
    tab,
    upload,
)

# Images of so many pixels are not enlarged in grids.
SIZE = 96
FLAGS = shlex.split(f"""
    --model.image-size {SIZE}
    --model.lowest-resolution-size 12
    --model.dim-multiply 1,1,1,1
    --model.transformer-layers 3
    --diffusion.epochs 1
    --diffusion.checkpoint-every 2
""")


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """Return a run of 5 steps on images of SIZE, with checkpoints of steps 2, 4 and 5."""
    return train_tiny(pictures, tmp_path_factory.mktemp("runs"), *FLAGS)


@pytest.fixture(scope="module")
def served_run(run, tmp_path_factory):
    """Yield the address of a page for the run."""
    log = tmp_path_factory.mktemp("printed") / "log"
    with served(log, "--runs", run.parent) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    """Yield one browser for all tests here."""
    with browser.browser() as chromium:
        yield chromium


@pytest.fixture
def page(chromium, served_run):
    """Yield a new page of the run; then check that it asked no other machine."""
    urls = []

    def note(request):
        urls.append(request.url)

    with chromium.new_page() as page:
        page.on("request", note)
        page.goto(served_run)
        yield page
    assert urls
    assert [url for url in urls if not url.startswith((served_run, "data:", "blob:"))] == []


def cut(grid):
    """Return the images of a grid, row by row."""
    # There are 2 pixels between images, and around them.
    step = SIZE + 2
    height, width = grid.shape[:2]
    return [
        grid[y : y + SIZE, x : x + SIZE]
        for y in range(2, height - SIZE, step)
        for x in range(2, width - SIZE, step)
    ]


def sample_py(*flags):
    """Run sample.py in this process, which is not the page's."""
    call(sample.main, "--device", "cpu", *flags)


def pixels_of(path):
    """Return the pixels of an image file."""
    return np.asarray(Image.open(path))


def give_second_number(page):
    """Type 12 as the number of the second image, in the tab Mix."""
    number = control(page, "Index of the second image")
    number.press("Backspace")
    number.press_sequentially("12", delay=20)


def await_picture(page, label, expected):
    """Wait until the picture under this label is the expected one, after an older one."""
    for _ in range(30):
        if np.array_equal(picture(page, label), expected):
            return
        page.wait_for_timeout(500)
    assert_array_equal(picture(page, label), expected)


def sampler_of(run, *flags):
    """Return the `ImageSampler` for a seed, sampler and steps."""
    from demo import Demo

    args = Namespace(checkpoint=run, runs=None, device="cpu")
    return Demo(args).open(None, *flags)[1]


def test_draw(page, run, tmp_path):
    """The downloaded grid is that of sample.py, to the bit, and the slider shows earlier x_0."""
    fill(page, Seed=3, How_many=4, Steps=40, Guidance=2)
    page.get_by_label("ddim").check()
    click(page, DRAW)
    # The guide is the weights of about a quarter of the 5 steps.
    flags = "--seed 3 --n 4 --sampler ddim --steps 40 --guide 1 --guidance 2"
    checkpoint = run / "checkpoints" / "step-00000005.safetensors"
    grid = picture(page, f"sample.py {checkpoint} {flags}")

    sample_py(run, *flags.split(), "--out", tmp_path)
    assert_array_equal(grid, pixels_of(tmp_path / "grid.png"))
    assert all(image.std() > 10 for image in cut(grid))

    image_sampler = sampler_of(run, 3, "ddim", 40, 2)
    frames = generate(image_sampler, range(4), {("x_0", 1), ("x_0", 39)}).frames
    for place, calls, t in ((1, 1, 100), (20, 39, 5)):
        fill(page, Look_back=place)
        shown = picture(page, f"after {calls} of 40 steps, at t = {t}")
        assert_array_equal(cut(shown), frames["x_0", calls])

    # Of the two numbers that are typed here, 1 and 17, the last counts.
    number = control(page, "Look back")
    number.press("Home")
    page.keyboard.press("Shift+End")
    number.press_sequentially("17", delay=20)
    picture(page, "after 33 of 40 steps")


def test_clicks_wait_for_each_other(page, run, served_run):
    """Another page's click waits until the first ends, and is then served as it was given.

    The first ends by Stop, or when its page is closed.
    """
    images = generate(sampler_of(run, 0, "dpm++", 2), [12]).images
    twelfth = to_uint8(images).numpy()[0]
    for end in ("stop", "close"):
        # The first page starts a long sampling.
        first = page.context.new_page()
        second = page.context.new_page()
        first.goto(served_run)
        fill(first, How_many=16, Steps=100)
        click(first, DRAW)
        first.get_by_text("of 100 steps").wait_for()

        # The second page waits in the queue. Without noise, a share of 1 is the second image.
        second.goto(served_run)
        tab(second, "Mix")
        fill(second, Steps=2, Depth=0, Share=1)
        give_second_number(second)
        click(second, MIX)
        second.get_by_text("queue: ").first.wait_for()
        assert not second.get_by_test_id("download-link").count()
        assert not first.get_by_text("sample.py").count()

        if end == "close":
            first.close()
        else:
            click(first, "Stop")
        assert_array_equal(picture(second, "The mixture"), twelfth)
        second.close()
        first.close()


def test_mix(page, run, pictures):
    """Two images of a seed are those of `generate`, and are mixed as edit.py mixes.

    An upload comes back when depth and share are 0.
    """
    tab(page, "Mix")
    fill(page, Seed=3, Steps=5, Depth=0.5, Share=0.3)
    give_second_number(page)
    click(page, MIX)

    image_sampler = sampler_of(run, 3, "dpm++", 5)
    ends = generate(replace(image_sampler, batch_size=1), [0, 12]).images
    t = image_sampler.time_at(0.5)
    mixture = interpolate_images(image_sampler, ends, t, torch.tensor([0.3]))
    expected = to_uint8(torch.cat([ends, mixture])).numpy()
    labels = ("The first image", "The second image", "The mixture")
    for label, image in zip(labels, expected, strict=True):
        assert_array_equal(picture(page, label), image)

    # The page shows the upload itself in large, and the model's size of it as the mixture.
    fill(page, Depth=0, Share=0)
    upload(page, pictures / "00003.png")
    photo = read_image(pictures / "00003.png", (3, SIZE, SIZE), fit=True)
    large = Image.fromarray(photo).resize((512, 512), Image.Resampling.BICUBIC)
    await_picture(page, "The first image", np.asarray(large))
    click(page, MIX)
    await_picture(page, "The mixture", photo)


def test_paint(page, run, tmp_path):
    """What is painted over is made anew, as edit.py makes it, and all else stays."""
    fill(page, How_many=2, Steps=5)
    click(page, DRAW)
    drawn = cut(picture(page, "--n 2"))

    # Without an image there is nothing to paint over.
    tab(page, "Paint")
    click(page, PAINT)
    sentence(page, UNPAINTED)

    fill(page, Index_of_the_image=1)
    click(page, "Use the image with this index")
    fill(page, Seed=3, Steps=6, Repeats=2)
    image, kept, *answers = cut(inpaint(page))
    assert_array_equal(image, drawn[1])
    # The page shows in grey what is painted over.
    painted = (kept == 128).all(axis=2)
    assert 0.02 < painted.mean() < 0.4
    assert painted[SIZE // 2, SIZE // 2]
    assert len(answers) == 4

    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(np.uint8(255) * painted).save(tmp_path / "mask.png")
    files = [tmp_path / "image.png", run, "--mask", tmp_path / "mask.png", "--out", tmp_path]
    flags = "--resample 2 --steps 6 --seed 3 --n 4 --individual --device cpu"
    call(edit.main, "inpaint", *files, *flags.split())
    paths = sorted(tmp_path.glob("inpainting-*-image-*-0*.png"))
    for answer, path in zip(answers, paths, strict=True):
        assert_array_equal(answer, pixels_of(path))
        assert_array_equal(answer[~painted], image[~painted])
        assert abs(answer[painted].astype(int) - image[painted]).mean() > 5


def test_bad_input_is_a_sentence_and_the_page_goes_on(page, tmp_path):
    (tmp_path / "text.png").write_text("<html>Quota exceeded</html>")
    (tmp_path / "bomb.png").write_bytes(png(20_000, 20_000, 8, 2, b""))

    fill(page, Steps=101)
    click(page, DRAW)
    sentence(page, "steps is 101; a model with 100 timesteps takes 1 to 100")

    tab(page, "Paint")
    click(page, "Use the image with this index")
    sentence(page, "The tab Draw has 0 images")
    for file, reason in (("text", "not a PNG, JPEG, WEBP, BMP image"), ("bomb", "too many pixels")):
        upload(page, tmp_path / f"{file}.png")
        sentence(page, reason)

    # After all that it still draws.
    tab(page, "Draw")
    fill(page, How_many=1, Steps=2)
    click(page, DRAW)
    picture(page, "--n 1")


def test_a_run_comes_goes_on_and_vanishes(chromium, run, tmp_path):
    """Without a model, page and terminal say which command to run.

    Later each click takes the newest checkpoint there is.
    """
    runs = tmp_path / "runs"
    printed = tmp_path / "printed"
    command = f"python train.py --runs {runs}"
    missing = f"no run with a checkpoint here yet; train one first ({command})"
    with chromium.new_page() as page, served(printed, "--runs", runs) as address:
        page.goto(address)
        sentence(page, missing)
        assert missing in printed.read_text()

        # A run appears, and goes on.
        checkpoints = runs / run.name / "checkpoints"
        checkpoints.mkdir(parents=True)
        fill(page, How_many=1, Steps=2)
        for step in (4, 5):
            shutil.copy(run / "checkpoints" / f"step-0000000{step}.safetensors", checkpoints)
            click(page, DRAW)
            picture(page, f"step-0000000{step}.safetensors --seed 0")

        # It vanishes.
        shutil.rmtree(checkpoints)
        click(page, DRAW)
        sentence(page, missing)

        # It is back, and Ctrl-C, pressed when this context ends, interrupts its sampling.
        shutil.copytree(run / "checkpoints", checkpoints)
        fill(page, How_many=16, Steps=100)
        click(page, DRAW)
        page.get_by_text("of 100 steps").wait_for()


def test_the_command_that_the_page_shows_can_be_pasted(run, tmp_path):
    """The path of the model has a space here."""
    from demo import Demo

    folder = tmp_path / "my runs"
    folder.mkdir()
    shutil.copy(run / "checkpoints" / "step-00000005.safetensors", folder)
    demo = Demo(Namespace(checkpoint=folder / "step-00000005.safetensors", runs=None, device="cpu"))
    _, _, history = demo.draw(lambda *step, outputs=None: None, 0, 1, "dpm++", 2, 1)
    title, _ = history[-1]
    assert shlex.split(title)[1] == str(folder / "step-00000005.safetensors")


def test_it_listens_to_this_machine_alone(served_run):
    """Linux lists the sockets of IPv4 and IPv6, with addresses in hexadecimal digits."""
    port = int(served_run.strip("/").split(":")[-1])
    lines = []
    for file in ("tcp", "tcp6"):
        lines += Path("/proc/net", file).read_text().splitlines()
    addresses = {line.split()[1] for line in lines}

    # 0100007F is 127.0.0.1, whose bytes are stored in reverse.
    ours = {address for address in addresses if address.endswith(f":{port:04X}")}
    assert ours == {f"0100007F:{port:04X}"}


def test_a_wrong_device_ends_the_script(run, capsys):
    def demo_py():
        runpy.run_path(str(ROOT / "demo.py"), run_name="__main__")

    with pytest.raises(SystemExit, match="2"):
        call(demo_py, run, "--device", "tpu")
    assert capsys.readouterr().err.startswith("error: device is 'tpu'; it must be")
