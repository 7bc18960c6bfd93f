"""When an engine is killed, and which model is to blame: by what is asked and heard, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace

from node.engine import frames
from node.engine.progress import Reading
from node.engine.watch import Limits, Verdict, Watch
from potluck.errors import EngineFailed, OutOfMemory
from potluck.wire.tasks import EvaluateTask, SyncTask
from potluck.wire.values import BlobRef, DataFormat, Signature

LIMITS = Limits(start_seconds=120, silence_seconds=20, batch_seconds=60, load_seconds=300)
MODEL = BlobRef(sha256="0" * 64, size=1)
TASK = frames.RunTask(
    number=1,
    job_id="j",
    task=EvaluateTask(model=MODEL, weights=None, slices=(), format=DataFormat(kind="arrays"), image=None, batch_size=1),
    files={},
)


def load(number: int, replica_id: str = "m:1/1") -> frames.LoadReplica:
    return frames.LoadReplica(number=number, replica_id=replica_id, path="")


def infer(number: int, replica_id: str = "m:1/1", expires: float = 0.0) -> frames.RunBatch:
    return frames.RunBatch(number=number, replica_id=replica_id, requests=(), expires=expires)


def loaded(number: int, runtime: str = "") -> frames.ReplicaLoaded:
    return frames.ReplicaLoaded(
        number=number, signature=Signature(inputs=(), outputs=()), resident_bytes=0, runtime=runtime
    )


def inferred(number: int, seconds: float = 0.1) -> frames.BatchRun:
    return frames.BatchRun(number=number, outcomes=(), seconds=seconds)


@dataclass
class Bench:
    """An engine that uses `share` of a core, and reports every second that it lives unless it is `mute`."""

    watch: Watch = field(default_factory=lambda: Watch(LIMITS))
    now: float = 0.0
    cpu_seconds: float = 0.0
    share: float = 0.0
    mute: bool = False
    resident_bytes: int = 0

    def up(self, after: float = 4.0) -> Bench:
        self.share, before = 1.0, self.share
        assert self.passes(after) is None
        self.watch.heard(frames.Started(runtimes={}))
        self.share = before
        return self

    def passes(self, seconds: float, every: Callable[[], None] = lambda: None) -> Verdict | None:
        """The verdict, if there is one within this many seconds."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            self.cpu_seconds += 0.5 * self.share
            if not self.mute and self.now % 1.0 == 0.0:
                self.watch.heard(None)
                self.watch.heard(frames.Heartbeat())
            every()
            verdict = self.watch.look(self.now, self.now, lambda: Reading(self.cpu_seconds), self.resident_bytes)
            if verdict is not None:
                return verdict
        return None


def reason(verdict: Verdict | None) -> str:
    assert verdict is not None
    return verdict.error.message


def test_a_start_on_a_twentieth_of_a_core_takes_as_long_as_it_takes() -> None:
    bench = Bench(share=0.05)
    assert bench.passes(1200) is None
    assert "was not ready for 1800 s" in reason(bench.passes(900))


def test_a_start_that_hangs_is_ended_though_the_engine_says_that_it_is_there() -> None:
    bench = Bench(share=0.0002)
    assert bench.passes(110) is None
    assert "got no further for 120 s" in reason(bench.passes(20))


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_one_that_is_silent_is_ended_unless_it_gets_further(share: float) -> None:
    bench = Bench(share=share).up()
    bench.mute = True
    assert bench.passes(17) is None
    verdict = bench.passes(1000)
    assert (verdict is None) == (share > 0)
    if verdict is not None:
        assert "was silent for 20 s" in reason(verdict)
        assert bench.now < 30
    else:
        assert "was silent for 1800 s" in reason(bench.passes(1000))


def test_one_at_rest_may_rest() -> None:
    assert Bench().up().passes(100_000) is None


def test_what_hangs_is_ended_and_what_is_slow_is_not() -> None:
    step = frames.ApplyStep(number=1, weights="", update="")
    for asked, guilty in ((TASK, frozenset()), (step, frozenset()), (load(1), frozenset({"m:1/1"}))):
        bench = Bench(share=0.05).up()
        bench.watch.asked(asked)
        assert bench.passes(150) is None
        bench.share = 0.0
        verdict = bench.passes(130)
        assert "got no further for 120 s" in reason(verdict)
        assert verdict is not None
        assert verdict.suspects == guilty


def test_a_task_may_stand_still_that_is_told_to_that_waits_for_others_or_that_tells_of_its_steps() -> None:
    bench = Bench().up()
    bench.watch.asked(TASK)
    bench.watch.paused = True
    assert bench.passes(1000) is None
    bench.watch.paused = False
    assert bench.passes(1000, lambda: bench.watch.heard(frames.TaskProgressed(number=1, done=1))) is None
    bench.watch.heard(frames.TaskDone(number=1, result=None))  # type: ignore[arg-type]
    assert bench.passes(1000) is None
    group = SyncTask(
        model=MODEL, data=(), image=None, format=DataFormat(kind="arrays"), formation="f", members=("127.0.0.1:1",), batches=(16,),
        rank=0, first_step=0, steps=1, begins=True,
    )  # fmt: skip
    bench.watch.asked(replace(TASK, number=2, task=group))
    assert bench.passes(1000) is None


def test_a_batch_that_does_not_return_is_ended_and_blamed_alone() -> None:
    bench = Bench(share=1.0).up()
    bench.watch.asked(infer(1))
    bench.watch.asked(infer(2, "other:1/1"))
    assert bench.passes(59) is None
    verdict = bench.passes(5)
    assert "a batch of replica m:1/1 took more than 60 s" in reason(verdict)
    assert verdict is not None
    assert isinstance(verdict.error, EngineFailed)
    assert verdict.suspects == {"m:1/1"}


def test_each_runtime_has_a_batch_under_way() -> None:
    bench = Bench(share=1.0).up()
    for number, (replica_id, runtime) in enumerate((("t", "tensorflow"), ("u", "tensorflow"), ("l", "litert")), 1):
        bench.watch.asked(load(number, replica_id))
        bench.watch.heard(loaded(number, runtime))
    for number, replica_id in enumerate(("t", "u", "l", "l"), 10):
        bench.watch.asked(infer(number, replica_id))
    assert bench.watch.suspects() == {"t", "l"}
    bench.watch.heard(inferred(12))
    assert bench.passes(59) is None
    bench.watch.heard(inferred(13))
    assert bench.watch.suspects() == {"t"}
    verdict = bench.passes(5)
    assert "a batch of replica t took more than 60 s" in reason(verdict)
    assert verdict is not None
    assert verdict.suspects == {"t"}


def test_a_batch_counts_from_its_turn_and_by_what_others_took() -> None:
    bench = Bench(share=1.0).up()
    for number in range(1, 6):
        bench.watch.asked(infer(number))
    for number in range(1, 5):
        assert bench.passes(50) is None
        bench.watch.heard(inferred(number, seconds=50.0))
    assert bench.passes(490) is None  # they are slow here
    assert "took more than 500 s" in reason(bench.passes(20))


def test_a_model_that_took_long_to_load_may_take_long_to_answer() -> None:
    bench = Bench(share=1.0).up()
    bench.watch.asked(load(1))
    assert bench.passes(100) is None
    bench.watch.heard(loaded(1))
    bench.watch.asked(infer(2))
    assert bench.passes(195) is None
    assert "took more than 200 s" in reason(bench.passes(10))


def test_while_somebody_waits_a_batch_may_go_on_but_not_for_ever() -> None:
    bench = Bench(share=1.0).up()
    bench.watch.asked(infer(1, expires=bench.now + 300))
    assert bench.passes(298) is None
    assert bench.passes(5) is not None
    other = Bench(share=1.0).up()
    other.watch.asked(infer(1, expires=1e12))  # by a wrong clock
    assert other.passes(590) is None
    assert other.passes(20) is not None


def test_a_load_has_a_limit_and_a_machine_that_starts_slowly_more() -> None:
    for start_seconds, limit in ((4.5, 300), (100.5, 2000)):
        bench = Bench(share=1.0).up(start_seconds)
        bench.watch.asked(load(1))
        assert bench.passes(limit - 10) is None
        verdict = bench.passes(30)
        assert f"loading the model of replica m:1/1 took more than {limit} s" in reason(verdict)


def test_what_was_answered_is_under_way_no_more() -> None:
    bench = Bench().up()
    bench.watch.asked(load(1, "a"))
    bench.watch.asked(infer(2, "b"))
    bench.watch.asked(infer(3, "c"))
    assert bench.watch.suspects() == {"a", "b"}
    bench.watch.heard(inferred(2))
    bench.watch.heard(loaded(1))
    assert bench.watch.suspects() == {"c"}


def test_one_that_takes_too_much_memory_is_ended() -> None:
    bench = Bench(Watch(replace_memory(2**30))).up()
    bench.resident_bytes = 2**30
    bench.watch.asked(load(1))
    assert bench.passes(5) is None
    bench.resident_bytes += 1
    verdict = bench.passes(1)
    assert verdict is not None
    assert isinstance(verdict.error, OutOfMemory)
    assert "more than 1.0 GiB" in verdict.error.message
    assert verdict.suspects == {"m:1/1"}


def test_time_in_which_the_machine_slept_is_nobodys() -> None:
    bench = Bench(share=1.0).up()
    bench.watch.asked(infer(1))
    bench.passes(1)
    bench.now += 3600
    assert bench.passes(1) is None


def replace_memory(limit: int) -> Limits:
    return Limits(LIMITS.start_seconds, LIMITS.silence_seconds, memory_bytes=limit)
