"""The tasks of shards: train a round, evaluate and predict slices, export a model."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from node.engine import inputs, runtime
from node.engine.training import Session
from potluck.errors import Cancelled, InvalidData, InvalidModel
from potluck.messages import (
    AnyTask,
    AnyTaskResult,
    BlobRef,
    DataFormat,
    DataSlice,
    EvaluateResult,
    EvaluateTask,
    ExportResult,
    ExportTask,
    ImageOptions,
    PredictResult,
    PredictTask,
    TrainResult,
    TrainTask,
)
from potluck.tensors import from_numpy

Progress = Callable[[int, dict[str, float]], None]
PROGRESS_SECONDS = 1.0
MODELS_KEPT = 2
DATA_KEPT = 4


class Tasks:
    """Runs one task at a time. Models and decoded shards of the last tasks are kept, so that the next chunk begins at once."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.cancelled = threading.Event()
        self._sessions: dict[str, Session] = {}
        self._models: OrderedDict[tuple[str, bool], _Loaded] = OrderedDict()
        self._data: OrderedDict[tuple[Any, ...], tuple[list[Any], Any]] = OrderedDict()

    def run(self, job_id: str, task: AnyTask, files: Mapping[str, str], progress: Progress) -> AnyTaskResult:
        """Raises InvalidModel, InvalidData, InvalidRequest, Cancelled."""
        paths = {sha256: Path(path) for sha256, path in files.items()}
        match task:
            case TrainTask():
                return self._train(job_id, task, paths, progress)
            case EvaluateTask():
                return self._evaluate(task, paths, progress)
            case PredictTask():
                return self._predict(task, paths, progress)
            case ExportTask():
                return self._export(task, paths)

    def forget(self, job_id: str) -> None:
        """Drop what is kept for a job."""
        if self._sessions.pop(job_id, None) is not None or self._data:
            self._data.clear()
            self._models.clear()

    def _train(self, job_id: str, task: TrainTask, paths: Mapping[str, Path], progress: Progress) -> TrainResult:
        session = self._sessions.get(job_id)
        if session is None:
            model = runtime.load_model(paths[task.model.sha256], self._scratch, compiled=True)
            runtime.need_compiled(model)
            self._sessions.clear()  # one training job at a time keeps its optimizer; another one begins anew
            session = self._sessions[job_id] = Session(model, seed=task.seed)
        if task.weights is not None:
            runtime.set_weights(session.model, paths[task.weights.sha256])
        session.use_data(task, [inputs.Part(paths[shard.blob.sha256]) for shard in task.data])
        outcome = session.train(task.samples, task.seconds, self.cancelled, progress)
        target = self._scratch / f"weights-{job_id}"
        runtime.save_weights(session.model, target)
        return TrainResult(
            weights=self._blob(target),
            samples=outcome.samples,
            steps=outcome.steps,
            metrics=outcome.metrics,
            seconds=outcome.seconds,
        )

    def _evaluate(self, task: EvaluateTask, paths: Mapping[str, Path], progress: Progress) -> EvaluateResult:
        loaded = self._loaded(paths[task.model.sha256], compiled=True)
        wanted_weights = task.weights.sha256 if task.weights is not None else ""
        if loaded.weights and not wanted_weights:  # other weights were put into it, and its own are only in its file
            del self._models[task.model.sha256, True]
            loaded = self._loaded(paths[task.model.sha256], compiled=True)
        if loaded.weights != wanted_weights:
            runtime.set_weights(loaded.model, paths[wanted_weights])
            loaded.weights = wanted_weights
        labels = inputs.labels_for(loaded.model, task.format.classes)
        arrays, target = self._items(loaded.model, task.slices, task.format, task.image, paths)
        if target is None or (task.format.kind == "images" and int(target.min(initial=0)) < 0):
            raise InvalidData("the data set has no targets to evaluate against")
        wanted = inputs.encode_targets(target, labels)
        started, told = time.perf_counter(), time.perf_counter()
        sums: dict[str, float] = {}
        classes = max(2, labels.units) if labels.kind != "plain" else 0
        table = np.zeros((classes, classes), np.int64)
        count = len(wanted)
        for start in range(0, count, task.batch_size):
            self._check()
            stop = min(start + task.batch_size, count)
            batch = [array[start:stop] for array in arrays]
            loss, outputs = loaded.evaluate(batch, wanted[start:stop])
            _add(sums, "loss", float(loss) * (stop - start))
            if classes:
                truth, guess = _decided(wanted[start:stop], outputs[0], labels)
                np.add.at(table, (truth.ravel(), guess.ravel()), 1)
            elif len(outputs) == 1 and outputs[0].shape == wanted[start:stop].shape:
                error = outputs[0].astype(np.float64) - wanted[start:stop]
                axes = tuple(range(1, error.ndim))
                _add(sums, "mae", float(np.abs(error).mean(axis=axes).sum()))
                _add(sums, "mse", float(np.square(error).mean(axis=axes).sum()))
            if time.perf_counter() - told > PROGRESS_SECONDS:
                told = time.perf_counter()
                progress(stop, {})
        if not math.isfinite(sums.get("loss", 0.0)):
            sums["loss"] = math.nan
        confusion = tuple(tuple(int(cell) for cell in row) for row in table)
        return EvaluateResult(count=count, sums=sums, confusion=confusion, seconds=time.perf_counter() - started)

    def _predict(self, task: PredictTask, paths: Mapping[str, Path], progress: Progress) -> PredictResult:
        loaded = self._loaded(paths[task.model.sha256], compiled=False)
        arrays, _ = self._items(loaded.model, task.slices, task.format, task.image, paths)
        started, told = time.perf_counter(), time.perf_counter()
        count = len(arrays[0])
        parts: list[list[Any]] = []
        for start in range(0, count, task.batch_size):
            self._check()
            stop = min(start + task.batch_size, count)
            parts.append(loaded.predict([array[start:stop] for array in arrays], task.batch_size))
            if time.perf_counter() - told > PROGRESS_SECONDS:
                told = time.perf_counter()
                progress(stop, {})
        names = [spec.name for spec in runtime.signature(loaded.model).outputs]
        outputs = tuple(
            from_numpy(name, np.concatenate([part[number] for part in parts])) for number, name in enumerate(names)
        )
        return PredictResult(count=count, outputs=outputs, seconds=time.perf_counter() - started)

    def _export(self, task: ExportTask, paths: Mapping[str, Path]) -> ExportResult:
        started = time.perf_counter()
        model = runtime.load_model(paths[task.model.sha256], self._scratch, compiled=True)
        runtime.set_weights(model, paths[task.weights.sha256])
        target = self._scratch / "export.keras"
        model.save(target)
        return ExportResult(
            model=self._blob(target), signature=runtime.signature(model), seconds=time.perf_counter() - started
        )

    def _items(
        self,
        model: Any,
        slices: Sequence[DataSlice],
        data: DataFormat,
        image: ImageOptions | None,
        paths: Mapping[str, Path],
    ) -> tuple[list[Any], Any]:
        """Inputs in the model's order, and targets as stored, of the slices in their order."""
        found: list[tuple[list[Any], Any]] = []
        for part in slices:
            arrays, target = self._shard(model, part.blob.sha256, data, image, paths)
            if part.stop > len(arrays[0]):
                raise InvalidData(f"data shard {part.blob.sha256[:12]} has {len(arrays[0])} items, not {part.stop}")
            kept = None if target is None else target[part.start : part.stop]
            found.append(([array[part.start : part.stop] for array in arrays], kept))
        if len(found) == 1:
            return found[0]
        joined = [np.concatenate([arrays[i] for arrays, _ in found]) for i in range(len(found[0][0]))]
        targets = [target for _, target in found]
        return joined, None if targets[0] is None else np.concatenate(targets)

    def _shard(
        self, model: Any, sha256: str, data: DataFormat, image: ImageOptions | None, paths: Mapping[str, Path]
    ) -> tuple[list[Any], Any]:
        """A whole shard decoded; the last few are kept, since chunks seldom end where shards do."""
        options = inputs.options_for(model, image) if data.kind == "images" else None
        key = (sha256, options, data.inputs)
        if key in self._data:
            self._data.move_to_end(key)
            arrays, target = self._data[key]
        else:
            part = inputs.Part(paths[sha256])
            if options is not None:
                images, target = inputs.load_images([part], options)
                arrays = [images]
            else:
                named, target = inputs.load_arrays([part], data)
                arrays = list(named.values())
            self._data[key] = (arrays, target)
            while len(self._data) > DATA_KEPT:
                self._data.popitem(last=False)
        if options is not None:
            return arrays, target
        return inputs.fit_inputs(model, dict(zip(data.inputs, arrays, strict=True))), target

    def _loaded(self, path: Path, *, compiled: bool) -> _Loaded:
        key = (path.name, compiled)
        found = self._models.get(key)
        if found is None:
            model = runtime.load_model(path, self._scratch, compiled=compiled)
            if compiled:
                runtime.need_compiled(model)
            found = self._models[key] = _Loaded(model)
            while len(self._models) > MODELS_KEPT:
                self._models.popitem(last=False)
        self._models.move_to_end(key)
        return found

    def _check(self) -> None:
        if self.cancelled.is_set():
            raise Cancelled("the attempt was withdrawn")

    def _blob(self, path: Path) -> BlobRef:
        """Name a file of the scratch folder by its hash: the parent takes it from there."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        path.replace(self._scratch / sha256)
        return BlobRef(sha256=sha256, size=size)


class _Loaded:
    """A model and its compiled functions."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.weights = ""
        self._evaluate = tf.function(self._evaluate_step, reduce_retracing=True)
        self._predict = tf.function(self._predict_step, reduce_retracing=True)

    def evaluate(self, batch: list[Any], target: Any) -> tuple[float, list[Any]]:
        """Mean loss over the batch (as Keras reports it), and outputs."""
        try:
            loss, outputs = self._evaluate(
                [tf.convert_to_tensor(array) for array in batch], tf.convert_to_tensor(target)
            )
        except (ValueError, tf.errors.InvalidArgumentError) as error:
            raise InvalidModel(f"the model cannot be evaluated on this data: {_first_line(error)}") from error
        return loss.numpy(), [output.numpy() for output in outputs]

    def predict(self, batch: list[Any], batch_size: int) -> list[Any]:
        """Outputs of the batch, which is padded to `batch_size`, so that nothing is traced again."""
        count = len(batch[0])
        if count < batch_size:
            batch = [np.concatenate([array, np.repeat(array[-1:], batch_size - count, axis=0)]) for array in batch]
        try:
            outputs = self._predict([tf.convert_to_tensor(array) for array in batch])
        except (ValueError, tf.errors.InvalidArgumentError) as error:
            raise InvalidModel(f"the model cannot predict on this data: {_first_line(error)}") from error
        return [output.numpy()[:count] for output in outputs]

    def _evaluate_step(self, batch: list[Any], target: Any) -> tuple[Any, list[Any]]:
        x = batch[0] if len(batch) == 1 else batch
        outputs = self.model(x, training=False)
        loss = self.model.compute_loss(x=x, y=target, y_pred=outputs, training=False)
        return loss, _flat(outputs)

    def _predict_step(self, batch: list[Any]) -> list[Any]:
        return _flat(self.model(batch[0] if len(batch) == 1 else batch, training=False))


def _flat(outputs: Any) -> list[Any]:
    return list(tf.nest.flatten(outputs))


def _decided(target: Any, output: Any, labels: inputs.Labels) -> tuple[Any, Any]:
    """Class indexes: what is, and what the model says."""
    if labels.kind == "binary":
        return (target > 0.5).astype(np.int64), (output > 0.5).astype(np.int64)
    truth = target if labels.kind == "sparse" else target.argmax(axis=-1)
    if truth.ndim == output.ndim and truth.shape[-1] == 1:
        truth = truth[..., 0]
    return truth, output.argmax(axis=-1)


def _add(sums: dict[str, float], name: str, value: float) -> None:
    sums[name] = sums.get(name, 0.0) + value


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
