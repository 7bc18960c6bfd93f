"""The models that this node keeps loaded for deployments. They have their own engine, so that a bad job cannot end them.

If that engine dies while it loads a model or runs its batch, the model is next loaded on an engine of its own, where it can end no
other. After three times within an hour, it is refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from node.engine.process import Engine
from node.inputs import Inputs
from node.slot import EngineSlot
from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore
from potluck.bus.outbox import Outbox
from potluck.crashes import Crashes
from potluck.errors import (
    Cancelled,
    EngineFailed,
    ModelCrashed,
    NotFound,
    OutOfMemory,
    Overloaded,
    PotluckError,
    TimedOut,
    TooLarge,
    Unavailable,
)
from potluck.logs import fields
from potluck.surviving import as_defect, outlived
from potluck.wire.commands import CancelInference, LoadModel, RunInference, UnloadModel
from potluck.wire.deadlines import deadline, too_late
from potluck.wire.failures import error_info
from potluck.wire.reports import InferenceFinished, ModelLoaded, ModelLoadFailed, ModelUnloaded, RequestOutcome
from potluck.wire.values import INPUT_BLOB_LIMIT_BYTES, BlobRef, Signature, Tensor

log = logging.getLogger(__name__)

REPLICAS_LIMIT = 256
"""Most replicas loaded or being loaded: memory is full long before, so more would be somebody's mistake."""
LOADS_LIMIT = 3
"""How often a load is tried while other models on the same engine make it fail."""
BATCHES_LIMIT = 256
"""Most batches that wait for the engine: the coordinator sends two per replica, so more would be somebody's mistake."""
OUTPUTS_KEPT = 10_000
"""How many blobs of outputs are remembered: clients may fetch those, and no other blobs."""
INLINE_OUTPUT_BYTES = 192 * 1024
"""How large a batch's outputs may be in a message; larger tensors become blobs."""


class Replicas:
    """Replicas by id. `run` must be running. Events go to `outbox`, answers to `fast`, both on `topic`.

    All share `slot`, except those that must be `alone`, in slots made by name. Call `on_engine_death` when an engine of either dies.
    `on_served` gets the time of each batch of a deployment with an objective: (objective, seconds).
    """

    def __init__(
        self,
        *,
        store: BlobStore,
        downloader: Downloader,
        inputs: Inputs,
        slot: EngineSlot,
        alone: Callable[[str], EngineSlot],
        outbox: Outbox,
        fast: Outbox,
        topic: str,
        urls: Callable[[], tuple[str, ...]],
        on_served: Callable[[float, float], None] = lambda objective_seconds, seconds: None,
    ) -> None:
        self._store = store
        self._outputs: dict[str, None] = {}
        """Blobs that were outputs of batches, the newest last."""
        self._downloader = downloader
        self._inputs = inputs
        self._slot = slot
        self._alone = alone
        self._own_slots: dict[str, EngineSlot] = {}
        """The slots of replicas that have an engine of their own."""
        self._own_count = 0
        self._engines: dict[str, Engine] = {}
        """The engine on which each replica is loaded."""
        self._crashes: dict[str, Crashes] = {}
        """Crashes of each model, by its SHA-256."""
        self._outbox = outbox
        self._fast = fast
        self._topic = topic
        self._urls = urls
        self._on_served = on_served
        self._loaded: dict[str, ModelLoaded] = {}
        self._models: dict[str, str] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._batches = 0
        self._fetching: dict[str, _Fetching] = {}
        """The batches that wait for their inputs."""
        self._draining = False
        self._idle = asyncio.Event()
        """Set once the last batch is answered, while draining."""
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    @property
    def needed(self) -> bool:
        """Whether the engine holds a replica, or soon will."""
        return bool(self._loaded or self._loading)

    async def stop(self) -> None:
        """Stop the engines that serve one replica only."""
        for slot in self._own_slots.values():
            await slot.stop()

    async def drained(self) -> None:
        """Return when the batches under way are answered, and begin no other.

        Those that come now get no answer: the coordinator asks them elsewhere as soon as it hears that this node is gone. A refusal
        would count as a failure, and with one replica the coordinator would ask here again and again.
        """
        self._draining = True
        if self._batches:
            await self._idle.wait()

    def no_inputs(self) -> PotluckError | None:
        """Why nobody should send inputs here now; None while a replica is ready."""
        if self._draining:
            return Unavailable("this node is stopping")
        return None if self._loaded else Unavailable("this node has no replica")

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            await asyncio.get_running_loop().create_future()

    def load(self, command: LoadModel) -> None:
        """Become a replica; reports again if it is one already."""
        known = self._loaded.get(command.replica_id)
        if known is not None:
            self._outbox.publish(self._topic, known)
        elif command.replica_id in self._loading:
            return
        elif len(self._loaded) + len(self._loading) >= REPLICAS_LIMIT:
            error = Overloaded(f"this node has {REPLICAS_LIMIT} replicas already", retry_after_seconds=1.0)
            self._outbox.publish(self._topic, ModelLoadFailed(replica_id=command.replica_id, error=error_info(error)))
        else:
            assert self._tasks is not None
            task = self._tasks.create_task(self._load(command), name=f"load {command.replica_id}")
            self._loading[command.replica_id] = task
            task.add_done_callback(lambda _: self._loading.pop(command.replica_id, None))

    def unload(self, command: UnloadModel) -> None:
        """Unload a replica; reports again if it is already unloaded."""
        if command.replica_id not in self._loaded and command.replica_id not in self._loading:
            self._outbox.publish(self._topic, ModelUnloaded(replica_id=command.replica_id))
            return
        assert self._tasks is not None
        unloading = outlived(self._unload(command.replica_id), "unloading of a model")
        self._tasks.create_task(unloading, name=f"unload {command.replica_id}")

    def infer(self, command: RunInference) -> None:
        """Run a batch unless it is too late; answers with `InferenceFinished`."""
        if self._draining:
            return
        now = time.time()
        until = deadline(command, now)
        if until < now:
            self._answer(command, TimedOut(too_late(command, now, "this node's")))
            return
        command = replace(command, expires=0.0 if until == inf else until)  # from here on by this machine's clock
        if command.replica_id not in self._loaded or self._batches >= BATCHES_LIMIT:
            error: PotluckError = NotFound(f"replica {command.replica_id} is not loaded on this node")
            if self._batches >= BATCHES_LIMIT:
                error = Overloaded(f"{BATCHES_LIMIT} batches wait on this node", retry_after_seconds=1.0)
            self._answer(command, error)
            return
        assert self._tasks is not None
        self._batches += 1
        self._tasks.create_task(self._infer(command), name="batch")

    def cancel(self, command: CancelInference) -> None:
        """Nobody waits for this batch any more: it is only computed if that has begun."""
        if (fetching := self._fetching.get(command.id)) is not None:
            fetching.cancel()
        elif (engine := self._engines.get(command.replica_id)) is not None:
            engine.cancel_inference(command.id)

    def on_engine_death(self, engine: Engine) -> None:
        """The engine's replicas are gone. Reports that, and which model was the cause; the coordinator decides what comes next."""
        for replica_id in [one for one, where in self._engines.items() if where is engine]:
            error = engine.blame(replica_id)
            if not _others_doing(error):
                self._crashed(replica_id, error)
            del self._loaded[replica_id]
            self._release(replica_id)
            self._outbox.publish(self._topic, ModelUnloaded(replica_id=replica_id, error=error_info(error)))

    def _crashed(self, replica_id: str, error: PotluckError) -> None:
        crashes = self._crashes.setdefault(self._models[replica_id], Crashes())
        crashes.add(time.monotonic(), error.message)
        count = crashes.count(time.monotonic())
        log.warning("model ended its engine %s", fields(replica=replica_id, times=count, reason=error.message))

    async def _load(self, command: LoadModel) -> None:
        replica_id, sha256 = command.replica_id, command.model.sha256
        self._models[replica_id] = sha256
        self._store.pin(sha256)
        crashes = self._crashes.get(sha256)
        try:
            if crashes is not None and crashes.too_many(time.monotonic()):
                raise ModelCrashed(f"this node refuses {command.name}: {crashes.summary}")
            try:
                path = await self._downloader.fetch(command.model)
            except OSError as error:
                raise Unavailable(f"the model cannot be kept on this node: {error}") from error

            engine, signature, resident, warm_rows = await self._on_an_engine(command, path)
        except Exception as error:  # noqa: BLE001 - the coordinator hears of a defect, too
            failure = as_defect(error, "loading of a model")
            self._release(replica_id)
            log.info("model not loaded %s", fields(model=command.name, replica=replica_id, reason=failure.message))
            self._outbox.publish(self._topic, ModelLoadFailed(replica_id=replica_id, error=error_info(failure)))
            return
        loaded = ModelLoaded(replica_id=replica_id, signature=signature, resident_bytes=resident, warm_rows=warm_rows)
        self._loaded[replica_id] = loaded
        self._engines[replica_id] = engine
        log.info(
            "model loaded %s",
            fields(model=command.name, replica=replica_id, resident_bytes=resident, warm_rows=warm_rows),
        )
        self._outbox.publish(self._topic, loaded)

    async def _on_an_engine(self, command: LoadModel, path: Path) -> tuple[Engine, Signature, int, int]:
        """Load it; try again when another model ended the engine meanwhile."""
        replica_id, tried = command.replica_id, 0
        while True:
            on: Engine | None = None

            async def load(engine: Engine) -> tuple[Engine, Signature, int, int]:
                nonlocal on
                on = engine
                return engine, *await engine.load_model(
                    replica_id, path, command.format, command.warm_rows, command.warm_seconds, command.pixel_scale
                )

            try:
                found = await self._slot_for(replica_id).use(load)
                if found[0].alive:  # otherwise its death was reported before this replica was known to be on it
                    return found
                raise found[0].blame(replica_id)
            except (EngineFailed, OutOfMemory) as error:
                if on is None or on.alive:
                    raise
                tried += 1
                if not _others_doing(error):
                    self._crashed(replica_id, error)
                    raise
                if tried == LOADS_LIMIT:
                    raise

    def _slot_for(self, replica_id: str) -> EngineSlot:
        crashes = self._crashes.get(self._models[replica_id])
        if crashes is None or not crashes.count(time.monotonic()):
            return self._slot
        if replica_id not in self._own_slots:
            self._own_count += 1
            self._own_slots[replica_id] = self._alone(f"alone-{self._own_count}")
        return self._own_slots[replica_id]

    async def _unload(self, replica_id: str) -> None:
        loading = self._loading.get(replica_id)
        if loading is not None:
            await asyncio.wait([loading])
        if self._loaded.pop(replica_id, None) is not None:
            engine, alone = self._engines[replica_id], replica_id in self._own_slots
            self._release(replica_id)
            self._slot.touch()
            if not alone:
                try:
                    await engine.unload_model(replica_id)
                except PotluckError as error:  # it died, or is too busy: it keeps the memory until it ends
                    log.info("engine did not unload %s", fields(replica=replica_id, reason=error.message))
        self._outbox.publish(self._topic, ModelUnloaded(replica_id=replica_id))

    async def _infer(self, command: RunInference) -> None:
        began = time.monotonic()
        try:
            outcomes, seconds = await self._computed(command)
            if _bytes_of(outcomes) > INLINE_OUTPUT_BYTES:
                outcomes = await self._as_blobs(outcomes)
        except Exception as error:  # noqa: BLE001 - a defect must not end this node: the next one would be asked, and end too
            self._answer(command, as_defect(error, "a batch"))
            return
        finally:
            self._batches -= 1
            if self._draining and not self._batches:
                self._idle.set()
        self._fast.publish(
            self._topic,
            InferenceFinished(id=command.id, replica_id=command.replica_id, outcomes=tuple(outcomes), seconds=seconds),
            qos=0,
        )
        if command.objective_seconds:
            self._on_served(command.objective_seconds, time.monotonic() - began)

    async def _computed(self, command: RunInference) -> tuple[list[RequestOutcome], float]:
        """An outcome for each request, and the engine's seconds."""
        files: dict[str, Path] = {}
        needed: set[str] = set()
        """Inputs of requests that failed here: another node may answer them."""
        try:
            requests = command.requests
            failed: dict[int, RequestOutcome] = {}
            if any(isinstance(tensor.data, BlobRef) for request in requests for tensor in request):
                requests, failed = await self._all_at_hand(command, files)
            needed = set(files)
            found, seconds = await self._run(command, requests, files) if requests else ([], 0.0)
            for place in sorted(failed):
                found.insert(place, failed[place])
            if files:
                needed = _needed_elsewhere(command, found)
            return found, seconds
        except PotluckError as error:
            if not error.retryable:
                needed = set()
            raise
        finally:
            self._inputs.done([path for name, path in files.items() if name in needed], answered=False)
            self._inputs.done([path for name, path in files.items() if name not in needed], answered=True)

    async def _run(
        self, command: RunInference, requests: tuple[tuple[Tensor, ...], ...], files: dict[str, Path]
    ) -> tuple[list[RequestOutcome], float]:
        engine = self._engines.get(command.replica_id)
        if engine is None or not engine.alive:  # it died just now
            raise EngineFailed("the engine that held the replica is gone")
        return await engine.infer(command.replica_id, requests, files, batch_id=command.id, expires=command.expires)

    async def _all_at_hand(
        self, command: RunInference, files: dict[str, Path]
    ) -> tuple[tuple[tuple[Tensor, ...], ...], dict[int, RequestOutcome]]:
        """The requests whose inputs are here, with the files of all blobs that are here in `files`; and the outcomes of the others,
        by their place in the batch. Raises Cancelled when nobody wants them any more, TimedOut.
        """
        refs = {one.sha256: one for one in _blobs(command) if one.size <= INPUT_BLOB_LIMIT_BYTES}
        fetching = self._fetching[command.id] = _Fetching(self._inputs.fetch_all(refs.values()))
        try:
            found = await fetching.result(command.expires)
            files.update({name: path for name, path in found.items() if isinstance(path, Path)})
            requests: list[tuple[Tensor, ...]] = []
            failed: dict[int, RequestOutcome] = {}
            for place, request in enumerate(command.requests):
                try:
                    requests.append(tuple([await _at_hand(one, found) for one in request]))
                except PotluckError as error:
                    failed[place] = RequestOutcome(error=error_info(error))
            fetching.check()
            return tuple(requests), failed
        finally:
            if self._fetching.get(command.id) is fetching:  # a batch may come twice
                del self._fetching[command.id]

    def is_output(self, sha256: str) -> bool:
        """Whether this blob is an output of one of the last batches."""
        return sha256 in self._outputs

    async def _as_blobs(self, outcomes: list[RequestOutcome]) -> list[RequestOutcome]:
        """The outcomes; tensors too large for a message are blobs in our store."""
        count = sum(len(outcome.outputs) for outcome in outcomes)
        share = INLINE_OUTPUT_BYTES // max(1, count)

        async def kept(tensor: Tensor) -> Tensor:
            if not isinstance(tensor.data, bytes) or len(tensor.data) <= share:
                return tensor
            ref = await asyncio.to_thread(self._store.put_bytes, tensor.data)
            self._outputs[ref.sha256] = None
            while len(self._outputs) > OUTPUTS_KEPT:
                del self._outputs[next(iter(self._outputs))]
            return replace(tensor, data=replace(ref, holders=self._urls()))

        try:
            return [
                replace(outcome, outputs=tuple([await kept(tensor) for tensor in outcome.outputs]))
                for outcome in outcomes
            ]
        except OSError as error:
            raise Unavailable(f"outputs cannot be kept on this node: {error}") from error

    def _answer(self, command: RunInference, error: PotluckError) -> None:
        outcome = RequestOutcome(error=error_info(error))
        finished = InferenceFinished(
            id=command.id, replica_id=command.replica_id, outcomes=(outcome,) * len(command.requests)
        )
        self._fast.publish(self._topic, finished, qos=0)

    def _release(self, replica_id: str) -> None:
        """Forget where a replica was, and stop the engine that was only for it."""
        sha256: Any = self._models.pop(replica_id, None)
        if sha256 is not None:
            self._store.unpin(sha256)
        self._engines.pop(replica_id, None)
        slot = self._own_slots.pop(replica_id, None)
        if slot is not None:
            assert self._tasks is not None
            self._tasks.create_task(outlived(slot.stop(), "stop of an engine"), name=f"stop the engine of {replica_id}")


class _Fetching:
    """The inputs of a batch, on their way."""

    def __init__(self, work: Coroutine[Any, Any, dict[str, Path | PotluckError]]) -> None:
        self._task = asyncio.create_task(work, name="inputs of a batch")
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self._task.cancel()

    def check(self) -> None:
        if self._cancelled:
            raise Cancelled("nobody waits for this batch any more")

    async def result(self, expires: float) -> dict[str, Path | PotluckError]:
        """By name: a file, or why there is none. `expires`: a Unix time; 0: no limit. Raises Cancelled, TimedOut."""
        try:
            await asyncio.wait({self._task}, timeout=max(0.0, expires - time.time()) if expires else None)
            if not self._task.done():
                raise TimedOut("the inputs of the request did not come in time")
            if self._task.cancelled():
                self.check()
            return self._task.result()
        finally:
            if not self._task.done():
                self._task.cancel()
                await asyncio.wait({self._task})


def _blobs(command: RunInference) -> Iterator[BlobRef]:
    for request in command.requests:
        for tensor in request:
            if isinstance(tensor.data, BlobRef):
                yield tensor.data


async def _at_hand(tensor: Tensor, found: Mapping[str, Path | PotluckError]) -> Tensor:
    """The tensor, if its blob was found; text is read at once."""
    ref = tensor.data
    if not isinstance(ref, BlobRef):
        return tensor
    if ref.size > INPUT_BLOB_LIMIT_BYTES:
        raise TooLarge(f"input '{tensor.name}' is a blob of {ref.size} bytes; the limit is {INPUT_BLOB_LIMIT_BYTES}")
    path = found[ref.sha256]
    if isinstance(path, PotluckError):
        raise path
    if tensor.datatype != "BYTES":
        return tensor
    try:
        data = await asyncio.to_thread(path.read_bytes)
    except OSError as error:
        raise Unavailable(f"input '{tensor.name}' cannot be read on this node: {error}") from error
    # Imported here: it needs numpy, which a daemon at rest does without.
    from potluck.wire.tensors import unpacked

    return replace(tensor, data=unpacked(tensor.name, tensor.datatype, data))


def _needed_elsewhere(command: RunInference, outcomes: Iterable[RequestOutcome]) -> set[str]:
    """The names of the inputs of those requests that another node may answer."""
    return {
        tensor.data.sha256
        for request, outcome in zip(command.requests, outcomes, strict=False)
        if outcome.error is not None and outcome.error.retryable
        for tensor in request
        if isinstance(tensor.data, BlobRef)
    }


def _others_doing(error: PotluckError) -> bool:
    """Whether an engine with a replica died, and another model was the cause."""
    return isinstance(error, EngineFailed) and not isinstance(error, ModelCrashed)


def _bytes_of(outcomes: Iterable[RequestOutcome]) -> int:
    return sum(len(tensor.data) for outcome in outcomes for tensor in outcome.outputs if isinstance(tensor.data, bytes))
