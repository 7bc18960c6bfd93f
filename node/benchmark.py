"""Measures how fast this machine multiplies float32 matrices: its own process, prints GFLOP/s. `--gently`: at the lowest priority.

The result stands for the speed of a model until that was measured on this node.
"""

from __future__ import annotations

import os
import sys
import time

SIZE = 768
SECONDS = 0.3


def measure() -> float:
    """The best GFLOP/s of several products of SIZE x SIZE matrices, in about SECONDS."""
    import numpy as np

    rng = np.random.default_rng(0)
    a = rng.random((SIZE, SIZE), np.float32)
    b = rng.random((SIZE, SIZE), np.float32)
    best = float("inf")
    deadline = time.perf_counter() + SECONDS
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * SIZE**3 / best / 1e9


if __name__ == "__main__":
    if "--gently" in sys.argv:
        os.nice(19)
    sys.stdout.write(f"{measure():.1f}\n")
