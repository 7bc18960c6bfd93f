"""Whose updates are of use."""

from __future__ import annotations

from coordinator.plans.placement import NodeView
from coordinator.plans.training.trust import REJECTIONS_LIMIT, Trust, exploded
from potluck.wire.tasks import TrainResult
from potluck.wire.values import BlobRef

BLOB = BlobRef(sha256="0" * 64, size=1)


def results(**norms: float) -> dict[str, TrainResult]:
    return {
        node_id: TrainResult(base=BLOB, update=BLOB, samples=10, steps=1, seconds=1.0, norm=norm)
        for node_id, norm in norms.items()
    }


def test_updates_that_went_too_far_are_told_from_those_of_faster_nodes() -> None:
    assert exploded({"a": (1.0, 10), "b": (8.0, 80), "c": (2.0, 20)}) == {}
    assert exploded({"a": (100.0, 10), "b": (1.0, 10), "c": (1.1, 10)}).keys() == {"a"}
    assert exploded({"a": (100.0, 10)}) == {}
    assert exploded({"a": (0.0, 10), "b": (5.0, 10)}) == {}
    assert "100 times" in exploded({"a": (100.0, 10), "b": (1.0, 10)})["a"]


def test_updates_in_a_row_that_are_no_use_end_in_quarantine_and_one_that_is_forgives() -> None:
    found = Trust()
    for _ in range(REJECTIONS_LIMIT - 1):
        found.reject("a", "it was too large")
    found.closed(results(a=1.0, b=1.0), {})
    assert (found.rejections, found.quarantined) == ({}, {})
    for _ in range(REJECTIONS_LIMIT):
        found.closed(results(a=1.0, b=1.0), {"a": "it was too large"})
    assert found.quarantined == {"a": "it was too large"}


def test_better_all_nodes_than_none() -> None:
    nodes = [NodeView("a", 1.0, 1), NodeView("b", 1.0, 1)]
    found = Trust(quarantined={"a": "no use"})
    assert found.trusted(nodes) == nodes[1:]
    assert found.trusted(nodes[:1]) == nodes[:1]


def test_an_update_no_larger_than_was_ever_usual_is_none_that_went_too_far() -> None:
    found = Trust()
    found.closed(results(a=10.0, b=10.0, c=12.0), {})
    found.closed(results(a=50.0), {})  # one alone is held against nobody
    assert found.usual == 1.0
    assert found.too_far(results(a=0.1, b=0.1, c=9.0)) == {}
    assert found.too_far(results(a=0.1, b=0.1, c=11.0)).keys() == {"c"}
