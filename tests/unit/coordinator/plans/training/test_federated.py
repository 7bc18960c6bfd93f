"""Data that live on nodes: what is known of them, rounds over their holders, FedNova's mean, evaluation, and the cost of noise."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.dispatch.outer import nova_scales
from coordinator.plans.decisions import Choose, CloseEpoch, CloseRound, Complete, Lease
from coordinator.plans.events import JobSubmitted, RoundClosed
from coordinator.plans.job import Attempt
from coordinator.plans.node_data import NodesEvaluation, described, fits, joined
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.strategies import strategy_for
from coordinator.plans.training import privacy
from coordinator.plans.training.federated import GRACE_LEAST, Federated
from coordinator.plans.training.readiness import WARM_UP
from coordinator.plans.training.rounds import UpdateRounds
from coordinator.plans.training.strategy import TrainingStrategy
from potluck.errors import InvalidRequest, NotFound
from potluck.wire.jobs import Train
from potluck.wire.tasks import EvaluateResult, EvaluateTask, TrainResult, TrainTask, WarmUpResult, WarmUpTask
from potluck.wire.values import BlobRef, DataFormat, ErrorInfo, NodeData, Privacy


def held(count: int, *classes: str, **format: Any) -> NodeData:
    return NodeData(name="d", format=DataFormat(kind="images", classes=classes, **format), count=count)


def node(name: str, data: NodeData | None, **changes: Any) -> NodeView:
    return NodeView(name, 10.0, free_slots=2, data=() if data is None else (data,), **changes)


def blob(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size=1)


def test_parts_are_joined_with_every_class_in_the_order_of_the_alphabet() -> None:
    data = joined("d", {"n2": held(5, "cat", "ant"), "n1": held(7, "bee", "cat")})
    assert (data.name, data.count, data.shards) == ("d", 12, ())
    assert data.format.classes == ("ant", "bee", "cat")


def test_parts_of_another_form_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"images on n1, images of a on n2"):
        joined("d", {"n1": held(5, "a"), "n2": held(5, "a", inputs=("a",))})
    with pytest.raises(InvalidRequest, match="without classes"):
        joined("d", {"n1": held(5, "a"), "n2": held(5)})
    with pytest.raises(NotFound, match="has data named 'd'"):
        joined("d", {})


def test_a_node_may_lack_classes_but_not_add_any() -> None:
    format = joined("d", {"n1": held(5, "a", "b")}).format
    assert fits(held(3, "a"), format)
    assert not fits(held(3, "a", "c"), format)
    assert not fits(None, format)


def test_clients_see_what_there_is_without_bytes() -> None:
    (info,) = described({"d": {"n2": held(5, "b"), "n1": held(7, "a")}})
    assert (info.name, info.count, info.nodes, info.classes, info.size_bytes) == (
        "node:d", 12, ("n1", "n2"), ("a", "b"), 0,
    )  # fmt: skip


def test_updates_count_per_step_and_by_items() -> None:
    """If updates are as long as their steps, FedNova's mean goes along each node's direction only by its number of items."""
    items, steps = [300, 100], [40, 10]
    scales = nova_scales(items, steps)
    directions = np.eye(2)
    updates = [directions[0] * 40, directions[1] * 10]
    mean = sum(count / 400 * scale * update for count, scale, update in zip(items, scales, updates, strict=True))
    assert mean[0] / mean[1] == pytest.approx(3)
    assert mean.sum() == pytest.approx(0.75 * 40 + 0.25 * 10)
    assert nova_scales([10, 20], [7, 7]) == pytest.approx([1, 1])


class Play:
    """One job on the data of nodes `counts`; the test plays the dispatcher and the nodes."""

    def __init__(self, counts: dict[str, int], **options: Any) -> None:
        self.views = {name: node(name, held(count, "a", "b")) for name, count in counts.items()}
        spec = Train(model="m", dataset="node:d", epochs=2, batch_size=10, **options)
        data = joined("d", {name: held(count, "a", "b") for name, count in counts.items()})
        validation = data if spec.validation else None
        submitted = JobSubmitted(at=0.0, job_id="j", request_id="", spec=spec, model=blob(1))
        strategy = strategy_for(submitted, data, validation)
        assert isinstance(strategy, TrainingStrategy)
        assert isinstance(strategy.rounds, UpdateRounds)
        assert isinstance(strategy.rounds.manner, Federated)
        self.strategy, self.spec = strategy, spec
        self.attempts: dict[str, Attempt] = {}
        self.now = 0.0

    def plan(self, *names: str) -> list[Any]:
        view = ClusterView(tuple(self.views[name] for name in names or self.views), self.now)
        before = repr(self.strategy)
        decisions = self.strategy.plan(view, self.attempts)
        assert repr(self.strategy) == before, "a plan changed the state"
        for decision in decisions:
            if isinstance(decision, Choose):
                self.strategy.happened(decision.event)
                return self.plan(*names)
            if isinstance(decision, Lease):
                attempt = Attempt(f"a{len(self.attempts)}-{self.now}", decision.shard_id, decision.node_id, self.now)
                self.strategy.leased(attempt, decision.task)
                if isinstance(decision.task, WarmUpTask):
                    self.strategy.finished(attempt, WarmUpResult(rate=100.0, beside_seconds=0.0), self.now)
                else:
                    self.attempts[attempt.attempt_id] = attempt
        if any(isinstance(decision, Lease) and decision.shard_id == WARM_UP for decision in decisions):
            return self.plan(*names)
        return decisions

    def finish(self, node_id: str, samples: int, steps: int, items: int, norm: float = 1.0) -> None:
        attempt = next(one for one in self.attempts.values() if one.node_id == node_id)
        del self.attempts[attempt.attempt_id]
        self.now += 1
        result = TrainResult(
            base=self.strategy.checkpoint() or blob(2), update=blob(3), samples=samples, steps=steps, items=items, norm=norm, seconds=1.0,
            metrics={} if self.spec.privacy else {"loss": 1.0},
        )  # fmt: skip
        self.strategy.finished(attempt, result, self.now)

    def close(self, samples: int) -> None:
        self.strategy.happened(
            RoundClosed(
                at=self.now, round=self.strategy.state.open.number, base=blob(2), step=blob(4), weights=blob(5), velocity=blob(6),
                samples=samples, metrics={},
            )
        )  # fmt: skip


def test_each_holder_trains_on_its_own_and_nobody_gets_shards() -> None:
    play = Play({"n1": 1000, "n2": 30})
    play.views["n3"] = node("n3", None)
    leases = play.plan()
    assert [lease.node_id for lease in leases] == ["n1", "n2"]
    for lease in leases:
        assert isinstance(lease.task, TrainTask)
        assert (lease.task.node_data, lease.task.data) == ("d", ())
    assert leases[1].task.samples == 30, "one pass over its own data at most"
    play.finish("n1", 500, 50, 1000)
    play.finish("n2", 30, 3, 30)
    (closing,) = play.plan()
    assert isinstance(closing, CloseRound)
    assert closing.by_items


def test_holders_are_waited_for_at_the_beginning_also_where_the_first_engine_was_warm() -> None:
    play = Play({"n1": 100, "n2": 100})
    view = ClusterView(tuple(play.views.values()), 0.0)
    leases = play.strategy.plan(view, {})
    warming = {lease.node_id: Attempt(lease.node_id, lease.shard_id, lease.node_id, 0.0) for lease in leases}
    for lease in leases:
        play.strategy.leased(warming[lease.node_id], lease.task)
    play.strategy.finished(warming.pop("n1"), WarmUpResult(rate=100.0, beside_seconds=0.0), 1.0)
    assert play.strategy.plan(dataclasses.replace(view, now=1.0 + GRACE_LEAST - 1), warming) == []
    (lease,) = play.strategy.plan(dataclasses.replace(view, now=1.0 + GRACE_LEAST), warming)
    assert (lease.node_id, lease.shard_id) == ("n1", "round-0")


def test_a_holder_that_hangs_for_a_moment_is_not_left_out() -> None:
    """Otherwise, short rounds would go on without it, and the last round without the data that only it has."""
    play = Play({"n1": 100, "n2": 100}, round_seconds=0.02)
    play.plan()
    play.finish("n1", 50, 5, 100)
    play.now += 15
    assert play.plan() == []
    play.now += 10
    (closing,) = play.plan()
    assert isinstance(closing, CloseRound)


def test_updates_are_held_against_the_same_nodes_own_and_not_against_others() -> None:
    play = Play({"n1": 100, "n2": 100})
    for size in (1.0, 1.2, 12.0):
        play.plan()
        play.finish("n1", 20, 2, 100, norm=size)
        play.finish("n2", 20, 2, 100, norm=30.0)  # its data have another scale
        (closing,) = play.plan()
        assert isinstance(closing, CloseRound)
        assert (closing.rejected != {}) == (size == 12.0)
        play.close(40)
    assert "11 times as large as its last ones" in closing.rejected["n1"]


def test_a_node_with_fewer_items_than_a_batch_trains_on_all_of_them() -> None:
    play = Play({"n1": 1000, "n2": 4})
    assert {lease.node_id: lease.task.samples for lease in play.plan()}["n2"] == 4


def test_the_job_waits_while_no_holder_is_there_and_goes_on_with_one() -> None:
    play = Play({"n1": 100, "n2": 100})
    play.views["n3"] = node("n3", None)
    assert play.plan("n3") == []
    assert play.strategy.progress({}).message == "waiting for a node that holds node:d"
    assert [lease.node_id for lease in play.plan("n2", "n3")] == ["n2"]


def test_noise_turns_overlap_off_and_epochs_tell_epsilon() -> None:
    play = Play({"n1": 100, "n2": 50}, privacy=Privacy(l2_norm_clip=1.0, noise_multiplier=1.0))
    for lease in play.plan():
        assert lease.task.privacy == play.spec.privacy
        assert not lease.task.overlap
    play.finish("n1", 100, 10, 100)
    play.finish("n2", 50, 5, 50)
    play.close(150)
    (closing,) = play.plan()
    assert isinstance(closing, CloseEpoch)
    spent = [privacy.Spent(100, 10, 1), privacy.Spent(50, 5, 1)]
    assert closing.epoch.metrics == {"epsilon": privacy.epsilon(play.spec.privacy, spent, 10)}
    assert closing.epoch.metrics["epsilon"] > 0


def test_epsilon_is_that_of_the_node_known_best() -> None:
    rules = Privacy(l2_norm_clip=1.0, noise_multiplier=1.0)
    few, many = privacy.Spent(100, 50, 5), privacy.Spent(10_000, 50, 5)
    assert privacy.epsilon(rules, [few, many], 10) == privacy.epsilon(rules, [few], 10)
    assert privacy.epsilon(rules, [many], 10) < privacy.epsilon(rules, [few], 10)
    # For one Gaussian mechanism with noise 1, Renyi's bound is at most min over orders of order / 2 + log(1e5) / (order - 1).
    once = privacy.epsilon(Privacy(l2_norm_clip=1.0, noise_multiplier=1.0, unit="node"), [privacy.Spent(9, 9, 1)], 10)
    orders = np.linspace(1.1, 60, 1000)
    assert 3.0 < once <= (orders / 2 + np.log(1e5) / (orders - 1)).min()


def test_what_noise_costs_is_told_after_the_first_round() -> None:
    rules = Privacy(l2_norm_clip=0.5, noise_multiplier=2.0, unit="node")
    even = [privacy.Spent(100), privacy.Spent(100), privacy.Spent(100), privacy.Spent(100)]
    rng = np.random.default_rng(0)
    noise = rng.normal(0.0, 2.0 * 0.5, (4, 10_000)).mean(axis=0)
    assert privacy.loudness(rules, even, 10_000, 10) == pytest.approx(np.linalg.norm(noise) / 0.5, rel=0.05)
    assert privacy.loudness(rules, [*even[:1], privacy.Spent(100_000)], 10_000, 10) == pytest.approx(200, rel=0.01)
    each = Privacy(l2_norm_clip=0.5, noise_multiplier=2.0)
    assert privacy.loudness(each, even, 10_000, 10) == privacy.loudness(rules, even, 10_000, 10) / 10

    play = Play({"n1": 100, "n2": 100}, privacy=replace(rules, noise_multiplier=1.0))
    play.plan()
    assert play.strategy.progress({}).strategy == "local, since the data stay on the nodes"
    for name in ("n1", "n2"):
        play.finish(name, 100, 10, 100)
    play.close(200)
    play.strategy.state.exchange.weights = BlobRef(sha256="0" * 64, size=4 * 5000)
    assert play.strategy.progress({}).strategy.endswith(
        "; the noise in the mean of 2 nodes is 50.0 times as long as the longest update"
    )
    unhidden = Play({"n1": 100}, privacy=Privacy(l2_norm_clip=1.0))
    assert unhidden.strategy.progress({}).strategy.endswith("; without noise nothing is hidden")


def evaluation() -> NodesEvaluation:
    data = joined("d", {"n1": held(5, "a"), "n2": held(7, "a")})
    task = EvaluateTask(
        model=blob(1), weights=None, slices=(), format=data.format, image=None, batch_size=4, node_data="d"
    )
    return NodesEvaluation(data, task, "evaluate")


def test_every_holder_evaluates_its_own_once_and_the_lost_are_left_out() -> None:
    play = evaluation()
    nodes = (node("n1", held(5, "a")), node("n2", held(7, "a")), node("n3", None))
    first, second = play.plan(ClusterView(nodes, 0.0), {})
    assert isinstance(first, Lease)
    assert isinstance(second, Lease)
    assert (first.shard_id, second.shard_id) == ("evaluate-n1", "evaluate-n2")
    attempts = {"a1": Attempt("a1", first.shard_id, "n1", 0.0), "a2": Attempt("a2", second.shard_id, "n2", 0.0)}
    assert play.plan(ClusterView(nodes, 0.0), attempts) == []
    play.finished(attempts.pop("a1"), EvaluateResult(count=5), 1.0)
    assert play.plan(ClusterView(nodes, 0.0), attempts) == []
    play.ended(attempts.pop("a2"), None)
    assert [lease.node_id for lease in play.plan(ClusterView(nodes, 0.0), attempts)] == ["n2"]  # type: ignore[union-attr]
    assert play.plan(ClusterView((nodes[0], nodes[2]), 0.0), attempts) == [Complete()]


def test_a_node_that_rests_after_an_error_is_waited_for_and_left_out_after_three() -> None:
    play = evaluation()
    nodes = (node("n1", held(5, "a")), node("n2", held(7, "a")))
    play.finished(Attempt("a1", "evaluate-n1", "n1", 0.0), EvaluateResult(count=5), 1.0)
    for number in range(3):
        assert [lease.node_id for lease in play.plan(ClusterView(nodes, 0.0), {})] == ["n2"]  # type: ignore[union-attr]
        play.ended(Attempt(f"b{number}", "evaluate-n2", "n2", 0.0), ErrorInfo(code="internal", message="no memory"))
        alone = ClusterView(nodes[:1], 0.0, resting=frozenset({"n2"}))
        assert play.plan(alone, {}) == ([Complete()] if number == 2 else [])
    assert play.plan(ClusterView(nodes, 0.0), {}) == [Complete()]


def test_where_no_node_has_a_result_they_are_asked_until_the_job_ends() -> None:
    play = evaluation()
    view = ClusterView((node("n1", held(5, "a")),), 0.0)
    for number in range(5):
        play.ended(Attempt(f"a{number}", "evaluate-n1", "n1", 0.0), ErrorInfo(code="internal", message="no memory"))
        assert [lease.node_id for lease in play.plan(view, {})] == ["n1"]  # type: ignore[union-attr]


def test_without_any_result_the_evaluation_waits() -> None:
    assert evaluation().plan(ClusterView((node("n3", None),), 0.0), {}) == []
