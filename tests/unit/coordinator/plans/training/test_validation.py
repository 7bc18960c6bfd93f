"""Validation at the end of an epoch, and the look at its data before the first."""

from __future__ import annotations

from coordinator.plans.batch import BatchStrategy, ItemIndex
from coordinator.plans.decisions import Lease
from coordinator.plans.job import CHECK, VALIDATION, Attempt
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.training.validation import Validation
from potluck.wire.tasks import EvaluateResult, EvaluateTask
from potluck.wire.values import BlobRef, DataFormat, DataShard, DataSlice, Step

BLOB = BlobRef(sha256="0" * 64, size=1)
VIEW = ClusterView((NodeView("a", 1.0, free_slots=1),), 0.0)


def evaluate(weights: BlobRef | None, step: Step | None, epoch: int) -> BatchStrategy:
    def task_for(slices: tuple[DataSlice, ...]) -> EvaluateTask:
        format = DataFormat(kind="arrays")
        return EvaluateTask(model=BLOB, weights=weights, slices=slices, format=format, image=None, batch_size=4)

    return BatchStrategy(ItemIndex((DataShard(blob=BLOB, count=8),)), 4, task_for, prefix=f"{VALIDATION}{epoch}")


def test_a_job_without_validation_has_no_metrics_of_it_and_looks_at_nothing() -> None:
    found = Validation()
    assert found.plan(VIEW, VIEW, {}, None, None, 1) == ([], {})
    assert found.check("a") == []
    assert found.of(Attempt("1", f"{VALIDATION}1-0-4", "a", 0.0), None, None, 1) is None


def test_the_first_batch_is_looked_at_once() -> None:
    found = Validation(evaluate)
    (lease,) = found.check("a")
    assert isinstance(lease, Lease)
    assert (lease.shard_id, lease.node_id) == (CHECK, "a")
    found.checked = True
    assert found.check("a") == []


def test_a_plan_begins_nothing_and_the_first_attempt_does() -> None:
    found = Validation(evaluate)
    found.plan(VIEW, VIEW, {}, BLOB, None, 2)
    assert found.under_way is None
    while (planned := found.plan(VIEW, VIEW, {}, BLOB, None, 2))[1] is None:
        (lease,) = planned[0]
        assert isinstance(lease, Lease)
        attempt = Attempt("1", lease.shard_id, "a", 0.0)
        evaluation = found.of(attempt, BLOB, None, 2)
        assert evaluation is not None
        assert evaluation is found.under_way
        evaluation.leased(attempt, lease.task)
        evaluation.finished(attempt, EvaluateResult(count=4, sums={"loss": 2.0}, seconds=1.0), 1.0)
    assert planned == ([], {"val_loss": 0.5})
    assert found.of(Attempt("2", f"{VALIDATION}1-0-4", "a", 0.0), BLOB, None, 2) is None, "of another epoch"
    found.epoch_ended()
    assert found.under_way is None


def test_nodes_that_would_begin_at_once_are_asked_before_others() -> None:
    both = ClusterView((NodeView("a", 1.0, free_slots=1), NodeView("b", 1.0, free_slots=1)), 0.0)
    leases, _ = Validation(evaluate).plan(both, VIEW, {}, None, None, 1)
    assert [lease.node_id for lease in leases if isinstance(lease, Lease)] == ["a"]
    leases, _ = Validation(evaluate).plan(both, ClusterView((), 0.0), {}, None, None, 1)
    assert {lease.node_id for lease in leases if isinstance(lease, Lease)} == {"a", "b"}
