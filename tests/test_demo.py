"""The page of demo.py in a real browser.

It shows what sample.py and edit.py write, and answers bad input with a sentence.
"""

import importlib.util
import shutil
import socket
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image

import edit
import sample
from data.decode import fit_image, open_image_file
from data.pixels import picture_of, to_uint8
from functions.samplers import SAMPLERS
from functions.sampling.editing import interpolate_images
from functions.sampling.generation import generate, open_drawing
from functions.sampling.settings import DrawingConfig, add_sampling_flags, settings_of
from functions.support.command_line import Parser
from tests.conftest import call, changed, pixels_of, train_tiny, words

pytest.importorskip("playwright", reason="requirements-dev.txt is not installed")
# Gradio takes seconds to import, which tests that are not slow need not wait for.
no_gradio = importlib.util.find_spec("gradio") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(no_gradio, reason="requirements-demo.txt is not installed"),
    pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH"),
]

from tests import browser
from tests.browser import UNPAINTED, fill, inpaint, picture, sentence, served, submit, tab

# Images of so many pixels are not enlarged in grids.
SIZE = 96
FLAGS = f"""
    --model.image-size {SIZE}
    --model.lowest-resolution-size 12
    --model.dim-multiply 1,1,1,1
    --model.transformer-layers 3
    --diffusion.epochs 1
    --diffusion.checkpoint-every 2
"""


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """Return a run of 5 steps on images of SIZE, with checkpoints of steps 2, 4 and 5."""
    return train_tiny(pictures, tmp_path_factory.mktemp("runs"), FLAGS)


@pytest.fixture(scope="module")
def served_run(run, tmp_path_factory):
    """Yield the address of a page for the run; at the end, Ctrl-C ends it."""
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


def test_draw(page, run, tmp_path):
    """The downloaded grid is that of sample.py, to the bit."""
    fill(page, Seed=3, How_many=4, Steps=20)
    page.get_by_label("ddim").locator("visible=true").check()
    submit(page)
    grid = picture(page)
    call(sample, run, "--seed 3 --sampler ddim --steps 20 --device cpu --n 4 --out", tmp_path)
    assert_array_equal(grid, pixels_of(tmp_path / "grid.png"))


def test_fields_begin_with_the_values_of_flags(chromium, run, tmp_path):
    flags = "--seed 2 --sampler ddim --steps 5 --spacing trailing --guide 2 --guidance 3"
    with served(tmp_path / "log", run, *words(flags)) as address, chromium.new_page() as page:
        page.goto(address)
        fill(page, How_many=2)
        submit(page)
        grid = picture(page)
    call(sample, run, flags, "--n 2 --device cpu --out", tmp_path / "out")
    assert_array_equal(grid, pixels_of(tmp_path / "out" / "grid.png"))


def opened(run, *flags):
    """Return the `Drawing` that sample.py has for these flags."""
    parser = Parser()
    add_sampling_flags(parser)
    args = parser.parse_args(words(run, "--device cpu", *flags))
    return open_drawing(args, settings_of(args))


def test_mix(page, run, pictures):
    """Two images of a seed are mixed as edit.py mixes, and an upload comes back at depth 0."""
    tab(page, "Mix")
    fill(page, Seed=3, Steps=5, Depth=0.5, Share=0.3, Index_of_the_second_image=12)
    submit(page)
    drawing = opened(run, "--seed 3 --sampler dpm++ --steps 5")
    ends = generate(changed(drawing, batch_size=1), [0, 12])
    t = drawing.time_at(0.5)
    mixture = interpolate_images(drawing, ends, t, torch.tensor([0.3]))
    expected = to_uint8(torch.stack([ends[0], mixture[0], ends[1]]))
    assert_array_equal(cut(picture(page)), expected)

    # Without an earlier picture in the page, that of the upload is waited for.
    page.reload()
    tab(page, "Mix")
    fill(page, Depth=0, Share=1)
    upload(page, pictures / "00003.png")
    photo = fit_image(open_image_file(pictures / "00003.png"), (3, SIZE, SIZE))
    submit(page)
    _, mixture, second = cut(picture(page))
    assert_array_equal(second, photo)
    assert_array_equal(mixture, photo)


def upload(page, path):
    """Upload an image file by the last button for files in the open tab."""
    panel = page.get_by_role("tabpanel").locator("visible=true")
    panel.locator("input[type=file]").last.set_input_files(path)
    # The picture is shown when the upload is complete.
    panel.locator("img").last.wait_for()


def test_paint(page, run, tmp_path):
    """What is painted over is made anew, as edit.py makes it, and all else stays."""
    tab(page, "Paint")
    fill(page, Seed=3, Steps=4)
    # Nothing is painted over yet.
    submit(page)
    sentence(page, UNPAINTED)

    image, kept, *answers = cut(inpaint(page))
    # The page begins with image 0 of the flags' seed, enlarged and then reduced again.
    drawing = opened(run, "--sampler dpm++ --steps 20")
    first = picture_of(to_uint8(generate(drawing, [0]))[0]).resize((512, 512))
    assert_array_equal(image, fit_image(first, drawing.models.shape))
    # The page shows in grey what is painted over.
    painted = (kept == 128).all(axis=2)
    assert 0.02 < painted.mean() < 0.4

    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(np.uint8(255) * painted).save(tmp_path / "mask.png")
    files = [tmp_path / "image.png", run, "--mask", tmp_path / "mask.png", "--out", tmp_path]
    call(edit, "inpaint", *files, "--steps 4 --seed 3 --n 4 --device cpu")
    by_script = cut(pixels_of(tmp_path / "inpainting-image.png"))[2:]
    for answer, expected in zip(answers, by_script, strict=True):
        assert_array_equal(answer, expected)
        assert_array_equal(answer[~painted], image[~painted])


def test_it_listens_to_this_machine_alone(served_run):
    """On Linux 127.0.0.2 is this machine, too; who listens to other machines answers there."""
    port = int(served_run.strip("/").split(":")[-1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))


@pytest.fixture
def shown(monkeypatch):
    """Let a tab be the function of its button; return the first values of the fields, by tab."""
    import demo

    shown = []

    def interface(call, inputs, *_, **__):
        shown.append([field.value for field in inputs])
        return call

    monkeypatch.setattr(demo.gr, "Interface", interface)
    return shown


def drawing_tab(begun):
    """Return a tab that returns its drawing."""
    import demo

    return demo.tab(begun, lambda drawing: drawing, [*SAMPLERS])


def test_a_model_of_few_timesteps_begins_with_all_of_them(trained, shown, monkeypatch):
    import demo

    run = trained("--diffusion.timesteps-diff 11 --diffusion.beta-end 0.01")
    monkeypatch.setattr(demo.gr, "TabbedInterface", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        call(demo, run)
    # An inpainting begins with 50 steps, or all.
    assert [steps for _, _, steps, *_ in shown] == [11] * 3


def test_flags_of_one_sampler_leave_the_others_as_they_are(run, shown):
    begun = opened(run, "--sampler dpm++ --steps 4 --eta 0.5 --temperature 0.5")
    submit = drawing_tab(begun)
    assert submit(None, 0, "dpm++", 4).config == begun.config
    plain = DrawingConfig(model=begun.config.model, sampler="ddim", steps=3)
    assert submit(None, 0, "ddim", 3).config == plain


def test_a_model_with_labels_has_fields_for_them(pictures, tmp_path, shown):
    """An empty label draws without one, and then the weight has no effect."""
    for name in ("a", "b"):
        shutil.copytree(pictures, tmp_path / "data" / name)
    labels = "--diffusion.labels true --diffusion.epochs 1"
    run = train_tiny(tmp_path / "data", tmp_path / "runs", labels)
    submit = drawing_tab(opened(run, "--sampler dpm++ --steps 4 --label b --cfg 2"))
    assert shown == [[0, "dpm++", 4, "b", 2.0]]
    drawing = submit(None, 0, "dpm++", 4, "a", 3)
    guided = drawing.models.denoiser
    assert guided.weight == 3
    assert guided.model.inputs["label"].tolist() == [0]
    plain = submit(None, 0, "dpm++", 4, "", 3)
    assert plain.models.denoiser.inputs == {}
