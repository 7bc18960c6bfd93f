"""Training rounds: samples counted over the cluster, lost nodes, validation, export, and replay."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coordinator.plans.decisions import CloseEpoch, CloseRound, Complete, Lease, Withdraw
from coordinator.plans.events import (
    AnyEvent,
    AttemptEnded,
    AttemptFinished,
    AttemptLeased,
    EpochEnded,
    JobSubmitted,
    RoundClosed,
    StopAsked,
)
from coordinator.plans.failings import OPINION_SECONDS
from coordinator.plans.job import Job
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.strategies import strategy_for
from coordinator.plans.training.contributions import Contributions
from coordinator.plans.training.readiness import AGAIN_SECONDS, WARM_UP
from coordinator.plans.training.rounds import UpdateRounds
from coordinator.plans.training.state import TrainingState
from coordinator.plans.training.strategy import TrainingStrategy
from coordinator.plans.training.warming import LOST_SECONDS
from potluck.errors import InvalidRequest, OutOfMemory
from potluck.wire import codec
from potluck.wire.jobs import EpochMetrics, Train
from potluck.wire.tasks import (
    EvaluateResult,
    EvaluateTask,
    ExportResult,
    ExportTask,
    TrainResult,
    TrainTask,
    WarmUpResult,
    WarmUpTask,
)
from potluck.wire.values import BlobRef, DataFormat, Dataset, DataShard, ErrorInfo, Signature
from support.purely import planned


def blob(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size=1)


def dataset(name: str, first: int, *counts: int) -> Dataset:
    shards = tuple(DataShard(blob=blob(first + number), count=count) for number, count in enumerate(counts))
    return Dataset(name=name, format=DataFormat(kind="images", classes=("a", "b")), count=sum(counts), shards=shards)


class Simulation:
    """Plays the dispatcher and the nodes; keeps every event, so that it can be replayed."""

    def __init__(
        self, epochs: int = 2, validation: bool = True, shards: Sequence[int] = (40,) * 8, **options: Any
    ) -> None:
        self.shards = shards
        options = {"strategy": "local", **options}
        spec = Train(
            model="m", dataset="d", validation="v" if validation else None, epochs=epochs, batch_size=10, **options
        )
        self.validation_losses: dict[int, float] = {}
        """Values by epoch; 1 where none is set."""
        self.norms: dict[str, float] = {}
        self.submitted = JobSubmitted(at=0.0, job_id="j", request_id="", spec=spec, model=blob(1))
        self.validation = dataset("v", 100, 50) if validation else None
        self.job = self.new_job()
        self.events: list[AnyEvent] = []
        self.now = 0.0
        self.number = 1000
        self.tasks: dict[str, TrainTask | EvaluateTask | ExportTask] = {}
        self.complete = False
        self.by_hand = False
        """Whether the test itself says when nodes have warmed up."""
        self.rates: dict[str, float] = {}
        """Items/s that nodes measure when they warm up; 80 where none is set."""

    def new_job(self) -> Job:
        data = dataset("d", 10, *self.shards)
        return Job(submitted=self.submitted, strategy=strategy_for(self.submitted, data, self.validation), dataset=data)

    @property
    def strategy(self) -> TrainingStrategy:
        assert isinstance(self.job.strategy, TrainingStrategy)
        return self.job.strategy

    @property
    def state(self) -> TrainingState:
        return self.strategy.state

    @property
    def contributions(self) -> Contributions:
        assert isinstance(self.strategy.rounds, UpdateRounds)
        return self.strategy.rounds.contributions

    def record(self, event: AnyEvent) -> None:
        self.events.append(event)
        self.job.apply(event)

    def plan(self, *nodes: str) -> None:
        """Plan again as long as planning changes something."""
        for _ in range(20):
            busy = {attempt.node_id for attempt in self.job.attempts.values()}
            views = tuple(
                NodeView(name, 1.0, free_slots=1 if name in busy else 2, idle=name not in busy) for name in nodes
            )
            decisions = planned(self.job, ClusterView(views, self.now), self.events, self.new_job, self.record)
            for decision in decisions:
                self.perform(decision)
            warming = [key for key, attempt in self.job.attempts.items() if attempt.shard_id == WARM_UP]
            if not self.by_hand:
                for attempt_id in warming:
                    self.finish(attempt_id)
            if not decisions or self.complete:
                return

    def perform(self, decision: object) -> None:
        self.number += 1
        match decision:
            case Lease():
                attempt_id = str(self.number)
                self.tasks[attempt_id] = decision.task  # type: ignore[assignment]
                self.record(
                    AttemptLeased(
                        at=self.now,
                        attempt_id=attempt_id,
                        shard_id=decision.shard_id,
                        node_id=decision.node_id,
                        task=decision.task,
                    )
                )
            case Withdraw():
                self.record(AttemptEnded(at=self.now, attempt_id=decision.attempt_id, reason=decision.reason))
            case CloseRound():
                samples = sum(result.samples for result in decision.results)
                made = {name: blob(self.number + place) for place, name in enumerate(("step", "weights", "velocity"))}
                self.number += 3
                self.record(
                    RoundClosed(
                        at=self.now, round=decision.round, base=decision.results[0].base, samples=samples,
                        learning_rate=1.0, momentum=0.0, metrics={"loss": 0.5}, rejected=decision.rejected, **made,
                    )
                )  # fmt: skip
            case CloseEpoch():
                self.record(EpochEnded(at=self.now, epoch=decision.epoch))
            case Complete():
                self.complete = True

    def error(self, *nodes: str) -> ErrorInfo | None:
        """The error with which the job must end while these nodes are there."""
        views = tuple(NodeView(name, 1.0, free_slots=1, idle=True) for name in nodes)
        return self.job.error(3, ClusterView(views, self.now))

    def finish(self, attempt_id: str) -> None:
        self.now += 0.1
        self.number += 1
        task = self.tasks[attempt_id]
        match task:
            case TrainTask():
                result: TrainResult | EvaluateResult | ExportResult | WarmUpResult = TrainResult(
                    base=task.weights or blob(7),
                    update=blob(self.number),
                    samples=task.samples,
                    steps=1,
                    seconds=1.0,
                    metrics={"loss": 0.5},
                    norm=self.norms.get(self.job.attempts[attempt_id].node_id, 1.0),
                )
            case WarmUpTask():
                rate = self.rates.get(self.job.attempts[attempt_id].node_id, 80.0)
                result = WarmUpResult(rate=rate, beside_seconds=0.0, seconds=1.0)
                self.now -= 0.1  # nobody waits for this
            case EvaluateTask():
                count = sum(part.stop - part.start for part in task.slices)
                loss = self.validation_losses.get(self.state.epochs.ended + 1, 1.0)
                result = EvaluateResult(count=count, sums={"loss": loss * count}, seconds=0.1)
            case ExportTask():
                result = ExportResult(model=blob(self.number), signature=Signature(inputs=(), outputs=()))
        self.record(AttemptFinished(at=self.now, attempt_id=attempt_id, result=result))

    def lose(self, node_id: str) -> None:
        for attempt in [attempt for attempt in self.job.attempts.values() if attempt.node_id == node_id]:
            self.record(AttemptEnded(at=self.now, attempt_id=attempt.attempt_id, reason="lost"))

    def run(self, *nodes: str, steps: int = 500, each: Callable[[], None] = lambda: None) -> None:
        for _ in range(steps):
            self.plan(*nodes)
            if self.complete:
                return
            for attempt_id in list(self.job.attempts):
                if attempt_id in self.job.attempts:
                    self.finish(attempt_id)
                    each()
        raise AssertionError("the job did not come to an end")


def test_a_job_runs_its_epochs_and_validates_each() -> None:
    play = Simulation(epochs=3)
    play.run("a", "b")
    assert [epoch.epoch for epoch in play.job.history.epochs] == [1, 2, 3]
    assert all(epoch.metrics["val_loss"] == 1.0 and epoch.metrics["loss"] == 0.5 for epoch in play.job.history.epochs)
    total = 3 * 320
    assert total - 10 < play.state.epochs.samples < total + 40
    assert play.strategy.exported() is not None


def test_rounds_grow_when_exchanging_weights_takes_longer_than_computing() -> None:
    def samples_of_a_round(exchange_seconds: float) -> int:
        play = Simulation(epochs=4, validation=False)
        for _ in range(2):  # the first round also starts engines, and is not measured
            play.plan("a", "b")
            for attempt_id in list(play.job.attempts):
                play.finish(attempt_id)  # 80 samples in a second each
            play.now = play.state.open.opened_at + 1.0 + exchange_seconds
        play.plan("a", "b")
        play.plan("a", "b")
        return sum(task.samples for key, task in play.tasks.items() if key in play.job.attempts)  # type: ignore[union-attr]

    assert samples_of_a_round(exchange_seconds=0.2) == 160  # half an epoch
    assert samples_of_a_round(exchange_seconds=1.2) == 160  # nearly as long as the exchange: rounds of one length
    assert samples_of_a_round(exchange_seconds=1.5) == 320
    assert samples_of_a_round(exchange_seconds=60.0) == 320  # an epoch at most


def test_a_node_that_takes_long_beside_computing_gets_less_of_the_next_round() -> None:
    play = Simulation(epochs=8, validation=False)
    for _ in range(2):  # 80 samples in a second each; b needs half a second more
        play.plan("a", "b")
        for attempt_id in sorted(play.job.attempts, key=lambda attempt_id: play.job.attempts[attempt_id].node_id):
            late = play.job.attempts[attempt_id].node_id == "b"
            play.now = play.state.open.opened_at + (1.4 if late else 0.9)
            play.finish(attempt_id)
        play.plan("a", "b")
    given = {
        play.job.attempts[key].node_id: task.samples  # type: ignore[union-attr]
        for key, task in play.tasks.items()
        if key in play.job.attempts
    }
    assert given == {"a": 100, "b": 60}  # 1.25 s each, including b's extra time


def test_nodes_train_on_disjoint_shards() -> None:
    play = Simulation()
    play.plan("a", "b", "c")
    held = [{shard.blob.sha256 for shard in task.data} for task in play.tasks.values() if isinstance(task, TrainTask)]
    assert len(held) == 3
    assert len(set.union(*held)) == sum(map(len, held)) == 8


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 6))
def test_every_epoch_is_trained_however_small_the_data(shards: list[int], nodes: int, epochs: int) -> None:
    play = Simulation(epochs=epochs, validation=False, shards=shards)
    play.run(*"abcde"[:nodes])
    count = sum(shards)
    assert [set(epoch.metrics) for epoch in play.job.history.epochs] == [{"loss"}] * epochs
    assert all(epoch.rounds > 0 for epoch in play.job.history.epochs)
    at_once = min(nodes, max(1, count // 10)) * 10
    assert play.state.epochs.samples <= count * epochs + max(at_once, 10)
    if count < 10:  # fewer than a batch: one node, one step an epoch, as Keras
        assert [epoch.samples for epoch in play.job.history.epochs] == [count * (epoch + 1) for epoch in range(epochs)]
        assert len({task.samples for task in play.tasks.values() if isinstance(task, TrainTask)}) == 1


@pytest.mark.parametrize(
    ("crew", "left", "full"),
    [
        ("a", 9, True),
        ("a", 10, False),
        ("abc", 29, True),
        ("abc", 30, False),
        ("abcdefgh", 52, True),
        ("abcdefgh", 53, False),
    ],
)
def test_an_epoch_leaves_to_the_next_what_is_less_than_a_batch_for_each(crew: str, left: int, full: bool) -> None:
    """And at most a twentieth of it. The last node has no other to leave it to."""
    play = Simulation(epochs=2, validation=False, shards=(105,) * 10)
    play.state.open.crew = frozenset(crew)
    play.state.epochs.samples = 1050 - left
    assert play.strategy.epoch_full == full
    play.state.epochs.ended, play.state.epochs.samples = 1, 2 * 1050 - left
    assert play.strategy.epoch_full == (left < 10)


def test_the_steps_of_an_epoch_in_step_are_all_taken() -> None:
    play = Simulation(epochs=2, validation=False, shards=(105,) * 10, strategy="sync")
    play.state.open.crew, play.state.epochs.samples = frozenset("abc"), 1050 - 10
    assert not play.strategy.epoch_full


def test_who_did_a_part_lately_is_not_measured_again_for_being_left_out_once() -> None:
    play = Simulation(epochs=8, validation=False)
    play.plan("a", "b")
    play.now += AGAIN_SECONDS  # since they warmed up
    for attempt_id in list(play.job.attempts):
        play.finish(attempt_id)
    assert not any(play.state.readiness.stale(node, play.now) for node in "ab")
    assert play.state.readiness.stale("b", play.now + AGAIN_SECONDS)


def test_a_lost_node_costs_its_own_round_only() -> None:
    play = Simulation(epochs=1, validation=False)
    play.plan("a", "b")
    play.lose("b")
    (left,) = play.job.attempts
    play.finish(left)
    play.plan("a")
    assert play.state.open.number == 1
    assert 0 < play.state.epochs.samples < 160
    play.run("a")
    assert play.complete
    assert play.state.epochs.samples >= 310


def test_all_nodes_lost_and_the_round_is_opened_again() -> None:
    play = Simulation(epochs=1, validation=False)
    play.plan("a", "b")
    play.lose("a")
    play.lose("b")
    play.plan()
    assert not play.job.attempts
    play.run("c")
    assert play.complete


def test_a_round_goes_on_without_a_node_that_is_late_and_that_may_go_on_as_well() -> None:
    play = Simulation(epochs=8, validation=False)
    play.plan("a", "b")
    first, late = play.job.attempts.values()
    play.finish(first.attempt_id)
    play.plan("a", "b")
    assert play.state.open.number == 0
    play.now = play.contributions.due
    play.plan("a", "b")
    assert play.state.open.number == 1
    assert late.attempt_id in play.job.attempts, "it is not stopped"
    running = {key: (attempt, 0, {}) for key, attempt in play.job.attempts.items()}
    assert play.strategy.progress(running).waiting.keys() == {late.node_id}
    assert [attempt.node_id for attempt in play.job.attempts.values()].count(late.node_id) == 1, "and gets no more"
    samples = play.state.epochs.samples
    play.finish(late.attempt_id)
    assert play.state.epochs.samples == samples
    assert not play.contributions.results, "its result is of no use, but tells how fast it is"
    assert not play.strategy.wants(late)
    play.finish(next(iter(play.job.attempts)))
    play.plan("a", "b")
    assert {attempt.node_id for attempt in play.job.attempts.values()} == {"a", "b"}
    assert not play.strategy.progress({}).waiting


def test_where_all_are_late_another_does_the_round() -> None:
    play = Simulation(epochs=1, validation=False)
    play.plan("a")
    play.now = play.contributions.due - 0.1
    play.plan("a", "b")
    assert {attempt.node_id for attempt in play.job.attempts.values()} == {"a"}
    play.now = play.contributions.due
    play.plan("a", "b")
    assert {attempt.node_id for attempt in play.job.attempts.values()} == {"a", "b"}
    play.finish(next(attempt.attempt_id for attempt in play.job.attempts.values() if attempt.node_id == "b"))
    play.now = play.contributions.due
    play.plan("a", "b")
    assert play.state.open.number == 1


def test_when_the_one_that_was_late_is_done_nobody_waits_for_whoever_does_it_again() -> None:
    play = Simulation(epochs=1, validation=False)
    play.plan("a")
    play.now = play.contributions.due
    play.plan("a", "b", "c")
    assert {attempt.node_id for attempt in play.job.attempts.values()} == {"a", "b", "c"}
    play.finish(next(attempt.attempt_id for attempt in play.job.attempts.values() if attempt.node_id == "a"))
    assert play.now < play.contributions.due
    play.plan("a", "b", "c")
    assert play.state.open.number == 1


def test_nobody_waits_for_a_node_that_gets_ready_and_it_joins_when_it_is() -> None:
    play = Simulation(epochs=8, validation=False)
    play.by_hand = True
    play.plan("a", "b")
    first, slow = play.job.attempts.values()
    assert first.shard_id == slow.shard_id == WARM_UP
    play.finish(first.attempt_id)
    play.plan("a", "b")
    assert play.state.open.number == 0
    assert {attempt.node_id: attempt.shard_id for attempt in play.job.attempts.values()} == {
        "a": "round-0",
        "b": WARM_UP,
    }
    for number in range(3):
        play.finish(next(key for key, attempt in play.job.attempts.items() if attempt.node_id == "a"))
        play.plan("a", "b")
        assert play.state.open.number == number + 1
    running = {key: (attempt, 0, {}) for key, attempt in play.job.attempts.items()}
    assert play.strategy.progress(running).waiting == {"b": "it gets ready"}
    play.finish(slow.attempt_id)
    play.plan("a", "b")
    assert {attempt.node_id for attempt in play.job.attempts.values()} == {"a"}, "it is for the next round"
    play.finish(next(iter(play.job.attempts)))
    play.plan("a", "b")
    assert {attempt.node_id for attempt in play.job.attempts.values()} == {"a", "b"}


def test_no_more_nodes_get_ready_than_can_take_part_and_one_more() -> None:
    play = Simulation(epochs=2, validation=False, shards=(20,))
    play.by_hand = True
    play.plan(*"abcde")
    assert len(play.job.attempts) == 3  # the third of two batches for two nodes
    play.lose("a")
    play.plan(*"bcde")
    assert len(play.job.attempts) == 3


def test_slow_nodes_that_were_ready_for_long_are_not_found_stale_in_the_plan_that_leaves_them_out() -> None:
    """It was, and another one was chosen instead: a plan that continued to choose."""
    play = Simulation(epochs=200, validation=False, shards=(10, 10))
    play.rates = {"a": 1000.0, **dict.fromkeys("bcdefgh", 1.0)}

    def rounds(nodes: str, count: int) -> None:
        for _ in range(count):
            play.plan(*nodes)
            for attempt_id in list(play.job.attempts):
                play.finish(attempt_id)
            play.plan(*nodes)

    rounds("abcd", 2)
    rounds("abefg", 2)  # c and d are away, and do nothing
    play.now += AGAIN_SECONDS - 2
    rounds("abcdefg", 1)
    play.now += 2 * AGAIN_SECONDS
    rounds("abcdefg", 3)
    assert play.state.open.number >= 8


def test_nodes_that_are_alike_are_waited_for_a_moment() -> None:
    play = Simulation(epochs=8, validation=False)
    play.by_hand = True
    play.plan("a", "b")
    first, second = play.job.attempts
    play.now = 10.0
    play.finish(first)
    play.now += 0.9
    play.plan("a", "b")
    assert {attempt.shard_id for attempt in play.job.attempts.values()} == {WARM_UP}
    play.finish(second)
    play.plan("a", "b")
    assert {attempt.shard_id for attempt in play.job.attempts.values()} == {"round-0"}


def test_a_far_slower_node_is_not_waited_for_a_moment() -> None:
    """One second of each job, while a node with a twentieth of a core gets ready."""
    play = Simulation(epochs=8, validation=False)
    play.by_hand = True
    play.plan("a", "b")
    play.now = 10.0
    play.finish(next(iter(play.job.attempts)))
    ready = next(iter(play.state.readiness.ready))
    views = tuple(NodeView(name, 40.0 if name == ready else 2.0, free_slots=1, idle=True) for name in "ab")
    decisions = planned(play.job, ClusterView(views, play.now), play.events, play.new_job, play.record)
    assert [decision.node_id for decision in decisions if isinstance(decision, Lease)] == [ready]


def test_a_node_that_brings_less_than_it_costs_is_left_out_and_measured_again() -> None:
    play = Simulation(epochs=40, validation=False)
    play.rates = {"a": 400.0, "b": 4.0}
    play.plan("a", "b")
    assert {attempt.node_id for attempt in play.job.attempts.values()} == {"a"}
    assert list(play.strategy.progress({}).waiting) == ["b"]
    play.rates["b"] = 300.0
    while play.now < 60.0:
        assert {attempt.node_id for attempt in play.job.attempts.values()} == {"a"}
        play.now += 0.9  # a second for each part
        play.finish(next(iter(play.job.attempts)))
        play.plan("a", "b")
    assert {attempt.node_id for attempt in play.job.attempts.values()} == {"a", "b"}
    assert not play.strategy.progress({}).waiting


def test_a_part_of_which_nothing_comes_is_taken_back_in_the_end() -> None:
    play = Simulation(epochs=8, validation=False)
    play.by_hand = True
    play.plan("a", "b")
    first, hanging = play.job.attempts
    play.finish(first)
    for _ in range(10):
        play.plan("a", "b")
        play.finish(next(key for key, attempt in play.job.attempts.items() if attempt.node_id == "a"))
    play.now += LOST_SECONDS + 1
    play.plan("a", "b")
    assert hanging not in play.job.attempts
    ended = [event for event in play.events if isinstance(event, AttemptEnded)]
    assert next(event.attempt_id for event in ended if "too long" in event.reason) == hanging


DIED = ErrorInfo(code="engine_failed", message="died", retryable=True)


def fails(play: Simulation, node_id: str, error: ErrorInfo = DIED) -> None:
    """The node's present attempt ends with an error, and the node rests."""
    (attempt_id,) = (attempt.attempt_id for attempt in play.job.attempts.values() if attempt.node_id == node_id)
    play.record(AttemptEnded(at=play.now, attempt_id=attempt_id, reason="", error=error))
    play.now = max(play.now, play.job.failings.resting[node_id])


def test_a_node_that_fails_again_and_again_ends_the_job_that_it_has_alone() -> None:
    play = Simulation(validation=False)
    for _ in range(3):
        assert play.error("a") is None
        play.plan("a")
        fails(play, "a")
    assert play.error("a") == replace(DIED, message="node a: died")


def test_engines_that_all_die_once_end_nothing() -> None:
    play = Simulation(validation=False)
    play.plan("a", "b", "c")
    for node_id in ("a", "b", "c"):
        fails(play, node_id)
    assert play.error("a", "b", "c") is None
    play.run("a", "b", "c")
    assert play.complete


def leased(play: Simulation, node_id: str) -> AttemptLeased:
    """One more part of the first round."""
    task = next(iter(play.tasks.values()))
    return AttemptLeased(at=play.now, attempt_id=f"again-{play.now}", shard_id="round-0", node_id=node_id, task=task)


def test_a_node_that_fails_ends_nothing_while_another_is_at_work_and_all_of_them_do() -> None:
    play = Simulation(validation=False)
    play.plan("a", "b")
    for _ in range(5):
        fails(play, "b")
        assert play.error("a", "b") is None
        play.plan("a", "b")
        if "b" not in {attempt.node_id for attempt in play.job.attempts.values()}:
            play.record(leased(play, "b"))
    for _ in range(3):
        fails(play, "a")
        play.record(leased(play, "a"))
    assert play.error("a", "b") is not None


def test_what_is_wrong_with_the_validation_data_is_said_of_them() -> None:
    play = Simulation(epochs=1)
    play.plan("a")
    while not any(attempt.shard_id.startswith("validation-") for attempt in play.job.attempts.values()):
        play.finish(next(iter(play.job.attempts)))
        play.plan("a")
    wrong = ErrorInfo(code="invalid_data", message="the targets are classes 5 to 7")
    play.record(AttemptEnded(at=1, attempt_id=next(iter(play.job.attempts)), reason="", error=wrong))
    assert play.error("a") == replace(wrong, message="in validation: the targets are classes 5 to 7")


def test_a_first_batch_of_the_validation_data_is_looked_at_once_and_before_all_else() -> None:
    play = Simulation(epochs=2)
    play.plan("a", "b")
    first, *rest = play.job.attempts.values()
    task = play.tasks[first.attempt_id]
    assert isinstance(task, EvaluateTask)
    assert sum(part.stop - part.start for part in task.slices) == 10
    assert all(isinstance(play.tasks[attempt.attempt_id], TrainTask) for attempt in rest)
    play.lose(first.node_id)
    play.run("a", "b")
    assert play.complete
    leased = [event.shard_id for event in play.events if isinstance(event, AttemptLeased)]
    assert (leased[0], leased.count("check-validation")) == ("check-validation", 1)
    wrong = ErrorInfo(code="invalid_data", message="the targets are classes 5 to 7")
    play = Simulation(epochs=2)
    play.plan("a")
    play.record(AttemptEnded(at=1, attempt_id=next(iter(play.job.attempts)), reason="", error=wrong))
    assert play.error("a") == replace(wrong, message="in validation: the targets are classes 5 to 7")


def test_an_error_that_trying_again_cannot_mend_ends_the_job_once_two_nodes_say_it() -> None:
    play = Simulation(validation=False)
    play.by_hand = True  # both get ready
    play.plan("a", "b")
    one, two = play.job.attempts
    wrong = ErrorInfo(code="invalid_model", message="no")
    play.record(AttemptEnded(at=0, attempt_id=two, reason="", error=wrong))
    assert play.error("a", "b") is None
    play.record(AttemptEnded(at=0, attempt_id=one, reason="", error=replace(wrong, message="no, too")))
    assert play.error("a", "b") == wrong


def test_an_error_that_trying_again_cannot_mend_ends_the_job_of_a_node_alone_at_once() -> None:
    play = Simulation(validation=False)
    play.plan("a")
    wrong = ErrorInfo(code="invalid_model", message="no")
    play.record(AttemptEnded(at=0, attempt_id=next(iter(play.job.attempts)), reason="", error=wrong))
    assert play.error("a") == wrong


def test_an_error_that_only_one_node_has_is_its_own() -> None:
    """It lacks a library, or lies: the others finish the job, and it gets no more of the job."""
    play = Simulation(epochs=1, validation=False)
    play.by_hand = True
    play.plan("a", "b")
    broken = next(attempt for attempt in play.job.attempts.values() if attempt.node_id == "b")
    wrong = ErrorInfo(code="invalid_model", message="no module named 'regex'")
    play.record(AttemptEnded(at=0.0, attempt_id=broken.attempt_id, reason="", error=wrong))
    play.now += 2 * OPINION_SECONDS
    assert play.error("a", "b") == wrong, "so long nobody has shown that it can be done: somebody waits for the error"
    play.finish(next(iter(play.job.attempts)))
    assert play.error("a", "b") is None
    assert play.error("b") is None, "it can be done, by one that is away now"
    while not play.complete:
        play.plan("a", "b")
        assert {attempt.node_id for attempt in play.job.attempts.values()} <= {"a"}
        for attempt_id in list(play.job.attempts):
            play.finish(attempt_id)


def test_a_node_that_called_it_hopeless_stays_out_whatever_else_it_finishes() -> None:
    """It holds two leases, and the other one may end well. Otherwise, two nodes' errors could never be there at the same time."""
    play = Simulation(epochs=1)
    play.by_hand = True
    play.plan("a", "b")
    check = next(attempt for attempt in play.job.attempts.values() if attempt.shard_id == "check-validation")
    wrong = ErrorInfo(code="invalid_data", message="the targets are classes 5 to 7")
    play.record(AttemptEnded(at=1, attempt_id=check.attempt_id, reason="", error=wrong))
    for attempt_id in list(play.job.attempts):
        play.finish(attempt_id)
    play.plan("a", "b")
    again = next(attempt for attempt in play.job.attempts.values() if attempt.shard_id == "check-validation")
    assert again.node_id != check.node_id
    for attempt_id in list(play.job.attempts):
        if attempt_id != again.attempt_id:
            play.finish(attempt_id)
    play.record(AttemptEnded(at=1, attempt_id=again.attempt_id, reason="", error=wrong))
    assert play.error("a", "b") is not None


def test_where_the_others_can_do_nothing_it_is_tried_again_and_in_the_end_given_up() -> None:
    play = Simulation(epochs=1, validation=False)
    play.plan("a", "b")
    wrong = ErrorInfo(code="invalid_model", message="no")
    play.record(AttemptEnded(at=0.0, attempt_id=next(iter(play.job.attempts)), reason="", error=wrong))
    out, (left,) = next(iter(play.job.failings.hopeless)), [one.node_id for one in play.job.attempts.values()]
    for attempt_id in list(play.job.attempts):
        play.finish(attempt_id)
    assert play.error("a", "b") is None
    assert play.error() is None, "after a restart nobody is known yet"

    def nodes(now: float, *names: str, free: int = 1) -> set[str]:
        seen: list[str] = []
        strategy: Any = play.job.strategy
        play.job.strategy = SimpleNamespace(
            plan=lambda view, attempts: seen.extend(node.node_id for node in view.nodes) or []
        )
        views = tuple(NodeView(name, 1.0, free_slots=free, idle=True) for name in names)
        play.job.plan(ClusterView(views, now))
        play.job.strategy = strategy
        return set(seen)

    later = play.now + OPINION_SECONDS
    assert nodes(play.now, "a", "b") == {left}
    assert nodes(later, "a", "b") == {"a", "b"}, "nothing has come of it for so long"
    assert nodes(later, "a", "b", free=0) == {left}, "it is busy with other jobs"
    assert nodes(later, out) == {out}


def test_what_is_asked_while_an_epoch_is_validated_does_not_open_it_again() -> None:
    play = Simulation(epochs=3, shards=(105,) * 10)
    play.state.open.crew, play.state.epochs.samples = frozenset("abc"), 1050 - 25
    assert play.strategy.epoch_full
    play.state.validation.under_way = play.state.validation.make(None, None, 1)  # type: ignore[misc]
    play.strategy.happened(StopAsked(at=0.0))
    assert play.strategy.epoch_full


def test_what_one_node_says_of_the_validation_data_another_looks_at() -> None:
    play = Simulation(epochs=1)
    play.plan("a", "b")
    check = next(attempt for attempt in play.job.attempts.values() if attempt.shard_id == "check-validation")
    wrong = ErrorInfo(code="invalid_data", message="the targets are classes 5 to 7")
    play.record(AttemptEnded(at=1, attempt_id=check.attempt_id, reason="", error=wrong))
    play.plan("a", "b")
    (again,) = [attempt for attempt in play.job.attempts.values() if attempt.shard_id == "check-validation"]
    assert again.node_id != check.node_id
    play.record(AttemptEnded(at=1, attempt_id=again.attempt_id, reason="", error=wrong))
    assert play.error("a", "b") == replace(wrong, message="in validation: the targets are classes 5 to 7")


def test_a_node_that_fails_rests_while_the_others_go_on() -> None:
    play = Simulation(epochs=1, validation=False)
    play.plan("a", "b")
    broken = next(attempt for attempt in play.job.attempts.values() if attempt.node_id == "b")
    flaky = ErrorInfo(code="engine_failed", message="died", retryable=True)
    play.record(AttemptEnded(at=0.0, attempt_id=broken.attempt_id, reason="", error=flaky))
    play.finish(next(iter(play.job.attempts)))
    play.plan("a", "b")
    assert {attempt.node_id for attempt in play.job.attempts.values()} == {"a"}
    play.finish(next(iter(play.job.attempts)))
    play.now += 10
    play.plan("a", "b")
    assert {attempt.node_id for attempt in play.job.attempts.values()} == {"a", "b"}


def test_progress_counts_nodes_that_wait_for_the_others_and_for_the_next_round() -> None:
    play = Simulation(epochs=3, validation=False)
    for _ in range(2):
        play.plan("a", "b")
        for attempt_id in list(play.job.attempts):
            play.finish(attempt_id)
            if play.state.open.number:
                assert play.strategy.progress({}).nodes.keys() >= play.contributions.results.keys()
        assert play.strategy.progress({}).nodes.keys() == {"a", "b"}
    play.lose("b")
    play.plan("a")
    (attempt,) = play.job.attempts.values()
    assert play.strategy.progress({attempt.attempt_id: (attempt, 5, {})}).nodes.keys() == {"a"}


def test_metrics_of_a_round_count_the_parts_that_are_done_before_the_others() -> None:
    """Otherwise, the weights would go back to those of the slowest node alone."""
    play = Simulation(epochs=2, validation=False)
    play.plan("a", "b")
    first, last = play.job.attempts.values()
    live = {"loss": 1.5}
    before = play.strategy.progress({one.attempt_id: (one, 100, live) for one in (first, last)})
    play.finish(first.attempt_id)
    (done,) = play.contributions.results.values()
    found = play.strategy.progress({last.attempt_id: (last, 100, live)})
    assert before.metrics == live
    assert found.metrics["loss"] == pytest.approx((done.samples * 0.5 + 100 * 1.5) / (done.samples + 100))
    assert found.done == done.samples + 100
    play.finish(last.attempt_id)
    assert play.strategy.progress({}).metrics == {"loss": 0.5}


def test_a_node_without_the_memory_is_left_out_the_second_time_and_the_others_finish() -> None:
    play = Simulation(epochs=1, validation=False)
    short = ErrorInfo(code="out_of_memory", message="b's GPU is full", retryable=True)
    for _ in range(2):
        play.now += 10
        play.plan("a", "b")
        small = next(attempt for attempt in play.job.attempts.values() if attempt.node_id == "b")
        play.record(AttemptEnded(at=play.now, attempt_id=small.attempt_id, reason="", error=short))
        play.finish(next(iter(play.job.attempts)))
        assert play.error("a", "b") is None
    assert play.job.failings.refused == {"b": short}
    play.run("a", "b")
    assert play.complete
    assert play.state.trust.quarantined == {}


def test_a_job_for_which_no_node_has_the_memory_says_so() -> None:
    play = Simulation(epochs=1, validation=False)
    short = ErrorInfo(code="out_of_memory", message="the GPU is full", retryable=True)
    for _ in range(2):
        play.now += 10
        play.plan("a")
        fails(play, "a", short)
    with pytest.raises(OutOfMemory, match="no node can do this job: the GPU is full"):
        play.plan("a")


def test_a_node_that_had_the_memory_in_between_is_not_left_out() -> None:
    play = Simulation(epochs=5, validation=False)
    short = ErrorInfo(code="out_of_memory", message="the GPU is full", retryable=True)
    for _ in range(3):
        play.now += 10
        play.plan("a")
        fails(play, "a", short)
        play.now += 10
        play.plan("a")
        play.finish(next(iter(play.job.attempts)))
    assert play.job.failings.refused == {}


def test_the_model_of_the_best_epoch_is_kept_and_training_ends_when_nothing_gets_better() -> None:
    play = Simulation(epochs=50, monitor="val_loss", patience=3, min_delta=0.05)
    play.validation_losses = {1: 0.9, 2: 0.5, 3: 0.49, 4: 0.8, 5: 0.6}
    weights: dict[int, BlobRef | None] = {}

    def note() -> None:
        weights.setdefault(play.state.epochs.ended, play.state.exchange.weights)

    play.run("a", "b", each=note)
    assert len(play.job.history.epochs) == 5  # the third is better by less than min_delta
    assert play.state.epochs.best is not None
    assert (play.state.epochs.best.epoch, play.state.epochs.best.value) == (2, 0.5)
    (export,) = (task for task in play.tasks.values() if isinstance(task, ExportTask))
    assert export.weights == play.state.epochs.best.weights != play.state.exchange.weights
    assert export.weights.sha256 in play.strategy.kept()
    assert export.step is None


def test_all_that_the_next_round_rests_on_is_kept() -> None:
    """Also from other jobs, which may hold the same blobs and end."""
    play = Simulation(validation=False)
    play.plan("a", "b")
    play.finish(next(iter(play.job.attempts)))
    (part,) = play.contributions.results.values()
    assert play.strategy.kept() == {part.base.sha256, part.update.sha256}
    play.finish(next(iter(play.job.attempts)))
    play.plan("a", "b")
    exchange = play.state.exchange
    assert play.state.open.number == 1
    assert exchange.step is not None
    held = (exchange.weights, exchange.velocity, exchange.step.update)
    assert play.strategy.kept() == {ref.sha256 for ref in held if ref is not None}
    assert len(play.strategy.kept()) == 3


def test_the_history_of_very_many_epochs_fits_into_a_message() -> None:
    play = Simulation(epochs=50_000, validation=False)
    for number in range(1, 5001):
        play.record(
            EpochEnded(at=0.0, epoch=EpochMetrics(epoch=number, metrics={"loss": 0.123456789, "accuracy": 0.5}))
        )
    told = play.job.history.told()
    assert 500 < len(told) < 5000
    assert len({after.epoch - before.epoch for before, after in itertools.pairwise(told)}) == 1
    assert told[-1].epoch == 5000
    assert len(codec.pack(told)) < 200_000
    assert Simulation().job.history.told() == ()
    listed: list[int] = []
    while part := play.job.epochs_after(listed[-1] if listed else 0):
        assert len(codec.pack(part)) < 200_000
        listed += [epoch.epoch for epoch in part]
    assert listed == list(range(1, 5001)), "of a job that runs, all of them"


def test_training_that_is_to_stop_ends_after_the_epoch_under_way() -> None:
    play = Simulation(epochs=5)

    def stop_in_the_second() -> None:
        if play.state.epochs.ended in (1, 2):
            play.record(StopAsked(at=play.now))

    play.run("a", "b", each=stop_in_the_second)
    assert [epoch.epoch for epoch in play.job.history.epochs] == [1, 2]
    assert play.strategy.exported() is not None
    assert play.strategy.progress({}).epochs == 2
    again = play.new_job()
    for event in play.events:
        again.apply(event)
    assert isinstance(again.strategy, TrainingStrategy)
    assert again.strategy.state.epochs.stop_after == 2
    assert again.strategy.state.epochs.all_trained


def test_a_metric_that_is_not_there_ends_the_job_with_those_that_are() -> None:
    play = Simulation(monitor="val_auc")
    with pytest.raises(InvalidRequest, match=r"'val_auc'.*this job has loss"):
        play.run("a")


def test_a_resumed_job_goes_on_from_the_checkpoint_and_counts_on() -> None:
    play = Simulation(epochs=5, weights=blob(77), initial_epoch=3)
    play.plan("a")
    *_, task = play.tasks.values()
    assert isinstance(task, TrainTask)
    assert (task.weights, task.step, task.seen) == (blob(77), None, 3 * 320)
    assert blob(77).sha256 in play.strategy.kept()
    play.run("a")
    assert [epoch.epoch for epoch in play.job.history.epochs] == [4, 5]
    assert play.state.epochs.total == 2 * 320


def test_every_round_tells_how_to_get_to_its_weights_from_those_before() -> None:
    play = Simulation(epochs=2, validation=True)
    play.run("a", "b")
    tasks = [task for task in play.tasks.values() if isinstance(task, TrainTask | EvaluateTask)]
    assert isinstance(tasks[1], TrainTask)
    assert tasks[1].weights is tasks[1].step is None
    later = [task for task in tasks if task.weights is not None]
    assert len(later) > 4
    assert all(task.step is not None and task.step.base != task.weights for task in later)
    seen = [task.seen for task in tasks if isinstance(task, TrainTask)]
    assert seen == sorted(seen)


def test_updates_that_go_too_far_are_left_out_and_their_node_after_three() -> None:
    play = Simulation(epochs=30, validation=False)
    play.norms = {"c": 1000.0}
    for expected in (1, 2, 3):
        play.plan("a", "b", "c")
        for attempt_id in list(play.job.attempts):
            play.finish(attempt_id)
        before = play.state.epochs.samples
        play.plan("a", "b", "c")
        assert play.state.epochs.samples - before < 320
        assert play.state.trust.rejections["c"] == expected
    assert "times as large" in play.state.trust.quarantined["c"]
    assert play.strategy.progress({}).quarantined == play.state.trust.quarantined
    held = {attempt.node_id for attempt in play.job.attempts.values()}
    for _ in range(4):
        for attempt_id in list(play.job.attempts):
            play.finish(attempt_id)
        play.plan("a", "b", "c")
        held = {attempt.node_id for attempt in play.job.attempts.values()}
    assert held == {"a", "b"}
    play.lose("a")
    play.lose("b")
    play.plan("c")  # better than none
    assert {attempt.node_id for attempt in play.job.attempts.values()} == {"c"}


def test_a_node_that_comes_when_little_is_left_to_learn_is_welcome() -> None:
    """Its new optimizer takes steps of the usual size, while the others' steps have become tiny."""
    play = Simulation(epochs=30, validation=False)
    nodes = ["a", "b"]
    for number in range(6):
        if number == 3:
            play.norms = {"a": 0.01, "b": 0.01, "c": 0.5}
            nodes.append("c")
        play.plan(*nodes)
        for attempt_id in list(play.job.attempts):
            play.finish(attempt_id)
        play.plan(*nodes)
    assert "c" in play.state.open.crew | {attempt.node_id for attempt in play.job.attempts.values()}
    assert not play.state.trust.rejections
    play.norms["c"] = 1000.0
    for attempt_id in list(play.job.attempts):
        play.finish(attempt_id)
    play.plan(*nodes)
    assert play.state.trust.rejections == {"c": 1}, "what never was is no use now either"


def test_while_all_get_ready_nobody_takes_no_part() -> None:
    play = Simulation(validation=False)
    play.by_hand = True
    play.plan("a", "b")
    running: dict[str, Any] = {key: (attempt, 0, {}) for key, attempt in play.job.attempts.items()}
    assert not play.strategy.progress(running).waiting
    play.finish(next(iter(play.job.attempts)))
    running = {key: (attempt, 0, {}) for key, attempt in play.job.attempts.items()}
    assert list(play.strategy.progress(running).waiting.values()) == ["it gets ready"]


def test_a_good_round_forgives_and_weights_that_are_not_finite_count_as_no_use() -> None:
    play = Simulation(epochs=30, validation=False)
    diverged = ErrorInfo(code="diverged", message="the loss became nan", retryable=True)
    play.plan("a", "b")
    attempt = next(key for key, one in play.job.attempts.items() if one.node_id == "b")
    play.record(AttemptEnded(at=play.now, attempt_id=attempt, reason="", error=diverged))
    assert play.state.trust.rejections == {"b": 1}
    play.now += 100
    play.finish(next(iter(play.job.attempts)))
    play.plan("a", "b")
    for attempt_id in list(play.job.attempts):
        play.finish(attempt_id)
    play.plan("a", "b")
    assert play.state.trust.rejections == {}


def test_a_node_that_began_from_other_weights_is_left_out() -> None:
    play = Simulation(epochs=3, validation=False)
    play.plan("a", "b")
    for number, (attempt_id, attempt) in enumerate(list(play.job.attempts.items())):
        task = play.tasks[attempt_id]
        assert isinstance(task, TrainTask)
        result = TrainResult(
            base=blob(500 + number), update=blob(600 + number), samples=100 - number, steps=1, seconds=1.0, norm=1.0
        )
        play.record(AttemptFinished(at=play.now, attempt_id=attempt_id, result=result))
        assert attempt.node_id == "ab"[number]
    play.plan("a", "b")
    assert play.state.epochs.samples == 100
    assert play.state.trust.rejections == {"b": 1}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["finish", "lose", "plan"]), st.sampled_from("abc")), max_size=40))
def test_replaying_the_events_gives_the_state_back(steps: list[tuple[str, str]]) -> None:
    play = Simulation()
    for action, node_id in steps:
        if action == "plan":
            play.plan("a", "b", "c")
        elif action == "lose":
            play.lose(node_id)
        else:
            held = [key for key, attempt in play.job.attempts.items() if attempt.node_id == node_id]
            if held:
                play.finish(held[0])
    again = play.new_job()
    for event in play.events:
        again.apply(event)
    assert again.attempts == play.job.attempts
    assert again.history == play.job.history
    assert again.failings == play.job.failings
    assert isinstance(again.strategy, TrainingStrategy)
    assert isinstance(again.strategy.rounds, UpdateRounds)
    assert again.strategy.rounds.contributions == play.contributions
    for part in ("open", "exchange", "epochs", "measured", "readiness", "sharing", "trust", "exported"):
        assert getattr(again.strategy.state, part) == getattr(play.state, part), part
    play.job = again  # and the job can be finished from there
    play.run("b", "c")
    assert [epoch.epoch for epoch in play.job.history.epochs] == [1, 2]
