"""What a training job's result tells of its rounds and epochs."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.plans.events import RoundClosed
from coordinator.plans.history import HISTORY_LIMIT_BYTES, ROUNDS_LIMIT_BYTES, History, epochs_that_fit
from potluck.wire import codec
from potluck.wire.jobs import EpochMetrics
from potluck.wire.values import BlobRef

BLOB = BlobRef(sha256="0" * 64, size=1)


def filled(rounds: int, epochs: int, names: int) -> History:
    found = History()
    metrics = {f"metric_{number}": 1 / 3 for number in range(names)}
    for number in range(rounds):
        found.round_closed(RoundClosed(at=1.0, round=number, weights=BLOB, samples=1, metrics=metrics))
    for number in range(epochs):
        found.epoch_ended(EpochMetrics(epoch=number + 1, metrics=metrics))
    found.round_closed(RoundClosed(at=1.0, round=rounds, weights=BLOB, samples=1, metrics=metrics))
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1500), st.integers(0, 1500), st.integers(1, 20))
def test_however_many_there_are_they_fit_into_a_message_evenly(rounds: int, epochs: int, names: int) -> None:
    found = filled(rounds, epochs, names)
    assert [kept.round for kept in found.rounds] == list(range(0, rounds + 1, found.stride)) or len(found.rounds) == 1
    told = found.told()
    assert len(codec.pack(found.rounds)) <= ROUNDS_LIMIT_BYTES
    assert len(codec.pack(told)) <= HISTORY_LIMIT_BYTES
    assert [epoch.epoch for epoch in told][-1:] == ([epochs] if epochs else [])


def test_very_many_epochs_are_listed_message_by_message() -> None:
    found = filled(0, 4000, 5)
    listed: list[int] = []
    while part := epochs_that_fit(listed[-1] if listed else 0, found.epochs):
        assert len(codec.pack(part)) <= HISTORY_LIMIT_BYTES
        listed += [epoch.epoch for epoch in part]
    assert listed == list(range(1, 4001))
