"""What the coordinator does with the blobs of results: fetch, average, join, and throw away what is no longer needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from coordinator import results
from coordinator.batch import BatchStrategy, merge
from coordinator.jobs import CloseRound, Job, RoundClosed
from coordinator.training.averaging import average
from coordinator.training.rounds import RoundsStrategy, weighted
from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore
from potluck.errors import InvalidModel
from potluck.messages import (
    AnyTaskResult,
    BlobRef,
    Evaluate,
    EvaluateResult,
    ExportResult,
    Predict,
    PredictResult,
    Tensor,
    TrainResult,
)

S = TypeVar("S")


class Collector:
    """Blobs of results in the coordinator's store. `urls` are where others get them from us."""

    def __init__(self, store: BlobStore, downloader: Downloader, urls: tuple[str, ...]) -> None:
        self._store = store
        self._downloader = downloader
        self.urls = urls

    async def collect(self, result: AnyTaskResult) -> AnyTaskResult:
        """The same result with all its blobs in our store. Raises Unavailable when nobody has one any more, CorruptBlob."""
        match result:
            case TrainResult():
                return replace(result, weights=await self._fetch(result.weights))
            case ExportResult():
                return replace(result, model=await self._fetch(result.model))
            case PredictResult():
                return replace(result, outputs=tuple([await self._output(tensor) for tensor in result.outputs]))
            case EvaluateResult():
                return result

    async def average(self, decision: CloseRound, clock: Callable[[], float]) -> RoundClosed:
        """Average a round's weights. Raises InvalidModel when they are not finite."""
        parts = [part for part in decision.results if isinstance(part, TrainResult)]
        weights = await asyncio.to_thread(self._average, parts)
        samples = sum(part.samples for part in parts)
        metrics = weighted([(part.samples, part.metrics) for part in parts])
        return RoundClosed(at=clock(), round=decision.round, weights=weights, samples=samples, metrics=metrics)

    def drop_round(self, decision: CloseRound, before: BlobRef | None, keep: BlobRef) -> None:
        """Throw away the updates of a closed round, and the checkpoint that its average replaces."""
        old = [part.weights for part in decision.results if isinstance(part, TrainResult)]
        for ref in [*old, *([before] if before else [])]:
            if ref.sha256 != keep.sha256:
                self._store.delete(ref.sha256)

    def pin(self, ref: BlobRef) -> None:
        self._store.pin(ref.sha256)

    async def result(self, job: Job) -> dict[str, Any]:
        """What the result of a job with all its work done holds, as fields of `JobEnded` (and a `signature`)."""
        spec, strategy, dataset = job.submitted.spec, job.strategy, job.dataset
        labels = dataset.format.classes if dataset else ()
        if isinstance(strategy, RoundsStrategy) and strategy.exported is not None:
            exported = strategy.exported
            return {"model": exported.model, "signature": exported.signature, "classes": labels}
        if isinstance(strategy, BatchStrategy) and isinstance(spec, Evaluate):
            merged = merge([part for part in strategy.in_order() if isinstance(part, EvaluateResult)])
            return {"evaluation": results.evaluation(merged, labels), "classes": labels}
        if isinstance(strategy, BatchStrategy) and isinstance(spec, Predict):
            parts = [part for part in strategy.in_order() if isinstance(part, PredictResult)]
            outputs = await asyncio.to_thread(results.predictions, parts, self._store)
            return {"outputs": outputs, "classes": labels, "keys": dataset.keys if dataset else None}
        raise InvalidModel(f"job {job.job_id} has no result")

    def _average(self, parts: list[TrainResult]) -> BlobRef:
        with self._store.new_file() as file:
            average([(self._store.path(part.weights.sha256), part.samples) for part in parts], file.path)
            return self._store.put_file(file.path, move=True)

    async def _output(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor.data, BlobRef):
            return replace(tensor, data=await self._fetch(tensor.data))
        if isinstance(tensor.data, bytes):
            # The journal holds the event, the store holds the bytes.
            return replace(tensor, data=await asyncio.to_thread(self._store.put_bytes, tensor.data))
        return tensor

    async def _fetch(self, ref: BlobRef) -> BlobRef:
        await self._downloader.fetch(ref)
        return BlobRef(sha256=ref.sha256, size=ref.size)


def locate(value: S, holders_of: Callable[[str], tuple[str, ...]]) -> S:
    """The same message with every blob reference in it naming its holders; those it named already come first."""
    if isinstance(value, BlobRef):
        found = dict.fromkeys((*value.holders, *holders_of(value.sha256)))
        return replace(value, holders=tuple(found))
    if isinstance(value, Struct):
        changed = {}
        for name in value.__struct_fields__:
            before = getattr(value, name)
            if isinstance(before, Struct | tuple):
                after = locate(before, holders_of)
                if after is not before:
                    changed[name] = after
        return replace(value, **changed) if changed else value
    if isinstance(value, tuple) and any(isinstance(item, Struct | tuple) for item in value):
        return tuple(locate(item, holders_of) for item in value)  # type: ignore[return-value]
    return value
