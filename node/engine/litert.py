"""LiteRT models (`.tflite`): graphs for small machines, run without TensorFlow.

There is one interpreter, resized to the rows of each batch. A size that it had before costs nothing measurable, and a new size
costs no more than padding would. An interpreter for each size would pack the weights again for each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from node.engine.fitting import Array
from node.engine.wording import one_line
from potluck.errors import InvalidModel, ModelFailed
from potluck.wire.tensors import datatype_of
from potluck.wire.values import Signature, TensorSpec

ROWS_LIMIT = 32
"""More rows in one batch take memory, and are not faster."""
SERVING = "serving_default"
MAGIC = b"TFL3"
"""The bytes from byte 4 on (the flatbuffer's file identifier)."""
FAILURES = (RuntimeError, ValueError)
_MISSING = re.compile(r"unresolved custom op: (\S+?)\.?\s")
_TENSORFLOW = re.compile(r"Select TensorFlow op\(s\)")


@dataclass(frozen=True)
class Port:
    """A tensor of the model: its place, and how its whole numbers stand for floats (`scale` 0: not quantised)."""

    name: str
    index: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    scale: float
    zero_point: int

    @property
    def seen(self) -> np.dtype[Any]:
        """Its dtype as users see it."""
        return np.dtype(np.float32) if self.scale else self.dtype

    def quantised(self, array: Array) -> Array:
        """Floats as whole numbers. Raises nothing: a value beyond the range becomes the end of the range."""
        if not self.scale:
            return array
        limits = np.iinfo(self.dtype)
        found: Array = np.clip(np.rint(array / self.scale) + self.zero_point, limits.min, limits.max).astype(self.dtype)
        return found

    def floats(self, array: Array) -> Array:
        if not self.scale:
            return array
        return (array.astype(np.float32) - self.zero_point) * np.float32(self.scale)


class LiteModel:
    """An interpreter with its signature. Users see floats where the model has quantised numbers."""

    def __init__(self, path: Path, threads: int) -> None:
        """Raises InvalidModel."""
        with path.open("rb") as file:
            if file.read(8)[4:] != MAGIC:
                raise InvalidModel(
                    "the model is not a .tflite file: convert it (tf.lite.TFLiteConverter), or import it as what it is"
                )
        try:
            self._interpreter = Interpreter(model_path=str(path), num_threads=threads)
            self._interpreter.allocate_tensors()
            self._inputs, self._outputs = _ports(self._interpreter)
        except FAILURES as error:
            raise InvalidModel(_refusal(str(error))) from error
        rows = {port.shape[0] for port in self._inputs}
        self._exactly = None if rows == {-1} else max(rows)
        if len(rows) > 1:
            raise InvalidModel(f"the model's inputs take batches of other sizes: {', '.join(map(str, sorted(rows)))}")
        self._shapes = [tuple(port.shape) for port in self._inputs]
        self.signature = Signature(inputs=_specs(self._inputs), outputs=_specs(self._outputs))
        self.dtypes = tuple(port.seen for port in self._inputs)

    def rows_at_once(self, rows: int) -> int:
        return self._exactly or min(rows, ROWS_LIMIT)

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        interpreter = self._interpreter
        try:
            shapes = [array.shape for array in arrays]
            if shapes != self._shapes:
                for port, shape in zip(self._inputs, shapes, strict=True):
                    interpreter.resize_tensor_input(port.index, shape, strict=True)
                interpreter.allocate_tensors()
                self._shapes = shapes
            for port, array in zip(self._inputs, arrays, strict=True):
                interpreter.set_tensor(port.index, port.quantised(array))
            interpreter.invoke()
            return [port.floats(interpreter.get_tensor(port.index)) for port in self._outputs]
        except FAILURES as error:
            self._shapes = []  # the interpreter's shapes are unknown now
            raise ModelFailed(f"the model failed on this input: {one_line(error)}") from error


def _ports(interpreter: Any) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs, from the signature `serving_default` (or the only one), else from the tensors. Raises InvalidModel."""
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    signatures = list(interpreter.get_signature_list())
    chosen = SERVING if SERVING in signatures else signatures[0] if len(signatures) == 1 else None
    if chosen is None:
        if signatures:
            raise InvalidModel(
                f"the model has no signature {SERVING!r}, but {', '.join(signatures)}: convert it with that one alone"
            )
        return [_port(each["name"], each) for each in inputs], [_port(each["name"], each) for each in outputs]
    runner = interpreter.get_signature_runner(chosen)
    named = runner.get_input_details(), runner.get_output_details()
    if {each["index"] for each in named[0].values()} != {each["index"] for each in inputs}:
        raise InvalidModel(
            f"the model's signature {chosen!r} is not that of its first graph: convert it with that one alone"
        )
    taken, given = ([_port(name, each) for name, each in details.items()] for details in named)
    return taken, given


def _port(name: str, details: dict[str, Any]) -> Port:
    dtype = np.dtype(details["dtype"])
    if dtype.kind in "SUO":
        raise InvalidModel(
            f"the model's '{name}' is text, which LiteRT models here do not take: keep its text layers out of it"
        )
    scales = details["quantization_parameters"]["scales"]
    if len(scales) > 1:
        raise InvalidModel(
            f"the model's '{name}' is quantised by channels, but inputs and outputs must have one scale: convert it again"
        )
    scale, zero_point = details["quantization"]
    shape = tuple(int(d) for d in details["shape_signature"])
    if not shape:
        raise InvalidModel(f"the model's '{name}' has no batch: give its first dimension to the items of a batch")
    whole = dtype.kind in "iu"
    return Port(name, int(details["index"]), dtype, shape, float(scale) if whole else 0.0, int(zero_point))


def _specs(ports: Sequence[Port]) -> tuple[TensorSpec, ...]:
    """Specs with -1 for the batch, even if the model takes only one size: batches are padded and cut to it."""
    return tuple(
        TensorSpec(name=port.name, datatype=datatype_of(port.seen), shape=(-1, *port.shape[1:])) for port in ports
    )


def _refusal(text: str) -> str:
    custom = _MISSING.search(text)
    if custom is not None:
        return (
            f"the model has the operation {custom[1]} of its own, which LiteRT does not have and a .tflite file does not hold: "
            "convert it with built-in operations alone"
        )
    if _TENSORFLOW.search(text):
        return (
            "the model has operations of TensorFlow that LiteRT does not have: convert it with TFLITE_BUILTINS alone, "
            "or deploy the Keras model or SavedModel that it was made of"
        )
    return f"the model cannot be loaded: {one_line(text, 400)}"
