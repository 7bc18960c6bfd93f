"""LiteRT with 8-bit whole numbers against TensorFlow: the demo's network, in the real engine on one core.

The same process for both: an engine with one thread on its own core, asked over its socket from another core, two batches at a
time. It gets batches of 1, 8 and 32 in turns, so that a slow minute of the machine affects all, and the best turn counts. The cost in
accuracy is measured on scikit-learn's digits, with the same network at 32x32, trained for a few epochs and converted by the engine.

How much faster LiteRT is depends on the processor: some have instructions for 8-bit products (VNNI on x86, dot products on ARM).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import OtherLoad, Report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from node.engine.process import Engine
from node.engine.watch import Limits
from potluck.wire.tasks import ConvertTask, EvaluateTask
from potluck.wire.tensors import from_numpy
from potluck.wire.values import BlobRef, DataFormat, ModelFormat
from support.digits import digits
from support.models import Files, converted, convolutional, exported, whole

SIZE = 128
SMALL = 32
BATCHES = (1, 8, 32)
ARRAYS = DataFormat(kind="arrays", inputs=("x",), target="y")
FEATURES = {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


async def start_engine(folder: Path, core: int) -> Engine:
    """An engine with one thread on `core`; this process keeps its own cores."""
    ours = os.sched_getaffinity(0)
    engine = Engine(folder, threads=1, limits=Limits(120, 120))
    os.sched_setaffinity(0, {core})
    try:
        await engine.start()
    finally:
        os.sched_setaffinity(0, ours)
    return engine


async def rate(engine: Engine, replica_id: str, rows: int, seconds: float) -> float:
    """Items per second."""
    request = (from_numpy("x", np.random.default_rng(0).random((rows, SIZE, SIZE, 3), np.float32)),)
    until = time.perf_counter() + seconds

    async def ask() -> int:
        done = 0
        while time.perf_counter() < until:
            [outcome], _ = await engine.infer(replica_id, [request])
            assert outcome.error is None, outcome.error
            done += rows
        return done

    await engine.infer(replica_id, [request])
    started = time.perf_counter()
    until = started + seconds
    counts = await asyncio.gather(ask(), ask())
    return sum(counts) / (time.perf_counter() - started)


async def throughput(
    engine: Engine, files: Files, folder: Path, turns: int, seconds: float
) -> dict[str, dict[int, float]]:
    """Median speed by runtime and rows."""
    model = convolutional(SIZE)
    saved = exported(folder / "saved", model)
    random = np.random.default_rng(0)
    (shard,) = files.arrays(1, x=random.random((16, SIZE, SIZE, 3), np.float32), y=np.zeros(16, np.int64))
    models: dict[str, tuple[ModelFormat, BlobRef]] = {
        "tensorflow": ("keras", files.model(model)),
        "litert float32": ("tflite", files.put(converted(saved))),
        "litert int8": ("tflite", await quantized(engine, files, folder, files.model(model), whole([shard]))),
    }
    for name, (model_format, ref) in models.items():
        await engine.load_model(name, files.paths[ref.sha256], model_format)
    found: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in BATCHES} for name in models}
    for _ in range(turns):
        for rows in BATCHES:
            for name in models:
                found[name][rows].append(await rate(engine, name, rows, seconds))
    return {name: {rows: statistics.median(kept) for rows, kept in by.items()} for name, by in found.items()}


async def quantized(engine: Engine, files: Files, folder: Path, model: BlobRef, slices: Any) -> BlobRef:
    task = ConvertTask(model=model, slices=slices, format=ARRAYS, image=None)
    result: Any = await engine.run_task("convert", task, files.paths, lambda done, metrics: None)
    return files.put((folder / "engine" / result.model.sha256).read_bytes())


async def accuracies(engine: Engine, files: Files, folder: Path, epochs: int) -> tuple[float, float]:
    """Accuracy on every fifth digit: of the network trained on the others, and of the converted network."""
    rows, labels = digits()
    images = np.repeat(np.repeat(rows.reshape(-1, 8, 8), SMALL // 8, axis=1), SMALL // 8, axis=2)
    x = np.repeat(images[..., None], 3, axis=-1)
    held_out = np.arange(len(x)) % 5 == 4
    model = convolutional(SMALL)
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    model.fit(x[~held_out], labels[~held_out], epochs=epochs, batch_size=32, verbose=0)
    original = files.model(model)
    small = await quantized(
        engine, files, folder, original, whole(files.arrays(1, x=x[~held_out][:100], y=labels[~held_out][:100]))
    )
    slices = whole(files.arrays(1, x=x[held_out], y=labels[held_out]))
    found = []
    for model_format, ref in (("keras", original), ("tflite", small)):
        task = EvaluateTask(
            model=ref, weights=None, slices=slices, format=ARRAYS, image=None, batch_size=32,
            model_format=model_format, by_outputs=True,
        )  # fmt: skip
        result: Any = await engine.run_task("evaluate", task, files.paths, lambda done, metrics: None)
        found.append(result.sums["accuracy"] / result.count)
    return found[0], found[1]


def processor() -> str:
    """The processor's features that matter here."""
    text = Path("/proc/cpuinfo").read_text()
    flags = next(
        (line.split(":", 1)[1] for line in text.splitlines() if line.lower().startswith(("flags", "features"))), ""
    )
    return " ".join(sorted(FEATURES & set(flags.split()))) or "none of them"


async def measure(quick: bool, report: Report) -> None:
    core = max(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = await start_engine(folder / "engine", core)
        try:
            files = Files(folder / "blobs")
            load = OtherLoad()
            rates = await throughput(engine, files, folder, 1 if quick else 5, 0.3 if quick else 2.0)
            report.figures["other_load_cores"] = round(load.cores(), 2)
            before, after = await accuracies(engine, files, folder, 1 if quick else 5)
        finally:
            await engine.stop()
    best = {name: max(by.values()) for name, by in rates.items()}
    for name, by in rates.items():
        report.rows.append((name, *(f"{by[rows]:.0f}" for rows in BATCHES), f"{best[name] / best['tensorflow']:.2f}"))
    report.rows.append(("accuracy on the digits", "", "", f"{before:.4f}", f"{after:.4f} int8 ({after - before:+.4f})"))
    report.figures |= {
        "images_per_second": {
            name: {str(rows): round(value, 1) for rows, value in by.items()} for name, by in rates.items()
        },
        "accuracy_before": round(before, 4),
        "accuracy_after": round(after, 4),
        "processor": processor(),
    }
    report.check("litert_int8", best["litert int8"] / best["tensorflow"], at_least=2.0)
    report.check("accuracy_lost", before - after, at_most=0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    arguments = parser.parse_args()
    columns = ("images a second, one core", *(f"batch {rows}" for rows in BATCHES), "of TensorFlow")
    report = Report("litert", columns=columns)
    asyncio.run(measure(arguments.quick, report))
    report.show()


if __name__ == "__main__":
    main()
