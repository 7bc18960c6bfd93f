"""Which pixels a model's first layers expect: 0 to 255, or 0 to 1."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from msgspec.structs import replace

from node.engine import keras_models, keras_parts
from potluck.data.images import DEFAULT_SCALE
from potluck.data.items import scale_of
from potluck.wire.values import Signature

_KEEP = frozenset(
    [
        "Activation",
        "Average",
        "AveragePooling2D",
        "CenterCrop",
        "Concatenate",
        "Cropping2D",
        "Dropout",
        "Identity",
        "InputLayer",
        "MaxPooling2D",
        "Permute",
        "RandomCrop",
        "RandomElasticTransform",
        "RandomErasing",
        "RandomFlip",
        "RandomGaussianBlur",
        "RandomPerspective",
        "RandomRotation",
        "RandomShear",
        "RandomTranslation",
        "RandomZoom",
        "Reshape",
        "Resizing",
        "SpatialDropout2D",
        "UpSampling2D",
        "ZeroPadding2D",
        "BroadcastTo",
        "Cast",
        "ExpandDims",
        "Flip",
        "GetItem",
        "Pad",
        "Repeat",
        "Resize",
        "Squeeze",
        "Stack",
        "Tile",
        "Transpose",
    ]
)
"""Layers and functions of keras.ops that do not change the scale of values: they move, cut, mix or leave out values."""
_STEPS_LIMIT = 1000
"""How many operations are looked at: a graph with many branches has very many paths."""
_BRIGHT, _WIDE = 1.5, 16.0
"""Inputs are pixels of 0 to 255, and not 0 to 1, if layers make 0 of a value above _BRIGHT, or 1 of a width above _WIDE."""


@dataclass(frozen=True)
class _Line:
    """`factor` * pixel + `offset`, for each channel or for all: the value that the layers so far make of a pixel."""

    factor: Any = 1.0
    offset: Any = 0.0

    def times(self, number: Any) -> _Line:
        return _Line(self.factor * number, self.offset * number)

    def plus(self, number: Any) -> _Line:
        return _Line(self.factor, self.offset + number)

    @property
    def expects(self) -> float:
        """The factor for pixels of 0 to 255 for which these layers were made; 0: they do not change pixels."""
        if np.all(np.asarray(self.factor) == 1.0) and np.all(np.asarray(self.offset) == 0.0):
            return 0.0
        with np.errstate(all="ignore"):
            wide = np.abs(1.0 / np.asarray(self.factor, np.float64))
            bright = np.abs(np.asarray(self.offset, np.float64)) * wide
        return 1.0 if np.nanmax(bright) > _BRIGHT or np.nanmax(wide) > _WIDE else DEFAULT_SCALE


def expected(model: Any) -> float:
    """The factor for pixels of 0 to 255 that the model's first layers imply; 0: they imply none.

    These layers are Rescaling, Normalization, arithmetic with constants (as in keras.applications' `preprocess_input`), and layers
    with a `value_range`. Augmentation and cropping may come before them, and models may be nested.
    """
    graph = _graph(model)
    if graph is None or len(graph.inputs) != 1:
        return 0.0
    found = _Walk().through(graph, graph.inputs[0], _Line())
    return max([0.0, *found.said, *(line.expects for line in found.left)])


def described(model: Any) -> Signature:
    """A Keras model's signature, with the pixels that it expects."""
    return replace(keras_models.signature(model), pixel_scale=expected(model))


def scale_for(model: Any) -> float:
    """The factor for pixels if the user gives none."""
    return scale_of(expected(model), input_dtype(model))


def input_dtype(model: Any) -> np.dtype[Any]:
    """The dtype of the first input; float32 if numpy does not have it."""
    name = keras.backend.standardize_dtype(model.inputs[0].dtype)
    return np.dtype("float32" if name in ("bfloat16", "string") else name)


@dataclass
class _Found:
    """`said`: what layers expect. `left`: what a pixel has become when it leaves the model."""

    said: set[float]
    left: list[_Line]


class _Walk:
    def __init__(self) -> None:
        self._steps = 0

    def through(self, graph: Any, tensor: Any, line: _Line) -> _Found:
        """From a tensor of a Functional model to the first layers with weights."""
        readers: dict[int, list[Any]] = defaultdict(list)
        for node in (node for nodes in graph._nodes_by_depth.values() for node in nodes):
            for read in node.input_tensors:
                readers[id(read)].append(node)
        ends = {id(output) for output in graph.outputs}
        found = _Found(set(), [])
        waiting = [(tensor, line)]
        while waiting and self._steps < _STEPS_LIMIT:
            tensor, line = waiting.pop()
            if id(tensor) in ends:
                found.left.append(line)
            for node in readers[id(tensor)]:
                self._steps += 1
                after = self._after(node, line, found)
                waiting += [(node.output_tensors[0], each) for each in after]
        return found

    def _after(self, node: Any, line: _Line, found: _Found) -> list[_Line]:
        """What an operation makes of pixels that go on. What it expects of them is added to `found`."""
        operation = node.operation
        inner = _graph(operation)
        if inner is not None and len(inner.inputs) == 1:
            nested = self.through(inner, inner.inputs[0], line)
            found.said |= nested.said
            return nested.left
        if (limits := getattr(operation, "value_range", None)) is not None and not line.expects:
            found.said.add(1.0 if float(limits[1]) > _WIDE else DEFAULT_SCALE)
            return []
        made = _made(node, line)
        if made is None and line.expects:
            found.said.add(line.expects)
        return [] if made is None else [made]


def _graph(model: Any) -> Any:
    """A model as a Functional one; None: it cannot be one."""
    if isinstance(model, keras.Sequential):
        model = keras_parts.functional(model)
    return model if isinstance(model, keras.Model) and hasattr(model, "_nodes_by_depth") else None


def _made(node: Any, line: _Line) -> _Line | None:
    """What an operation makes of pixels; None: not a line any more."""
    operation = node.operation
    if isinstance(operation, keras.layers.Rescaling):
        return line.times(np.asarray(operation.scale)).plus(np.asarray(operation.offset))
    if isinstance(operation, keras.layers.Normalization):
        return _normalized(operation, line)
    name = type(operation).__name__
    if name == "Activation" and operation.activation is not keras.activations.linear:
        return None
    if name in _KEEP:
        return line
    return _computed(name, node.arguments.args, line)


def _normalized(layer: Any, line: _Line) -> _Line | None:
    if layer.invert or getattr(layer, "mean", None) is None:
        return None
    mean, variance = (
        np.asarray(keras.ops.convert_to_numpy(value), np.float64) for value in (layer.mean, layer.variance)
    )
    return line.plus(-mean).times(1.0 / np.maximum(np.sqrt(variance), keras.backend.epsilon()))


def _computed(name: str, arguments: Any, line: _Line) -> _Line | None:
    """The line after arithmetic with a constant."""
    if len(arguments) != 2 or sum(isinstance(each, keras.KerasTensor) for each in arguments) != 1:
        return None
    first = isinstance(arguments[0], keras.KerasTensor)
    try:
        number = np.asarray(keras.ops.convert_to_numpy(arguments[1 if first else 0]), np.float64)
    except (ValueError, TypeError):
        return None
    match name:
        case "Add":
            return line.plus(number)
        case "Subtract":
            return line.plus(-number) if first else line.times(-1.0).plus(number)
        case "Multiply":
            return line.times(number)
        case "Divide" | "TrueDivide" if first:
            return line.times(1.0 / number)
    return None
