"""Replicas on an engine that does what the test says: what may go wrong there ends no daemon."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from node import replicas
from node.inputs import Inputs
from node.replicas import Replicas
from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore
from potluck.bus import Bus
from potluck.errors import EngineFailed, Overloaded, PotluckError
from potluck.messages import (
    BlobRef,
    InferenceFinished,
    LoadModel,
    Message,
    ModelLoaded,
    ModelLoadFailed,
    ModelUnloaded,
    RunInference,
    Signature,
    UnloadModel,
)
from potluck.outbox import Outbox
from support.eventually import eventually
from support.fake_bus import FakeBroker, FakeBus


class Engine:
    alive = True

    def __init__(self) -> None:
        self.on_loaded: Callable[[], None] = lambda: None
        self.gate = asyncio.Event()
        self.gate.set()

    async def load_model(
        self, replica_id: str, path: Path, model_format: str, warm_rows: int, warm_seconds: float, pixel_scale: float
    ) -> tuple[Signature, int, int]:
        await self.gate.wait()
        self.on_loaded()
        return Signature(inputs=(), outputs=()), 1, warm_rows

    def blame(self, replica_id: str) -> PotluckError:
        return EngineFailed("the engine was ended by SIGKILL")

    async def unload_model(self, replica_id: str) -> None:
        raise Overloaded("64 tasks wait for this engine")


class Slot:
    """Has what Replicas need of an EngineSlot."""

    def __init__(self) -> None:
        self.engine: Engine | None = Engine()

    async def use(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        return await work(self.engine)

    def touch(self) -> None:
        pass


@dataclass
class Bench:
    replicas: Replicas
    store: BlobStore
    slot: Slot
    broker: FakeBroker
    pinned: list[str] = field(default_factory=list)

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
    bus: Bus = FakeBus(broker, client_id="node")
    async with Downloader(store) as downloader, Inputs(folder / "inputs") as inputs:
        outbox, fast = Outbox(bus), Outbox(bus)
        held = Replicas(
            store=store, downloader=downloader, inputs=inputs, slot=slot, outbox=outbox, fast=fast, topic="out",  # type: ignore[arg-type]
            urls=lambda: (),
        )  # fmt: skip
        async with asyncio.TaskGroup() as tasks:
            parts = [tasks.create_task(part) for part in (bus.run(), outbox.run(), fast.run(), held.run())]
            await bus.connected(5)
            yield Bench(held, store, slot, broker)
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
    """Its death is told before the answer is taken up."""
    engine = bench.slot.engine
    assert engine is not None

    def die() -> None:
        bench.slot.engine = None
        bench.replicas.on_engine_death(engine)  # type: ignore[arg-type]

    engine.on_loaded = die
    bench.load("r1")
    (failed,) = await bench.heard(1)
    assert isinstance(failed, ModelLoadFailed)
    assert (failed.error.code, failed.error.retryable) == ("engine_failed", True)
    assert bench.replicas.ids == ()
    assert not bench.replicas.needed


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
    bench.replicas.infer(RunInference(id="b1", replica_id="r1", requests=((), ()), expires=1.0))
    (finished,) = await bench.heard(1)
    assert isinstance(finished, InferenceFinished)
    assert [outcome.error.code for outcome in finished.outcomes if outcome.error is not None] == ["timed_out"] * 2
