"""Models kept loaded for inference, of any runtime. Requests that fit run together, in the batch sizes that the model prefers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import psutil
from msgspec.structs import replace

from node.engine import fitting
from node.engine.fitting import Array, padded
from node.engine.runtimes import not_loaded
from node.engine.wording import one_line
from potluck.errors import InvalidModel, InvalidRequest, ModelFailed, OutOfMemory, PotluckError
from potluck.wire import tensors
from potluck.wire.failures import error_info
from potluck.wire.reports import RequestOutcome
from potluck.wire.specs import shown
from potluck.wire.values import ModelFormat, Signature, Tensor
from potluck.wording import counted


class Model(Protocol):
    """A model in memory, of any runtime: a function of batches of arrays. Rows are the first axis of all of them."""

    @property
    def signature(self) -> Signature:
        """The signature, with -1 for the rows, whatever sizes the model takes."""
        ...

    @property
    def dtypes(self) -> tuple[np.dtype[Any], ...]:
        """The dtypes of the inputs."""
        ...

    def rows_at_once(self, rows: int) -> int:
        """How many of `rows` the next batch should have. If more than there are, the last row is repeated."""
        ...

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs for one batch of such a size. Raises ModelFailed if the model fails on it, InvalidModel if it would on any."""
        ...


Load = Callable[[ModelFormat, Path], Model]
"""Raises InvalidModel, CodeNotAllowed, Unavailable."""


class LoadedReplicas:
    """By replica id. `load` and `unload` may run beside `infer`, on another thread."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._replicas: dict[str, Model] = {}
        self._warm_rows: dict[str, int] = {}
        self._pixel_scales: dict[str, float] = {}
        self._untried: set[str] = set()
        """Replicas that have not run yet: if one fails, the cause may be the model or the request."""

    def load(
        self,
        replica_id: str,
        model_format: ModelFormat,
        path: Path,
        warm_rows: int,
        warm_seconds: float,
        pixel_scale: float = 1.0,
    ) -> tuple[Signature, int, int]:
        """Load and warm up. Returns the signature, the memory that it took, and up to how many rows it is warm. Raises as `Load`."""
        if replica_id in self._replicas:
            return self._replicas[replica_id].signature, 0, self._warm_rows[replica_id]
        before = psutil.Process().memory_info().rss
        replica = self._load(model_format, path)
        self._warm_rows[replica_id] = warm = warm_up(replica, warm_rows, warm_seconds)
        if not warm:
            self._untried.add(replica_id)
        self._replicas[replica_id] = replica
        self._pixel_scales[replica_id] = pixel_scale or replica.signature.pixel_scale
        return replica.signature, max(0, psutil.Process().memory_info().rss - before), warm

    def unload(self, replica_id: str) -> None:
        self._warm_rows.pop(replica_id, None)
        self._pixel_scales.pop(replica_id, None)
        self._untried.discard(replica_id)
        if self._replicas.pop(replica_id, None) is not None:
            gc.collect()  # models are full of cycles, and nothing else here would collect them soon

    def infer(self, replica_id: str, requests: Sequence[Sequence[Tensor]]) -> tuple[RequestOutcome, ...]:
        """One outcome for each request. Requests that fit run together, and a bad one fails alone. Raises NotFound."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            raise not_loaded(replica_id)
        pixel_scale = self._pixel_scales.get(replica_id, 1.0)
        outcomes: list[RequestOutcome | None] = [None] * len(requests)
        groups: dict[tuple[Any, ...], list[tuple[int, list[Array]]]] = {}
        for number, request in enumerate(requests):
            try:
                arrays = fitting.fit(request, replica.signature.inputs, replica.dtypes, pixel_scale)
            except PotluckError as error:
                outcomes[number] = _failed(error)
                continue
            groups.setdefault(tuple(array.shape[1:] for array in arrays), []).append((number, arrays))
        for members in groups.values():
            found = _outcomes(replica, members)
            if any(outcome.error is None for _, outcome in found):
                self._untried.discard(replica_id)
            for number, outcome in found:
                outcomes[number] = _doubtful(outcome) if replica_id in self._untried else outcome
        return tuple(outcome for outcome in outcomes if outcome is not None)


def run(model: Model, arrays: Sequence[Array]) -> list[Array]:
    """Outputs for any number of rows. Raises ModelFailed if the model fails on them, InvalidModel, OutOfMemory."""
    rows, done = len(arrays[0]), 0
    pieces: list[list[Array]] = []
    while done < rows:
        size = model.rows_at_once(rows - done)
        whole = done == 0 and size == rows
        part = list(arrays) if whole else [padded(array[done : done + size], size) for array in arrays]
        outputs = model.run(part)
        for spec, output in zip(model.signature.outputs, outputs, strict=True):
            if output.ndim == 0 or len(output) != size:
                raise InvalidModel(
                    f"the model's output '{spec.name}' has shape {shown(output.shape)} for {counted(size, 'item')}: it must have a row for each"
                )
        kept = min(size, rows - done)
        pieces.append([output[:kept] for output in outputs])
        done += size
    return pieces[0] if len(pieces) == 1 else [np.concatenate(outputs) for outputs in zip(*pieces, strict=True)]


def warm_up(model: Model, rows_limit: int, seconds: float, clock: Callable[[], float] = time.perf_counter) -> int:
    """Run each batch size for up to `rows_limit` rows once, smallest first, until `seconds` are over.

    Returns up to how many rows that was done; 0: the model takes no made-up input, which does not mean that it is bad. Raises
    InvalidModel for a model that cannot run, OutOfMemory.
    """
    started = clock()
    inputs = model.signature.inputs
    fixed = all(d > 0 for spec in inputs for d in spec.shape[1:])
    """Whether all dimensions are fixed. Only the model's users know good sizes for free dimensions."""
    values: list[Literal[0, 1]] = [0, 1]
    done: set[int] = set()
    warm = 0
    for rows in range(1, rows_limit + 1):
        size = model.rows_at_once(rows)
        if size not in done:
            if done and clock() - started > seconds:
                break
            try:
                values = [_accepted(model, size, values)]
            except ModelFailed as error:
                if done and fixed:  # the same row worked in a smaller batch
                    raise InvalidModel(f"the model cannot run: {one_line(error.__cause__ or error)}") from error
                break
            except InvalidModel:
                if fixed:
                    raise
                break
            except OutOfMemory:
                if not done:
                    raise
                break  # smaller batches have room
            done.add(size)
        warm = rows
    return warm


def _accepted(model: Model, rows: int, values: Sequence[Literal[0, 1]]) -> Literal[0, 1]:
    """The first of the values that the model takes in all inputs. Raises ModelFailed if it takes none, and what `run` raises."""
    *others, last = values
    for value in others:
        with suppress(ModelFailed):
            run(model, fitting.invented(model.signature.inputs, model.dtypes, rows, value))
            return value
    run(model, fitting.invented(model.signature.inputs, model.dtypes, rows, last))
    return last


Member = tuple[int, list[Array]]


def _outcomes(replica: Model, members: list[Member]) -> list[tuple[int, RequestOutcome]]:
    """Run requests of equal shapes together; if that fails, one by one, so that only the bad one fails."""
    try:
        return [(number, RequestOutcome(outputs=outputs)) for number, outputs in _run_together(replica, members)]
    except (InvalidRequest, InvalidModel, OutOfMemory) as error:  # a single request may have enough memory
        if len(members) > 1:
            return [found for member in members for found in _outcomes(replica, [member])]
        return [(members[0][0], _failed(error))]


def _run_together(replica: Model, members: list[Member]) -> list[tuple[int, tuple[Tensor, ...]]]:
    sizes = [len(arrays[0]) for _, arrays in members]
    inputs = range(len(replica.signature.inputs))
    joined = [
        members[0][1][i] if len(members) == 1 else np.concatenate([arrays[i] for _, arrays in members]) for i in inputs
    ]
    outputs = run(replica, joined)
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


def _doubtful(outcome: RequestOutcome) -> RequestOutcome:
    """The outcome of a replica that has not answered anything yet."""
    error = outcome.error
    if error is None or error.code != ModelFailed.code:
        return outcome
    message = f"{error.message} (nothing has run on this replica yet, so the model itself may be at fault)"
    return RequestOutcome(error=replace(error, message=message))


def _failed(error: PotluckError) -> RequestOutcome:
    return RequestOutcome(error=error_info(error))
