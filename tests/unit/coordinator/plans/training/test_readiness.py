"""Which nodes are ready for rounds, and for whom the first one waits a moment."""

from __future__ import annotations

from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.training.readiness import AGAIN_SECONDS, WARM_UP, Readiness


def warming(node_id: str, leased_at: float = 0.0) -> Attempt:
    return Attempt(node_id, WARM_UP, node_id, leased_at)


def view(now: float = 0.0, **gflops: float) -> ClusterView:
    return ClusterView(tuple(NodeView(name, speed, free_slots=1) for name, speed in gflops.items()), now)


def names(nodes: ClusterView) -> list[str]:
    return [node.node_id for node in nodes.nodes]


def test_who_is_ready_and_late_with_nothing_begins_with_what_it_is_given() -> None:
    found = Readiness()
    for name in "abc":
        found.warmed_up(warming(name), 10.0)
    late = {"1": Attempt("1", "round-3", "b", 0.0), "2": Attempt("2", "validation-1-0-5", "c", 0.0)}
    assert names(found.able(view(a=1.0, b=1.0, c=1.0, d=1.0), late)) == ["a", "c"]
    found.lost("a")
    assert names(found.able(view(a=1.0, b=1.0, c=1.0), late)) == ["c"]


def test_the_first_waits_for_a_share_of_what_it_took_between_bounds() -> None:
    found = Readiness()
    found.warmed_up(warming("a", 0.0), 10.0)
    attempts = {"1": warming("b")}
    assert found.hopes(10.9, attempts, share=0.1, seconds=2.0)
    assert not found.hopes(11.0, attempts, share=0.1, seconds=2.0)
    assert not found.hopes(10.9, {}, share=0.1, seconds=2.0), "nobody comes"
    assert not found.hopes(10.9, attempts, share=0.1, seconds=0.5)
    assert found.hopes(14.9, attempts, share=0.1, seconds=60.0, least=5.0)
    assert not found.hopes(10.9, attempts, share=0.1, seconds=2.0, among={"c"})


def test_far_slower_nodes_are_not_alike() -> None:
    found = Readiness()
    assert found.alike(view(a=40.0, b=1.0)) == {"a", "b"}, "nobody is ready to be compared with"
    found.warmed_up(warming("a"), 1.0)
    assert found.alike(view(a=40.0, b=5.0, c=4.0, d=0.0)) == {"a", "b", "d"}


def test_a_node_is_measured_again_after_twice_as_long_each_time() -> None:
    found = Readiness()
    found.warmed_up(warming("a"), 0.0)
    assert (found.stale("a", AGAIN_SECONDS - 1), found.stale("a", AGAIN_SECONDS)) == (False, True)
    found.warmed_up(warming("a"), 100.0)
    assert (found.stale("a", 100 + AGAIN_SECONDS), found.stale("a", 100 + 2 * AGAIN_SECONDS)) == (False, True)
    found.measured("a", 200.0)
    assert not found.stale("a", 100 + 2 * AGAIN_SECONDS)
    assert not found.stale("b", 1e9), "one that never was ready is not measured again"
