"""Journals of versions before this one: what they do not say, and follows from what they do. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from coordinator.plans.job import AnyEvent, AttemptLeased, JobSubmitted, RoundClosed, StrategyChosen
from potluck.wire.messages import SyncTask, Train, TrainTask


def with_choices(events: Iterable[AnyEvent]) -> Iterator[AnyEvent]:
    """The events of a job, with what `auto` chose: it was not journaled, and shows in the first task after its first round."""
    undecided, rounds = False, 0
    for event in events:
        match event:
            case JobSubmitted(spec=Train(strategy="auto")):
                undecided = True
            case StrategyChosen():
                undecided = False
            case RoundClosed():
                rounds += 1
            case AttemptLeased(task=SyncTask()) if undecided:
                undecided = False
                yield StrategyChosen(at=event.at, chosen="sync", why="sync")
            case AttemptLeased(task=TrainTask()) if undecided and rounds:
                undecided = False
                yield StrategyChosen(at=event.at, chosen="local", why="local")
            case _:
                pass
        yield event
