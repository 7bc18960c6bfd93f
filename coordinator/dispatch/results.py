"""Makes the user's results from the parts that nodes sent: merged metrics, predictions in order."""

from __future__ import annotations

import math
from collections.abc import Sequence

from coordinator.plans.training.scores import evaluation_metrics
from potluck.blobs.store import BlobStore
from potluck.errors import InvalidModel
from potluck.wire.jobs import ClassScore, Evaluation
from potluck.wire.tasks import EvaluateResult, PredictResult
from potluck.wire.tensors import DTYPES
from potluck.wire.values import Tensor

SUMMARY = ("precision", "recall", "f1")
INLINE_OUTPUT_BYTES = 64 * 1024
"""Predictions up to this size are in the result itself."""


def evaluation(merged: EvaluateResult, labels: Sequence[str]) -> Evaluation:
    """Metrics from sums and counts. Precision, recall and F1 are 0 where they are not defined (no such prediction or item),
    like scikit-learn's `zero_division=0`. Where one output tells two classes apart, they are for class 1 (`average="binary"` there, and
    in Keras); else unweighted means over the classes that occur (`macro`). A compiled metric of that name is kept; F1 then comes from
    the compiled precision and recall, and the means over classes get the prefix `macro_`.
    """
    metrics = evaluation_metrics(merged)
    table = merged.confusion
    scores: list[ClassScore] = []
    occurring: list[ClassScore] = []
    """Classes that occur in the data or in predictions: a data set may lack some of a model's classes."""
    for i, row in enumerate(table):
        hit, support, predicted = row[i], sum(row), sum(other[i] for other in table)
        precision = hit / predicted if predicted else 0.0
        recall = hit / support if support else 0.0
        f1 = 2 * hit / (predicted + support) if predicted + support else 0.0
        label = labels[i] if i < len(labels) else str(i)
        scores.append(ClassScore(label=label, precision=precision, recall=recall, f1=f1, support=support))
        if support or predicted:
            occurring.append(scores[-1])
    if scores:
        _summarize(metrics, scores if merged.threshold is not None else occurring, merged.threshold is not None)
    return Evaluation(
        count=merged.count,
        metrics=metrics,
        confusion=table,
        classes=tuple(scores),
        threshold=merged.threshold,
        remark=_remark(merged),
    )


def _summarize(metrics: dict[str, float], scores: Sequence[ClassScore], binary: bool) -> None:
    """Add precision, recall and F1 of all classes together to the metrics."""
    compiled = [name for name in SUMMARY if name in metrics]
    if binary:
        found = {name: getattr(scores[1], name) for name in SUMMARY}
    else:
        found = {name: math.fsum(getattr(score, name) for score in scores) / max(1, len(scores)) for name in SUMMARY}
    if {"precision", "recall"} <= metrics.keys():
        both = metrics["precision"] + metrics["recall"]
        metrics.setdefault("f1", 2 * metrics["precision"] * metrics["recall"] / both if both else 0.0)
    prefix = "macro_" if compiled and not binary else ""
    for name, value in found.items():
        metrics.setdefault(prefix + name, value)


def _remark(merged: EvaluateResult) -> str:
    if merged.threshold is None or merged.threshold == merged.middle:
        return ""
    return (
        f"the compiled metrics separate the classes at an output of {merged.threshold:g}, and so does this whole report; but the loss "
        f"separates them at {merged.middle:g}: to use that, compile them with threshold={merged.middle:g}, as "
        f"keras.metrics.BinaryAccuracy(threshold={merged.middle:g})"
    )


def predictions(parts: Sequence[PredictResult], store: BlobStore) -> tuple[Tensor, ...]:
    """The outputs of all parts, joined along the first axis in the given order; large ones as blobs of the store.

    Each part's data are already a blob of the store (raw little-endian bytes). Blocks on files: call it in a thread. Raises
    InvalidModel where the parts have different forms.
    """
    forms = [[(one.name, one.datatype, list(one.shape[1:])) for one in part.outputs] for part in parts]
    other = next((form for form in forms if form != forms[0]), None)
    if other is not None:
        raise InvalidModel(
            f"predictions for some items have another form than for others, so they cannot be one array: {_form(forms[0])} and "
            f"{_form(other)}: the model's outputs depend on its batch, or a node runs another model"
        )
    joined: list[Tensor] = []
    for number, first in enumerate(parts[0].outputs if parts else ()):
        rows = sum(part.outputs[number].shape[0] for part in parts)
        shape = (rows, *first.shape[1:])
        datatype = first.datatype
        if datatype == "BYTES":
            texts = [text for part in parts for text in _list(part.outputs[number])]
            joined.append(Tensor(name=first.name, datatype=datatype, shape=shape, data=texts))
            continue
        size = math.prod(shape) * DTYPES[datatype].itemsize
        if size <= INLINE_OUTPUT_BYTES:
            data = b"".join(_bytes(part.outputs[number], store) for part in parts)
            joined.append(Tensor(name=first.name, datatype=datatype, shape=shape, data=data))
            continue
        with store.new_file() as file:
            for part in parts:
                file.write(_bytes(part.outputs[number], store))
            file.flush()
            ref = store.put_file(file.path, move=True)
        joined.append(Tensor(name=first.name, datatype=datatype, shape=shape, data=ref))
    return tuple(joined)


def _form(outputs: list[tuple[str, str, list[int]]]) -> str:
    shown = [f"{name[:80]} {datatype} {shape[:8]}" for name, datatype, shape in outputs[:4]]
    return ", ".join([*shown, *(["..."] if len(outputs) > len(shown) else [])])


def _bytes(tensor: Tensor, store: BlobStore) -> bytes:
    if isinstance(tensor.data, bytes):
        return tensor.data
    if isinstance(tensor.data, list):
        raise ValueError(f"output {tensor.name} was not stored as bytes")
    return store.read(tensor.data.sha256)


def _list(tensor: Tensor) -> list[str]:
    return tensor.data if isinstance(tensor.data, list) else []
