"""Synchronous training's plan: one group, exact epochs, members lost and joined, replay; and the choice of `auto`."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.plans.decisions import CloseEpoch, CloseSync, Complete, Lease, Withdraw
from coordinator.plans.events import (
    AnyEvent,
    AttemptEnded,
    AttemptFinished,
    AttemptLeased,
    EpochEnded,
    JobSubmitted,
    RoundClosed,
    StrategyChosen,
)
from coordinator.plans.job import Attempt, Job
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.strategies import strategy_for
from coordinator.plans.training.auto import AutoStrategy
from coordinator.plans.training.readiness import WARM_UP
from coordinator.plans.training.strategy import TrainingStrategy
from coordinator.plans.training.sync import FORMING_SECONDS, TRIES_LIMIT, SyncRounds
from potluck.data.order import passes
from potluck.errors import Unavailable
from potluck.wire.jobs import Train
from potluck.wire.tasks import ExportResult, SyncResult, SyncTask, TrainResult, WarmUpResult, WarmUpTask
from potluck.wire.values import BlobRef, DataFormat, Dataset, DataShard, ErrorInfo, Signature
from support.purely import planned

LOST = ErrorInfo(code="peer_lost", message="another member of the group is gone", retryable=True)


def blob(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size=1000)


class Simulation:
    """Plays the dispatcher and the nodes, which take every lease; keeps all events."""

    def __init__(self, items: int = 320, batch: int = 32, epochs: int = 2, **options: Any) -> None:
        spec = Train(
            **{"model": "m", "dataset": "d", "epochs": epochs, "batch_size": batch, "strategy": "sync", **options}
        )
        self.data = Dataset(
            name="d", format=DataFormat(kind="arrays"), count=items, shards=(DataShard(blob=blob(7), count=items),)
        )
        self.submitted = JobSubmitted(at=0.0, job_id="j", request_id="", spec=spec, model=blob(1))
        self.job = self.new_job()
        self.events: list[AnyEvent] = []
        self.now = 0.0
        self.number = 100
        self.giving_way: set[str] = set()
        self.rates: dict[str, float] = {}
        """Items/s that nodes measure when they warm up; 10 where none is set."""
        self.took: dict[str, float] = {}
        """Seconds that the warm-up takes; 0 where none is set."""
        self.tasks: dict[str, SyncTask] = {}
        self.complete = False
        self.reduced_bytes = 0

    def new_job(self) -> Job:
        return Job(submitted=self.submitted, strategy=strategy_for(self.submitted, self.data, None), dataset=self.data)

    @property
    def strategy(self) -> Any:
        """`TrainingStrategy`; `AutoStrategy` while it has not chosen."""
        assert isinstance(self.job.strategy, TrainingStrategy | AutoStrategy)
        return self.job.strategy

    def record(self, event: AnyEvent) -> None:
        self.events.append(event)
        self.job.apply(event)

    def plan(self, *nodes: str, **speeds: float) -> list[object]:
        self.now += 1.0
        busy = {attempt.node_id for attempt in self.job.attempts.values()}
        views = tuple(
            NodeView(
                name,
                speeds.get(name, 1.0),
                free_slots=2,
                idle=name not in busy,
                collective=f"{name}:1",
                gives_way=name in self.giving_way,
            )
            for name in nodes
        )
        decisions = planned(self.job, ClusterView(views, self.now), self.events, self.new_job, self.record)
        warmed = False
        for decision in decisions:
            self.number += 1
            match decision:
                case Lease(shard_id, node_id, task):
                    attempt_id = f"a{self.number}"
                    self.record(
                        AttemptLeased(at=self.now, attempt_id=attempt_id, shard_id=shard_id, node_id=node_id, task=task)
                    )
                    if isinstance(task, SyncTask):
                        self.tasks[attempt_id] = task
                    elif isinstance(task, WarmUpTask):
                        result = WarmUpResult(rate=self.rates.get(node_id, 10.0), beside_seconds=0.0)
                        at = self.now + self.took.get(node_id, 0.0)
                        self.record(AttemptFinished(at=at, attempt_id=attempt_id, result=result))
                        warmed = True
                case Withdraw(attempt_id, reason):
                    self.record(AttemptEnded(at=self.now, attempt_id=attempt_id, reason=reason))
                case CloseSync(round, weights, optimizer, samples, metrics):
                    self.record(
                        RoundClosed(
                            at=self.now,
                            round=round,
                            weights=weights,
                            optimizer=optimizer,
                            samples=samples,
                            metrics=metrics,
                        )
                    )
                case CloseEpoch(epoch):
                    self.record(EpochEnded(at=self.now, epoch=epoch))
                case Complete():
                    self.complete = True
        others = [one for one in decisions if not (isinstance(one, Lease) and isinstance(one.task, WarmUpTask))]
        return [*others, *self.plan(*nodes, **speeds)] if warmed else others

    def open_tasks(self) -> dict[str, SyncTask]:
        return {key: self.tasks[key] for key in self.job.attempts if key in self.tasks}

    def finish(self, attempt_id: str, rate: float = 10.0) -> None:
        task = self.tasks.get(attempt_id)
        self.number += 1
        result: Any = ExportResult(model=blob(self.number), signature=Signature(inputs=(), outputs=()))
        if task is not None:
            result = SyncResult(
                samples=task.steps * task.batches[task.rank],
                steps=task.steps,
                metrics={"loss": 1.0},
                rate=rate,
                weights=blob(self.number) if task.rank == 0 else None,
                optimizer=blob(self.number + 10_000) if task.rank == 0 else None,
                seconds=task.steps * 0.1,
                reduced_bytes=self.reduced_bytes,
            )
        self.record(AttemptFinished(at=self.now, attempt_id=attempt_id, result=result))

    def finish_all(self) -> None:
        for attempt_id in list(self.job.attempts):
            self.finish(attempt_id)

    def run(self, *nodes: str, limit: int = 300) -> None:
        for _ in range(limit):
            self.plan(*nodes)
            if self.complete:
                return
            self.finish_all()
        raise AssertionError("the job did not end")


@given(nodes=st.integers(1, 5), items=st.integers(1, 500), batch=st.integers(1, 64), epochs=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_step_is_taken_once_by_the_whole_group(nodes: int, items: int, batch: int, epochs: int) -> None:
    simulation = Simulation(items, batch, epochs)
    simulation.run(*(f"n{number}" for number in range(nodes)))
    whole = min(batch, items)
    taken: list[int] = []
    for task in simulation.tasks.values():
        assert sum(task.batches) == whole
        assert len(task.batches) == len(task.members) == min(nodes, whole)
        if task.rank == 0:
            taken += range(task.first_step, task.first_step + task.steps)
    assert taken == list(range(len(taken)))
    assert len(simulation.job.history.epochs) == epochs
    assert abs(simulation.job.history.epochs[-1].samples - epochs * items) < whole


def test_only_the_first_round_of_a_group_begins_from_a_file() -> None:
    simulation = Simulation()
    simulation.run("a", "b")
    first = [task for task in simulation.tasks.values() if task.begins]
    assert {task.rank for task in first} == {0, 1}
    assert len(simulation.tasks) > 2
    assert all(task.weights is None for task in simulation.tasks.values() if not task.begins)
    assert len({task.formation for task in simulation.tasks.values()}) == 1


def test_the_rest_forms_a_group_anew_from_the_last_checkpoint() -> None:
    simulation = Simulation()
    simulation.plan("a", "b", "c")
    simulation.finish_all()
    simulation.plan("a", "b", "c")  # closes the round, and then opens the next
    simulation.plan("a", "b", "c")
    before = simulation.open_tasks()
    assert {task.first_step for task in before.values()} == {8}
    lost = next(key for key, attempt in simulation.job.attempts.items() if attempt.node_id == "b")
    simulation.record(AttemptEnded(at=simulation.now, attempt_id=lost, reason="node b was lost"))
    assert {type(decision) for decision in simulation.plan("a", "c")} == {Withdraw}
    simulation.plan("a", "c")
    anew = list(simulation.open_tasks().values())
    assert [task.members for task in anew] == [("a:1", "c:1")] * 2
    assert all(task.begins and task.first_step == 8 and task.weights and task.optimizer for task in anew)
    assert len({task.formation for task in (*anew, *before.values())}) == 2
    simulation.run("a", "c")
    assert [epoch.samples for epoch in simulation.job.history.epochs] == [320, 640]
    leased = [event.shard_id for event in simulation.events if isinstance(event, AttemptLeased)]
    assert leased.count(WARM_UP) == 3, "those that are left are not measured again before they go on"


def test_a_checkpoint_counts_when_a_member_is_lost_after_the_last_step() -> None:
    simulation = Simulation()
    simulation.plan("a", "b")
    for attempt_id, task in simulation.open_tasks().items():
        if task.rank == 0:
            simulation.finish(attempt_id)
        else:
            simulation.record(AttemptEnded(at=1.0, attempt_id=attempt_id, reason="lost", error=LOST))
    assert {type(decision) for decision in simulation.plan("a")} == {CloseSync}
    simulation.plan("a")
    (task,) = simulation.open_tasks().values()
    assert task.begins
    assert task.first_step == 8


def test_a_group_with_a_member_that_gives_way_is_waited_for() -> None:
    simulation = Simulation()
    simulation.plan("a", "b")
    simulation.giving_way = {"b"}
    for _ in range(3):
        simulation.now += FORMING_SECONDS
        assert simulation.plan("a", "b") == []
    simulation.giving_way = {"c"}
    assert simulation.plan("a", "b", "c") == []
    simulation.now += FORMING_SECONDS
    assert {type(decision) for decision in simulation.plan("a", "b", "c")} == {Withdraw}


def test_a_group_whose_members_wait_for_each_other_is_broken_off_and_not_for_ever() -> None:
    simulation = Simulation()
    for _ in range(TRIES_LIMIT):
        assert {type(decision) for decision in simulation.plan("a", "b")} == {Lease}
        simulation.now += FORMING_SECONDS
        assert {type(decision) for decision in simulation.plan("a", "b")} == {Withdraw}
    with pytest.raises(Unavailable, match=f"broke off {TRIES_LIMIT} times in a row: its members wait for each other"):
        simulation.plan("a", "b")


def test_lost_peers_are_nobodys_failure() -> None:
    simulation = Simulation()
    simulation.plan("a", "b")
    for attempt_id in simulation.open_tasks():
        simulation.record(AttemptEnded(at=1.0, attempt_id=attempt_id, reason="lost", error=LOST))
    assert simulation.job.failings.in_a_row == {}
    assert not simulation.job.failings.resting


def test_a_node_that_joins_is_taken_in_at_the_next_round() -> None:
    simulation = Simulation()
    joined(simulation, "b")
    tasks = list(simulation.open_tasks().values())
    assert len(tasks) == 2
    assert all(task.begins for task in tasks)


def joined(simulation: Simulation, node_id: str) -> None:
    """A job on node a alone, and the second round after another node has come."""
    simulation.plan("a")
    simulation.finish_all()
    simulation.plan("a", node_id)  # closes the round
    simulation.plan("a", node_id)  # opens the next; the other node gets ready meanwhile
    simulation.finish_all()
    for _ in range(3):  # closes the round and the epoch, and opens the next
        simulation.plan("a", node_id)


def test_the_first_group_waits_for_nodes_that_are_alike_and_for_no_slow_one() -> None:
    strategy = Simulation().strategy
    strategy.state.readiness.ready["a"] = strategy.state.readiness.first_at = 10.0
    strategy.state.readiness.took["a"] = 10.0
    attempts = {"1": Attempt("1", WARM_UP, "b", 0.0)}

    def hopes(gflops: float, now: float) -> bool:
        return strategy.rounds.hopes(ClusterView((NodeView("a", 40.0, 2), NodeView("b", gflops, 2)), now), attempts)

    assert hopes(20.0, now=19.0)
    assert not hopes(20.0, now=21.0)
    assert not hopes(2.0, now=10.5)
    assert hopes(0.0, now=19.0), "its speed is not known yet"


def test_a_node_that_would_cost_more_than_it_brings_does_not_join() -> None:
    simulation = Simulation()
    simulation.took["b"] = 300.0
    joined(simulation, "b")
    (task,) = simulation.open_tasks().values()
    assert not task.begins
    assert simulation.strategy.progress({}).waiting.keys() == {"b"}


def test_a_node_with_a_twentieth_of_the_speed_is_no_member_of_the_first_group() -> None:
    simulation = Simulation()
    simulation.rates = {"a": 20.0, "b": 1.0, "c": 9.0}
    simulation.took = {"a": 10.0, "b": 200.0, "c": 15.0}
    simulation.plan("a", "b", "c")
    (batches,) = {task.batches for task in simulation.open_tasks().values()}
    assert batches == (22, 10)
    assert simulation.strategy.progress({}).waiting.keys() == {"b"}


def test_a_node_that_was_too_slow_is_measured_again_while_a_round_is_open() -> None:
    lab = Simulation(items=32_000, epochs=3)
    lab.rates = {"a": 20.0, "b": 1.0, "c": 9.0}
    lab.took = {"a": 10.0, "b": 200.0, "c": 15.0}
    lab.plan("a", "b", "c")
    assert "b" in lab.strategy.state.sharing.slow
    lab.giving_way = {"a"}  # so that the round is not broken off
    for _ in range(6):
        lab.now += 60.0
        lab.plan("a", "b", "c")
    again = [event for event in lab.events if isinstance(event, AttemptLeased) and event.shard_id == WARM_UP]
    assert [event.node_id for event in again].count("b") == 2


def test_nodes_that_can_be_in_no_group_are_told_of() -> None:
    simulation = Simulation()
    views = (NodeView("a", 1.0, 2, collective="a:1"), NodeView("b", 1.0, 2))
    (lease,) = simulation.job.plan(ClusterView(views, 1.0))
    assert isinstance(lease, Lease)
    assert lease.node_id == "a"
    assert "--insecure" in simulation.strategy.progress({}, views).waiting["b"]


def test_items_of_a_step_go_by_the_speed_that_was_measured() -> None:
    simulation = Simulation(items=6000, batch=60)
    simulation.plan("a", "b")
    for attempt_id, attempt in list(simulation.job.attempts.items()):
        simulation.finish(attempt_id, rate=20.0 if attempt.node_id == "a" else 10.0)
    simulation.plan("a", "b")
    simulation.plan("a", "b")
    assert {task.batches for task in simulation.open_tasks().values()} == {(40, 20)}


@given(stops=st.lists(st.integers(0, 10_000), max_size=3))
@settings(max_examples=30, deadline=None)
def test_replaying_gives_the_same_state(stops: list[int]) -> None:
    simulation = Simulation()
    simulation.run("a", "b")
    for stop in [*(stop % (len(simulation.events) + 1) for stop in stops), len(simulation.events)]:
        once, again = simulation.new_job(), simulation.new_job()
        for event in simulation.events[:stop]:
            once.apply(event)
            again.apply(event)
        view = ClusterView((NodeView("a", 1.0, 2, collective="a:1"), NodeView("b", 1.0, 2, collective="b:1")), 1e6)
        assert once.plan(view) == again.plan(view)
    replayed = simulation.new_job()
    for event in simulation.events:
        replayed.apply(event)
    assert isinstance(replayed.strategy, TrainingStrategy)
    assert isinstance(replayed.strategy.rounds, SyncRounds)
    assert replayed.strategy.rounds.group == simulation.strategy.rounds.group
    assert replayed.strategy.rounds.steps_done == simulation.strategy.rounds.steps_done
    assert replayed.strategy.state.exchange == simulation.strategy.state.exchange


@given(count=st.integers(1, 50), seed=st.integers(0, 5), skip=st.integers(0, 200))
def test_passes_see_every_item_once_each_and_can_be_entered_anywhere(count: int, seed: int, skip: int) -> None:
    stream = passes(count, seed)
    whole = [next(stream) for _ in range(skip + count)]
    assert sorted(whole[:count]) == list(range(count))
    later = passes(count, seed, skip)
    assert [next(later) for _ in range(count)] == whole[skip:]


def test_what_was_exchanged_is_what_members_added_up() -> None:
    """Nor does it grow with the model: most of it may be frozen."""
    for reduced, each in ((0, blob(1).size), (3, 3)):
        lab = Simulation(items=320, batch=32, epochs=1)
        lab.reduced_bytes = reduced
        lab.run("a", "b", "c")
        assert lab.strategy.state.exchange.bytes == 10 * 2 * 2 * each


def test_progress_counts_members_that_are_done_before_the_others() -> None:
    lab = Simulation(items=320, batch=32, epochs=2)
    lab.plan("a", "b")
    first, last = lab.job.attempts.values()
    task = lab.tasks[first.attempt_id]
    samples = task.steps * task.batches[task.rank]
    lab.finish(first.attempt_id)
    found = lab.strategy.progress({last.attempt_id: (last, 16, {"loss": 3.0})})
    assert found.done == samples + 16
    assert found.nodes.keys() == {"a", "b"}, "both are members still"
    assert found.metrics["loss"] == pytest.approx((samples * 1.0 + 16 * 3.0) / (samples + 16))


def test_auto_counts_the_weights_that_are_trained() -> None:
    lab = Simulation(items=32_000, strategy="auto")
    lab.plan("a", "b")
    for attempt in list(lab.job.attempts.values()):
        result = TrainResult(
            base=blob(2), update=blob(3), samples=64, steps=2, norm=1.0, seconds=0.1, trained_bytes=41_000
        )
        lab.record(AttemptFinished(at=lab.now, attempt_id=attempt.attempt_id, result=result))
    whole = blob(9)
    lab.record(
        RoundClosed(
            at=lab.now, round=0, base=blob(2), step=blob(4), weights=BlobRef(sha256=whole.sha256, size=8_700_000),
            velocity=blob(5), samples=128, metrics={},
        )
    )  # fmt: skip
    view = ClusterView(tuple(NodeView(name, 1.0, 2, collective=f"{name}:1") for name in "ab"), lab.now)
    assert lab.strategy.prediction(view).costs.weights_bytes == 41_000
    lab.plan("a", "b")
    (chosen,) = [event for event in lab.events if isinstance(event, StrategyChosen)]
    assert lab.strategy.progress({}).strategy == chosen.why
    assert "0.0 MB of weights" in chosen.why
