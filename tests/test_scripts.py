"""train.py and sample.py as a user calls them: a whole run, and what flags change in it."""

import json
from dataclasses import fields

import pytest

import sample
import train
from config import DiffusionConfig, ModelConfig
from functions.support.command_line import field_comments
from functions.training.metrics import read_metrics
from tests.conftest import ROOT, TINY, call, linux, script


def test_a_run_folder_holds_everything(tiny_run):
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["config"]["model"]["base_dim"] == 8
    assert (config["run"]["experiment"], config["run"]["total_steps"]) == ("faces", 10)

    rows = read_metrics(tiny_run / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 10]
    for column in ("val_loss", "val_loss_ema"):
        assert [row["step"] for row in rows if row[column] is not None] == [5, 10]

    for folder, ending in (("samples", "png"), ("checkpoints", "safetensors")):
        # Other tests sample from this run, which puts other names among its samples.
        names = sorted(path.name for path in (tiny_run / folder).glob("step-????????.*"))
        assert names == [f"step-00000005.{ending}", f"step-00000010.{ending}"]
    assert (tiny_run / "losses.png").stat().st_size > 1000
    assert list((tiny_run / "tensorboard").iterdir())


@pytest.mark.slow
def test_without_ema_the_raw_weights_are_used_and_it_is_said(trained, capsys):
    run = trained("--diffusion.ema-decay 0 --diffusion.epochs 1")
    capsys.readouterr()
    call(sample, "--runs", run.parent, "--n 1 --steps 1")
    assert "raw weights" in capsys.readouterr().out


@pytest.mark.slow
def test_a_script_works_from_another_folder(pictures, tmp_path):
    flags = ["--diffusion.dataset-name", pictures, TINY]
    ended = script(ROOT / "train.py", *flags, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "epoch 2/2" in ended.stderr
    assert list((tmp_path / "runs").glob("faces-*/checkpoints/step-00000010.safetensors"))


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, setting, spin_count",
    [
        *((name, {}, 10_000) for name in ("train", "sample", "sampleFFHQ", "edit", "demo")),
        ("evaluate", {"GOMP_SPINCOUNT": "77"}, 77),
        ("evaluate", {"OMP_WAIT_POLICY": "PASSIVE"}, 0),
    ],
)
def test_threads_spin_shortly_unless_the_environment_says_more(
    name, setting, spin_count, monkeypatch
):
    # A script that ran in this process has set it.
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    for key, value in {"OMP_DISPLAY_ENV": "VERBOSE", **setting}.items():
        monkeypatch.setenv(key, value)
    # OpenMP itself prints what it has read.
    assert f"GOMP_SPINCOUNT = '{spin_count}'" in script(f"{name}.py", "--help").stderr


@pytest.mark.slow
def test_modules_of_other_packages_on_the_path_are_not_taken(tmp_path, monkeypatch):
    for package in ("models", "data", "functions"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("train.py", "data/prepare.py"):
        ended = script(ROOT / name, "--help", cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("config_class", [DiffusionConfig, ModelConfig])
def test_every_field_is_a_flag_with_a_comment(config_class, capsys):
    """Of a field with choices, the help shows all of these."""
    with pytest.raises(SystemExit):
        call(train, "--help")

    printed = capsys.readouterr().out.split()
    comments = field_comments(config_class)
    for field in fields(config_class):
        assert comments[field.name].endswith("."), field.name
        if "no_flag" not in field.metadata:
            flag = next(
                word for word in printed if word.endswith(f".{field.name.replace('_', '-')}")
            )
            choices = "|".join(map(str, field.metadata.get("choices", [])))
            assert printed[printed.index(flag) + 1].startswith(choices), field.name
