"""Targets as the compiled loss wants them, found from the loss and the output's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from node.engine.wording import shape as shown
from potluck.errors import InvalidModel, InvalidRequest

Array = np.ndarray[Any, Any]
Kind = Literal["one_hot", "sparse", "binary", "plain"]


@dataclass(frozen=True)
class Labels:
    """`one_hot`: float rows of `units`; `sparse`: class numbers; `binary`: 0.0 or 1.0; `plain`: as they are stored.

    `threshold` is the output from which a binary item counts as class 1.
    """

    kind: Kind
    units: int
    loss: str = ""
    threshold: float = 0.5


def labels_for(model: Any, classes: Sequence[str]) -> Labels:
    """From the compiled loss and the output's shape. Raises InvalidModel when the data's classes do not fit the output."""
    if len(model.outputs) > 1:
        raise InvalidModel(
            f"the model has {len(model.outputs)} outputs, but the items of a data set have one target: give it one output"
        )
    output = tuple(model.outputs[0].shape)
    units = int(output[-1] or 0) if len(output) > 1 else 1
    name = loss_name(model.loss)
    kind: Kind = "plain"
    if "sparse" in name:
        kind = "sparse"
    elif "categorical" in name or "kl_divergence" in name or "kullback" in name:
        kind = "one_hot"
    elif "binary" in name and units == 1:
        kind = "binary"
    elif classes and len(classes) == units > 1:
        kind = "one_hot"
    room = 2 if kind == "binary" else units
    if kind != "plain" and len(classes) > room:
        takes = "2 classes (one sigmoid unit)" if kind == "binary" else f"{units} (output of shape {shown(output)})"
        raise InvalidModel(
            f"the data has {len(classes)} classes, but the model takes {takes}: make its last layer {len(classes)} units"
        )
    return Labels(kind, units, name, 0.0 if from_logits(model.loss) else 0.5)


def loss_name(loss: Any) -> str:
    """Of a name, function or Loss object; empty for several losses."""
    if isinstance(loss, str):
        return loss.lower()
    if loss is None or isinstance(loss, list | tuple | dict):
        return ""
    kind = "".join(f"_{sign.lower()}" if sign.isupper() else sign for sign in type(loss).__name__)
    return f"{getattr(loss, 'name', '') or ''} {getattr(loss, '__name__', '')} {kind.lstrip('_')}".lower()


def from_logits(loss: Any) -> bool:
    """Whether the loss takes outputs that no sigmoid or softmax has been applied to."""
    config = loss.get_config() if hasattr(loss, "get_config") else {}
    return bool(config.get("from_logits", False))


def encode(target: Array, labels: Labels, output: Sequence[int | None]) -> Array:
    """`target` (items first) for the loss; `output` is the shape of the model's output. Raises InvalidRequest."""
    match labels.kind:
        case "one_hot":
            return _one_hot(target, labels)
        case "sparse":
            if target.ndim > 1 and target.ndim == len(output) and target.shape[-1] not in (1, output[-2]):
                raise InvalidRequest(
                    f"the targets have shape {shown(target.shape[1:])} per item, but the loss {labels.loss.split()[0]} takes "
                    "class numbers: use categorical_crossentropy for one-hot targets"
                )
            return _class_numbers(target, labels)
        case "binary":
            if target.size and (target.min() < 0 or target.max() > 1):
                raise InvalidRequest(
                    f"the targets go from {target.min():g} to {target.max():g}, but a binary loss takes 0 and 1"
                )
            return target.reshape(len(target), -1).astype(np.float32)
        case _:
            return _plain(target, labels, output)


def item_weights(
    encoded: Array, labels: Labels, classes: Sequence[str], class_weight: Mapping[str, float]
) -> Array | None:
    """A weight for each item, by the label of its class (1 where none is given); None without weights.

    A class without a label goes by its number. Raises InvalidRequest for targets that are no classes.
    """
    if not class_weight:
        return None
    if labels.kind == "plain" or (labels.kind != "one_hot" and encoded.size != len(encoded)):
        raise InvalidRequest("class_weight needs one class for each item, and the targets are no classes")
    numbers = encoded.argmax(axis=-1) if labels.kind == "one_hot" else encoded.reshape(len(encoded)).astype(np.int64)
    names = [classes[i] if i < len(classes) else str(i) for i in range(max(2, labels.units))]
    unknown = sorted(set(class_weight) - set(names))
    if unknown:
        raise InvalidRequest(f"class_weight names {', '.join(unknown)}, but the classes are {', '.join(names[:12])}")
    table = np.array([class_weight.get(name, 1.0) for name in names], np.float32)
    weights: Array = table[numbers]
    return weights


def _one_hot(target: Array, labels: Labels) -> Array:
    if target.ndim == 2 and target.shape[1] == 1 and labels.units > 1:
        target = target[:, 0]
    if target.ndim == 1:
        numbers = _class_numbers(target, labels)
        rows = np.zeros((len(numbers), labels.units), np.float32)
        rows[np.arange(len(numbers)), numbers] = 1.0
        return rows
    if target.shape[-1] != labels.units:
        raise InvalidRequest(
            f"the targets have shape {shown(target.shape[1:])} per item, but the model's output has {labels.units} units"
        )
    return target.astype(np.float32, copy=False)


def _class_numbers(target: Array, labels: Labels) -> Array:
    numbers = target.astype(np.int64)
    if target.dtype.kind == "f" and not np.array_equal(numbers, target):
        raise InvalidRequest("the targets are not whole numbers, but the loss takes class numbers")
    if numbers.size and (numbers.min() < 0 or (labels.units and numbers.max() >= labels.units)):
        raise InvalidRequest(
            f"the targets are classes {numbers.min()} to {numbers.max()}, but the model's output has {labels.units} units"
        )
    return numbers


def _plain(target: Array, labels: Labels, output: Sequence[int | None]) -> Array:
    if target.dtype.kind in "iub" or target.dtype == np.float64:
        target = target.astype(np.float32)
    if len(output) == 2 and output[1] is not None:
        if target.ndim == 1 and output[1] == 1:
            return target[:, None]
        if target.ndim <= 2 and (target.ndim == 1 or target.shape[1] != output[1]):
            raise InvalidRequest(
                f"the targets have shape {shown(target.shape[1:])} per item, but the model's output is {shown(output[1:])}"
            )
    return target
