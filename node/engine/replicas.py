"""Models kept loaded for inference: batches padded to powers of two, so that nothing is traced while somebody waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tensorflow as tf

from node.engine import runtime
from potluck import tensors
from potluck.errors import InvalidModel, InvalidRequest, NotFound, PotluckError
from potluck.messages import ErrorInfo, RequestOutcome, Signature, Tensor, TensorSpec

WARM_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
WARM_SECONDS_EACH = 2.0
"""Buckets above one whose run takes longer than this are warmed up only when they are first needed."""

Array = np.ndarray[Any, Any]


@dataclass
class _Replica:
    signature: Signature
    functions: Any
    dtypes: tuple[Any, ...]

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs for one padded batch."""
        outputs = self.functions(*[tf.constant(array) for array in arrays])
        return [output.numpy() for output in outputs]


class Replicas:
    """By replica id."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._replicas: dict[str, _Replica] = {}

    def load(self, replica_id: str, path: Path) -> tuple[Signature, int]:
        """Load and warm up; the signature, and what memory it took. Raises InvalidModel."""
        import time

        if replica_id in self._replicas:
            return self._replicas[replica_id].signature, 0
        before = psutil.Process().memory_info().rss
        model = runtime.load_model(path, self._scratch, compiled=False)
        signature = runtime.signature(model)

        def call(*batch: Any) -> list[Any]:
            return list(tf.nest.flatten(model(batch[0] if len(batch) == 1 else list(batch), training=False)))

        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
        function = tf.function(call, input_signature=specs).get_concrete_function()
        replica = _Replica(
            signature, function, tuple(np.dtype(tf.as_dtype(t.dtype).as_numpy_dtype) for t in model.inputs)
        )
        for rows in WARM_BUCKETS:
            zeros = [
                np.zeros((rows, *(1 if d < 0 else d for d in spec.shape[1:])), dtype)
                for spec, dtype in zip(signature.inputs, replica.dtypes, strict=True)
            ]
            started = time.perf_counter()
            try:
                replica.run(zeros)
            except tf.errors.InvalidArgumentError as error:
                if all(d > 0 for spec in signature.inputs for d in spec.shape[1:]):
                    raise InvalidModel(f"the model cannot run: {' '.join(str(error).split())[:300]}") from error
                break  # free dimensions: which sizes it takes, only its users know
            if time.perf_counter() - started > WARM_SECONDS_EACH:
                break
        self._replicas[replica_id] = replica
        return signature, max(0, psutil.Process().memory_info().rss - before)

    def unload(self, replica_id: str) -> None:
        self._replicas.pop(replica_id, None)

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
            try:
                for number, outputs in _run_together(replica, members):
                    outcomes[number] = RequestOutcome(outputs=outputs)
            except (tf.errors.OpError, ValueError) as error:
                failure = _failed(
                    InvalidRequest(f"the model failed on this input: {' '.join(str(error).split())[:300]}")
                )
                for number, _ in members:
                    outcomes[number] = failure
        return tuple(outcome for outcome in outcomes if outcome is not None)


def _run_together(replica: _Replica, members: list[tuple[int, list[Array]]]) -> list[tuple[int, tuple[Tensor, ...]]]:
    sizes = [len(arrays[0]) for _, arrays in members]
    rows = sum(sizes)
    bucket = 1 << max(0, rows - 1).bit_length()
    joined = [_padded([arrays[i] for _, arrays in members], rows, bucket) for i in range(len(replica.signature.inputs))]
    outputs = replica.run(joined)
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


def _padded(arrays: list[Array], rows: int, bucket: int) -> Array:
    if len(arrays) == 1 and rows == bucket:
        return arrays[0]
    padded = np.zeros((bucket, *arrays[0].shape[1:]), arrays[0].dtype)
    np.concatenate(arrays, out=padded[:rows])
    return padded


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
        shape = array.shape
        if len(shape) != len(spec.shape) or any(
            w >= 0 and w != h for w, h in zip(spec.shape[1:], shape[1:], strict=True)
        ):
            raise InvalidRequest(
                f"input '{spec.name}' has shape {list(spec.shape)} (-1: any), but the request has {list(shape)}"
            )
        if array.dtype != dtype:
            if array.dtype.kind not in "fiub" or (dtype.kind in "iu" and array.dtype.kind == "f"):
                raise InvalidRequest(f"input '{spec.name}' is {spec.datatype}, but the request has {tensor.datatype}")
            array = array.astype(dtype)
        arrays.append(array)
    if not len(arrays[0]) or any(len(array) != len(arrays[0]) for array in arrays):
        raise InvalidRequest("the inputs of a request need the same number of rows, one at least")
    return arrays


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs)


def _failed(error: PotluckError) -> RequestOutcome:
    return RequestOutcome(error=ErrorInfo(code=error.code, message=error.message, retryable=error.retryable))
