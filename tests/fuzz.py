"""Spoil files and values by the thousand and read them: each gives a clear error of a documented type, or the truth.

    python -m tests.fuzz                        all kinds, 500 cases each
    python -m tests.fuzz --count 5000 zip npz   more of some
    python -m tests.fuzz zip --only 1234        one case again, with its traceback

A case is a function of (seed, kind, number). In each one: no undocumented error, no message without the file's (or the
field's) name, no wrong result, the file as it was, nothing new beside it but a data set's packed file, not above 10
seconds, and no more than 2 GB of memory. tests/test_fuzz.py does the same with few.
"""

import argparse
import hashlib
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch

from config import ConfigError, DiffusionConfig, ModelConfig
from tests.fuzz_configs import Configs
from tests.fuzz_images import Arrays, Images, Zips
from tests.fuzz_kinds import Checkpoints, Fault

KINDS = {kind.name: kind for kind in (Checkpoints, Configs, Images, Zips, Arrays)}
SECONDS, EXTRA_BYTES, LONGEST_MESSAGE = 10, 2 * 2**30, 700
IN_MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # spares a disk the flushing of many small files
FIELDS = [field.name for config in (DiffusionConfig, ModelConfig) for field in fields(config)]
PARTS = ["argument '", "diffusion", "DiffusionConfig", "model", "ModelConfig"]  # what from_dict names
LISTED_FAULTS = 20


class TooSlow(BaseException):
    """Not an Exception, so that no reader takes it for an error of the file."""


@contextmanager
def time_limit():
    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_case(kind, seed: int, number: int) -> str:
    """What came of one case, in words; `Fault` for what must not come."""
    rng = random.Random(f"{seed} {kind.name} {number}")
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        folder = Path(folder)
        case = kind.make(folder, rng)
        before = contents_of(folder)
        try:
            with time_limit():
                outcome = kind.judge(case, kind.read(case))
        except kind.errors as error:
            check_error(error, case.path if case.path != folder else None)
            outcome = f"refused: {type(error).__name__}"
        except TooSlow:
            raise Fault(f"it took more than {SECONDS} seconds") from None
        except Fault:
            raise
        except Exception as error:
            raise Fault(f"an undocumented {type(error).__name__}: {str(error)[:200]}") from error
        if contents_of(folder) != before:
            raise Fault("the file was changed, or another lies beside it")
        return outcome


def contents_of(folder: Path) -> dict[str, str]:
    """All files and a hash of what they hold; of packed images only what should not be left over."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if ".packed" not in path.name or path.name.endswith(".tmp")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def check_error(error: Exception, path: Path | None) -> None:
    """Whether an error is one that a person can act on."""
    message = str(error)
    names = [path.name, str(path.parent)] if path and not isinstance(error, ConfigError) else FIELDS + PARTS
    if not any(name in message for name in names):
        raise Fault(f"a message that names neither file nor field: {message[:200]}") from error
    if len(message) > LONGEST_MESSAGE or message.count("\n") > 1:
        raise Fault(f"a message of {len(message)} characters: {message[:100]}") from error
    cause = error
    while cause := cause.__cause__ or cause.__context__:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            raise Fault("it ran out of memory") from error


def work(name: str, seed: int, numbers: range, current, results) -> None:
    """Run cases in a process of limited memory, which says in `current` where it is in case it dies."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        kind = KINDS[name](Path(folder))
    for number in numbers:
        current.value = number
        try:
            results.put((number, run_case(kind, seed, number), None))
        except Fault as fault:
            results.put((number, "FAULT", f"{fault}{traceback.format_exc() if len(numbers) == 1 else ''}"))
    results.put((None, None, None))


def run_kind(name: str, seed: int, numbers: range) -> tuple[Counter, list[str]]:
    """The outcomes of many cases and how often each came, and the faults."""
    context = multiprocessing.get_context("spawn")
    outcomes, faults = Counter(), []
    while numbers:
        current, results = context.Value("q", -1), context.SimpleQueue()
        process = context.Process(target=work, args=(name, seed, numbers, current, results))
        process.start()
        done = 0
        while True:
            if results.empty() and not process.is_alive() and results.empty():  # killed: by a crash in C
                faults.append(f"{name} {current.value}: the process died ({process.exitcode})")
                outcomes["FAULT"] += 1
                numbers = range(current.value + 1, numbers.stop)
                break
            if results.empty():
                process.join(0.01)
                continue
            number, outcome, fault = results.get()
            if number is None:
                numbers = range(0)
                break
            done += 1
            outcomes[outcome] += 1
            if fault:
                faults.append(f"{name} {number}: {fault}")
        process.join()
    return outcomes, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all when left out")
    parser.add_argument("--count", type=int, default=500, metavar="N", help="cases of each kind (500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case alone")
    args = parser.parse_args()
    if not {*args.kinds} <= {*KINDS}:
        parser.error(f"the kinds are {', '.join(KINDS)}")
    numbers, failed = range(args.count) if args.only is None else range(args.only, args.only + 1), False
    for name in args.kinds or KINDS:
        outcomes, faults = run_kind(name, args.seed, numbers)
        print(f"{name}: {outcomes.total():,} cases", flush=True)
        for outcome, count in outcomes.most_common():
            print(f"  {count:6,} {outcome}")
        print("".join(f"  FAULT {fault}\n" for fault in faults[:LISTED_FAULTS]), end="", flush=True)
        failed |= bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
