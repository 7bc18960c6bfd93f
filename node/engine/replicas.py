"""Models kept loaded for inference: requests that fit run together, padded to few batch sizes, traced once at load."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tensorflow as tf

from node.engine import runtime
from node.engine.wording import one_line
from node.engine.wording import shape as shown
from potluck import tensors
from potluck.errors import InvalidModel, InvalidRequest, NotFound, PotluckError
from potluck.messages import ErrorInfo, RequestOutcome, Signature, Tensor, TensorSpec

log = logging.getLogger(__name__)

WARM_ROWS = (1, 2, 4, 8, 16, 32, 64)
WARM_SECONDS = 3.0
"""Larger batches are warmed up until this much time is spent; the rest when they are first needed."""
ROWS_LIMIT = 256
"""Requests of more rows run in pieces, so that memory stays bounded."""

Array = np.ndarray[Any, Any]


def bucket(rows: int) -> int:
    """The batch size that `rows` are padded to: the next of 1 to 8, 10, 12, 14, 16, 20, ..., so at most a quarter is waste.

    (Powers of two would waste up to half, and with a graph for any batch size nothing is traced anew either way.)
    """
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    return math.ceil(rows / step) * step


class _Replica:
    """A model as one concrete function of tensors."""

    def __init__(self, model: Any) -> None:
        self.signature: Signature = runtime.signature(model)
        self.dtypes = tuple(np.dtype(tf.as_dtype(tensor.dtype).as_numpy_dtype) for tensor in model.inputs)

        def call(*batch: Any) -> list[Any]:
            return runtime.flat(model(runtime.packed(model, batch), training=False))

        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
        self._function = tf.function(call, input_signature=specs).get_concrete_function()
        self._call = self._shortest_call()

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs for one padded batch."""
        return [output.numpy() for output in self._call(*[tf.constant(array) for array in arrays])]

    def zeros(self, rows: int) -> list[Array]:
        """An input of that many rows; free dimensions are 1."""
        shapes = [(rows, *(1 if d < 0 else d for d in spec.shape[1:])) for spec in self.signature.inputs]
        return [_blank(shape, dtype) for shape, dtype in zip(shapes, self.dtypes, strict=True)]

    def warm_up(self) -> None:
        """Run the usual batch sizes once. Raises InvalidModel for a model that cannot run."""
        started = time.perf_counter()
        for rows in WARM_ROWS:
            try:
                self.run(self.zeros(rows))
            except tf.errors.OpError as error:
                if all(d > 0 for spec in self.signature.inputs for d in spec.shape[1:]):
                    raise InvalidModel(f"the model cannot run: {one_line(error)}") from error
                return  # which sizes its free dimensions take, only its users know
            if time.perf_counter() - started > WARM_SECONDS:
                return

    def _shortest_call(self) -> Callable[..., list[Any]]:
        """The function without the checks of its arguments, which `_fit` has made: 130 us instead of 300 for a small model.

        That way is TensorFlow's own, but not in its interface: where it is gone, the ordinary one serves.
        """
        function = self._function
        try:
            inner, captured = function._inference_function, list(function.captured_inputs)
            found: list[Any] = inner.call_flat(*[tf.constant(array) for array in self.zeros(1)], *captured)
            assert len(found) == len(self.signature.outputs)
        except tf.errors.OpError:  # zeros do not suit it; the way is there
            assert len(function.outputs) == len(self.signature.outputs)
        except (AttributeError, TypeError, ValueError, AssertionError) as error:
            log.info("short call not usable: %s", error)
            return function  # type: ignore[no-any-return]
        return lambda *batch: inner.call_flat(*batch, *captured)


class Replicas:
    """By replica id. `load` and `unload` may run beside `infer`, on another thread."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._replicas: dict[str, _Replica] = {}

    def load(self, replica_id: str, path: Path) -> tuple[Signature, int]:
        """Load and warm up; the signature, and what memory it took. Raises InvalidModel."""
        if replica_id in self._replicas:
            return self._replicas[replica_id].signature, 0
        before = psutil.Process().memory_info().rss
        replica = _Replica(runtime.load_model(path, self._scratch, compiled=False))
        replica.warm_up()
        self._replicas[replica_id] = replica
        return replica.signature, max(0, psutil.Process().memory_info().rss - before)

    def unload(self, replica_id: str) -> None:
        if self._replicas.pop(replica_id, None) is not None:
            gc.collect()  # models are full of cycles, and nothing else here would collect them soon

    def infer(self, replica_id: str, requests: Sequence[Sequence[Tensor]]) -> tuple[RequestOutcome, ...]:
        """One outcome a request; those that fit together run together, and a bad one fails alone. Raises NotFound."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            raise NotFound(f"replica {replica_id} is not loaded here")
        outcomes: list[RequestOutcome | None] = [None] * len(requests)
        groups: dict[tuple[Any, ...], list[tuple[int, list[Array]]]] = {}
        for number, request in enumerate(requests):
            try:
                arrays = _fit(request, replica)
            except PotluckError as error:
                outcomes[number] = _failed(error)
                continue
            groups.setdefault(tuple(array.shape[1:] for array in arrays), []).append((number, arrays))
        for members in groups.values():
            for number, outcome in _outcomes(replica, members):
                outcomes[number] = outcome
        return tuple(outcome for outcome in outcomes if outcome is not None)


Member = tuple[int, list[Array]]


def _outcomes(replica: _Replica, members: list[Member]) -> list[tuple[int, RequestOutcome]]:
    """Of requests with equal shapes, run together; when that fails, one by one, so that only the bad one fails."""
    try:
        return [(number, RequestOutcome(outputs=outputs)) for number, outputs in _run_together(replica, members)]
    except (tf.errors.OpError, ValueError) as error:
        if len(members) > 1:
            return [found for member in members for found in _outcomes(replica, [member])]
        return [(members[0][0], _failed(InvalidRequest(f"the model failed on this input: {one_line(error)}")))]


def _run_together(replica: _Replica, members: list[Member]) -> list[tuple[int, tuple[Tensor, ...]]]:
    sizes = [len(arrays[0]) for _, arrays in members]
    inputs = range(len(replica.signature.inputs))
    joined = [
        members[0][1][i] if len(members) == 1 else np.concatenate([arrays[i] for _, arrays in members]) for i in inputs
    ]
    outputs = _run_in_pieces(replica, joined, sum(sizes))
    found: list[tuple[int, tuple[Tensor, ...]]] = []
    start = 0
    for (number, _), size in zip(members, sizes, strict=True):
        part = tuple(
            tensors.from_numpy(spec.name, output[start : start + size])
            for spec, output in zip(replica.signature.outputs, outputs, strict=True)
        )
        found.append((number, part))
        start += size
    return found


def _run_in_pieces(replica: _Replica, arrays: list[Array], rows: int) -> list[Array]:
    if rows <= ROWS_LIMIT:
        return [output[:rows] for output in replica.run([_padded(array, bucket(rows)) for array in arrays])]
    pieces = [
        _run_in_pieces(replica, [array[start : start + ROWS_LIMIT] for array in arrays], min(ROWS_LIMIT, rows - start))
        for start in range(0, rows, ROWS_LIMIT)
    ]
    return [np.concatenate(outputs) for outputs in zip(*pieces, strict=True)]


def _padded(array: Array, rows: int) -> Array:
    if len(array) == rows:
        return array
    padded = _blank((rows, *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    return padded


def _blank(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return np.full(shape, "", dtype) if dtype.kind == "O" else np.zeros(shape, dtype)


def _fit(request: Sequence[Tensor], replica: _Replica) -> list[Array]:
    """A request's arrays in the order of the model's inputs. Raises InvalidRequest, naming expected and given."""
    specs = replica.signature.inputs
    if len(request) != len(specs):
        raise InvalidRequest(f"the model has {len(specs)} inputs ({_names(specs)}), the request {len(request)}")
    by_name = {tensor.name: tensor for tensor in request}
    if len(specs) == 1:
        ordered = list(request)
    elif {spec.name for spec in specs} == set(by_name):
        ordered = [by_name[spec.name] for spec in specs]
    else:
        raise InvalidRequest(f"the model's inputs are {_names(specs)}, the request's {', '.join(by_name)}")
    arrays = []
    for spec, dtype, tensor in zip(specs, replica.dtypes, ordered, strict=True):
        array = tensors.to_numpy(tensor)
        given = array.shape
        if len(given) != len(spec.shape) or any(
            w >= 0 and w != h for w, h in zip(spec.shape[1:], given[1:], strict=True)
        ):
            raise InvalidRequest(
                f"input '{spec.name}' takes {spec.datatype} of shape {shown(spec.shape)}, the first being the batch, "
                f"but the request has {shown(given)}"
            )
        arrays.append(array if array.dtype == dtype else _cast(array, dtype, spec, tensor.datatype))
    rows = len(arrays[0])
    if not rows or any(len(array) != rows for array in arrays):
        raise InvalidRequest("the inputs of a request need the same number of rows, one at least")
    return arrays


def _cast(array: Array, dtype: np.dtype[Any], spec: TensorSpec, datatype: str) -> Array:
    """Floats and whole numbers to floats, and whole numbers to those that hold them. Raises InvalidRequest."""
    if array.dtype.kind in "fiub" and dtype.kind == "f":
        return array.astype(dtype)
    if array.dtype.kind in "iub" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not array.size or (int(array.min()) >= limits.min and int(array.max()) <= limits.max):
            return array.astype(dtype)
    raise InvalidRequest(
        f"input '{spec.name}' takes {spec.datatype}, but the request has {datatype}, which cannot be cast without loss"
    )


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs)


def _failed(error: PotluckError) -> RequestOutcome:
    return RequestOutcome(error=ErrorInfo(code=error.code, message=error.message, retryable=error.retryable))
