"""Deterministic rounds: parts stay the same, whichever node does them."""

from __future__ import annotations

from typing import Any

from coordinator.plans.decisions import CloseRound, Lease
from coordinator.plans.events import JobSubmitted, RoundClosed
from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.strategies import strategy_for
from coordinator.plans.training.fixed import Fixed
from coordinator.plans.training.readiness import WARM_UP
from coordinator.plans.training.rounds import UpdateRounds
from coordinator.plans.training.strategy import TrainingStrategy
from potluck.wire.jobs import Train
from potluck.wire.tasks import TrainResult, TrainTask, WarmUpResult, WarmUpTask
from potluck.wire.values import BlobRef, DataFormat, Dataset, DataShard


def blob(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size=1)


class Play:
    """One job; the test plays the dispatcher and the nodes."""

    def __init__(self, shards: tuple[int, ...] = (40,) * 6) -> None:
        data = Dataset(
            name="d",
            format=DataFormat(kind="images", classes=("a", "b")),
            count=sum(shards),
            shards=tuple(DataShard(blob=blob(10 + number), count=count) for number, count in enumerate(shards)),
        )
        spec = Train(model="m", dataset="d", epochs=2, batch_size=10, deterministic=True)
        strategy = strategy_for(JobSubmitted(at=0.0, job_id="j", request_id="", spec=spec, model=blob(1)), data, None)
        assert isinstance(strategy, TrainingStrategy)
        assert isinstance(strategy.rounds, UpdateRounds)
        assert isinstance(strategy.rounds.manner, Fixed)
        self.strategy = strategy
        self.contributions = strategy.rounds.contributions
        self.attempts: dict[str, Attempt] = {}
        self.tasks: dict[str, TrainTask] = {}
        self.number = 0
        self.rates: dict[str, float] = {}
        self.now = 0.0

    def plan(self, *names: str, gflops: float = 1.0) -> list[Any]:
        busy = [attempt.node_id for attempt in self.attempts.values()]
        nodes = tuple(NodeView(name, gflops, 1 - busy.count(name), idle=name not in busy) for name in names)
        before = repr(self.strategy)
        decisions = self.strategy.plan(ClusterView(nodes, self.now), self.attempts)
        assert repr(self.strategy) == before, "a plan changed the state"
        for decision in decisions:
            if isinstance(decision, Lease):
                self.number += 1
                attempt = Attempt(f"a{self.number}", decision.shard_id, decision.node_id, self.now)
                self.strategy.leased(attempt, decision.task)
                if isinstance(decision.task, WarmUpTask):
                    rate = self.rates.get(decision.node_id, 100.0)
                    self.strategy.finished(attempt, WarmUpResult(rate=rate, beside_seconds=0.0), self.now)
                    continue
                assert isinstance(decision.task, TrainTask)
                self.attempts[attempt.attempt_id] = attempt
                self.tasks[attempt.attempt_id] = decision.task
        if any(isinstance(decision, Lease) and decision.shard_id == WARM_UP for decision in decisions):
            return self.plan(*names, gflops=gflops)
        return decisions

    def of(self, node_id: str) -> Attempt:
        return next(attempt for attempt in self.attempts.values() if attempt.node_id == node_id)

    def finish(self, node_id: str) -> TrainTask:
        attempt = self.of(node_id)
        del self.attempts[attempt.attempt_id]
        task = self.tasks[attempt.attempt_id]
        update = blob(1000 + task.part)
        result = TrainResult(base=blob(2), update=update, samples=task.samples, steps=1, norm=1.0, seconds=0.1)
        self.strategy.finished(attempt, result, 1.0)
        return task

    def lose(self, node_id: str) -> TrainTask:
        attempt = self.of(node_id)
        del self.attempts[attempt.attempt_id]
        self.strategy.ended(attempt, None)
        return self.tasks[attempt.attempt_id]


def test_a_round_has_a_part_for_each_node_at_the_beginning_whatever_their_speed() -> None:
    play = Play()
    leases = play.plan("n1", "n2", "n3")
    assert [(lease.shard_id, lease.node_id) for lease in leases] == [
        ("round-0.0", "n1"),
        ("round-0.1", "n2"),
        ("round-0.2", "n3"),
    ]
    assert [(lease.task.part, lease.task.parts, lease.task.samples) for lease in leases] == [
        (i, 3, 40) for i in range(3)
    ]
    held = [shard for lease in leases for shard in lease.task.data]
    assert len(held) == len({shard.blob.sha256 for shard in held}) == 6
    assert not any(lease.task.overlap for lease in leases)


def test_a_lost_part_is_done_by_whoever_is_free_and_is_the_same() -> None:
    play = Play()
    play.plan("n1", "n2")
    play.finish("n1")
    lost = play.lose("n2")
    (lease,) = play.plan("n1")
    assert (lease.node_id, lease.task) == ("n1", lost)
    play.finish("n1")
    (closing,) = play.plan("n1")
    assert isinstance(closing, CloseRound)
    assert [result.update for result in closing.results] == [blob(1000), blob(1001)], "in the order of the parts"


def test_the_round_waits_for_all_its_parts() -> None:
    play = Play()
    play.plan("n1", "n2")
    play.finish("n2")
    assert play.plan("n2") == [], "the other part is under way"
    play.lose("n1")
    assert play.plan() == []
    assert [lease.task.part for lease in play.plan("n9")] == [0]


def test_the_next_round_has_as_many_parts_though_nodes_came_and_went() -> None:
    play = Play()
    play.plan("n1", "n2")
    play.finish("n1")
    play.finish("n2")
    play.strategy.happened(
        RoundClosed(
            at=2.0, round=0, base=blob(2), step=blob(4), weights=blob(5), velocity=blob(6), samples=120, metrics={}
        )
    )
    leases = play.plan("n7", "n8", "n9", gflops=5.0)
    assert [(lease.shard_id, lease.node_id) for lease in leases] == [("round-1.0", "n7"), ("round-1.1", "n8")]


def test_less_data_than_a_batch_for_each_makes_fewer_parts() -> None:
    assert [lease.task.parts for lease in Play((15,)).plan("n1", "n2", "n3")] == [1]
    assert [lease.task.samples for lease in Play((4,)).plan("n1", "n2")] == [4]


def test_without_nodes_there_is_nothing_to_plan() -> None:
    assert Play().plan() == []


def test_a_slow_node_does_no_part_that_another_would_have_done_sooner() -> None:
    play = Play()
    play.rates["n2"] = 5.0
    (lease,) = play.plan("n1", "n2")
    assert (lease.node_id, lease.task.parts) == ("n1", 2)
    play.finish("n1")
    (lease,) = play.plan("n1", "n2")
    assert (lease.shard_id, lease.node_id) == ("round-0.1", "n1")


def test_a_part_that_is_late_is_given_to_another_node_as_well() -> None:
    play = Play()
    play.plan("n1", "n2")
    play.finish("n1")
    assert play.plan("n1", "n2") == []
    play.now = play.contributions.due
    (lease,) = play.plan("n1", "n2")
    assert (lease.shard_id, lease.node_id) == ("round-0.1", "n1")
    play.finish("n1")
    (closing,) = play.plan("n1", "n2")
    assert isinstance(closing, CloseRound)
