"""The page of demo.py in a real browser.

It shows what sample.py and edit.py write, and answers bad input with a sentence.
"""

import importlib.util
import shlex
import shutil
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image

import edit
import sample
from data.decode import read_image
from data.pixels import to_uint8
from functions.sampling.generation import generate, open_sampler
from functions.sampling.interpolation import interpolate_images
from functions.sampling.options import add_sampling_flags
from functions.support.command_line import Parser
from functions.support.processes import SINGLE_PROCESS
from tests.conftest import call, train_tiny

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
    MIXED,
    PAINT,
    UNPAINTED,
    USE,
    click,
    fill,
    inpaint,
    picture,
    sentence,
    served,
    tab,
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
    """Yield the address of a page for the run; at the end, Ctrl-C interrupts a sampling."""
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
    with chromium.new_page() as page:
        page.on("request", lambda request: urls.append(request.url))
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


def pixels_of(path):
    """Return the pixels of an image file."""
    return np.asarray(Image.open(path))


def test_draw(page, run, tmp_path):
    """The downloaded grid is that of sample.py, to the bit."""
    fill(page, Seed=3, How_many=4, Steps=20)
    page.get_by_label("ddim").check()
    click(page, DRAW)
    grid = picture(page, "4 images of seed 3: sampler ddim, steps 20")
    flags = "--seed 3 --sampler ddim --steps 20 --device cpu"
    call(sample.main, run, *flags.split(), "--n", 4, "--out", tmp_path)
    assert_array_equal(grid, pixels_of(tmp_path / "grid.png"))


def test_steps_spacing_and_guide_are_flags(chromium, run, tmp_path):
    flags = ("--steps", "5", "--spacing", "trailing", "--guide", "2", "--guidance", "3")
    with served(tmp_path / "log", run, *flags) as address, chromium.new_page() as page:
        page.goto(address)
        fill(page, How_many=2)
        click(page, DRAW)
        grid = picture(page, "2 images of seed 0: sampler dpm++, steps 5, spacing trailing")
    rest = ("--sampler", "dpm++", "--n", 2, "--device", "cpu", "--out", tmp_path)
    call(sample.main, run, *flags, *rest)
    assert_array_equal(grid, pixels_of(tmp_path / "grid.png"))


def sampler_of(run, *flags):
    """Return the `ImageSampler` that sample.py has for these flags."""
    parser = Parser()
    add_sampling_flags(parser)
    args = parser.parse_args([str(run), "--device", "cpu", *flags])
    return open_sampler(args, SINGLE_PROCESS)[1]


def test_mix(page, run, pictures):
    """Two images of a seed are mixed as edit.py mixes, and an upload comes back at depth 0."""
    fill(page, Seed=3, Steps=5)
    tab(page, "Mix")
    fill(page, Depth=0.5, Share=0.3, Index_of_the_second_image=12)
    click(page, MIX)
    image_sampler = sampler_of(run, "--seed", "3", "--sampler", "dpm++", "--steps", "5")
    ends = generate(replace(image_sampler, batch_size=1), [0, 12])
    t = image_sampler.time_at(0.5)
    mixture = interpolate_images(image_sampler, ends, t, torch.tensor([0.3]))
    expected = to_uint8(torch.stack([ends[0], mixture[0], ends[1]])).numpy()
    assert_array_equal(cut(picture(page, MIXED)), expected)

    # Without an earlier picture in the page, that of the upload is waited for.
    page.reload()
    tab(page, "Mix")
    fill(page, Depth=0, Share=1)
    upload(page, pictures / "00003.png")
    photo = read_image(pictures / "00003.png", (3, SIZE, SIZE))
    click(page, MIX)
    _, mixture, second = cut(picture(page, MIXED))
    assert_array_equal(second, photo)
    assert_array_equal(mixture, photo)


def upload(page, path):
    """Upload an image file by the last button for files in the open tab."""
    panel = page.get_by_role("tabpanel").locator("visible=true")
    panel.locator("input[type=file]").last.set_input_files(path)
    # The name is there earlier, but the link only when the upload is complete.
    panel.locator(f"a[download='{path.name}']").wait_for()


def test_paint(page, run, tmp_path):
    """What is painted over is made anew, as edit.py makes it, and all else stays."""
    fill(page, Seed=3, Steps=4)
    tab(page, "Paint")
    # Without an image there is nothing to paint over.
    click(page, PAINT)
    sentence(page, UNPAINTED)

    fill(page, Index_of_the_image=1)
    click(page, USE)
    image, kept, *answers = cut(inpaint(page))
    sampler = sampler_of(run, "--seed", "3", "--sampler", "dpm++", "--steps", "4")
    assert_array_equal(image, to_uint8(generate(sampler, [1]))[0].numpy())
    # The page shows in grey what is painted over.
    painted = (kept == 128).all(axis=2)
    assert 0.02 < painted.mean() < 0.4

    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(np.uint8(255) * painted).save(tmp_path / "mask.png")
    files = [tmp_path / "image.png", run, "--mask", tmp_path / "mask.png", "--out", tmp_path]
    flags = "--steps 4 --seed 3 --n 4 --device cpu"
    call(edit.main, "inpaint", *files, *flags.split())
    [path] = tmp_path.glob("inpainting-image-*.png")
    by_script = cut(pixels_of(path))[2:]
    for answer, expected in zip(answers, by_script, strict=True):
        assert_array_equal(answer, expected)
        assert_array_equal(answer[~painted], image[~painted])


def test_clicks_wait_for_each_other_until_stop(page, served_run):
    """Another page's click waits until Stop ends the first, and is then served."""
    fill(page, How_many=16, Steps=100)
    click(page, DRAW)
    page.get_by_text("estimate of x_0 at t").wait_for()
    second = page.context.new_page()
    second.goto(served_run)
    fill(second, How_many=1, Steps=2)
    click(second, DRAW)
    second.get_by_text("queue: ").first.wait_for()
    assert not second.get_by_text("images of seed").count()
    click(page, "Stop")
    picture(second, "1 images of seed 0")
    assert not page.get_by_text("16 images of seed").count()
    second.close()


def test_bad_input_is_a_sentence_and_the_page_goes_on(page, tmp_path):
    (tmp_path / "quota.png").write_text("<html>Quota exceeded</html>")
    fill(page, Steps=101)
    click(page, DRAW)
    sentence(page, "steps is 101; a model with 100 timesteps takes 1 to 100")
    fill(page, Steps=2)
    tab(page, "Paint")
    upload(page, tmp_path / "quota.png")
    click(page, USE)
    sentence(page, "not a PNG, JPEG, WEBP")
    # After all that it still draws.
    tab(page, "Draw")
    fill(page, How_many=1)
    click(page, DRAW)
    picture(page, "1 images of seed 0")


def test_it_listens_to_this_machine_alone(served_run):
    """On Linux 127.0.0.2 is this machine, too; who listens to other machines answers there."""
    port = int(served_run.strip("/").split(":")[-1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
