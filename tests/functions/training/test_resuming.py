"""What a resumed run keeps, what it may change, and what it says of the rest."""

import json
import math
import shutil

import pytest
import torch

import train
from config import ConfigError
from functions.training import opening
from functions.training.metrics import read_metrics
from functions.training.resuming import locked
from tests.conftest import (
    HELD_OUT,
    call,
    during,
    newest,
    posix,
    refused,
    split_folder,
    terminate,
    words,
)
from tests.kill import assert_same_run
from tests.small_training import same


@pytest.mark.slow
@posix
def test_a_run_with_other_settings_is_still_one_run(unfinished, tmp_path, capsys):
    """Its steps are those of the new settings, also when it is interrupted once more."""
    for flags, message in {
        # It has done 7 steps, and an epoch has five.
        "--diffusion.epochs 1": "finished with 1 epochs of 5 steps, as 7 steps are done",
        "ffhq-full": "a run of 'faces', not of 'ffhq-full'",
    }.items():
        with refused(message, ConfigError):
            call(train, flags, "--resume", unfinished)
    copy = shutil.copytree(unfinished, tmp_path / "copy" / unfinished.name)
    changes = """
        --diffusion.epochs 3
        --diffusion.learning-rate 8e-3
        --diffusion.ema-decay 0.5
        --diffusion.use-augmentation false
        --diffusion.batch-size 4
        --diffusion.gradient-accumulation 2
        --diffusion.validate-every 4
    """
    call(train, "--resume", unfinished, changes)
    printed = capsys.readouterr().out
    for line in (
        "changed: diffusion.learning_rate was 0.002, is now 0.008\n",
        "warning: batch_size was 8, is now 4: no longer bit for bit",
    ):
        assert line in printed
    assert printed.count("changed: ") == 7
    rates = {row["step"]: row["learning_rate"] for row in read_metrics(unfinished / "metrics.csv")}
    assert [*rates] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    # These are half cosines over 10 and over 15 steps, of which the eighth has the index 7.
    earlier = 1e-3 * (1 + math.cos(math.pi * 6 / 10))
    later = 4e-3 * (1 + math.cos(math.pi * 7 / 15))
    assert rates[8] == pytest.approx(later, rel=1e-5)
    jump = f"was {earlier:.3g} in the last step, of a run of 10, and is {later:.3g} in the next, "
    assert jump in printed
    config = json.loads((unfinished / "config.json").read_text())["config"]["diffusion"]
    assert config["epochs"] == 3
    with refused(f"longer: --resume {unfinished} --diffusion.epochs 4$", ConfigError):
        call(train, "--resume", unfinished)

    with pytest.raises(SystemExit, match="75"), during(2, terminate):
        call(train, "--resume", copy, changes)
    call(train, "--resume", copy)
    assert_same_run(unfinished, copy)


def test_resuming_keeps_precision_and_says_what_it_cannot_keep(unfinished, monkeypatch):
    """The run is in float32, and "auto" would be bfloat16 here."""
    monkeypatch.setattr("functions.support.device.cpu_has_bfloat16", lambda: True)
    resume = words("--resume", unfinished, "--diffusion.precision auto")
    with opening.open_run(resume, "") as run:
        printed = run.describe()
    assert "parameters, float32, cpu" in printed
    assert "no longer bit for bit" not in printed

    # Another number of threads adds in another order.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    warning = "warning: threads was 1, is now 2: no longer bit for bit like an uninterrupted run"
    with opening.open_run(resume, "") as run:
        assert warning in run.describe()


def test_deterministic_kernels_are_asked_for_and_only_then(unfinished):
    for wanted in (True, False):
        flags = words("--resume", unfinished, f"--diffusion.deterministic {str(wanted).lower()}")
        with opening.open_run(flags, ""):
            pass
        assert torch.are_deterministic_algorithms_enabled() == wanted
        # With its benchmark cuDNN may take other kernels each time.
        assert torch.backends.cudnn.benchmark != wanted


def test_a_run_goes_on_with_the_same_images_wherever_they_are(unfinished, tiny_run, pictures):
    """A run is refused whose images are fewer, or other ones of the same names."""
    elsewhere = shutil.copytree(pictures, unfinished.parent.parent / "moved")
    resume = ["--resume", unfinished, "--diffusion.dataset-name", elsewhere]
    before = (unfinished / "config.json").read_bytes()
    for name, other, sentence in (
        ("00007.png", "00008.png", "was trained on other pixels or inputs than"),
        ("00007.png", None, "was trained on other images or in another order than"),
        (f"{HELD_OUT[0]:05d}.png", None, "was validated on other images or in "),
    ):
        (elsewhere / name).unlink()
        if other:
            shutil.copy(pictures / other, elsewhere / name)
        with refused(sentence, ConfigError):
            call(train, *resume)
        shutil.copy(pictures / name, elsewhere)
    # The same images in folders of these names are split by another rule.
    sides = split_folder(pictures, elsewhere.with_name("sides"), 40, 10)
    with refused(r"then: by a hash of each name; now: its val images\)", ConfigError):
        call(train, *resume[:-1], sides)
    assert (unfinished / "config.json").read_bytes() == before

    # An unreadable picture is none of them, and its name does not make the others' numbers names.
    (elsewhere / "broken.png").touch()
    call(train, *resume, "--diffusion.max-bad-images 1")
    assert same(newest(unfinished)["ema"], newest(tiny_run)["ema"])


def test_a_run_is_locked_before_its_checkpoint_is_read(unfinished, monkeypatch):
    """So a second process cannot read a checkpoint that the first one then leaves behind."""
    read = opening.intact_checkpoint

    def read_while_locked(folder):
        with refused("already training in this folder"), locked(folder):
            pass
        return read(folder)

    with locked(unfinished), refused("already training in this folder"):
        call(train, "--resume", unfinished)
    monkeypatch.setattr(opening, "intact_checkpoint", read_while_locked)
    call(train, "--resume", unfinished)
