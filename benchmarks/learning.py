"""How well rounds learn: the engine's training and the coordinator's outer step, one node after the other, in one process.

There is no network and no clock, so runs differ only by their seeds. `sync` is one process with batches as large as those
of all nodes together: the result of exact synchronous data parallelism.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.dispatch import outer
from node.engine.array_runtimes import TensorFlow
from node.engine.tasks import Tasks
from potluck.weights.updates import apply_update
from potluck.wire.tasks import EvaluateTask, TrainResult, TrainTask
from potluck.wire.values import BlobRef, Compression, DataFormat, DataShard
from support.models import Files, whole

BATCH = 32
ARRAYS = DataFormat(kind="arrays", inputs=("x",), target="y")
LENGTH = 32
"""How many characters an item of the language model has."""


@dataclass
class Problem:
    """A compiled model, and data to train and to measure on."""

    model: Any
    train: tuple[np.ndarray, np.ndarray]
    held_out: tuple[np.ndarray, np.ndarray]


def language(seed: int) -> Problem:
    """Text of Python's documentation: predict each character from those before, with a small GRU of about 116,000 weights."""
    import keras

    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    letters = sorted(set(text))
    codes = np.array([letters.index(letter) for letter in text], np.int32)
    items = codes[: len(codes) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    items = items[np.random.default_rng(0).permutation(len(items))]
    x, y = items[:, :-1], items[:, 1:].astype(np.int64)
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    model = keras.Sequential([keras.Input((LENGTH,), dtype="int32"), layers.Embedding(len(letters), 32),
                              layers.GRU(160, return_sequences=True),
                              layers.Dense(len(letters), activation="softmax")])  # fmt: skip
    model.compile(keras.optimizers.Adam(0.003), "sparse_categorical_crossentropy")
    cut = 1500
    return Problem(model, (x[cut:], y[cut:]), (x[:cut], y[:cut]))


def handwriting(seed: int) -> Problem:
    """The digits, and the demo's network at 16x16 with fewer filters."""
    import keras

    from support.digits import split

    data = split()

    def images(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(-1, 8, 8, 1).repeat(2, axis=1).repeat(2, axis=2)

    keras.utils.set_random_seed(seed)
    layers = keras.layers
    model = keras.Sequential([keras.Input((16, 16, 1)), layers.Conv2D(16, 3, activation="relu"), layers.MaxPooling2D(),
                              layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(), layers.Flatten(),
                              layers.Dense(128, activation="relu"), layers.Dense(10, activation="softmax")])  # fmt: skip
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return Problem(model, (images(data["x_train"]), data["y_train"]), (images(data["x_test"]), data["y_test"]))


class Worker:
    """An engine's tasks, without its process."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir()
        self.scratch = scratch
        self._tasks = Tasks(scratch, TensorFlow(scratch, threads=1).model)

    def run(self, task: Any, files: Files) -> Any:
        paths = {sha256: str(path) for sha256, path in files.paths.items()}
        return self._tasks.run("job", task, paths, threading.Event(), lambda done, metrics: None)


class Trial:
    """One problem as the engine sees it, in its own folder."""

    def __init__(self, folder: Path, problem: Problem, workers: int) -> None:
        self.folder = folder
        self.files = Files(folder / "blobs")
        self.model = self.files.model(problem.model)
        self.shards = self.files.arrays(workers, x=problem.train[0], y=problem.train[1])
        self.held_out = self.files.arrays(1, x=problem.held_out[0], y=problem.held_out[1])
        self.count = len(problem.train[0])

    def sync(self, workers: int, epochs: int) -> dict[str, float]:
        """One process, with batches of all workers together."""
        samples = epochs * self.count // (workers * BATCH) * workers * BATCH
        worker = Worker(self.folder / "sync")
        update, base, _ = self._round(worker, self.shards, None, 0, samples, workers * BATCH, "none")
        after = self.folder / "sync-weights"
        apply_update(base, update, after)
        return self._measured(worker, after)

    def local(
        self, workers: int, epochs: int, rounds: int, *, lost: float = 0.0, seed: int = 0, speeds: Sequence[int] = ()
    ) -> dict[str, float]:
        """`rounds` rounds over the same samples; each update is lost with probability `lost` (but never all of a round)."""
        speeds = speeds or (1,) * workers
        rng = np.random.default_rng(seed)
        nodes = [Worker(self.folder / f"worker-{number}") for number in range(workers)]
        each = [max(1, round(epochs * self.count * speed / sum(speeds) / rounds / BATCH)) * BATCH for speed in speeds]
        weights: Path | None = None
        velocity: Path | None = None
        agreement: float | None = None
        for number in range(rounds):
            updates: list[tuple[Path, int, float]] = []
            for place, node in enumerate(nodes):
                data = self.shards[place : place + 1]
                update, base, result = self._round(node, data, weights, number, each[place], BATCH, "auto")
                updates.append((update.replace(self.folder / f"update-{place}"), result.samples, result.norm))
            arrived = [one for one in updates if rng.random() >= lost] or updates[:1]
            after, moving = self.folder / f"weights-{number % 2}", self.folder / f"velocity-{number % 2}"
            settings = outer.outer_for(number, (number + 1) / rounds, 1.0 if agreement is None else agreement)
            square = outer.combine(
                weights or base, [(path, samples) for path, samples, _ in arrived], velocity, settings, "auto",
                step=self.folder / "step", after=after, velocity_after=moving,
            )  # fmt: skip
            agreement = outer.agreement_of(square, [(norm, samples) for _, samples, norm in arrived], agreement)
            weights, velocity = after, moving
        assert weights is not None
        return self._measured(nodes[0], weights)

    def _round(
        self, worker: Worker, data: tuple[DataShard, ...], weights: Path | None, number: int, samples: int, batch: int,
        compression: Compression,
    ) -> tuple[Path, Path, TrainResult]:  # fmt: skip
        """(update, weights before, result) of one node's part of a round."""
        ref = self._put(weights)
        task = TrainTask(
            model=self.model, weights=ref, data=data, format=ARRAYS, image=None, round=number, samples=samples,
            seconds=86_400, batch_size=batch, compression=compression,
        )  # fmt: skip
        result = worker.run(task, self.files)
        base = weights or worker.scratch / result.base.sha256
        return worker.scratch / result.update.sha256, base, result

    def _measured(self, worker: Worker, weights: Path) -> dict[str, float]:
        task = EvaluateTask(
            model=self.model,
            weights=self._put(weights),
            slices=whole(self.held_out),
            format=ARRAYS,
            image=None,
            batch_size=256,
        )
        result = worker.run(task, self.files)
        found = {name: value / result.count for name, value in result.sums.items()}
        if result.confusion:
            found["accuracy"] = sum(row[i] for i, row in enumerate(result.confusion)) / result.count
        return found

    def _put(self, path: Path | None) -> BlobRef | None:
        """The file as a blob that tasks may name, until the next call."""
        if path is None:
            return None
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.files.paths[sha256] = path
        return BlobRef(sha256=sha256, size=path.stat().st_size)
