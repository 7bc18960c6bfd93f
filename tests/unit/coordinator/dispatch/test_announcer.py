"""A waiting job says what it waits for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from coordinator.dispatch.announcer import NODES_TOLD, Announcer, bounded
from coordinator.plans.placement import ClusterView, NodeView
from potluck.bus.outbox import Outbox
from potluck.wire import codec
from potluck.wire.jobs import JobProgress
from potluck.wire.questions import JobChanged
from potluck.wire.topics import Topics
from potluck.wording import on_nodes


def node(name: str, *, gives_way: bool = False, runtimes: frozenset[str] = frozenset({"tensorflow"})) -> NodeView:
    return NodeView(name, 1.0, free_slots=1, idle=True, runtimes=runtimes, gives_way=gives_way)


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ((node("a"), node("b"), node("c", gives_way=True)), ""),  # c does nothing for this job
        ((node("b", gives_way=True), node("a", gives_way=True), node("c")), "gives way to inference on a, b"),
        ((node("a", gives_way=True), node("b")), "gives way to inference on a"),
        ((node("a", runtimes=frozenset()),), "waiting for a node with TensorFlow"),
        ((), "waiting for a node with TensorFlow"),
    ],
)
def test_a_job_says_what_it_waits_for(nodes: tuple[NodeView, ...], told: str) -> None:
    at_work = {name: (SimpleNamespace(node_id=name), 0, {}) for name in ("a", "b")}
    leases = SimpleNamespace(
        view=lambda now: ClusterView(nodes, now), running=lambda job: at_work, stage=lambda job: ""
    )
    jobs = SimpleNamespace(
        described=lambda job, running, nodes, *, waiting: JobChanged(
            job_id="j", kind="predict", state="running", created_at=0.0, progress=JobProgress(message=waiting)
        )
    )
    announcer = Announcer(Topics("test"), cast(Outbox, None), cast(Any, jobs), cast(Any, leases), lambda: ())
    described = announcer.described(cast(Any, SimpleNamespace(job_id="j", runtimes=("tensorflow",), active=False)), 0.0)
    assert described.progress.message == told


def test_of_a_thousand_nodes_the_fastest_are_told_and_how_many_more_there_are() -> None:
    few = JobProgress(nodes={"a": 1.0, "b": 2.0}, waiting={"c": "it starts"})
    assert bounded(few) is few
    many = JobProgress(
        nodes={f"n{number:03}": float(number) for number in range(1000)},
        waiting={f"w{number}": "it starts" for number in range(1000)},
    )
    told = bounded(many)
    assert list(told.nodes) == [f"n{number:03}" for number in range(950, 1000)]
    assert (told.nodes_more, len(told.waiting)) == (950, NODES_TOLD)
    assert len(codec.pack(told, "json")) < 4000


def test_what_nodes_do_before_they_compute_is_told_by_stage() -> None:
    start = "starting engine (TensorFlow)"
    stages = [(start, "n2"), ("loading the model", "n3"), (start, "n1"), ("", "n4")]
    assert on_nodes(stages) == f"loading the model on n3; {start} on n1, n2"
    assert on_nodes([("", "n1")]) == ""
