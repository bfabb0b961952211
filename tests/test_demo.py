"""The page of demo.py, also in a real browser: it shows what sample.py and edit.py write."""

import importlib.util
import itertools
import shutil
import socket
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

import sample
from data.pictures import fit_image, open_image_file
from data.pixels import picture_of, to_model_range, to_uint8
from edit import InpaintFlags
from figures.saved_model import open_saved
from functions.samplers import SAMPLERS
from functions.sampling.editing import inpaint_image, interpolate_images, time_at
from functions.sampling.generation import generate
from functions.sampling.settings import SamplingConfig
from functions.support.settings import ConfigError
from tests.conftest import call, changed, pixels_of, refused, train_tiny

pytest.importorskip("playwright", reason="requirements-dev.txt is not installed")
# Gradio takes seconds to import, which tests that are not slow need not wait for.
no_gradio = importlib.util.find_spec("gradio") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(no_gradio, reason="requirements-demo.txt is not installed"),
    pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH"),
]

from tests import browser
from tests.browser import fill, inpaint, picture, served, submit, tab

FLAGS = "--seed 2 --sampler dpm++ --spacing trailing --guide 5 --guidance 3"
# The run's images have so many pixels, and grids do not enlarge them here.
SIZE = 16
small_grids = mock.patch("functions.support.pictures.MIN_SIDE", SIZE)


@small_grids
def serve_small_grids():
    browser.demo_script()


@pytest.fixture(scope="module")
def page(tiny_run, tmp_path_factory):
    """Yield the page of a run; at the end, Ctrl-C ends it, and it has asked no other machine."""
    urls = []
    printed = tmp_path_factory.mktemp("printed") / "log"
    with (
        served(printed, tiny_run, FLAGS, act=serve_small_grids) as address,
        browser.browser() as chromium,
        chromium.new_page() as page,
    ):
        page.on("request", lambda request: urls.append(request.url))
        page.goto(address)
        yield page
    assert urls
    assert all(url.startswith((address, "data:", "blob:")) for url in urls)


def cut(grid):
    """Return the images of a grid, row by row."""
    pixels = np.array(grid)
    # There are 2 pixels between images, and around them.
    places = [range(2, length, SIZE + 2) for length in pixels.shape[:2]]
    return [pixels[y : y + SIZE, x : x + SIZE] for y, x in itertools.product(*places)]


@small_grids
def test_draw_is_the_grid_of_the_script_with_the_flags_of_the_page(page, tiny_run, tmp_path):
    """To the bit, as it is downloaded; the fields begin with the values of flags."""
    fill(page, Seed=3, How_many=2, Steps=5)
    submit(page)
    grid = picture(page)
    call(sample, tiny_run, FLAGS, "--seed 3 --steps 5 --n 2 --device cpu --out", tmp_path)
    assert_array_equal(grid, pixels_of(tmp_path / "grid.png"))


def test_mix_in_the_page_is_that_of_edits(page, tiny_run, pictures):
    """It mixes an image of the seed with an upload."""
    tab(page, "Mix")
    fill(page, Seed=3, Depth=0.5, Share=0.3, Steps=5)
    file = pictures / "00003.png"
    panel = page.get_by_role("tabpanel").locator("visible=true")
    panel.locator("input[type=file]").last.set_input_files(file)
    # The picture is shown when the upload is complete.
    panel.locator("img").last.wait_for()
    submit(page)
    pipeline = open_saved(tiny_run, f"{FLAGS} --seed 3 --steps 5 --device cpu")
    photo = fit_image(open_image_file(file), pipeline.models.shape)
    ends = torch.cat([generate(pipeline, [0]), to_model_range(photo[None])])
    mixture = interpolate_images(pipeline, ends, time_at(pipeline, 0.5), torch.tensor([0.3]))
    expected = to_uint8(torch.stack([ends[0], mixture[0], ends[1]]))
    assert_array_equal(cut(picture(page)), expected)


def test_paint_in_the_page_is_that_of_edits(page, tiny_run):
    """It begins with image 0 of the flags' seed, enlarged and then reduced again.

    As long as nothing is painted over, it says so. What is painted over is shown in grey.
    """
    tab(page, "Paint")
    fill(page, Seed=3, Steps=4)
    image, kept, *_ = edited = cut(inpaint(page))
    pipeline = open_saved(tiny_run, f"{FLAGS} --steps 20 --device cpu")
    first = picture_of(to_uint8(generate(pipeline, [0]))[0]).resize((512, 512))
    assert_array_equal(image, fit_image(first, pipeline.models.shape))
    painted = (kept == 128).all(axis=2)
    assert 0.02 < painted.mean() < 0.4
    # With the defaults of edit.py, whose tests are in tests/functions/sampling.
    pipeline = open_saved(tiny_run, f"{FLAGS} --seed 3 --sampler ddpm --steps 4 --device cpu")
    expected = inpaint_image(pipeline, image, painted, InpaintFlags.resample, 4)
    assert_array_equal(edited, expected)


def test_mix_and_paint_refuse_what_they_cannot_do(tiny_run):
    from demo import mix, paint

    pipeline = open_saved(tiny_run, "--device cpu")
    with refused("give the index or a file of each image"):
        mix(pipeline, 0.5, 0.3, 0, None, None, None)
    pipeline = changed(pipeline, label=("a", "b"))
    for work in (mix, paint):
        with refused("an edit has one --label"):
            work(pipeline, 0.5, {})


def test_it_listens_to_this_machine_alone(page):
    """On Linux 127.0.0.2 is this machine, too; who listens to other machines answers there."""
    port = int(page.url.strip("/").split(":")[-1])
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
    """Return a tab that returns its pipeline."""
    import demo

    return demo.tab(begun, lambda pipeline: pipeline, [*SAMPLERS])


def test_a_model_of_few_timesteps_begins_with_all_of_them(trained, shown, monkeypatch):
    import demo

    run = trained("--diffusion.timesteps-diff 11 --diffusion.beta-end 0.01")
    monkeypatch.setattr(demo.gr, "TabbedInterface", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        call(demo, run, "--steps 11")
    # An inpainting begins with 50 steps, or all.
    assert [steps for _, _, steps, *_ in shown] == [11] * 3


def test_flags_of_one_sampler_leave_the_others_as_they_are(tiny_run, shown):
    begun = open_saved(tiny_run, "--sampler dpm++ --steps 4 --eta 0.5 --temperature 0.5")
    submit = drawing_tab(begun)
    assert submit(None, 0, "dpm++", 4).config == begun.config
    plain = SamplingConfig(model=begun.config.model, precision="float32", sampler="ddim", steps=3)
    assert submit(None, 0, "ddim", 3).config == plain


def test_a_model_with_labels_has_fields_for_them(labelled_pictures, tmp_path, shown):
    """They begin as the flags are, and are read as these. An empty field is none."""
    labels = "--diffusion.labels true --diffusion.epochs 1"
    run = train_tiny(labelled_pictures, tmp_path, labels)
    submit = drawing_tab(open_saved(run, "--sampler dpm++ --steps 4 --label b --cfg 2"))
    assert shown == [[0, "dpm++", 4, "b", "2.0"]]
    config = submit(None, 0, "dpm++", 4, "'a b' --steps 7", "3").config
    # What looks like a flag is none.
    assert (config.label, config.cfg) == (("a b", "--steps", "7"), 3)
    config = submit(None, 0, "dpm++", 4, "", "").config
    assert (config.label, config.cfg) == ((), None)
    with refused("cfg is 'much'; it must be a number", ConfigError):
        submit(None, 0, "dpm++", 4, "a", "much")

    # A value for Cfg puts the guide out, until the field is empty again.
    submit = drawing_tab(open_saved(run, "--sampler dpm++ --steps 4 --label b --guide 5"))
    for cfg, guide in (("3", None), ("", 5)):
        assert submit(None, 0, "dpm++", 4, "b", cfg).config.guide == guide
