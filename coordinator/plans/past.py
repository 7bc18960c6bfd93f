"""Journals of earlier versions: adds what they do not say, but what follows from what they say. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from coordinator.plans.events import AnyEvent, AttemptLeased, JobSubmitted, RoundClosed, StrategyChosen
from potluck.wire.jobs import Train
from potluck.wire.tasks import SyncTask, TrainTask


def with_choices(events: Iterable[AnyEvent]) -> Iterator[AnyEvent]:
    """A job's events, with the choice of `auto` added: it was not journaled, but the first task after the first round shows it."""
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
