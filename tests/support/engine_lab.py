"""An engine for tests, with its blobs, the progress that it reported, and short ways to make tasks."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from node.engine.process import Engine
from node.engine.watch import Limits
from node.sandbox.policy import Confinement
from potluck.settings import Sandbox
from potluck.weights.files import load
from potluck.weights.updates import apply_update, norm
from potluck.wire.tasks import EvaluateTask, PredictTask, TrainResult, TrainTask
from potluck.wire.values import BlobRef, DataFormat
from support import models
from support.models import Files

IMAGES = DataFormat(kind="images", classes=("dark", "light"))
LIMITS = Limits(start_seconds=120, silence_seconds=20)
Progress = list[tuple[int, dict[str, float]]]


@dataclasses.dataclass
class Lab:
    """An engine, its blobs, and the progress that it reported."""

    engine: Engine
    files: Files
    scratch: Path
    progress: Progress = dataclasses.field(default_factory=list)

    async def run(self, task: Any, job_id: str = "job") -> Any:
        self.progress.clear()
        return await asyncio.wait_for(
            self.engine.run_task(
                job_id, task, self.files.paths, lambda done, metrics: self.progress.append((done, metrics))
            ),
            120,
        )

    def norm(self, result: TrainResult) -> float:
        """The norm of a round's update, as the coordinator measures it."""
        base = self.files.paths.get(result.base.sha256, self.scratch / result.base.sha256)
        return norm(self.scratch / result.update.sha256, base)

    def after(self, result: TrainResult) -> BlobRef:
        """The weights after a round, as a blob that tasks may name."""
        base = self.files.paths.get(result.base.sha256, self.scratch / result.base.sha256)
        update = self.scratch / result.update.sha256
        assert update.stat().st_size == result.update.size
        apply_update(base, update, self.scratch / "after")
        return self.files.put((self.scratch / "after").read_bytes())

    def weights(self, result: TrainResult) -> list[np.ndarray[Any, Any]]:
        stored = dict(load(self.files.paths[self.after(result).sha256]))
        return [stored[name] for name in sorted(stored, key=lambda name: name[1:])]


@asynccontextmanager
async def engine_lab(
    folder: Path, allow_code: Sequence[str] = (), limits: Limits = LIMITS, sandbox: Sandbox = "off"
) -> AsyncIterator[Lab]:
    """A running engine, stopped at the end."""
    files = Files(folder / "blobs")  # an engine in a sandbox can read only folders that were there at its start
    confinement = Confinement(mode=sandbox, reads=(str(files.folder),))
    engine = Engine(folder / "scratch", threads=0, limits=limits, allow_code=allow_code, confinement=confinement)
    await engine.start()
    try:
        yield Lab(engine, files, folder / "scratch")
    finally:
        await engine.stop()


def training(model: Any, data: Any, **changes: Any) -> TrainTask:
    task = TrainTask(
        model=model,
        weights=None,
        data=data,
        format=models.ARRAYS,
        image=None,
        round=0,
        samples=600,
        seconds=30,
        batch_size=32,
        compression="none",
    )
    return replace(task, **changes)


def evaluation(model: Any, slices: Any, **changes: Any) -> EvaluateTask:
    task = EvaluateTask(model=model, weights=None, slices=slices, format=models.ARRAYS, image=None, batch_size=32)
    return replace(task, **changes)


def prediction(model: Any, slices: Any, **changes: Any) -> PredictTask:
    return replace(PredictTask(model=model, slices=slices, format=models.ARRAYS, image=None, batch_size=32), **changes)


def pictures(count: int, size: int = 12) -> list[tuple[bytes, int | None]]:
    """PNG files of noise, dark (class 0) and light (class 1) in turn."""
    random = np.random.default_rng(0)
    labels = [number % 2 for number in range(count)]
    return [
        (models.png(random.integers(120 * label, 120 * label + 100, (size, size, 3), np.uint8)), label)
        for label in labels
    ]
