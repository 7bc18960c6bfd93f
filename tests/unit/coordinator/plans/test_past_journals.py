"""Journals that an earlier version wrote: at each event they give the decisions that they gave then, and at the end the state.

`journals/<name>.msgpack`: a job's events as in its stream, its data sets, and its state when the journal was saved.
`journals/<name>.decisions.txt`: for each event, on a line of its own, what is decided after it while nodes a, b and c are there.
Who decides otherwise on purpose writes the lines anew, and sees in them what that changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import pytest

from coordinator.plans.decisions import CloseEpoch, CloseRound, CloseSync, Decision, Lease, Withdraw
from coordinator.plans.events import AnyEvent, AttemptLeased, JobSubmitted
from coordinator.plans.job import Job, settled
from coordinator.plans.past import with_choices
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.strategies import strategy_for
from coordinator.plans.training.rounds import UpdateRounds
from coordinator.plans.training.strategy import TrainingStrategy
from coordinator.plans.training.sync import SyncRounds
from potluck.wire import codec
from potluck.wire.tasks import WarmUpTask
from potluck.wire.values import Dataset

JOURNALS = sorted((Path(__file__).parent / "journals").glob("*.msgpack"))
VIEWS = tuple(NodeView(name, 1.0, free_slots=1, idle=False, collective=f"{name}:1") for name in "abc")


def replayed(kept: dict[str, Any], count: int) -> tuple[Job, float]:
    """The job after its first `count` events, and the time of the last."""
    events = [codec.unpack(event, AnyEvent) for event in kept["events"][:count]]  # type: ignore[arg-type]
    submitted = events[0]
    assert isinstance(submitted, JobSubmitted)
    data = codec.unpack(kept["dataset"], Dataset)
    validation = codec.unpack(kept["validation"], Dataset) if kept["validation"] else None
    job = Job(submitted=submitted, strategy=strategy_for(submitted, data, validation), dataset=data)
    for event in with_choices(events):
        if not isinstance(event, JobSubmitted):
            job.apply(event)
    return job, events[-1].at


def told(decision: Decision) -> str:
    """A decision in a few words: what is asked of whom."""
    match decision:
        case Lease(shard_id, node_id, task):
            task = task.task if isinstance(task, WarmUpTask) else task
            names = ("samples", "seconds", "seen", "parts", "batches", "rank", "first_step", "steps", "begins")
            parts = {name: getattr(task, name) for name in names if getattr(task, name, None)}
            data = [shard.blob.sha256[-8:] for shard in getattr(task, "data", ())]
            weights = getattr(task, "weights", None)
            return f"lease {shard_id} to {node_id}: {parts} {data} {weights.sha256[-8:] if weights else None}"
        case Withdraw(attempt_id, reason):
            return f"withdraw {attempt_id}: {reason}"
        case CloseRound():
            used = [result.update.sha256[-8:] for result in decision.results]
            return f"close round {decision.round}: {used} {decision.rejected} {decision.done} {decision.agreement}"
        case CloseSync():
            return f"close round {decision.round}: {decision.weights.sha256[-8:]} {decision.samples} {decision.metrics}"
        case CloseEpoch(epoch):
            return f"close epoch {epoch.epoch}: {epoch.metrics} {epoch.samples} {epoch.rounds} {epoch.exchanged_bytes}"
        case _:
            return repr(decision)


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: path.stem)
def test_an_earlier_journal_is_read_and_planned_from_at_every_event(path: Path) -> None:
    kept = msgpack.unpackb(path.read_bytes())
    then = path.with_suffix(".decisions.txt").read_text().splitlines()
    assert len(then) == len(kept["events"])
    for count, decided in enumerate(then, start=1):
        job, at = replayed(kept, count)
        decisions = settled(job, ClusterView(VIEWS, at), job.apply)
        assert "; ".join(map(told, decisions)) == decided, f"after event {count}"
    job, _ = replayed(kept, len(kept["events"]))
    strategy = job.strategy
    assert isinstance(strategy, TrainingStrategy)
    weights = strategy.checkpoint()
    found = {
        "round": strategy.state.open.number,
        "samples": strategy.state.epochs.samples,
        "epochs_ended": strategy.state.epochs.ended,
        "weights": weights.sha256 if weights is not None else "",
    }
    assert found == {name: kept["state"][name] for name in found}


@pytest.mark.parametrize(("name", "kind"), [("auto-local", UpdateRounds), ("auto-sync", SyncRounds)])
def test_what_auto_chose_then_holds(name: str, kind: type[UpdateRounds | SyncRounds]) -> None:
    (path,) = [path for path in JOURNALS if path.stem == name]
    kept = msgpack.unpackb(path.read_bytes())
    chosen = [
        count
        for count in range(1, len(kept["events"]) + 1)
        if isinstance(codec.unpack(kept["events"][count - 1], AnyEvent), AttemptLeased)  # type: ignore[arg-type]
    ]
    job, _ = replayed(kept, chosen[-1])
    assert isinstance(job.strategy, TrainingStrategy), "it has chosen"
    assert isinstance(job.strategy.rounds, kind)
    assert job.strategy.why.startswith(name.removeprefix("auto-"))
