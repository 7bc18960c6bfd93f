"""The executor on an engine that does what the test says: blobs come and go, and every attempt ends in one outcome."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from node import executor as module
from node.executor import Executor
from node.own_data import OwnData
from potluck.blobs.store import BlobStore
from potluck.errors import EngineFailed, InvalidModel, PotluckError, Unavailable
from potluck.settings import NodeDataSettings
from potluck.wire.commands import LeaseShard
from potluck.wire.reports import ShardFailed, ShardFinished
from potluck.wire.tasks import (
    AnyTask,
    AnyTaskResult,
    EvaluateResult,
    EvaluateTask,
    ExportResult,
    ExportTask,
    PredictResult,
    PredictTask,
    SyncResult,
    SyncTask,
)
from potluck.wire.tensors import from_numpy
from potluck.wire.values import BlobRef, DataFormat, Signature, Step
from support.eventually import eventually

URLS = ("http://here",)
ITEMS = DataFormat(kind="arrays", inputs=("x",))
SEEN = EvaluateResult(count=1)


def ref(data: bytes) -> BlobRef:
    return BlobRef(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


MODEL, BASE, UPDATE, WEIGHTS = ref(b"model"), ref(b"base"), ref(b"update"), ref(b"weights")


class Engine:
    """`answer` is the result of a task, `made` what a step gives, `gate` holds tasks back."""

    pid = 1

    def __init__(self) -> None:
        self.answer: AnyTaskResult | Exception = SEEN
        self.made: bytes | PotluckError = b"weights"
        self.gate = asyncio.Event()
        self.gate.set()
        self.ran: list[tuple[str, AnyTask, set[str]]] = []
        self.did: list[str] = []
        self.obeys = True
        self.stuck_now = asyncio.Event()
        self._cancelled = asyncio.Event()
        self.scratch = Path()

    async def run_task(self, job_id: str, task: AnyTask, files: dict[str, Path], progress: Any) -> AnyTaskResult:
        self.ran.append((job_id, task, set(files)))
        progress(1, {"loss": 0.5})
        waits = [asyncio.ensure_future(self.gate.wait()), asyncio.ensure_future(self._cancelled.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for one in waits:
            one.cancel()
        if self._cancelled.is_set():
            raise EngineFailed("stopped")
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def apply_step(self, weights: Path, update: Path) -> BlobRef:
        names = {BASE.sha256: "base", UPDATE.sha256: "update"}
        self.did.append(f"step {names[weights.name]} {names[update.name]}")
        if isinstance(self.made, PotluckError):
            raise self.made
        return self.write(self.made)

    def write(self, data: bytes) -> BlobRef:
        found = ref(data)
        (self.scratch / found.sha256).write_bytes(data)
        return found

    async def cancel_task(self) -> None:
        self.did.append("cancel")
        if self.obeys:
            self._cancelled.set()

    async def stuck(self, limit_seconds: float, bound_seconds: float) -> None:
        await self.stuck_now.wait()

    async def stop(self, grace_seconds: float) -> None:
        self.did.append("stop")
        self._cancelled.set()

    async def forget_job(self, job_id: str) -> None:
        self.did.append(f"forget {job_id}")

    def pause(self) -> None:
        self.did.append("pause")

    def resume(self) -> None:
        self.did.append("resume")


class Slot:
    """The parts of an EngineSlot that the executor needs. `up` lets a start end."""

    def __init__(self, engine: Engine) -> None:
        self.next = engine
        self.engine: Engine | None = None
        self.up = asyncio.Event()
        self.up.set()
        self.did: list[str] = []

    async def get(self) -> Engine:
        await self.up.wait()
        self.engine = self.next
        return self.engine

    async def use(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        return await work(await self.get())

    async def renew(self, *, connected: bool = False) -> None:
        self.did.append("renew with the network" if connected else "renew")

    async def retire(self) -> None:
        self.did.append("retire")


class Holders:
    """A downloader: blobs that `have` has, each after `gate`."""

    def __init__(self, store: BlobStore) -> None:
        self.store = store
        self.have: dict[str, bytes] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[str] = []
        self.given_up: list[str] = []
        self.failure: Exception | None = None

    async def fetch(self, wanted: BlobRef) -> Path:
        if self.store.has(wanted.sha256):
            return self.store.path(wanted.sha256)
        self.asked.append(wanted.sha256)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.given_up.append(wanted.sha256)
            raise
        if self.failure is not None:
            raise self.failure
        if wanted.sha256 not in self.have:
            raise Unavailable(f"nobody has {wanted.sha256[:12]}")
        self.store.put_bytes(self.have[wanted.sha256])
        return self.store.path(wanted.sha256)


class Bench:
    def __init__(self, folder: Path, *, sandboxed: bool = False) -> None:
        self.store = BlobStore(folder / "blobs", 1 << 24)
        self.holders = Holders(self.store)
        self.engine = Engine()
        self.engine.scratch = folder / "scratch"
        self.engine.scratch.mkdir()
        self.slot = Slot(self.engine)
        self.outcomes: list[ShardFinished | ShardFailed] = []
        self.stages: list[str] = []
        self.progress: list[tuple[str, int, dict[str, float]]] = []
        self.own_data = OwnData(folder / "data", {})
        self.stored: list[str] = []
        self.executor = Executor(
            store=self.store,
            downloader=self.holders,  # type: ignore[arg-type]
            own_data=self.own_data,
            slot=self.slot,  # type: ignore[arg-type]
            scratch=self.engine.scratch,
            urls=lambda: URLS,
            on_progress=lambda *said: self.progress.append(said),
            on_stage=lambda attempt_id, stage: self.stages.append(stage),
            on_outcome=self.outcomes.append,
            on_stored=self.stored.extend,
            sandboxed=sandboxed,
        )

    def keep(self, *blobs: bytes) -> None:
        for blob in blobs:
            self.store.put_bytes(blob)

    def pinned(self, wanted: BlobRef) -> bool:
        return not self.store.delete(wanted.sha256)

    async def end(self, count: int = 1) -> ShardFinished | ShardFailed:
        """The outcome of attempt number `count`."""
        await eventually(lambda: len(self.outcomes) >= count)
        assert len(self.outcomes) == count
        return self.outcomes[-1]

    async def result(self, count: int = 1) -> Any:
        outcome = await self.end(count)
        assert isinstance(outcome, ShardFinished), outcome
        return outcome.result

    async def error(self, count: int = 1) -> tuple[str, str]:
        outcome = await self.end(count)
        assert isinstance(outcome, ShardFailed), outcome
        return outcome.error.code, outcome.error.message


@asynccontextmanager
async def at_work(made: Bench) -> AsyncIterator[Bench]:
    running = asyncio.create_task(made.executor.run())
    await asyncio.sleep(0)
    yield made
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with at_work(Bench(tmp_path)) as made:
        yield made


@pytest.fixture
async def sandboxed(tmp_path: Path) -> AsyncIterator[Bench]:
    async with at_work(Bench(tmp_path, sandboxed=True)) as made:
        yield made


def lease(task: AnyTask, attempt_id: str = "a1", job_id: str = "job") -> LeaseShard:
    return LeaseShard(epoch=1, job_id=job_id, shard_id="s", attempt_id=attempt_id, lease_seconds=10, task=task)


def evaluation(step: Step | None = None, weights: BlobRef | None = WEIGHTS) -> EvaluateTask:
    return EvaluateTask(
        model=MODEL, weights=weights, slices=(), format=ITEMS, image=None, batch_size=1, step=step
    )  # fmt: skip


STEP = evaluation(Step(base=BASE, update=UPDATE))
EXPORT = ExportTask(model=MODEL, weights=WEIGHTS)
PREDICTION = PredictTask(model=MODEL, slices=(), format=ITEMS, image=None, batch_size=1)


def group(*members: str, begins: bool = True) -> SyncTask:
    return SyncTask(
        model=MODEL, data=(), format=ITEMS, image=None, formation="f", members=members, batches=(1,) * len(members),
        rank=0, first_step=0, steps=1, begins=begins,
    )  # fmt: skip


async def test_what_is_missing_is_fetched_and_told_and_what_a_task_needs_stays_while_it_runs(bench: Bench) -> None:
    bench.keep(b"model")
    bench.holders.have[WEIGHTS.sha256] = b"weights"
    bench.engine.gate.clear()
    bench.executor.start(lease(evaluation()))
    await eventually(lambda: bench.engine.ran)
    assert bench.engine.ran == [("job", evaluation(), {MODEL.sha256, WEIGHTS.sha256})]
    assert bench.pinned(MODEL)
    assert bench.pinned(WEIGHTS)
    assert bench.executor.computing
    bench.engine.gate.set()
    found = await bench.result()
    assert (found.count, found.fetched_bytes) == (1, WEIGHTS.size)
    assert found.fetch_seconds > 0
    assert bench.stored == [WEIGHTS.sha256]
    assert bench.progress == [("a1", 1, {"loss": 0.5})]
    assert not bench.executor.computing
    assert not bench.pinned(MODEL)


async def test_what_was_found_in_own_data_stays_here_if_that_is_no_longer_allowed(bench: Bench, tmp_path: Path) -> None:
    """The owner reloads the settings while the engine computes."""
    bench.keep(b"model", b"weights")
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 2), np.float32), y=np.arange(4))
    given = NodeDataSettings(path=str(tmp_path / "a.npz"))
    bench.own_data.change({"mine": given})
    assert bench.own_data.pack("mine")
    bench.engine.gate.clear()
    bench.executor.start(lease(replace(evaluation(), node_data="mine")))
    await eventually(lambda: bench.engine.ran)
    (own,) = set(bench.engine.ran[0][2]) - {MODEL.sha256, WEIGHTS.sha256}
    bench.own_data.change({"mine": replace(given, least_noise_multiplier=1.0)})
    bench.engine.gate.set()
    code, message = await bench.error()
    assert (code, "least_noise_multiplier" in message) == ("invalid_request", True)
    assert (tmp_path / "data" / own).exists()


async def test_an_attempt_that_is_no_longer_allowed_is_stopped(bench: Bench, tmp_path: Path) -> None:
    bench.keep(b"model", b"weights")
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 2), np.float32), y=np.arange(4))
    given = NodeDataSettings(path=str(tmp_path / "a.npz"))
    bench.own_data.change({"mine": given})
    assert bench.own_data.pack("mine")
    bench.executor.recheck()
    bench.engine.gate.clear()
    bench.executor.start(lease(replace(evaluation(), node_data="mine")))
    await eventually(lambda: bench.engine.ran)
    bench.executor.recheck()
    assert bench.engine.did == []
    bench.own_data.change({})
    bench.executor.recheck()
    code, message = await bench.error()
    assert (code, bench.engine.did) == ("unavailable", ["cancel"])
    assert "no data named 'mine' any more" in message
    bench.executor.recheck()
    await asyncio.sleep(0)
    assert bench.engine.did == ["cancel"]


async def test_the_first_attempt_of_a_job_says_what_it_waits_for(bench: Bench) -> None:
    bench.keep(b"model", b"weights")
    bench.slot.up.clear()
    bench.executor.start(lease(evaluation()))
    await eventually(lambda: bench.stages)
    bench.slot.up.set()
    await bench.end()
    assert bench.stages[0] == "starting engine (TensorFlow)"
    assert bench.stages[-1] == "loading the model"
    bench.stages.clear()
    bench.executor.start(lease(evaluation(), "a2"))
    await bench.end(2)
    assert bench.stages == []
    bench.holders.have[BASE.sha256] = b"base"
    bench.executor.start(lease(evaluation(weights=BASE), "a3", "another job"))
    await bench.end(3)
    assert bench.stages[0] == "fetching 0.0 MB"


async def test_blobs_of_a_result_are_kept_with_this_node_as_their_holder(bench: Bench) -> None:
    bench.keep(b"model", b"weights")
    bench.engine.answer = ExportResult(model=bench.engine.write(b"made"), signature=Signature(inputs=(), outputs=()))
    bench.executor.start(lease(EXPORT))
    found = await bench.result()
    assert found.model.holders == URLS
    assert bench.store.read(found.model.sha256) == b"made"
    assert list(bench.engine.scratch.iterdir()) == []


async def test_the_word_of_an_engine_in_a_sandbox_for_its_files_does_not_count(
    sandboxed: Bench, tmp_path: Path
) -> None:
    sandboxed.keep(b"model", b"weights")
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (sandboxed.engine.scratch / ref(b"secret").sha256).symlink_to(secret)
    (sandboxed.engine.scratch / ref(b"wanted").sha256).write_bytes(b"others")
    for count, named in enumerate((b"secret", b"wanted"), 1):
        sandboxed.engine.answer = ExportResult(model=ref(named), signature=Signature(inputs=(), outputs=()))
        sandboxed.executor.start(lease(EXPORT, f"a{count}"))
        assert (await sandboxed.error(count))[0] == "corrupt_blob"
        assert not sandboxed.store.has(ref(named).sha256)
    sandboxed.engine.answer = ExportResult(
        model=sandboxed.engine.write(b"made"), signature=Signature(inputs=(), outputs=())
    )
    sandboxed.executor.start(lease(EXPORT, "a3"))
    found = await sandboxed.result(3)
    assert sandboxed.store.read(found.model.sha256) == b"made"


async def test_a_wrong_hash_from_an_engine_does_not_count(bench: Bench) -> None:
    bench.keep(b"model", b"weights")
    (bench.engine.scratch / ref(b"wanted").sha256).write_bytes(b"others")
    bench.engine.answer = ExportResult(model=ref(b"wanted"), signature=Signature(inputs=(), outputs=()))
    bench.executor.start(lease(EXPORT))
    assert (await bench.error())[0] == "corrupt_blob"
    assert not bench.store.has(ref(b"wanted").sha256)


async def test_in_a_sandbox_only_a_member_of_a_group_gets_the_network(sandboxed: Bench) -> None:
    sandboxed.keep(b"model")
    sandboxed.engine.answer = SyncResult(samples=1, steps=1)
    sandboxed.executor.start(lease(group("a:1", "b:1")))
    await sandboxed.end()
    sandboxed.executor.start(lease(group("a:1"), "a2"))
    await sandboxed.end(2)
    assert sandboxed.slot.did == ["renew with the network", "renew"]


@pytest.mark.parametrize(
    ("failure", "code"),
    [(EngineFailed("ended by SIGKILL"), "engine_failed"), (AssertionError("odd"), "internal")],
)
async def test_whatever_fails_is_one_outcome_and_the_next_attempt_runs(
    bench: Bench, failure: Exception, code: str
) -> None:
    bench.keep(b"model", b"weights")
    bench.engine.answer = failure
    bench.executor.start(lease(evaluation()))
    assert (await bench.error())[0] == code
    assert not bench.executor.computing
    assert not bench.pinned(MODEL)
    bench.keep(b"model")
    bench.engine.answer = SEEN
    bench.executor.start(lease(evaluation(), "a2"))
    assert await bench.result(2)


async def test_a_blob_that_nobody_has_and_a_disk_that_fails_are_told(bench: Bench) -> None:
    bench.keep(b"model")
    bench.executor.start(lease(evaluation()))
    assert await bench.error() == ("unavailable", f"nobody has {WEIGHTS.sha256[:12]}")
    bench.holders.failure = OSError("input/output error")
    bench.executor.start(lease(evaluation(), "a2"))
    assert await bench.error(2) == ("unavailable", "this node's disk fails: input/output error")


async def test_the_weights_of_a_round_are_made_from_those_before_where_they_are_here(bench: Bench) -> None:
    bench.keep(b"model", b"base")
    bench.holders.have[UPDATE.sha256] = b"update"
    bench.executor.start(lease(STEP))
    await bench.end()
    assert bench.engine.did == ["step base update"]
    assert bench.holders.asked == [UPDATE.sha256]
    assert set(bench.engine.ran[0][2]) >= {MODEL.sha256, WEIGHTS.sha256}
    assert bench.store.read(WEIGHTS.sha256) == b"weights"
    assert bench.stored == [UPDATE.sha256, WEIGHTS.sha256]
    assert not bench.store.has(BASE.sha256)  # nobody needs the weights before this round any more


async def test_weights_are_fetched_whole_where_those_before_are_not_here(bench: Bench) -> None:
    bench.keep(b"model")
    bench.holders.have[WEIGHTS.sha256] = b"weights"
    bench.executor.start(lease(STEP))
    await bench.end()
    assert bench.engine.did == []
    assert bench.holders.asked == [WEIGHTS.sha256]


@pytest.mark.parametrize("made", [b"other", InvalidModel("no such layer")])
async def test_a_step_that_does_not_give_the_weights_costs_a_fetch(bench: Bench, made: bytes | PotluckError) -> None:
    bench.keep(b"model", b"base", b"update")
    bench.engine.made = made
    bench.holders.have[WEIGHTS.sha256] = b"weights"
    bench.executor.start(lease(STEP))
    await bench.end()
    assert bench.holders.asked == [WEIGHTS.sha256]
    assert bench.store.read(WEIGHTS.sha256) == b"weights"


async def test_an_attempt_that_is_withdrawn_while_it_fetches_ends_at_once_and_the_engine_starts_all_the_same(
    bench: Bench,
) -> None:
    bench.keep(b"model")
    bench.holders.gate.clear()
    bench.slot.up.clear()
    bench.executor.start(lease(evaluation()))
    await eventually(lambda: bench.holders.asked)
    bench.executor.stop("another")
    bench.executor.stop("a1")
    assert await bench.error() == ("cancelled", "the attempt was withdrawn")
    assert bench.holders.given_up == [WEIGHTS.sha256]
    assert bench.engine.ran == []


async def test_an_engine_that_does_not_stop_its_task_is_ended(bench: Bench) -> None:
    bench.keep(b"model", b"weights")
    for obeys, did in ((True, ["cancel"]), (False, ["cancel", "stop"])):
        engine = bench.slot.next = Engine()
        engine.gate.clear()
        engine.obeys = obeys
        bench.executor.start(lease(evaluation()))
        await eventually(lambda engine=engine: engine.ran)
        bench.executor.stop("a1")
        await eventually(lambda engine=engine: engine.did)
        if not obeys:
            await asyncio.sleep(0)
            assert engine.did == ["cancel"]  # it makes progress: it has time
            engine.stuck_now.set()
        assert (await bench.error(2 - obeys))[0] == "engine_failed"
        assert engine.did == did


async def test_a_member_of_a_group_is_ended_at_once_and_its_engine_serves_only_that_group(bench: Bench) -> None:
    bench.keep(b"model")
    bench.engine.answer = SyncResult(samples=1, steps=1)
    bench.executor.start(lease(group("a:1", "b:1")))
    await bench.end()
    assert bench.slot.did == ["renew"]  # TensorFlow accepts members only at its start
    bench.executor.start(lease(group("a:1", "b:1", begins=False), "a2"))
    await bench.end(2)
    assert bench.slot.did == ["renew"]
    bench.engine.gate.clear()
    bench.executor.start(lease(group("a:1", "b:1", begins=False), "a3"))
    await eventually(lambda: len(bench.engine.ran) == 3)
    bench.executor.stop("a3")  # it may wait for a member that is gone
    assert (await bench.error(3))[0] == "engine_failed"
    assert bench.engine.did == ["stop"]
    bench.executor.forget("another job")
    bench.executor.forget("job")
    await eventually(lambda: bench.slot.did == ["renew", "retire"])
    assert bench.engine.did == ["stop", "forget another job", "forget job"]


async def test_a_group_of_one_needs_no_engine_of_its_own(bench: Bench) -> None:
    bench.keep(b"model")
    bench.engine.answer = SyncResult(samples=1, steps=1)
    bench.executor.start(lease(group("a:1")))
    await bench.end()
    assert bench.slot.did == []


async def test_an_engine_that_starts_during_a_pause_pauses_too(bench: Bench) -> None:
    bench.keep(b"model", b"weights")
    bench.executor.give_way(True)
    bench.executor.start(lease(evaluation()))
    await bench.end()
    assert bench.engine.did == ["pause"]
    bench.executor.give_way(False)
    assert bench.engine.did == ["pause", "resume"]


async def test_what_a_waiting_lease_needs_is_fetched_ahead_until_it_is_given_up(bench: Bench) -> None:
    bench.keep(b"model")
    bench.executor.prefetch(lease(evaluation(), "nobody has it"))
    await eventually(lambda: bench.holders.asked == [WEIGHTS.sha256])
    bench.holders.gate.clear()
    bench.executor.prefetch(lease(evaluation(), "a2"))
    await eventually(lambda: len(bench.holders.asked) == 2)
    bench.executor.give_up("a2")
    bench.executor.give_up("a2")
    await eventually(lambda: bench.holders.given_up == [WEIGHTS.sha256])
    bench.executor.prefetch(lease(evaluation(), "a2"))
    await eventually(lambda: len(bench.holders.asked) == 3)
    bench.executor.stop("a2")
    await eventually(lambda: len(bench.holders.given_up) == 2)
    bench.holders.gate.set()
    bench.holders.have[WEIGHTS.sha256] = b"weights"
    bench.executor.prefetch(lease(evaluation(), "a3"))
    await eventually(lambda: bench.stored[-1:] == [WEIGHTS.sha256])
    assert bench.outcomes == []


async def test_the_running_shard_does_not_wait_for_what_is_fetched_ahead(bench: Bench) -> None:
    bench.keep(b"model", b"weights")
    bench.holders.gate.clear()
    for number in range(2 * module.FETCHES_AT_ONCE):
        bench.executor.prefetch(lease(evaluation(weights=ref(b"%d" % number)), f"p{number}"))
    await eventually(lambda: len(bench.holders.asked) == module.FETCHES_AT_ONCE)
    bench.executor.start(lease(evaluation()))
    assert await bench.result()


async def test_large_predictions_become_blobs_and_small_ones_stay(bench: Bench) -> None:
    bench.keep(b"model")
    for count, size in ((1, 1000), (2, module.INLINE_RESULT_BYTES)):
        bench.engine.answer = PredictResult(count=1, outputs=(from_numpy("y", np.zeros(size, np.uint8)),))
        bench.executor.start(lease(PREDICTION, f"a{count}"))
        (output,) = (await bench.result(count)).outputs
        assert isinstance(output.data, BlobRef) == (size > 1000)
        if isinstance(output.data, BlobRef):
            assert output.data.holders == URLS
            assert bench.store.size(output.data.sha256) == size


async def test_a_confusion_matrix_too_large_to_send_is_left_out_and_other_results_are_refused(bench: Bench) -> None:
    bench.keep(b"model", b"weights")
    classes = 400
    bench.engine.answer = EvaluateResult(count=1, sums={"loss": 1.0}, confusion=((70_000,) * classes,) * classes)
    bench.executor.start(lease(evaluation()))
    found = await bench.result()
    assert (found.confusion, found.sums) == ((), {"loss": 1.0})
    bench.engine.answer = EvaluateResult(count=1, sums={f"metric {number:020}": 1.0 for number in range(10_000)})
    bench.executor.start(lease(evaluation(), "a2"))
    code, message = await bench.error(2)
    assert code == "too_large"
    assert f"at most {module.RESULT_LIMIT_BYTES} can be sent" in message
