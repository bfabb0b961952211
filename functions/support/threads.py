"""How PyTorch's threads wait for each other on a CPU. This module imports os alone, not torch."""

import os


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
