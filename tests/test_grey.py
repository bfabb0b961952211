"""Networks with one channel, from image files to pictures; and that three channels stay as ever."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import edit
import evaluate
import sample
from config import ConfigError
from data.decode import read_image
from data.packed import open_packed
from data.sources import find_source
from functions.sampling.generation import ImageSampler
from functions.support.errors import UserError
from functions.support.loading import open_model
from functions.support.pictures import save_strip
from tests.conftest import CPU, OPTIONS, call, train_tiny
from tests.data.packing import IMAGES, load, write_folder

# The luma of ITU-R BT.601.
LUMA = np.array([0.299, 0.587, 0.114])
FEW = ["--steps", 4, "--seed", 3, "--device", "cpu"]


def test_grey_packs_lie_beside_those_of_colours(tmp_path):
    path = write_folder(tmp_path / "set")
    colour = load(path)
    source = find_source(path, 8)
    source.channels = 1

    grey = open_packed(source, 8)

    assert grey.images.shape == (10, 8, 8, 1)
    assert_allclose(grey.images[..., 0], IMAGES @ LUMA, atol=1)
    assert_array_equal(load(path).images, IMAGES)
    assert (colour.path.name, grey.path.name) == ("set-8px.packed", "set-8px-grey.packed")


def test_an_npz_may_be_grey(tmp_path):
    np.savez(tmp_path / "grey.npz", IMAGES[..., :1])
    # A network with three channels sees grey as three equal ones.
    assert_array_equal(load(tmp_path / "grey.npz").images, np.repeat(IMAGES[..., :1], 3, axis=3))


def test_single_images_grids_and_figures_are_grey(grey_run, pictures, tmp_path):
    call(sample.main, grey_run, *FEW, "--n", 2, "--individual", "--out", tmp_path)
    # This grid was made from the files, and the next one is made from the samples.
    from_files = (tmp_path / "grid.png").read_bytes()
    flags = ["--n", 2, "--strip", "--progressive", "--gif"]
    call(sample.main, grey_run, *FEW, *flags, "--out", tmp_path)
    assert (tmp_path / "grid.png").read_bytes() == from_files

    # These files have colours.
    photos = [pictures / "00001.png", pictures / "00002.png"]
    call(edit.main, "interpolate", *photos, grey_run, *FEW, "--fit", "--out", tmp_path)

    for name in ("grid.png", "00000.png", "00001.png"):
        assert Image.open(tmp_path / name).mode == "L"
    figures = [file for file in tmp_path.iterdir() if file.suffix in (".png", ".gif")]
    assert len(figures) == 7
    for file in figures:
        red, green, blue = Image.open(file).convert("RGB").split()
        assert red == green == blue


def test_a_strip_shows_the_grey_levels_themselves(tmp_path):
    save_strip([np.full((1, 8, 8, 1), 60, np.uint8)], [""], tmp_path / "strip.png")
    # Most of the figure is the image.
    assert np.median(Image.open(tmp_path / "strip.png").convert("L")) == 60


# This is slow, as it imports Gradio.
@pytest.mark.slow
def test_the_page_shows_mixes_and_paints_a_photo_of_colours_in_grey(grey_run, pictures):
    pytest.importorskip("gradio", reason="requirements-demo.txt is not installed")
    from demo import Demo

    def check(*step, outputs=None):
        pass

    saved, denoiser = open_model(grey_run, CPU)
    demo = Demo(saved, ImageSampler(denoiser, OPTIONS, saved.model.image_shape, 0, CPU))
    path = pictures / "00003.png"
    photo = read_image(path, (1, 16, 16), fit=True)[..., 0]
    controls = (0, "ddpm", 3, 1)
    pixels, shown = demo.choose(check, str(path), *controls)
    assert shown.mode == "L"

    # At depth 0 the mixture is the first image if its share is all.
    first, mixture, second = demo.mix(check, 0, 0, str(path), 0, None, 1, *controls)
    assert_array_equal(first, photo)
    assert_array_equal(mixture, photo)
    assert (second.mode, second.size) == ("L", (16, 16))

    # The left quarter stays as it is.
    layer = np.full((512, 512, 4), 255, np.uint8)
    layer[:, :128] = 0
    grid = demo.paint(check, pixels, {"layers": [layer]}, 2, 1, *controls)
    assert grid.mode == "L"
    # The grid is enlarged 6 times. The second image of its first row shows in grey what is painted.
    assert grid.getpixel((6 * 28, 6 * 10)) == 128


@pytest.mark.slow
def test_a_grey_network_is_evaluated_with_a_calibration(grey_run, tmp_path):
    flags = ["--calibrate", "data", "--images", 4, "--device", "cpu"]
    call(evaluate.main, grey_run, *flags, "--out", tmp_path)
    assert len([*tmp_path.glob("*-bpd-*.json")]) == 1


def test_weights_of_other_channels_are_refused_in_a_sentence(
    grey_run, tiny_run, pictures, tmp_path
):
    with pytest.raises(ConfigError, match=r"model\.channels is 1 .* cannot be changed to 3"):
        train_tiny(pictures, tmp_path, "--init", grey_run, "--model.channels", 3)
    with pytest.raises(ConfigError, match=r"model\.channels is 3 .* cannot be changed to 1"):
        train_tiny(pictures, tmp_path, "--init", tiny_run, "--model.channels", 1)
    with pytest.raises(ConfigError, match=r"a resumed run cannot change model\.channels"):
        train_tiny(pictures, tmp_path, "--resume", tiny_run, "--model.channels", 1)

    message = r"its images are \(3, 16, 16\), and the model's are \(1, 16, 16\)"
    with pytest.raises(UserError, match=message):
        call(sample.main, grey_run, *FEW, "--guide", tiny_run, "--guidance", 2)
