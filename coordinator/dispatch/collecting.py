"""What the coordinator does with blobs of results: fetches, averages and joins them, and deletes those no longer needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from msgspec.structs import replace

from coordinator.dispatch import outer, results
from coordinator.plans.batch import BatchStrategy, merge
from coordinator.plans.decisions import CloseRound
from coordinator.plans.events import RoundClosed
from coordinator.plans.job import Job
from coordinator.plans.node_data import NodesEvaluation
from coordinator.plans.quantizing import QuantizeStrategy
from coordinator.plans.training.scores import weighted
from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore, hash_file, no_room
from potluck.errors import CorruptBlob, EngineFailed, InvalidModel
from potluck.weights import updates
from potluck.wire.jobs import Deploy, Evaluate, Predict, Train
from potluck.wire.refs import blob_refs
from potluck.wire.tasks import (
    AnyTaskResult,
    ConvertResult,
    EvaluateResult,
    ExportResult,
    PredictResult,
    SyncResult,
    TrainResult,
    WarmUpResult,
)
from potluck.wire.values import BlobRef, Compression, Step, Tensor

_STEP_FILES = 3
"""How many files an outer step writes; each is at most as large as the weights."""


class Collector:
    """Blobs of results in the coordinator's store."""

    def __init__(self, store: BlobStore, downloader: Downloader) -> None:
        self._store = store
        self._downloader = downloader

    def too_large(self, result: AnyTaskResult) -> int:
        """The size of a result's blobs if the store can never hold them; 0 if it can."""
        size = sum(ref.size for ref in blob_refs(result))
        return size if size > self._store.limit_bytes else 0

    def at_hand(self, result: AnyTaskResult) -> bool:
        """Whether a result has no blobs to fetch."""
        return isinstance(result, EvaluateResult | WarmUpResult)

    async def collect(self, result: AnyTaskResult) -> AnyTaskResult:
        """The same result, with all its blobs in our store. Raises Unavailable when a blob has no holder any more, CorruptBlob.

        Blobs of training are pinned until this returns: record the result before you await anything.
        """
        match result:
            case TrainResult():
                with self._store.pinning() as pin:
                    base, update = await self._fetch(result.base, pin), await self._fetch(result.update, pin)
                    norm = await asyncio.to_thread(self._norm, update, base)
                    return replace(result, base=base, update=update, norm=norm)
            case ExportResult() | ConvertResult():
                return replace(result, model=await self._fetch(result.model))
            case PredictResult():
                return replace(result, outputs=tuple([await self._output(tensor) for tensor in result.outputs]))
            case SyncResult():
                if result.weights is None or result.optimizer is None:
                    return result
                with self._store.pinning() as pin:
                    if result.step is not None and self._store.has(result.step.base.sha256):
                        with suppress(CorruptBlob):  # ours was damaged: the weights are fetched whole
                            await self._follow(result.step, result.weights, pin)
                    kept, state = await self._fetch(result.weights, pin), await self._fetch(result.optimizer, pin)
                    return replace(result, weights=kept, optimizer=state, step=None)
            case EvaluateResult() | WarmUpResult():
                return result

    async def close_round(self, decision: CloseRound, spec: Train, clock: Callable[[], float]) -> RoundClosed:
        """Take a round's outer step. Raises InvalidModel, Diverged.

        Its blobs are pinned until this returns: record the result before you await anything.
        """
        base = decision.results[0].base
        settings = outer.outer_for(
            decision.round,
            decision.done,
            1.0 if decision.agreement is None else decision.agreement,
            spec.outer_learning_rate,
            spec.outer_momentum,
            max(part.momentum for part in decision.results) if decision.by_items else 0.0,
        )
        parts = decision.results
        counts = [part.items if decision.by_items else part.samples for part in parts]
        scales = outer.nova_scales(counts, [part.steps for part in parts]) if decision.by_items else [1.0] * len(parts)
        with self._store.pinning() as pin:
            step, weights, velocity, square = await asyncio.to_thread(
                self._take_step, decision, base, settings, spec.compression, counts, scales, pin
            )
            return RoundClosed(
                at=clock(),
                round=decision.round,
                base=base,
                step=step,
                weights=weights,
                velocity=velocity,
                samples=sum(part.samples for part in parts),
                learning_rate=settings.learning_rate,
                momentum=settings.momentum,
                agreement=outer.agreement_of(
                    square,
                    [(part.norm * scale, count) for part, scale, count in zip(parts, scales, counts, strict=True)],
                    decision.agreement,
                ),
                metrics=weighted([(count, part.metrics) for count, part in zip(counts, parts, strict=True)]),
                rejected=decision.rejected,
            )

    def drop_round(self, decision: CloseRound, used: Sequence[BlobRef], closed: RoundClosed, keep: set[str]) -> None:
        """Delete what a closed round no longer needs: its updates, and the weights and state that it began from."""
        base = [closed.base] if closed.base is not None else []
        self.drop([*(part.update for part in decision.results), *base, *used], keep)

    def drop(self, used: Iterable[BlobRef], keep: set[str]) -> None:
        """Delete blobs that are no longer needed, except those in `keep`."""
        for ref in used:
            if ref.sha256 not in keep:
                self._store.delete(ref.sha256)

    async def result(self, job: Job) -> dict[str, Any]:
        """The result of a job whose work is all done, as fields of `JobEnded` (and a `signature`)."""
        spec, strategy, dataset = job.submitted.spec, job.strategy, job.dataset
        labels = dataset.format.classes if dataset else ()
        if isinstance(strategy, QuantizeStrategy) and strategy.converted is not None and isinstance(spec, Deploy):
            before, after = (
                results.evaluation(merge([part for part in parts if isinstance(part, EvaluateResult)]), labels)
                for parts in strategy.evaluated()
            )
            on = spec.evaluation or spec.calibration or ""
            return {"model": strategy.converted, "before": before, "evaluation": after, "evaluated_on": on}
        if (training := job.training) is not None and (exported := training.exported()) is not None:
            best = training.best_epoch()
            return {"model": exported.model, "signature": exported.signature, "classes": labels, "best_epoch": best}
        if isinstance(strategy, BatchStrategy | NodesEvaluation) and isinstance(spec, Evaluate):
            merged = merge([part for part in strategy.in_order() if isinstance(part, EvaluateResult)])
            return {"evaluation": results.evaluation(merged, labels), "classes": labels}
        if isinstance(strategy, BatchStrategy) and isinstance(spec, Predict):
            parts = [part for part in strategy.in_order() if isinstance(part, PredictResult)]
            outputs = await asyncio.to_thread(results.predictions, parts, self._store)
            # Scores are for the model's classes; the data may have no classes, or only some.
            labels = job.submitted.classes or labels
            return {"outputs": outputs, "classes": labels, "keys": dataset.keys if dataset else None}
        raise InvalidModel(f"job {job.job_id} has no result")

    def _take_step(
        self,
        decision: CloseRound,
        base: BlobRef,
        settings: outer.Outer,
        compression: Compression,
        counts: Sequence[int],
        scales: Sequence[float],
        pin: Callable[[str], None],
    ) -> tuple[BlobRef, BlobRef, BlobRef, float]:
        with ExitStack() as stack:
            stack.enter_context(no_room())
            self._store.clear(_STEP_FILES * base.size)
            step, after, moving = (stack.enter_context(self._store.new_file()).path for _ in range(3))
            square = outer.combine(
                self._store.checked(base.sha256),
                [
                    (self._store.checked(part.update.sha256), count)
                    for part, count in zip(decision.results, counts, strict=True)
                ],
                self._store.checked(decision.velocity.sha256) if decision.velocity else None,
                settings,
                compression,
                scales=scales,
                step=step,
                after=after,
                velocity_after=moving,
            )
            put: list[BlobRef] = []
            for path in (step, after, moving):
                sha256, _ = hash_file(path)
                pin(sha256)  # pin first: another job may delete the same blob at any time
                put.append(self._store.adopt(path, sha256))
            return put[0], put[1], put[2], square

    def _norm(self, update: BlobRef, base: BlobRef) -> float:
        try:
            return updates.norm(self._store.checked(update.sha256), self._store.checked(base.sha256))
        except InvalidModel as error:
            raise EngineFailed(f"the node's update cannot be used: {error.message}") from error

    async def _output(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor.data, BlobRef):
            return replace(tensor, data=await self._fetch(tensor.data))
        if isinstance(tensor.data, bytes):
            # The journal holds the event, the store holds the bytes.
            return replace(tensor, data=await asyncio.to_thread(self._store.put_bytes, tensor.data))
        return tensor

    async def _follow(self, step: Step, weights: BlobRef, pin: Callable[[str], None]) -> None:
        """Make the file of `weights` by a step from the weights before, if the step leads to it."""
        pin(step.base.sha256)
        with self._store.pinning() as used:
            update = await self._fetch(step.update, used)
            await asyncio.to_thread(self._apply, step.base, update, weights, pin)
        self._store.delete(update.sha256)

    def _apply(self, base: BlobRef, update: BlobRef, weights: BlobRef, pin: Callable[[str], None]) -> None:
        with self._store.new_file() as file, no_room():
            self._store.clear(weights.size)
            try:
                updates.apply_update(self._store.checked(base.sha256), self._store.checked(update.sha256), file.path)
            except InvalidModel as error:
                raise EngineFailed(f"the node's checkpoint cannot be used: {error.message}") from error
            sha256, _ = hash_file(file.path)
            if sha256 == weights.sha256:
                pin(sha256)
                self._store.adopt(file.path, sha256)

    async def _fetch(self, ref: BlobRef, pin: Callable[[str], None] | None = None) -> BlobRef:
        if pin is not None:
            pin(ref.sha256)
        await self._downloader.fetch(ref)
        return BlobRef(sha256=ref.sha256, size=ref.size)
