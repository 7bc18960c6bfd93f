"""The most memory that a model takes in an engine, above an idle engine, against the size of its file.

`--only NAME` runs one check. Needs Linux: the kernel keeps the peak of a process's resident memory.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from report import Report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from node.engine.process import Engine
from potluck.wire.tasks import WarmUpTask
from support.engine_lab import Lab, engine_lab, training

WIDTH = 1024


def network(megabytes: int, folder: Path, *, layers: int) -> Path:
    """A compiled model of this many MB, in this many equal layers, with SGD, which keeps no state."""
    import keras

    path = folder / f"model-{layers}.keras"
    model = keras.Sequential([keras.Input((WIDTH,))])
    for _ in range(layers):
        units = WIDTH if layers > 1 else megabytes * 1_000_000 // (4 * WIDTH)
        model.add(keras.layers.Dense(units, activation="relu", use_bias=False))
    model.add(keras.layers.Dense(1))
    model.compile(keras.optimizers.SGD(1e-4), "mse")
    model.save(path)
    return path


class Peak:
    """The peak of a process's resident memory since this was made, in bytes (proc_pid_status(5), VmHWM)."""

    def __init__(self, engine: Engine) -> None:
        assert engine.pid is not None
        self._pid = engine.pid
        self.before = self._read("VmRSS")
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")

    def above(self) -> int:
        return self._read("VmHWM") - self.before

    def _read(self, name: str) -> int:
        for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"the kernel does not tell {name}")


async def serve(lab: Lab, path: Path) -> None:
    """Load it as a replica, with batches of all sizes to warm up."""
    await lab.engine.load_model("replica", path)


async def train(lab: Lab, path: Path) -> None:
    """Get ready, and two rounds, as on a node."""
    model = lab.files.put(await asyncio.to_thread(path.read_bytes))
    x = np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)
    data = lab.files.arrays(1, x=x, y=x[:, :1])
    first = replace(training(model, data, samples=64, batch_size=32), seconds=60.0)
    await lab.run(WarmUpTask(task=first))
    result = await lab.run(first)
    weights = lab.after(result)
    await lab.run(replace(first, weights=weights, round=1))


async def measured(path: Path, work: Callable[[Lab, Path], Awaitable[None]]) -> float:
    """Peak above an idle engine, in bytes."""
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
        async with engine_lab(Path(folder)) as lab:
            peak = Peak(lab.engine)
            await work(lab, path)
            return float(peak.above())


CHECKS: dict[str, tuple[Callable[[Lab, Path], Awaitable[None]], float]] = {
    "serve_memory": (serve, 2.0),
    "train_memory": (train, 5.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, to see that it works")
    parser.add_argument("--only", choices=CHECKS, help="run only this check")
    arguments = parser.parse_args()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    report = Report("memory", columns=("an engine's peak above idle", "times the model's file"))
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
        megabytes = 120 if arguments.quick else 360
        paths = [network(megabytes, Path(folder), layers=layers) for layers in (megabytes // 4, 1)]
        for name, (work, bound) in CHECKS.items():
            if arguments.only in (None, name):
                ratios = [asyncio.run(measured(path, work)) / path.stat().st_size for path in paths]
                report.figures[name] = ratios
                in_one = f"{ratios[0]:.2f}, in one layer {ratios[1]:.2f}"
                report.rows.append((f"{work.__name__} a model of {megabytes} MB in {megabytes // 4} layers", in_one))
                report.check(name, max(ratios), at_most=bound)
    report.show()


if __name__ == "__main__":
    main()
