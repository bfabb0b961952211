"""A run that is stopped, killed, damaged or out of space goes on as if nothing had happened, or says why it cannot."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import sample
import train
from config import ConfigError
from functions import run_folder
from functions.checkpoint import CheckpointError, load_checkpoint
from functions.metrics import read_metrics
from functions.stopping import TrainingError
from tests.conftest import ROOT, TINY, call, script
from tests.kill import assert_same_run, kill_and_resume

posix = pytest.mark.skipif(os.name != "posix", reason="signals")


def newest(run):
    return load_checkpoint(run_folder.checkpoints_of(run)[-1])


@pytest.fixture
def unfinished(pictures, tmp_path):
    """The tiny run, stopped by a signal after step 7 of 10, with checkpoints of steps 5 and 7."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="75"):
        during(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
        call(train.main, "faces", "--runs", tmp_path / "runs", "--diffusion.dataset-name", pictures, *TINY)
    return next((tmp_path / "runs").iterdir())


def during(patch, step, act, name="update_ema"):
    """Do something at the `step`-th call of a function of train.py."""
    calls, original = [], getattr(train, name)

    def acting(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            act()
        return original(*args, **kwargs)

    patch.setattr(train, name, acting)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("during_pass", [13, 14], ids=["first pass of a step", "second pass"])
def test_a_step_cut_short_in_its_accumulation_is_done_again(during_pass, pictures, tmp_path):
    """Two passes a step, dropout and augmentation on; cut in step 7, in the second epoch, after the checkpoint of 5."""
    flags = ["faces", "--diffusion.dataset-name", pictures, *TINY, "--diffusion.batch-size", 4, "--model.dropout", 0.1,
             "--diffusion.gradient-accumulation", 2, "--diffusion.max-rotation", 3]  # fmt: skip
    call(train.main, *flags, "--runs", tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        during(patch, during_pass, interrupt, "noise_prediction_loss")
        call(train.main, *flags, "--runs", tmp_path / "cut")
    call(train.main, "faces", "--resume", "--runs", tmp_path / "cut")
    assert_same_run(*(tmp_path / "straight").iterdir(), *(tmp_path / "cut").iterdir())


@posix
def test_killed_at_random_moments(tmp_path):
    print(kill_and_resume(tmp_path, times=3))


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_finishes_the_step_saves_and_exits_with_75(name, tiny_run, pictures, tmp_path, capsys):
    """The signal comes in the middle of step 7; the run stops after it and then goes on as if never stopped."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        during(patch, 7, lambda: signal.raise_signal(getattr(signal, name)))
        call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY)
    assert stop.value.code == 75
    assert signal.getsignal(signal.SIGTERM) == before
    run = next(tmp_path.iterdir())
    assert newest(run)["run"]["step"] == 7
    assert f"stopped by {name}, saved; go on with: python train.py --resume {run}" in capsys.readouterr().out
    call(train.main, "--resume", run)
    assert_same_run(tiny_run, run)


@posix
def test_a_second_signal_ends_the_process_at_once():
    """At once means a second later: a scheduler's signal to all, and torchrun's for the same reason, are one."""
    code = """
import signal, time
from functions.stopping import StopSignals
with StopSignals():
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    print("one", flush=True)
    time.sleep(1.1)
    signal.raise_signal(signal.SIGINT)
    print("two")
"""
    result = script("-c", code)
    assert result.returncode == 130
    assert result.stdout == "one\n"


@posix
def test_resume_auto_goes_on_or_starts_loudly(unfinished, tiny_run, tmp_path, capsys):
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert list(unfinished.parent.iterdir()) == [unfinished]
    assert_same_run(tiny_run, unfinished)
    flags = ["--diffusion.dataset-name", newest(unfinished)["config"]["diffusion"]["dataset_name"], *TINY]
    capsys.readouterr()
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent, *flags)  # a finished run is no reason
    assert "WARNING: NOTHING TO RESUME" in capsys.readouterr().err
    assert len(list(unfinished.parent.iterdir())) == 2
    with pytest.raises(CheckpointError, match="no unfinished run"):
        call(train.main, "faces", "--resume", "--runs", unfinished.parent)


@posix
@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit"])
def test_a_damaged_newest_checkpoint_is_passed_over_loudly(damage, unfinished, tiny_run, capsys):
    path = run_folder.checkpoints_of(unfinished)[-1]
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 8
    path.write_bytes(content[: {"truncated": len(content) // 3, "empty": 0}.get(damage, len(content))])
    capsys.readouterr()
    call(sample.main, unfinished, "--n", 1, "--steps", 1)
    printed = capsys.readouterr()
    assert f"WARNING: DAMAGED CHECKPOINT: {path}" in printed.err
    assert "after 5 of 10 steps" in printed.out
    with pytest.raises(CheckpointError, match=path.name):  # named itself, it is not exchanged for another
        call(sample.main, path, "--n", 1, "--steps", 1)
    call(train.main, "--resume", unfinished)
    assert f"WARNING: DAMAGED CHECKPOINT: {path}" in capsys.readouterr().err
    assert_same_run(tiny_run, unfinished)


@posix
def test_a_damaged_last_checkpoint_or_config_is_no_reason_to_start_afresh(unfinished, tiny_run, pictures, capsys):
    (unfinished / "config.json").write_text("{")
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert json.loads((unfinished / "config.json").read_text())["experiment"] == "faces"  # made anew
    last = run_folder.checkpoints_of(unfinished)[-1]
    assert run_folder.step_of(last) == 10
    last.write_bytes(last.read_bytes()[:-100])
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert "DAMAGED CHECKPOINT" in capsys.readouterr().err
    assert list(unfinished.parent.iterdir()) == [unfinished]
    assert_same_run(tiny_run, unfinished)


@posix
def test_a_damaged_row_of_metrics_is_left_out_loudly(unfinished, capsys):
    with open(unfinished / "metrics.csv", "ab") as file:
        file.write(b"\xff\xfe,\n")
    call(train.main, "--resume", unfinished)
    assert "metrics.csv: line 6 is damaged" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(unfinished / "metrics.csv")] == [2, 4, 5, 6, 8, 10]


@posix
def test_a_run_made_longer_goes_on_by_itself(unfinished, pictures):
    """Given more epochs and stopped before its next checkpoint: its newest says already how long it is."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        during(patch, 1, interrupt)
        call(train.main, "--resume", unfinished, "--diffusion.epochs", 3)
    call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert newest(unfinished)["run"]["step"] == 15


@posix
def test_a_grid_that_the_stop_left_no_time_for_is_drawn_on_resuming(pictures, tiny_run, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="75"):
        during(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))  # step 5 is due for a grid
        call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY)
    run = next(tmp_path.iterdir())
    assert not list((run / "samples").iterdir())
    call(train.main, "--resume", run)
    assert_same_run(tiny_run, run)


@posix
def test_no_sound_checkpoint_is_an_error_and_no_fresh_start(unfinished):
    for path in run_folder.checkpoints_of(unfinished):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file is empty"):
        call(train.main, "faces", "--resume", "auto", "--runs", unfinished.parent)
    assert list(unfinished.parent.iterdir()) == [unfinished]


def test_checkpoints_by_time_and_kept_for_good(pictures, tmp_path):
    """By steps none is due before the last; a time that is always over makes one after every step."""
    call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY,
         "--diffusion.checkpoint-every", 1000, "--diffusion.checkpoint-minutes", 1e-9,
         "--diffusion.keep-checkpoints", 1, "--diffusion.keep-every", 4)  # fmt: skip
    saved = run_folder.checkpoints_of(next(tmp_path.iterdir()))
    assert [run_folder.step_of(path) for path in saved] == [4, 8, 10]


@posix
def test_two_trainings_in_one_folder(unfinished):
    """The second of two real processes is refused; the first is not disturbed."""
    command = [sys.executable, ROOT / "train.py", "--resume", unfinished, "--diffusion.epochs", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        assert any("goes to" in line for line in first.stdout)
        refused = script("train.py", "--resume", unfinished)
        assert refused.returncode == 2
        assert f"error: {unfinished}: process {first.pid} is training in this folder already\n" == refused.stderr
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75


FULL_DISK = """
mount -t tmpfs -o size=4m none {folder} || exit 99
cp -r {run} {folder}/
{python} {root}/train.py --resume {folder}/{name} --diffusion.epochs 20 --diffusion.keep-checkpoints 100
code=$?
cp -r {folder}/{name} {back}
exit $code
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a small file system of its own")
def test_a_full_disk(unfinished, tmp_path):
    """On a file system of 4 MB that fills up with checkpoints of 1.3 MB."""
    (tmp_path / "small").mkdir()
    commands = FULL_DISK.format(folder=tmp_path / "small", run=unfinished, name=unfinished.name, root=ROOT,
                                python=sys.executable, back=tmp_path / "back")  # fmt: skip
    result = subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", commands], cwd=ROOT, text=True,
                            capture_output=True, timeout=300, check=False)  # fmt: skip
    if result.returncode == 99 or "unshare" in result.stderr:
        pytest.skip("may not mount a file system here")
    assert result.returncode == 2
    last = run_folder.checkpoints_of(tmp_path / "back")[-1]
    assert "cannot be written to: No space left on device. Last good checkpoint: " in result.stderr
    assert f"checkpoints/{last.name}. When that is mended, go on with: python train.py --resume " in result.stderr
    assert "Traceback" not in result.stderr
    assert load_checkpoint(last)["run"]["step"] >= 7
    assert not list((tmp_path / "back").rglob(".*.tmp"))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the size of a file")
def test_a_checkpoint_beyond_a_quota(unfinished):
    """The system refuses files above 100 kB, as a quota does; the checkpoints are larger."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    before = {path: path.read_bytes() for path in run_folder.checkpoints_of(unfinished)}
    result = subprocess.run([sys.executable, ROOT / "train.py", "--resume", unfinished], preexec_fn=limit, text=True,
                            capture_output=True, timeout=300, check=False)  # fmt: skip
    assert result.returncode == 2
    assert f"cannot be written to: File too large. Last good checkpoint: {list(before)[-1]}" in result.stderr
    assert "Traceback" not in result.stderr
    assert {path: path.read_bytes() for path in run_folder.checkpoints_of(unfinished)} == before


@posix
def test_what_a_resumed_run_may_change(unfinished, capsys):
    with pytest.raises(ConfigError, match=r"cannot change diffusion\.learning_rate, model\.base_dim"):
        call(train.main, "--resume", unfinished, "--diffusion.learning-rate", "1e-3", "--model.base-dim", "16")
    with pytest.raises(ConfigError, match=r"cannot change diffusion\.batch_size"):
        call(train.main, "--resume", unfinished, "--diffusion.batch-size", "4")
    with pytest.raises(ConfigError, match="a run of 'faces', not of 'ffhq-full'"):
        call(train.main, "ffhq-full", "--resume", unfinished)
    capsys.readouterr()
    call(train.main, "--resume", unfinished, "--diffusion.batch-size", 4, "--diffusion.gradient-accumulation", 2,
         "--diffusion.epochs", 3)  # fmt: skip
    printed = capsys.readouterr().out
    assert "changed: diffusion.epochs was 2, is now 3" in printed
    assert "changed: diffusion.batch_size was 8, is now 4" in printed
    assert "note: batch_size was 8, is now 4: no longer bit for bit" in printed
    assert "note: model.base_dim stays 8, as the run was started; config.py has 32" in printed
    assert newest(unfinished)["run"]["step"] == 15
    with pytest.raises(ConfigError, match="finished"):
        call(train.main, "--resume", unfinished)


def test_resuming_keeps_precision_and_says_what_it_cannot_keep(pictures, tmp_path, monkeypatch, capsys):
    """A run started with "auto" where that is bfloat16 goes on in bfloat16 where it is not."""
    monkeypatch.setattr("functions.device.cpu_has_bfloat16", lambda: True)
    call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY,
         "--diffusion.precision", "auto")  # fmt: skip
    run = next(tmp_path.iterdir())
    monkeypatch.setattr("functions.device.cpu_has_bfloat16", lambda: False)
    capsys.readouterr()
    call(train.main, "--resume", run, "--diffusion.epochs", 3)
    assert "no longer bit for bit" not in capsys.readouterr().out
    assert newest(run)["run"]["arithmetic"]["precision"] == "bfloat16"
    torch.set_num_threads(2)
    call(train.main, "--resume", run, "--diffusion.epochs", 4)
    assert "note: threads was 1, is now 2: no longer bit for bit as if never stopped" in capsys.readouterr().out


def test_deterministic_kernels_are_asked_for_and_only_then(pictures, tmp_path):
    for value in ("true", "false"):
        call(train.main, "faces", "--dry-run", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY,
             "--diffusion.deterministic", value)  # fmt: skip
        assert torch.are_deterministic_algorithms_enabled() == (value == "true")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_deterministic_run_on_the_gpu_resumes_bit_for_bit(precision, pictures, tmp_path):
    flags = ["faces", "--diffusion.dataset-name", pictures, *TINY, "--device", "cuda", "--diffusion.deterministic",
             "true", "--diffusion.precision", precision]  # fmt: skip
    call(train.main, *flags, "--runs", tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="75"):
        during(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
        call(train.main, *flags, "--runs", tmp_path / "cut")
    call(train.main, "faces", "--resume", "--runs", tmp_path / "cut", "--device", "cuda")
    assert_same_run(*(tmp_path / "straight").iterdir(), *(tmp_path / "cut").iterdir())


def test_only_the_run_with_the_same_images_is_resumed(pictures, tmp_path):
    copy = tmp_path / "pictures"
    shutil.copytree(pictures, copy)
    call(train.main, "faces", "--runs", tmp_path / "runs", "--diffusion.dataset-name", copy, *TINY)
    run = next((tmp_path / "runs").iterdir())
    next(copy.glob("0*.png")).unlink()
    before = (run / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="other images"):
        call(train.main, "--resume", run, "--diffusion.epochs", "3")
    assert (run / "config.json").read_bytes() == before
    with pytest.raises(CheckpointError, match="not a run folder"):  # a file in it is not the run
        call(train.main, "--resume", next((run / "checkpoints").iterdir()))


LIMITED = """
import resource, sys, train
from functions.memory import STATUS, kilobytes
from tests.conftest import call
limit = kilobytes(STATUS)["VmSize"] + {spare}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
{before}
with train.plain_errors(train.TrainingError):
    call(train.main, *sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process's memory")
@pytest.mark.parametrize("foreseen", [True, False])
def test_out_of_memory_says_what_fits_and_that_fits(foreseen, pictures, tmp_path):
    """With 1.6 GB of address space to spare. Where the estimate does not foresee it, PyTorch's error is caught."""
    flags = ["faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY, "--model.image-size", 64,
             "--model.lowest-resolution-size", 16, "--model.dim-multiply", "1,2,4", "--model.base-dim", 48,
             "--model.norm-groups", 8, "--diffusion.batch-size", 24, "--diffusion.epochs", 1,
             "--diffusion.validation-samples", 1, "--diffusion.grid-images", 1]  # fmt: skip
    before = "" if foreseen else "import functions.memory; functions.memory.SURELY_TOO_MUCH = 0"
    code = LIMITED.format(spare=1_600_000_000, before=before)
    failed = script("-c", code, *flags)
    assert failed.returncode == 2, failed.stderr
    assert "out of memory: batch_size = 24 takes about" in failed.stderr
    assert ("can't allocate memory" in failed.stderr) != foreseen
    advice = failed.stderr.split("keeps the effective batch of 24: ")[1].split()[:4]
    assert int(advice[1]) * int(advice[3]) == 24
    if foreseen:
        return
    again = script("-c", code, *flags, *advice)
    assert again.returncode == 0, again.stderr


def test_the_log_goes_to_the_disk_before_the_checkpoint(pictures, tmp_path, monkeypatch):
    """After a power cut a checkpoint may not be ahead of metrics.csv: that would leave a gap."""
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (order.append((name, *a)), original(*a)))
    flush = train.BookKeeper.save
    monkeypatch.setattr(train.BookKeeper, "save", lambda self, done: (order.append(("save", done)), flush(self, done)))
    call(train.main, "faces", "--runs", tmp_path, "--diffusion.dataset-name", pictures, *TINY)
    saves = [i for i, (what, *_) in enumerate(order) if what == "save"]
    assert len(saves) == 2
    for i in saves:
        what = [name for name, *_ in order[i + 1 : i + 5]]
        assert what == ["fsync", "fsync", "replace", "fsync"]  # metrics, checkpoint, its name, the folder
        assert str(order[i + 3][-1]).endswith(".pt")


def test_metrics_and_config_of_a_resumed_run(unfinished):
    call(train.main, "--resume", unfinished, "--diffusion.epochs", 3)
    assert [row["step"] for row in read_metrics(unfinished / "metrics.csv")] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    assert json.loads((unfinished / "config.json").read_text())["diffusion"]["epochs"] == 3


def test_a_run_that_cannot_be_finished_now_is_not_lost(unfinished, monkeypatch):
    """An error in a sample grid: the checkpoint of the same step was written before it."""
    monkeypatch.setattr("functions.book_keeping.save_grid", lambda *a: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(TrainingError, match=r"I/O error\. Last good checkpoint: .*step-00000010\.pt"):
        call(train.main, "--resume", unfinished)
    assert newest(unfinished)["run"]["step"] == 10
