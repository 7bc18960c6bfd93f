"""Models that are scored by their outputs alone, without a loss: LiteRT models, SavedModels, and Keras models not compiled."""

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
from node.engine.shards import ShardPart
from node.engine.truth import by_output
from potluck.errors import InvalidData, InvalidModel, InvalidRequest
from potluck.wire.specs import shown
from potluck.wire.tasks import EvaluateResult
from potluck.wire.values import Signature, TensorSpec

Step = Callable[[int], None]


class Graded:
    """A model of any runtime, with `inputs`, `outputs` and `output_names` as in a Keras model. Data are fitted to these."""

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


THRESHOLD = 0.5
"""An output above it counts as class 1, if one output tells two classes apart. Without a loss, no other value is given."""


def grade(model: Graded, source: Source, parts: Sequence[ShardPart], batch_size: int, step: Step) -> EvaluateResult:
    """The model's accuracy if the targets are classes, else its mean absolute and squared error. Each of several outputs is scored
    separately, and its metrics begin with its name: `size_mae`. Only a model with a single output has a confusion matrix.

    Raises InvalidData, InvalidRequest, InvalidModel. `step` is called with the items so far.
    """
    stored = source.targets(parts)
    if not stored:
        raise InvalidData(
            "the data set has no targets to evaluate against: add it with class folders, or name its --target"
        )
    targets = by_output(model, stored)
    alone = len(targets) == 1
    scores = [_Score("" if alone else f"{name}_") for name in model.output_names]
    done = 0
    for batch in source.batches(parts, batch_size):
        outputs = model.predict(batch)
        size = len(batch[0])
        for score, target, output in zip(scores, targets, outputs, strict=True):
            score.add(target[done : done + size], output)
        done += size
        step(done)
    sums = {name: value for score in scores for name, value in score.sums.items()}
    table = scores[0].table
    confusion = tuple(tuple(row) for row in table.tolist()) if alone and len(table) <= CONFUSION_CLASSES else ()
    cut = THRESHOLD if confusion and alone and scores[0].binary else None
    return EvaluateResult(count=done, sums=sums, confusion=confusion, threshold=cut, middle=cut)


class _Score:
    """The score of one output. The names of its sums begin with the prefix."""

    def __init__(self, prefix: str) -> None:
        self.sums: dict[str, float] = {}
        self.table = np.zeros((0, 0), np.int64)
        self._prefix = prefix
        self.binary = False
        """Whether one output tells two classes apart."""

    def add(self, truth: Array, output: Array) -> None:
        """Raises InvalidModel."""
        found = _classes(truth, output)
        if found is None:
            for name, value in _errors(truth, output).items():
                self._count(name, value)
            return
        if not len(self.table):
            self.binary = output.shape[-1] == 1
            classes = max(2, output.shape[-1])
            self.table = np.zeros((classes, classes), np.int64)
        actual, decided = found
        if actual.size and (actual.min() < 0 or actual.max() >= len(self.table)):
            raise InvalidModel(
                f"the data has classes {actual.min()} to {actual.max()}, but the model tells {len(self.table)}"
            )
        np.add.at(self.table, (actual, decided), 1)
        self._count("accuracy", float((actual == decided).sum()))

    def _count(self, name: str, value: float) -> None:
        name = self._prefix + name
        self.sums[name] = self.sums.get(name, 0.0) + value


def _classes(truth: Array, output: Array) -> tuple[Array, Array] | None:
    """The class of each item: the true one, and the one that the model says; None: the targets are not classes."""
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
        return flat.astype(np.int64), (output[:, 0] > THRESHOLD).astype(np.int64)
    return None


def _errors(truth: Array, output: Array) -> dict[str, float]:
    """Sums of the errors over the items. Raises InvalidModel."""
    if truth.size != output.size:
        raise InvalidModel(
            f"the targets have shape {shown(truth.shape[1:])} per item, but the model's output is {shown(output.shape[1:])}"
        )
    error = (
        (output.astype(np.float64).reshape(len(output), -1) - truth.reshape(len(output), -1))
        if len(output)
        else np.zeros((0, 1))
    )
    return {
        name: float(values.mean(axis=1).sum()) for name, values in (("mae", np.abs(error)), ("mse", np.square(error)))
    }


def _tensor(spec: TensorSpec, dtype: np.dtype[Any] | None) -> Any:
    kind = "string" if spec.datatype == "BYTES" else "float32" if dtype is None else dtype.name
    shape = tuple(None if d < 0 else d for d in spec.shape)
    return keras.KerasTensor(shape, kind, name=spec.name)
