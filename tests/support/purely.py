"""Checks that plans of jobs change nothing, and that a job replayed from its events has the same plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coordinator.plans.decisions import Choose, Decision
from coordinator.plans.events import AnyEvent
from coordinator.plans.job import CHOICES_LIMIT, Job
from coordinator.plans.placement import ClusterView
from potluck.wire import codec


def planned(
    job: Job,
    view: ClusterView,
    events: Sequence[AnyEvent],
    new_job: Callable[[], Job],
    record: Callable[[AnyEvent], None],
) -> list[Decision]:
    """The decisions after all choices; each choice goes to `record`, which applies it and appends it to the events."""
    for _ in range(CHOICES_LIMIT):
        before = repr(job)
        decisions = job.plan(view)
        assert repr(job) == before, "a plan changed the state"
        again = new_job()
        for event in events:
            again.apply(codec.unpack(codec.pack(event), AnyEvent))  # type: ignore[arg-type]
        assert again.plan(view) == decisions, "a replayed job has another plan"
        choices = [decision.event for decision in decisions if isinstance(decision, Choose)]
        if not choices:
            return decisions
        for event in choices:
            record(event)
    raise AssertionError("it continues to choose")
