"""Evaluate and predict on nodes that come, fail and leave: every item exactly once."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.plans.batch import BatchStrategy, ItemIndex, merge
from coordinator.plans.decisions import Complete, Lease, Withdraw
from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.training.scores import evaluation_metrics
from potluck.errors import ModelFailed
from potluck.wire.tasks import EvaluateResult, EvaluateTask, PredictResult, PredictTask
from potluck.wire.values import BlobRef, DataFormat, DataShard, DataSlice

BLOB = BlobRef(sha256="0" * 64, size=1)


def shards(*counts: int) -> tuple[DataShard, ...]:
    return tuple(
        DataShard(blob=BlobRef(sha256=f"{number:064x}", size=1), count=count) for number, count in enumerate(counts)
    )


def task_for(slices: tuple[DataSlice, ...]) -> PredictTask:
    return PredictTask(model=BLOB, slices=slices, format=DataFormat(kind="images"), image=None, batch_size=8)


def view(now: float, **free: int) -> ClusterView:
    nodes = tuple(NodeView(name, 1.0, free_slots=slots, idle=slots == 2) for name, slots in sorted(free.items()))
    return ClusterView(nodes, now)


def test_slices_cross_shards() -> None:
    index = ItemIndex(shards(10, 5, 20))
    assert [(s.blob.sha256[-1], s.start, s.stop) for s in index.slices(8, 17)] == [
        ("0", 8, 10),
        ("1", 0, 5),
        ("2", 0, 2),
    ]


def test_chunks_follow_measured_speed() -> None:
    strategy = BatchStrategy(ItemIndex(shards(10_000)), 10, task_for)
    strategy.measured = {"slow": 100.0, "fast": 300.0}
    leases = [d for d in strategy.plan(view(0, slow=1, fast=1), {}) if isinstance(d, Lease)]
    sizes = {d.node_id: d.task.slices[0].stop - d.task.slices[0].start for d in leases}  # type: ignore[union-attr]
    assert sizes == {"fast": 900, "slow": 300}  # three seconds each


def test_an_idle_node_backs_up_a_straggler_and_the_first_result_counts() -> None:
    strategy = BatchStrategy(ItemIndex(shards(8)), 8, task_for)
    (lease,) = strategy.plan(view(0, a=2), {})
    assert isinstance(lease, Lease)
    first = Attempt("1", lease.shard_id, "a", 0.0)
    strategy.leased(first, lease.task)
    assert strategy.plan(view(1, b=2), {"1": first}) == []
    (backup,) = strategy.plan(view(60, b=2), {"1": first})
    assert isinstance(backup, Lease)
    assert (backup.shard_id, backup.node_id) == (lease.shard_id, "b")
    second = Attempt("2", lease.shard_id, "b", 60.0)
    strategy.leased(second, backup.task)
    assert strategy.plan(view(61, c=2), {"1": first, "2": second}) == []  # one backup is enough
    strategy.finished(second, PredictResult(count=8), 61.0)
    assert strategy.plan(view(62, b=2), {"1": first}) == [Withdraw("1", "another attempt was first"), Complete()]
    strategy.finished(first, PredictResult(count=8), 62.0)
    assert len(strategy.in_order()) == 1


def test_merging_parts_is_the_whole() -> None:
    parts = [
        EvaluateResult(count=3, sums={"loss": 1.5}, confusion=((1, 1), (0, 1))),
        EvaluateResult(count=2, sums={"loss": 0.5}, confusion=((2, 0), (0, 0))),
    ]
    whole = merge(parts)
    assert whole.count == 5
    assert whole.sums == {"loss": 2.0}
    assert whole.confusion == ((3, 1), (0, 1))


def test_nodes_that_disagree_on_the_classes_are_told_apart() -> None:
    parts = [EvaluateResult(count=3, confusion=((3,),)), EvaluateResult(count=2, confusion=((2, 0), (0, 0)))]
    with pytest.raises(ModelFailed, match="how many classes the model has: 1 and 2"):
        merge(parts)


def test_a_metric_that_one_part_lacks_is_not_shown_for_the_others() -> None:
    """A mean over the parts that have it would be shown as the metric of all items."""
    parts = [EvaluateResult(count=3, sums={"loss": 1.5, "accuracy": 2.0}), EvaluateResult(count=2, sums={"loss": 0.5})]
    assert merge(parts).sums == {"loss": 2.0}
    assert merge([parts[1], EvaluateResult(count=2)]).sums == {}
    assert merge([parts[0], EvaluateResult(count=0)]).sums == {"loss": 1.5, "accuracy": 2.0}


def test_a_confusion_matrix_that_one_part_left_out_is_not_shown_for_the_others() -> None:
    parts = [EvaluateResult(count=1, confusion=((1, 0), (0, 0))), EvaluateResult(count=2)]
    assert merge(parts).confusion == ()


def evaluate_task(slices: tuple[DataSlice, ...]) -> EvaluateTask:
    form = DataFormat(kind="images")
    return EvaluateTask(model=BLOB, weights=None, slices=slices, format=form, image=None, batch_size=8)


def half(auc: float, *counts: float) -> EvaluateResult:
    return EvaluateResult(count=8, sums={"loss": 8.0}, states={"auc": counts}, values={"auc": auc}, seconds=1.0)


def test_a_node_makes_values_of_what_all_parts_have_counted_for_metrics_that_are_no_means() -> None:
    strategy = BatchStrategy(ItemIndex(shards(16)), 8, evaluate_task, prefix="evaluate")
    for node, (start, result) in zip("ab", ((0, half(0.5, 1.0, 2.0)), (8, half(0.9, 0.5, 4.0))), strict=True):
        attempt = Attempt(node, f"evaluate-{start}-{start + 8}", node, 0.0)
        strategy.leased(attempt, evaluate_task(()))
        strategy.finished(attempt, result, 1.0)
    assert strategy.plan(view(1, a=0), {}) == []
    for turn in range(2):  # the first attempt is lost
        (lease,) = strategy.plan(view(1, a=1, b=0), {})
        assert isinstance(lease, Lease)
        assert isinstance(lease.task, EvaluateTask)
        assert lease.task.states == {"auc": (1.5, 6.0)}
        assert lease.task.slices == strategy.index.slices(0, 1)
        attempt = Attempt(f"c{turn}", lease.shard_id, "a", 1.0)
        strategy.leased(attempt, lease.task)
        assert strategy.plan(view(2, b=2), {attempt.attempt_id: attempt}) == []
        if turn == 0:
            strategy.ended(attempt, None)
    strategy.finished(attempt, EvaluateResult(count=0, values={"auc": 0.7}), 3.0)
    assert strategy.plan(view(3, a=1), {}) == [Complete()]
    whole = merge([part for part in strategy.in_order() if isinstance(part, EvaluateResult)])
    assert evaluation_metrics(whole) == {"loss": 1.0, "auc": 0.7}
    strategy.check_invariants()


def test_a_part_that_is_the_whole_needs_nobody_to_make_values() -> None:
    strategy = BatchStrategy(ItemIndex(shards(8)), 8, evaluate_task, prefix="evaluate")
    attempt = Attempt("1", "evaluate-0-8", "a", 0.0)
    strategy.leased(attempt, evaluate_task(()))
    strategy.finished(attempt, half(0.5, 1.0, 2.0), 1.0)
    assert strategy.plan(view(1, a=1), {}) == [Complete()]
    assert evaluation_metrics(merge([half(0.5, 1.0, 2.0)])) == {"loss": 1.0, "auc": 0.5}


def test_what_a_part_has_not_counted_or_otherwise_has_no_value() -> None:
    other = EvaluateResult(count=8, sums={"loss": 8.0})
    assert merge([half(0.5, 1.0, 2.0), other]).states == {}
    assert merge([half(0.5, 1.0, 2.0), half(0.5, 1.0)]).states == {}
    assert evaluation_metrics(merge([half(0.5, 1.0, 2.0), other])) == {"loss": 1.0}


def test_counts_that_are_not_finite_are_added_like_others() -> None:
    states = merge([half(0.5, math.inf, 1.0), half(0.5, -math.inf, 2.0)]).states
    assert math.isnan(states["auc"][0])
    assert states["auc"][1] == 3.0


class Cluster(RuleBasedStateMachine):
    """Nodes take chunks, finish, fail, and send late results that no longer count."""

    def __init__(self) -> None:
        super().__init__()
        self.strategy = BatchStrategy(ItemIndex(shards(7, 40, 1, 100, 29)), 4, task_for)
        self.attempts: dict[str, Attempt] = {}
        self.number = 0
        self.now = 0.0

    @rule(free=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2)), seconds=st.floats(0, 30))
    def plan(self, free: dict[str, int], seconds: float) -> None:
        self.now += seconds
        for decision in self.strategy.plan(view(self.now, **free), self.attempts):
            if isinstance(decision, Lease):
                self.number += 1
                attempt = Attempt(str(self.number), decision.shard_id, decision.node_id, self.now)
                self.attempts[attempt.attempt_id] = attempt
                self.strategy.leased(attempt, decision.task)
            elif isinstance(decision, Withdraw):
                self.strategy.ended(self.attempts.pop(decision.attempt_id), None)

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), seconds=st.floats(0.001, 5))
    def finish(self, data: st.DataObject, seconds: float) -> None:
        attempt = self.attempts.pop(data.draw(st.sampled_from(sorted(self.attempts))))
        start, stop = map(int, attempt.shard_id.split("-")[1:])
        self.strategy.finished(attempt, PredictResult(count=stop - start, seconds=seconds), self.now)

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.strategy.ended(self.attempts.pop(data.draw(st.sampled_from(sorted(self.attempts)))), None)

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        self.strategy.check_invariants()
        position = 0
        if self.strategy.complete:
            for start in sorted(self.strategy.results):
                assert start == position
                position += self.strategy.results[start].count  # type: ignore[attr-defined]
            assert position == self.strategy.total

    def teardown(self) -> None:
        """Whatever happened before, one working node finishes the rest."""
        for _ in range(1000):
            if self.strategy.complete:
                break
            self.plan({"z": 2}, 60.0)
            for attempt in list(self.attempts.values()):
                start, stop = map(int, attempt.shard_id.split("-")[1:])
                del self.attempts[attempt.attempt_id]
                self.strategy.finished(attempt, PredictResult(count=stop - start, seconds=0.1), self.now)
        assert self.strategy.complete
        self.nothing_is_lost_or_doubled()


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_loss_that_is_no_number_on_a_part_is_none_on_the_whole() -> None:
    """As Keras has it on all of the data. The mean of the other parts would look like that of all items."""
    merged = merge(
        [
            EvaluateResult(count=4, sums={"loss": 2.0, "mae": 1.0}),
            EvaluateResult(count=4, sums={"loss": math.nan, "mae": 3.0}),
        ]
    )
    assert math.isnan(merged.sums["loss"])
    assert merged.sums["mae"] == 4.0
