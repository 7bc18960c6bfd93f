"""Replicas on an engine that does what the test says: nothing that goes wrong there ends the daemon."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from node import replicas
from node.inputs import FETCHES_AT_ONCE, Inputs
from node.replicas import Replicas
from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore
from potluck.bus.mqtt import Bus
from potluck.bus.outbox import Outbox
from potluck.credentials import Credentials
from potluck.errors import EngineFailed, ModelCrashed, Overloaded, PotluckError
from potluck.wire.commands import CancelInference, LoadModel, RunInference, UnloadModel
from potluck.wire.failures import error_info
from potluck.wire.reports import InferenceFinished, ModelLoaded, ModelLoadFailed, ModelUnloaded, RequestOutcome
from potluck.wire.values import BlobRef, Message, Signature, Tensor
from support.eventually import eventually
from support.fake_bus import FakeBroker, FakeBus


class Engine:
    def __init__(self) -> None:
        self.alive = True
        self.suspects: set[str] = set()
        self.stopped = False
        self.on_loaded: Callable[[], None] = lambda: None
        self.gate = asyncio.Event()
        self.gate.set()

    async def load_model(
        self, replica_id: str, path: Path, model_format: str, warm_rows: int, warm_seconds: float, pixel_scale: float
    ) -> tuple[Signature, int, int]:
        await self.gate.wait()
        self.on_loaded()
        if not self.alive:
            raise self.blame(replica_id)
        return Signature(inputs=(), outputs=()), 1, warm_rows

    def blame(self, replica_id: str) -> PotluckError:
        return (ModelCrashed if replica_id in self.suspects else EngineFailed)("the engine was ended by SIGKILL")

    async def infer(
        self, replica_id: str, requests: Any, files: Any, *, batch_id: str, expires: float
    ) -> tuple[list[RequestOutcome], float]:
        return [RequestOutcome() for _ in requests], 0.0

    async def unload_model(self, replica_id: str) -> None:
        raise Overloaded("64 tasks wait for this engine")


class Slot:
    """The parts of an EngineSlot that Replicas need."""

    def __init__(self, name: str = "serve") -> None:
        self.name = name
        self.engine: Engine | None = Engine()
        self.stopped = False
        self.started_anew = False
        """Whether a dead engine is replaced."""

    async def use(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        if self.engine is None and not self.started_anew:
            raise EngineFailed("the engine did not start")
        self.engine = self.engine or Engine()
        return await work(self.engine)

    async def stop(self) -> None:
        self.stopped = True

    def touch(self) -> None:
        pass


@dataclass
class Bench:
    replicas: Replicas
    store: BlobStore
    slot: Slot
    broker: FakeBroker
    alone: list[Slot]
    inputs: Inputs

    def die(self, slot: Slot, *suspects: str) -> None:
        """The engine of these replicas."""
        engine, slot.engine = slot.engine, None
        assert engine is not None
        engine.alive, engine.suspects = False, set(suspects)
        self.replicas.on_engine_death(engine)  # type: ignore[arg-type]

    def said(self) -> list[Message]:
        return self.broker.messages("#")

    def load(self, replica_id: str, model: bytes = b"model") -> None:
        ref = BlobRef(sha256=hashlib.sha256(model).hexdigest(), size=len(model), holders=("http://a..b",))
        self.replicas.load(LoadModel(epoch=1, replica_id=replica_id, name="m:1", model=ref))

    def unload(self, replica_id: str) -> None:
        self.replicas.unload(UnloadModel(epoch=1, replica_id=replica_id))

    async def heard(self, count: int) -> list[Message]:
        return await eventually(lambda: self.said() if len(self.said()) >= count else [])


@asynccontextmanager
async def made(folder: Path) -> AsyncIterator[Bench]:
    store = BlobStore(folder / "blobs", 1 << 20)
    store.put_bytes(b"model")
    broker, slot = FakeBroker(), Slot()
    alone: list[Slot] = []

    def own(name: str) -> Any:
        alone.append(Slot(name))
        return alone[-1]

    bus: Bus = FakeBus(broker, client_id="node")
    async with Downloader(store, Credentials()) as downloader, Inputs(folder / "inputs", Credentials()) as inputs:
        outbox, fast = Outbox(bus), Outbox(bus)
        held = Replicas(
            store=store, downloader=downloader, inputs=inputs, slot=slot, alone=own, outbox=outbox, fast=fast,  # type: ignore[arg-type]
            topic="out", urls=lambda: (),
        )  # fmt: skip
        async with asyncio.TaskGroup() as tasks:
            parts = [tasks.create_task(part) for part in (bus.run(), outbox.run(), fast.run(), held.run())]
            await bus.connected(5)
            yield Bench(held, store, slot, broker, alone, inputs)
            for part in parts:
                assert not part.done()
                part.cancel()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with made(tmp_path) as found:
        yield found


async def test_an_engine_too_busy_to_unload_is_no_fault_of_the_replica(bench: Bench) -> None:
    bench.load("r1")
    bench.unload("r1")
    loaded, unloaded = await bench.heard(2)
    assert isinstance(loaded, ModelLoaded)
    assert unloaded == ModelUnloaded(replica_id="r1")
    assert bench.replicas.ids == ()
    assert bench.store.delete(hashlib.sha256(b"model").hexdigest())  # nobody pins it any more


async def test_what_is_not_loaded_is_said_to_be_unloaded(bench: Bench) -> None:
    for _ in range(3):
        bench.unload("never heard of")
    assert await bench.heard(3) == [ModelUnloaded(replica_id="never heard of")] * 3


async def test_an_engine_that_dies_as_it_has_loaded_leaves_no_replica(bench: Bench) -> None:
    """Its death is reported before the answer is handled."""
    assert bench.slot.engine is not None
    bench.slot.engine.on_loaded = lambda: bench.die(bench.slot)
    bench.load("r1")
    (failed,) = await bench.heard(1)
    assert isinstance(failed, ModelLoadFailed)
    assert (failed.error.code, failed.error.retryable) == ("engine_failed", True)
    assert bench.replicas.ids == ()
    assert not bench.replicas.needed


async def test_of_two_replicas_the_one_that_was_at_work_is_blamed_and_is_alone_from_then_on(bench: Bench) -> None:
    bench.slot.started_anew = True
    bench.store.put_bytes(b"other")
    bench.load("r1")
    bench.load("r2", b"other")
    await bench.heard(2)
    bench.die(bench.slot, "r1")
    told = {one.replica_id: one.error for one in (await bench.heard(4))[2:] if isinstance(one, ModelUnloaded)}
    assert {replica_id: error and error.code for replica_id, error in told.items()} == {
        "r1": "model_crashed",
        "r2": "engine_failed",
    }
    bench.load("r1b")
    bench.load("r2b", b"other")
    await bench.heard(6)
    assert [slot.name for slot in bench.alone] == ["alone-1"]
    bench.die(bench.alone[0], "r1b")
    gone = (await bench.heard(7))[-1]
    assert isinstance(gone, ModelUnloaded)
    assert bench.replicas.ids == ("r2b",)
    bench.replicas.infer(RunInference(id="b", replica_id="r2b", requests=((),)))
    assert isinstance((await bench.heard(8))[-1], InferenceFinished)
    await eventually(lambda: bench.alone[0].stopped)


async def test_after_three_times_it_is_refused_and_a_load_that_ends_the_engine_counts(bench: Bench) -> None:
    assert bench.slot.engine is not None
    bench.slot.engine.on_loaded = lambda: bench.die(bench.slot, "r0")
    bench.load("r0")
    (failed,) = await bench.heard(1)
    assert isinstance(failed, ModelLoadFailed)
    for number in (1, 2):
        bench.load(f"r{number}")
        await bench.heard(2 * number)
        bench.die(bench.alone[-1], f"r{number}")
        await bench.heard(2 * number + 1)
    bench.load("r3")
    refused = await eventually(
        lambda: [one for one in bench.said() if isinstance(one, ModelLoadFailed) and one.replica_id == "r3"]
    )
    assert refused[0].error.code == "model_crashed"
    assert "3 times within an hour" in refused[0].error.message
    assert "SIGKILL" in refused[0].error.message
    assert len(bench.alone) == 2


async def test_a_load_is_tried_again_when_another_model_ends_the_engine(bench: Bench) -> None:
    bench.slot.started_anew = True
    assert bench.slot.engine is not None
    bench.slot.engine.on_loaded = lambda: bench.die(bench.slot, "another")
    bench.load("r1")
    (loaded,) = await bench.heard(1)
    assert isinstance(loaded, ModelLoaded)
    assert not bench.alone


async def test_a_replica_that_is_alone_takes_its_engine_with_it_when_it_goes(bench: Bench) -> None:
    bench.load("r1")
    await bench.heard(1)
    bench.die(bench.slot, "r1")
    await bench.heard(2)
    bench.load("r2")
    await bench.heard(3)
    bench.unload("r2")
    assert (await bench.heard(4))[-1] == ModelUnloaded(replica_id="r2")
    await eventually(lambda: bench.alone[0].stopped)


async def test_a_disk_that_fails_and_an_address_that_is_none_are_told(bench: Bench) -> None:
    bench.load("r1", b"not here")
    (failed,) = await bench.heard(1)
    assert isinstance(failed, ModelLoadFailed)
    assert (failed.error.code, "a..b" in failed.error.message) == ("unavailable", True)
    shutil.rmtree(bench.store.folder)
    bench.store.folder.write_text("a file where the folder was")
    bench.load("r2", b"not here")
    _, failed = await bench.heard(2)
    assert isinstance(failed, ModelLoadFailed)
    assert (failed.error.code, "cannot be kept on this node" in failed.error.message) == ("unavailable", True)


async def test_there_is_a_limit_and_resends_do_not_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "REPLICAS_LIMIT", 2)
    assert bench.slot.engine is not None
    bench.slot.engine.gate.clear()
    for replica_id in ("r1", "r2", "r1", "r2", "r3"):
        bench.load(replica_id)
    (refused,) = await bench.heard(1)
    assert isinstance(refused, ModelLoadFailed)
    assert (refused.replica_id, refused.error.code) == ("r3", "overloaded")
    bench.slot.engine.gate.set()
    await bench.heard(3)
    assert bench.replicas.ids == ("r1", "r2")
    bench.replicas.infer(RunInference(id="b", replica_id="r3", requests=((),)))
    finished = (await bench.heard(4))[-1]
    assert isinstance(finished, InferenceFinished)
    assert finished.outcomes[0].error is not None
    assert finished.outcomes[0].error.code == "not_found"


async def test_a_batch_that_comes_too_late_is_answered_so(bench: Bench) -> None:
    late = RunInference(id="b1", replica_id="r1", requests=((), ()), expires=1.0)
    bench.replicas.infer(late)
    (finished,) = await bench.heard(1)
    assert isinstance(finished, InferenceFinished)
    assert [outcome.error.code for outcome in finished.outcomes if outcome.error is not None] == ["timed_out"] * 2
    assert "by this node's clock" in finished.outcomes[0].error.message
    bench.replicas.infer(replace(late, valid_seconds=5.0))  # time counted from receipt needs no clock
    finished = (await bench.heard(2))[-1]
    assert [outcome.error.code for outcome in finished.outcomes if outcome.error is not None] == ["not_found"] * 2


async def test_clients_may_fetch_outputs_that_are_blobs_and_only_the_last(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "OUTPUTS_KEPT", 2)
    bench.load("m:1/1")
    await bench.heard(1)
    assert bench.slot.engine is not None

    async def large(*_: Any, **__: Any) -> tuple[list[RequestOutcome], float]:
        outputs = [bytes([number]) * 400_000 for number in range(3)]
        tensors = [Tensor(name="y", datatype="UINT8", shape=(1, len(data)), data=data) for data in outputs]
        return [RequestOutcome(outputs=tuple(tensors))], 0.0

    monkeypatch.setattr(bench.slot.engine, "infer", large)
    bench.replicas.infer(RunInference(id="b", replica_id="m:1/1", requests=((),)))
    finished = (await bench.heard(2))[-1]
    assert isinstance(finished, InferenceFinished)
    refs = [output.data for output in finished.outcomes[0].outputs]
    assert [bench.replicas.is_output(ref.sha256) for ref in refs if isinstance(ref, BlobRef)] == [False, True, True]
    assert not bench.replicas.is_output(hashlib.sha256(b"model").hexdigest())


async def test_a_request_whose_inputs_nobody_has_fails_alone(bench: Bench) -> None:
    bench.load("m:1/1")
    await bench.heard(1)
    good = (Tensor(name="x", datatype="UINT8", shape=(1,), data=b"1"),)
    ref = BlobRef(sha256="0" * 64, size=9, holders=())
    lost = (Tensor(name="x", datatype="UINT8", shape=(9,), data=ref),)
    huge = (Tensor(name="x", datatype="UINT8", shape=(9,), data=replace(ref, size=2**40)),)
    for requests, codes in (
        ((lost, good, huge, good), ["inputs_lost", "", "too_large", ""]),
        ((lost, huge), ["inputs_lost", "too_large"]),
    ):
        batch_id = f"batch of {len(requests)}"
        bench.replicas.infer(RunInference(id=batch_id, replica_id="m:1/1", requests=requests))
        answer = (await bench.heard(2 + (len(requests) == 2)))[-1]
        assert isinstance(answer, InferenceFinished)
        assert [outcome.error.code if outcome.error else "" for outcome in answer.outcomes] == codes


class Holder:
    """A holder of blobs in a node's own memory. Blobs named in `hung` never arrive until they are let go."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs = bench.inputs
        self.hung: set[str] = set()
        self.asked: list[str] = []
        self.stopped: list[str] = []
        fetch = self.inputs.fetch

        async def slowly(ref: BlobRef) -> Path:
            self.asked.append(ref.sha256)
            try:
                await eventually(lambda: ref.sha256 not in self.hung)
            except asyncio.CancelledError:
                self.stopped.append(ref.sha256)
                raise
            return await fetch(ref)

        monkeypatch.setattr(self.inputs, "fetch", slowly)

    def put(self, text: bytes) -> BlobRef:
        return self.inputs.store.put_bytes(text)

    def hanging(self, text: bytes) -> BlobRef:
        ref = BlobRef(sha256=hashlib.sha256(text).hexdigest(), size=len(text), holders=())
        self.hung.add(ref.sha256)
        return ref


def request(*refs: BlobRef) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name=f"x{place}", datatype="UINT8", shape=(ref.size,), data=ref) for place, ref in enumerate(refs)
    )


async def test_inputs_of_a_batch_come_side_by_side(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, holders that hang would add up, and the replica would be taken for silent."""
    holder = Holder(bench, monkeypatch)
    bench.load("m:1/1")
    await bench.heard(1)
    refs = [holder.hanging(str(number).encode()) for number in range(2 * FETCHES_AT_ONCE)]
    bench.replicas.infer(RunInference(id="b", replica_id="m:1/1", requests=tuple(request(ref, ref) for ref in refs)))
    await eventually(lambda: len(holder.asked) >= FETCHES_AT_ONCE)
    assert len(holder.asked) == FETCHES_AT_ONCE
    holder.hung.clear()
    answer = (await bench.heard(2))[-1]
    assert isinstance(answer, InferenceFinished)
    assert [outcome.error.code for outcome in answer.outcomes if outcome.error] == ["inputs_lost"] * len(refs)
    assert sorted(holder.asked) == sorted(ref.sha256 for ref in refs)  # each once


async def test_a_batch_that_nobody_waits_for_stops_fetching_its_inputs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Holder(bench, monkeypatch)
    bench.load("m:1/1")
    await bench.heard(1)
    here, hung = holder.put(b"soup"), holder.hanging(b"bread")
    batch = RunInference(id="b", replica_id="m:1/1", requests=(request(here), request(hung)))
    bench.replicas.infer(batch)
    await eventually(lambda: len(holder.asked) == 2)
    bench.replicas.cancel(CancelInference(id="b", replica_id="m:1/1"))
    answer = (await bench.heard(2))[-1]
    assert isinstance(answer, InferenceFinished)
    assert [outcome.error and outcome.error.code for outcome in answer.outcomes] == ["cancelled"] * 2
    assert holder.stopped == [hung.sha256]
    assert not holder.inputs.store.has(here.sha256)
    bench.replicas.infer(replace(batch, id="c", valid_seconds=0.1))
    answer = (await bench.heard(3))[-1]
    assert isinstance(answer, InferenceFinished)
    assert [outcome.error and outcome.error.code for outcome in answer.outcomes] == ["timed_out"] * 2


async def test_inputs_of_requests_that_were_answered_go_and_those_of_others_stay(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Holder(bench, monkeypatch)
    bench.load("m:1/1")
    await bench.heard(1)
    done, shared, kept, gone = [holder.put(text) for text in (b"soup", b"bread", b"salt", b"tea")]
    lost = BlobRef(sha256="0" * 64, size=9, holders=())
    failures = iter([RequestOutcome(), RequestOutcome(error=error_info(Overloaded("full")))])

    async def infer(replica_id: str, requests: Any, *rest: Any, **options: Any) -> tuple[list[RequestOutcome], float]:
        assert len(requests) == 2
        return list(failures), 0.0

    assert bench.slot.engine is not None
    monkeypatch.setattr(bench.slot.engine, "infer", infer)
    huge = replace(lost, size=2**40)
    requests = (request(lost, shared), request(done, shared), request(kept), request(huge, gone))
    bench.replicas.infer(RunInference(id="b", replica_id="m:1/1", requests=requests))
    answer = (await bench.heard(2))[-1]
    assert isinstance(answer, InferenceFinished)
    codes = [outcome.error.code if outcome.error else "" for outcome in answer.outcomes]
    assert codes == ["inputs_lost", "", "overloaded", "too_large"]
    assert {ref.sha256 for ref in (done, shared, kept, gone) if holder.inputs.store.has(ref.sha256)} == {
        shared.sha256,
        kept.sha256,
    }
    assert all(holder.inputs.store.delete(ref.sha256) for ref in (shared, kept))  # no longer pinned


async def test_a_defect_ends_the_batch_or_the_load_that_meets_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, the next node would be asked, and end as well."""

    async def fails(*args: object, **options: object) -> None:
        raise AssertionError("odd")

    bench.load("m:1/1")
    await bench.heard(1)
    assert bench.slot.engine is not None
    monkeypatch.setattr(bench.slot.engine, "infer", fails)
    bench.replicas.infer(RunInference(id="b", replica_id="m:1/1", requests=((),)))
    answer = (await bench.heard(2))[1]
    assert isinstance(answer, InferenceFinished)
    error = answer.outcomes[0].error
    assert error is not None
    assert (error.code, error.message) == ("internal", "a defect of potluck: AssertionError('odd')")
    monkeypatch.setattr(bench.slot.engine, "load_model", fails)
    bench.load("m:1/2")
    failed = (await bench.heard(3))[2]
    assert isinstance(failed, ModelLoadFailed)
    assert failed.error.code == "internal"
