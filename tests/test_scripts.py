"""train.py and sample.py as a user calls them: a whole run, and what flags change in it."""

import inspect
import json
import re
import signal

import pytest

import edit
import evaluate
import sample
import sampleFFHQ
import train
from data import prepare
from functions.denoiser import OBJECTIVES
from functions.noise_scheduler import BETA_SCHEDULES
from functions.optimizers import LR_SCHEDULES, OPTIMIZERS
from functions.samplers import SAMPLERS, VARIANCES
from functions.sampling.settings import SamplingConfig
from functions.support.command_line import read_flags
from functions.timesteps import SPACINGS
from functions.training.metrics import read_metrics
from models.networks import NETWORKS
from tests.conftest import ROOT, TINY, call, linux, posix, script


def test_a_run_folder_holds_everything(tiny_run):
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["run"]["total_steps"] == 10

    rows = read_metrics(tiny_run / "metrics.csv")
    validated = [row["step"] for row in rows if row["val_loss"] and row["val_loss_ema"]]
    assert ([row["step"] for row in rows], validated) == ([2, 4, 5, 6, 8, 10], [5, 10])

    for folder in ("samples", "checkpoints"):
        # Other tests sample from this run, which puts other names among its samples.
        names = [path.stem for path in sorted((tiny_run / folder).glob("step-????????.*"))]
        assert names == ["step-00000005", "step-00000010"]
    assert (tiny_run / "losses.png").stat().st_size > 1000
    assert list((tiny_run / "tensorboard").iterdir())


@pytest.mark.slow
def test_without_ema_the_raw_weights_are_used_and_it_is_said(trained, capsys):
    run = trained("--diffusion.ema-decay 0 --diffusion.epochs 1")
    capsys.readouterr()
    call(sample, "--runs", run.parent, "--n 1 --steps 1")
    assert "raw weights" in capsys.readouterr().out


@linux
@pytest.mark.slow
def test_a_script_works_from_another_folder(pictures, tmp_path, monkeypatch):
    """Even if packages there have the names of ours; and its threads spin shortly."""
    for package in ("models", "data", "functions", "extras"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # A script that ran in this process has set it.
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    flags = ["--diffusion.dataset-name", pictures, TINY]
    ended = script(ROOT / "train.py", *flags, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "epoch 2/2" in ended.stderr
    # OpenMP itself prints what it has read.
    assert "GOMP_SPINCOUNT = '10000'" in ended.stderr
    assert list((tmp_path / "runs").glob("faces-*/checkpoints/step-00000010.safetensors"))


@pytest.mark.parametrize(
    "name, setting, spin_count",
    [
        *((name, {}, "10000") for name in ("train", "sample", "sampleFFHQ", "edit", "demo")),
        ("evaluate", {"GOMP_SPINCOUNT": "77"}, "77"),
        ("evaluate", {"OMP_WAIT_POLICY": "PASSIVE"}, ""),
    ],
)
def test_spinning_is_limited_before_torch_is_imported(
    name, setting, spin_count, tmp_path, monkeypatch
):
    """Unless the environment says more. A torch that ends with what it finds stands in for ours."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    for key, value in {"PYTHONPATH": str(tmp_path), **setting}.items():
        monkeypatch.setenv(key, value)
    torch = "import os\nraise SystemExit(os.getenv('GOMP_SPINCOUNT'))"
    (tmp_path / "torch.py").write_text(torch)
    assert script(f"{name}.py").stderr.strip() == spin_count


@posix
@pytest.mark.parametrize("name", ["train", "sample", "sampleFFHQ", "edit", "evaluate", "demo"])
def test_ctrl_c_ends_the_imports_in_one_word(name, tmp_path, monkeypatch):
    """A torch that sends the signal stands in for ours, and would catch an exception."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines = "import os, signal", "try:", "    os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "torch.py").write_text("\n".join([*lines, "except BaseException:", "    pass"]))
    # These tests may run in a job in the background, which ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = script(f"{name}.py")
    signal.signal(signal.SIGINT, before)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("script", [train, sample, edit, evaluate, sampleFFHQ, prepare])
def test_help_fits_80_columns_and_says_a_sentence_of_each_flag(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    verbs = {edit: (*edit.VERBS, "enlarge"), evaluate: evaluate.VERBS}.get(script, [""])
    for verb in verbs:
        with pytest.raises(SystemExit, match="0"):
            call(script, verb, "--help")
        # The first line may say that there is no run.
        printed = re.sub("^runs: .*", "", capsys.readouterr().out)
        assert max(map(len, printed.splitlines())) <= 80
        text = " ".join(printed.split())
        assert all(before.endswith(".") for before in text.split(" Default: ")[:-1])


NAMED = {
    "objective": OBJECTIVES,
    "optimizer": OPTIMIZERS,
    "lr-schedule": LR_SCHEDULES,
    "beta-schedule": BETA_SCHEDULES,
    "grid-sampler": SAMPLERS,
}
NAMED = {f"diffusion.{name}": table for name, table in NAMED.items()} | {"model.network": NETWORKS}
OF_SAMPLING = {"sampler": SAMPLERS, "spacing": SPACINGS, "variance": VARIANCES}


@pytest.mark.parametrize("script, tables", [(train, NAMED), (sample, OF_SAMPLING)])
def test_the_help_of_a_field_names_all_rows_of_its_table(script, tables, capsys):
    """The comments of config.py, which imports no table, name them."""
    with pytest.raises(SystemExit):
        call(script, "--help")
    text = capsys.readouterr().out.partition("usage")[2]
    for flag, table in tables.items():
        help_text = re.search(rf"\n  --{flag} (.*?)Default", text, re.DOTALL)[1]
        for name in table:
            assert name in help_text


def test_help_shows_the_range_of_each_number(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        call(train, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for flag, ends in (
        ("epochs", "Default: 25; from 1 to 1,000,000."),
        ("clip-grad-norm", "Default: 1.0; 0 or more."),
        ("max-bad-images", "Default: 0; 0 or more."),
    ):
        assert text.partition(f"--diffusion.{flag} ")[2].partition(" --diffusion")[0].endswith(ends)


def test_a_field_without_a_comment_is_a_flag_without_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(inspect, "getsource", lambda _: "")
    with pytest.raises(SystemExit, match="0"):
        call(train, "--help")
    assert "--diffusion.epochs INT" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", (False, "30")),
        ("--individual", (True, "30")),
        ("--individual True --individual false", (False, "30")),
        ("--guide 30 --individual true", (True, 30)),
    ],
)
def test_a_bool_needs_no_value_and_a_default_is_not_read_as_a_word(flags, expected):
    """A file of the name 30 is another guide than the step 30."""
    begun = sample.SampleFlags(sampling=SamplingConfig(model="run", guide="30"))
    flags = read_flags(begun, flags.split())
    assert (flags.individual, flags.sampling.guide) == expected
