"""Models that are scored by their outputs alone: they have no loss, as a LiteRT model or a SavedModel has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from node.engine import replicas
from node.engine.evaluating import CONFUSION_CLASSES
from node.engine.fitting import Array
from node.engine.inputs import Source
from node.engine.replicas import Model
from node.engine.shards import Part
from node.engine.wording import shape as shown
from potluck.errors import InvalidData, InvalidModel, InvalidRequest
from potluck.messages import EvaluateResult, Signature, TensorSpec

Step = Callable[[int], None]


class Graded:
    """A model of any runtime, with `inputs`, `outputs` and `output_names` as a Keras model has them: data are fitted to those."""

    loss = None

    def __init__(self, model: Model) -> None:
        self._model = model
        self.inputs = [_tensor(spec, dtype) for spec, dtype in zip(model.signature.inputs, model.dtypes, strict=True)]
        self.outputs = [_tensor(spec, None) for spec in model.signature.outputs]
        self.output_names = [spec.name for spec in model.signature.outputs]

    @property
    def signature(self) -> Signature:
        return self._model.signature

    def predict(self, batch: Sequence[Any]) -> list[Array]:
        """Outputs as arrays. Raises InvalidModel."""
        try:
            return replicas.run(self._model, [tensor.numpy() for tensor in batch])
        except InvalidRequest as error:
            raise InvalidModel(f"the model does not run on this data: {error.message}") from error


def grade(model: Graded, source: Source, parts: Sequence[Part], batch_size: int, step: Step) -> EvaluateResult:
    """How often it is right, where the targets are classes; else its mean absolute and squared error.

    Raises InvalidData, InvalidModel. `step` is told the items so far.
    """
    if len(model.outputs) != 1:
        raise InvalidModel(
            f"a model without a loss is scored by its output, and this one has {len(model.outputs)} ({', '.join(model.output_names)}): "
            "evaluate the Keras model that it was made of"
        )
    targets = source.targets(parts)
    if len(targets) != 1:
        raise InvalidData(f"the data set has {len(targets)} targets to evaluate against: it must have one")
    [target] = targets.values()
    done, hits = 0, 0
    classes = 0
    table = np.zeros((0, 0), np.int64)
    sums: dict[str, float] = {}
    for batch in source.batches(parts, batch_size):
        [output] = model.predict(batch)
        truth = target[done : done + len(output)]
        found = _classes(truth, output)
        if found is not None:
            if not classes:
                classes = max(2, output.shape[-1])
                table = np.zeros((classes, classes), np.int64)
            actual, decided = found
            if actual.size and (actual.min() < 0 or actual.max() >= classes):
                raise InvalidModel(
                    f"the data has classes {actual.min()} to {actual.max()}, but the model tells {classes}"
                )
            hits += int((actual == decided).sum())
            np.add.at(table, (actual, decided), 1)
        else:
            _add_errors(sums, truth, output)
        done += len(output)
        step(done)
    if classes:
        sums["accuracy"] = float(hits)
    confusion = tuple(tuple(row) for row in table.tolist()) if classes <= CONFUSION_CLASSES else ()
    return EvaluateResult(count=done, sums=sums, confusion=confusion)


def _classes(truth: Array, output: Array) -> tuple[Array, Array] | None:
    """Class of each item: what it is, and what the model says; None where the targets are no classes."""
    if output.ndim != 2:
        return None
    units = output.shape[1]
    flat = truth.reshape(len(truth)) if truth.size == len(truth) else None
    whole = flat is not None and (flat.dtype.kind in "iub" or bool(np.all(np.mod(flat, 1) == 0)))
    if units > 1 and whole and flat is not None:
        return flat.astype(np.int64), output.argmax(axis=-1)
    if (
        units > 1
        and truth.shape == output.shape
        and bool(np.all(truth.sum(axis=-1) == 1) and np.all(truth * (1 - truth) == 0))
    ):
        return truth.argmax(axis=-1), output.argmax(axis=-1)
    if (
        units == 1
        and whole
        and flat is not None
        and flat.dtype.kind in "iub"
        and bool(np.all((flat == 0) | (flat == 1)))
    ):
        return flat.astype(np.int64), (output[:, 0] > 0.5).astype(np.int64)
    return None


def _add_errors(sums: dict[str, float], truth: Array, output: Array) -> None:
    if truth.size != output.size:
        raise InvalidModel(
            f"the targets have shape {shown(truth.shape[1:])} per item, but the model's output is {shown(output.shape[1:])}"
        )
    error = (
        (output.astype(np.float64).reshape(len(output), -1) - truth.reshape(len(output), -1))
        if len(output)
        else np.zeros((0, 1))
    )
    for name, values in (("mae", np.abs(error)), ("mse", np.square(error))):
        sums[name] = sums.get(name, 0.0) + float(values.mean(axis=1).sum())


def _tensor(spec: TensorSpec, dtype: np.dtype[Any] | None) -> Any:
    kind = "string" if spec.datatype == "BYTES" else "float32" if dtype is None else dtype.name
    shape = tuple(None if d < 0 else d for d in spec.shape)
    return keras.KerasTensor(shape, kind, name=spec.name)
