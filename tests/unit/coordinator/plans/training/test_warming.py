"""Who gets ready for rounds, and with what."""

from __future__ import annotations

from coordinator.plans.decisions import Choose, Lease, Withdraw
from coordinator.plans.events import MeasureAgain
from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.training import warming
from coordinator.plans.training.given import Given
from coordinator.plans.training.local import Local
from coordinator.plans.training.readiness import AGAIN_SECONDS, WARM_UP
from coordinator.plans.training.state import TrainingState
from potluck.wire.jobs import Train
from potluck.wire.tasks import WarmUpTask
from potluck.wire.values import BlobRef, DataFormat, Dataset, DataShard


def blob(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size=1)


def state() -> TrainingState:
    shards = tuple(DataShard(blob=blob(number), count=10) for number in range(4))
    data = Dataset(name="d", format=DataFormat(kind="arrays"), count=40, shards=shards)
    spec = Train(model="m", dataset="d", batch_size=10, weights=blob(77))
    return TrainingState.of(Given(spec, blob(9), None, data), None)


def view(now: float = 0.0, **gflops: float) -> ClusterView:
    return ClusterView(tuple(NodeView(name, speed, free_slots=1) for name, speed in gflops.items()), now)


def warmed(found: TrainingState, *names: str, at: float = 1.0) -> None:
    for name in names:
        found.readiness.warmed_up(Attempt(name, WARM_UP, name, 0.0), at)


def test_nodes_rehearse_with_the_data_that_they_will_probably_have() -> None:
    found = state()
    leases = warming.warm_ups(found, Local(found), view(a=3.0, b=1.0), {})
    tasks = {lease.node_id: lease.task for lease in leases if isinstance(lease, Lease)}
    assert all(isinstance(task, WarmUpTask) for task in tasks.values())
    held = {name: {shard.blob for shard in task.task.data} for name, task in tasks.items()}  # type: ignore[union-attr]
    assert {name: len(data) for name, data in held.items()} == {"a": 3, "b": 1}
    assert not held["a"] & held["b"]
    assert {task.task.weights for task in tasks.values()} == {None}, "nobody needs them yet"  # type: ignore[union-attr]


def test_a_node_that_is_ready_or_busy_with_the_job_does_not_get_ready_again() -> None:
    found = state()
    warmed(found, "a")
    busy = {"1": Attempt("1", WARM_UP, "b", 0.0)}
    leases = warming.warm_ups(found, Local(found), view(a=1.0, b=1.0, c=1.0), busy)
    assert [lease.node_id for lease in leases if isinstance(lease, Lease)] == ["c"]


def test_of_more_nodes_than_can_take_part_the_fastest_and_one_more_get_ready() -> None:
    found = state()
    leases = warming.warm_ups(found, Local(found), view(a=1.0, b=9.0, c=8.0, d=7.0, e=6.0, f=5.0, g=1.0), {})
    assert {lease.node_id for lease in leases if isinstance(lease, Lease)} == set("bcdef")


def test_what_nothing_has_come_of_for_too_long_is_taken_back() -> None:
    found = state()
    attempts = {"1": Attempt("1", "round-0", "a", 0.0), "2": Attempt("2", "validation-1-0-5", "b", 0.0)}
    assert warming.warm_ups(found, Local(found), view(warming.LOST_SECONDS), attempts) == []
    (decision,) = warming.warm_ups(found, Local(found), view(warming.LOST_SECONDS + 1), attempts)
    assert isinstance(decision, Withdraw)
    assert decision.attempt_id == "1"


def test_a_slow_node_is_measured_anew_after_a_while_and_not_by_the_plan_that_left_it_out() -> None:
    found = state()
    warmed(found, "a", "b")
    later = 1.0 + AGAIN_SECONDS
    found.sharing.slow, found.sharing.slow_at = {"b": "it is slow"}, later
    assert warming.measured_anew(found, view(later, a=1.0, b=1.0)) == []
    (choice,) = warming.measured_anew(found, view(later + 1, a=1.0, b=1.0))
    assert choice == Choose(MeasureAgain(at=later + 1, nodes=("b",)))
