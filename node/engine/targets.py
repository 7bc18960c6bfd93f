"""The target of one output in the form that its compiled loss takes, found from the loss and the output's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from potluck.errors import InvalidModel, InvalidRequest
from potluck.wire.specs import shown
from potluck.wording import counted

Array = np.ndarray[Any, Any]
Kind = Literal["one_hot", "sparse", "binary", "plain"]


@dataclass(frozen=True)
class Labels:
    """`one_hot`: float rows of `units`; `sparse`: class numbers; `binary`: 0.0 or 1.0; `plain`: as they are stored.

    `threshold` is the output from which a binary item counts as class 1. `shaped`: the loss compares value by value, so
    target and output have the same shape. `ignored`: the number for values of no class (void), which the loss leaves out.
    """

    kind: Kind
    units: int
    loss: str = ""
    threshold: float = 0.5
    shaped: bool = True
    ignored: int | None = None

    def void(self, target: Array) -> Array:
        """Which values of an encoded target are of no class."""
        return np.zeros(target.shape, bool) if self.ignored is None else target == self.ignored


def labels_for(loss: Any, output: Sequence[int | None], rank: int, classes: Sequence[str]) -> Labels:
    """The labels for an output, from its compiled loss, its shape, and the rank of the target (items first).

    Raises InvalidModel if the data's classes do not fit the output.
    """
    output = tuple(output)
    units = int(output[-1] or 0) if len(output) > 1 else 1
    name = loss_name(loss)
    rows = rank == len(output) > 1 and units > 1
    """Whether the target has a value for each unit (or one class number in their place)."""
    kind: Kind = "plain"
    if "sparse" in name:
        kind = "sparse"
    elif "categorical" in name or "kl_divergence" in name or "kullback" in name:
        kind = "one_hot"
    elif name.split()[:1] in (["crossentropy"], ["ce"]):  # Keras chooses by the shape of the target
        kind = "binary" if units == 1 else "one_hot"
    elif "binary" in name and units == 1 and len(output) == 2:
        kind = "binary"
    elif classes and len(classes) == units > 1 and not ("binary" in name and rows):
        kind = "one_hot"
    room = 2 if kind == "binary" else units
    if kind != "plain" and len(classes) > room:
        takes = "2 classes (one sigmoid unit)" if kind == "binary" else f"{units} (output of shape {shown(output)})"
        raise InvalidModel(
            f"the data has {counted(len(classes), 'class', 'classes')}, but the model takes {takes}: make its last layer {counted(len(classes), 'unit')}"
        )
    threshold = 0.0 if from_logits(loss) else 0.5
    return Labels(kind, units, name, threshold, _compares(loss, name), _ignored(loss) if kind == "sparse" else None)


def loss_name(loss: Any) -> str:
    """The name of a loss, given as a name, function or Loss object; "": no loss."""
    if isinstance(loss, str):
        return loss.lower()
    if loss is None:
        return ""
    kind = "".join(f"_{sign.lower()}" if sign.isupper() else sign for sign in type(loss).__name__)
    return f"{getattr(loss, 'name', '') or ''} {getattr(loss, '__name__', '')} {kind.lstrip('_')}".lower()


def _compares(loss: Any, name: str) -> bool:
    """Whether it is a loss of Keras that takes a value for each unit of the output. Other losses are not known."""
    known = isinstance(loss, str) or type(loss).__module__.startswith("keras")
    if known and hasattr(loss, "fn"):
        known = loss.fn.__module__.startswith("keras")
    return known and "circle" not in name and "ctc" not in name


def from_logits(loss: Any) -> bool:
    """Whether the loss takes outputs that no sigmoid or softmax has been applied to."""
    config = loss.get_config() if hasattr(loss, "get_config") else {}
    return bool(config.get("from_logits", False))


def _ignored(loss: Any) -> int | None:
    """`ignore_class` of a loss: the label of what has no class, commonly -1 or 255."""
    config = loss.get_config() if hasattr(loss, "get_config") else {}
    number = config.get("ignore_class")
    return int(number) if isinstance(number, int | float) else None


def encode(target: Array, labels: Labels, output: Sequence[int | None]) -> Array:
    """`target` (items first) for the loss; `output` is the shape of the model's output. Raises InvalidRequest."""
    match labels.kind:
        case "one_hot":
            return _one_hot(target, labels, output)
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
    numbers[labels.void(numbers)] = 0  # the loss leaves them out, whatever their weight
    names = [classes[i] if i < len(classes) else str(i) for i in range(max(2, labels.units))]
    unknown = sorted(set(class_weight) - set(names))
    if unknown:
        raise InvalidRequest(f"class_weight names {', '.join(unknown)}, but the classes are {', '.join(names[:12])}")
    table = np.array([class_weight.get(name, 1.0) for name in names], np.float32)
    weights: Array = table[numbers]
    return weights


def _one_hot(target: Array, labels: Labels, output: Sequence[int | None]) -> Array:
    if target.ndim == len(output) and target.shape[-1] == 1 and labels.units > 1:
        target = target[..., 0]
    if target.ndim == len(output) - 1:
        return np.eye(labels.units, dtype=np.float32)[_class_numbers(target, labels)]
    if target.shape[-1] != labels.units:
        raise InvalidRequest(
            f"the targets have shape {shown(target.shape[1:])} per item, but the model's output has {labels.units} units"
        )
    return target.astype(np.float32, copy=False)


def _class_numbers(target: Array, labels: Labels) -> Array:
    numbers = target.astype(np.int64)
    if target.dtype.kind == "f" and not np.array_equal(numbers, target):
        raise InvalidRequest("the targets are not whole numbers, but the loss takes class numbers")
    known = numbers[~labels.void(numbers)]
    if known.size and (known.min() < 0 or (labels.units and known.max() >= labels.units)):
        void = "" if labels.ignored is None else f" (beside {labels.ignored}, which the loss ignores)"
        raise InvalidRequest(
            f"the targets are classes {known.min()} to {known.max()}{void}, but the model's output has {labels.units} units"
        )
    return numbers


def _plain(target: Array, labels: Labels, output: Sequence[int | None]) -> Array:
    if target.dtype.kind in "iub" or target.dtype == np.float64:
        target = target.astype(np.float32)
    if target.ndim == len(output) - 1 and output[-1] == 1:  # one value, with or without an axis of its own
        return target[..., None]
    fits = target.ndim == len(output) and all(
        want is None or want == have for want, have in zip(output[1:], target.shape[1:], strict=True)
    )
    if labels.shaped and not fits:
        raise InvalidRequest(
            f"the targets have shape {shown(target.shape[1:])} per item, but the model's output is {shown(output[1:])}"
        )
    return target
