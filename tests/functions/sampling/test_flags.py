"""Samplers by flag: every one through the script, the options as texts, and what is refused."""

import argparse

import pytest
from PIL import Image

import sample
from functions.noise_scheduler import NoiseScheduler
from functions.sampling.options import SAMPLERS, SamplerOptions, add_sampling_flags
from functions.support.errors import UserError
from tests.conftest import ROOT, call, script


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
def test_every_sampler_through_the_script(tiny_run, tmp_path, capsys, sampler, spacing):
    call(sample.main, tiny_run, "--sampler", sampler, "--steps", 4, "--spacing", spacing, "--n", 2, "--progressive",
         "--strip", "--eps-scale", 1.001, "--out", tmp_path)  # fmt: skip
    assert f"{sampler}, 4 steps, {spacing}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "progressive.png", "strip.png"]


def test_options_as_texts():
    for options, text, slug in (
        (SamplerOptions(), "ddpm, all steps, variance small", "ddpm"),
        (SamplerOptions(steps=50, variance="large"), "ddpm, 50 steps, trailing, variance large", "ddpm50-large"),
        (SamplerOptions("dpm++", 20), "dpm++, 20 steps, logsnr, eta 1.0", "dpmpp20"),
        (SamplerOptions("dpm++", 9, "trailing", eta=0.0), "dpm++, 9 steps, trailing, eta 0.0", "dpmpp9-trailing-eta0"),
        (SamplerOptions("ddim", 10, eta=0.5), "ddim, 10 steps, trailing, eta 0.5", "ddim10-eta0.5"),
        (SamplerOptions("ipndm", 10, eps_scale=1.005), "ipndm, 10 steps, trailing, eps / 1.005", "ipndm10-eps1.005"),
    ):
        assert (str(options), options.slug) == (text, slug)


def test_without_flags_the_options_are_the_defaults():
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    assert SamplerOptions.from_args(parser.parse_args([])) == SamplerOptions()
    flags = ["--sampler", "ddim", "--steps", "7", "--eta", "0.5", "--spacing", "logsnr", "--eps-scale", "1.01"]
    assert SamplerOptions.from_args(parser.parse_args(flags)) == SamplerOptions("ddim", 7, "logsnr", 1.01, eta=0.5)


def test_the_rest_of_the_way_is_done_in_the_steps_of_the_whole():
    scheduler = NoiseScheduler(1000)
    options = SamplerOptions("dpm++", 20, "trailing")
    assert options.times(scheduler, 999) == options.times(scheduler)
    assert options.times(scheduler, 249) == [249, 199, 149, 99, 49, -1]
    assert options.times(scheduler, 260) == [260, 249, 199, 149, 99, 49, -1]
    assert options.times(scheduler, 0) == [0, -1]
    assert SamplerOptions().times(scheduler, 2) == [2, 1, 0, -1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampler", "euler"], "invalid choice: 'euler' (choose from"),
        (["--spacing", "cosine"], "invalid choice: 'cosine' (choose from"),
        (["--variance", "medium"], "invalid choice: 'medium' (choose from"),
        (["--sampler", "ipndm", "--eta", "0.5"], "--eta is an option of ddim and dpm++, not of ipndm"),
        (["--steps", "50", "--eta", "0"], "--eta is an option of ddim and dpm++, not of ddpm"),
        (["--sampler", "ddim", "--variance", "large"], "--variance is an option of ddpm, not of ddim"),
        (["--eps-scale", "0.9"], "--eps-scale is 0.9; it can be 1"),
        (["--eps-scale", "-1"], "--eps-scale is -1; it can be 1"),
        (["--eps-scale", "inf"], "--eps-scale is inf; it can be 1"),
        (["--eps-scale", "nan"], "--eps-scale is nan; it can be 1"),
        (["--n", "101"], "a grid shows 100 images at most; for 101 add --individual"),
        (["--interpolate", "1"], "--interpolate: expected 2 arguments"),
        (["--depths", "0.5,2"], "'2' is not a number from 0 to 1"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(flags, message, tmp_path, capsys):
    """Refused before any checkpoint is looked for."""
    from functions.support.command_line import plain_errors

    with pytest.raises(SystemExit) as ended, plain_errors():
        call(sample.main, "no/such/run", *flags, "--out", tmp_path / "out")
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_images_that_do_not_fit_are_refused(tiny_run, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((pictures / "00000.png").read_bytes()[:60])
    Image.new("RGB", (16, 20)).save(tmp_path / "tall.png")
    right = tmp_path / "right.png"
    Image.new("RGB", (16, 16)).save(right)
    for flags, message in (
        (["--variations", pictures / "00000.png"], "00000.png is 20x20 pixels, the model's images are 16x16; --fit"),
        (["--interpolate", right, tmp_path / "tall.png"], "tall.png is 16x20 pixels"),
        (["--interpolate", right, broken], "broken.png: "),
        (["--variations", tmp_path / "none.png"], "No such file"),
        (["--variations", ROOT / "README.md"], "README.md: not a PNG"),
        (["--variations", tmp_path], "Is a directory"),
        (["--sampler", "ipndm", "--steps", 101], "steps is 101; a model with 100 timesteps takes 1 to 100"),
    ):
        with pytest.raises((UserError, OSError), match=message.replace("[", r"\[")):
            call(sample.main, tiny_run, *flags, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_refusal_of_rank_0_ends_both_processes_with_one_line(tiny_run, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sample.py"]
    (tmp_path / "00000.png").touch()
    two = script(*torchrun, tiny_run, "--individual", "-n", 2, "--device", "cpu", "--out", tmp_path)
    assert two.returncode != 0
    assert two.stderr.count("holds 00000.png but no samples.json") == 1
    assert [path.name for path in tmp_path.glob("*.png")] == ["00000.png"]
