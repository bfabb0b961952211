"""What a script does before it imports PyTorch, which takes seconds. This imports no torch."""

import os
import signal
import sys


def prepare() -> None:
    """Let Ctrl-C end the imports in one word, and limit the spinning of threads."""
    # A shell's background job ignores the signal.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
    limit_spinning()


def interrupted(*_) -> None:
    """End the process as `run_script` does, which takes over from here after the imports."""
    print("interrupted", file=sys.stderr, flush=True)
    # Shells use this status for Ctrl-C. An exception could be caught by what is imported now.
    os._exit(130)


def limit_spinning() -> None:
    """Let threads that wait give their core back soon, unless the environment says otherwise.

    OpenMP, which runs these threads, reads this when torch is imported. A thread waits for the
    others many times in a step. By default it tries for milliseconds before it sleeps, and takes
    the core from the very thread that it waits for if another program has the other cores.
    Sleeping at once is slow on idle cores (docs/speed.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        # The first is read by GNU's OpenMP, in tries; the second by Intel's and LLVM's, in
        # milliseconds.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        os.environ.setdefault("KMP_BLOCKTIME", "1")
