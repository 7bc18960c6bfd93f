"""Epochs of a training job: samples, an early end, the best one, and what is told of each."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.plans.events import EpochEnded, RoundClosed
from coordinator.plans.training.epochs import Epochs
from potluck.errors import InvalidRequest
from potluck.wire.jobs import EpochMetrics, Train
from potluck.wire.values import BlobRef


def blob(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size=1)


def epochs(count: int = 100, **options: Any) -> Epochs:
    options = {"epochs": 3, "batch_size": 10, **options}
    return Epochs(Train(model="m", dataset="d", **options), count)


def closed(samples: int, at: float = 1.0, **metrics: float) -> RoundClosed:
    return RoundClosed(at=at, round=0, weights=blob(1), samples=samples, metrics=metrics)


def ended(found: Epochs, at: float = 9.0, weights: BlobRef | None = None, **metrics: float) -> None:
    found.epoch_ended(EpochEnded(at=at, epoch=EpochMetrics(epoch=found.number, metrics=metrics)), weights or blob(1))


def test_an_epoch_is_full_when_less_than_a_batch_is_left_and_counts_on_in_the_next() -> None:
    found = epochs()
    found.round_closed(closed(90), 1.0, 1.0)
    assert (found.left, found.full(1, may_leave=False)) == (10, False)
    found.round_closed(closed(4), 1.0, 1.0)
    assert (found.left, found.full(1, may_leave=False)) == (6, True)
    ended(found)
    assert (found.ended, found.left, found.rounds) == (1, 106, [])


def test_little_is_left_to_the_next_epoch_only_where_there_is_one() -> None:
    found = epochs(count=1000, epochs=2)
    found.round_closed(closed(970), 1.0, 1.0)
    assert found.full(4, may_leave=True)
    assert not found.full(4, may_leave=False)
    assert not found.full(2, may_leave=True), "a batch for each of them is left"
    ended(found)
    found.round_closed(closed(1000), 1.0, 1.0)
    assert not found.full(4, may_leave=True)


def test_whoever_asks_for_an_end_gets_the_epoch_under_way_and_the_first_word_counts() -> None:
    found = epochs(epochs=5)
    ended(found)
    found.stop()
    ended(found)
    found.stop()
    assert (found.wanted, found.total, found.all_trained) == (2, 200, True)


def test_the_best_epoch_keeps_its_weights_and_patience_ends() -> None:
    found = epochs(epochs=9, monitor="val_loss", patience=2)
    for number, value in enumerate((0.5, 0.4, 0.6, float("nan")), start=1):
        assert not found.all_trained
        ended(found, weights=blob(number), val_loss=value)
    assert found.best is not None
    assert (found.best.epoch, found.best.weights) == (2, blob(2))
    assert found.all_trained


def test_a_resumed_job_counts_on() -> None:
    found = epochs(epochs=5, initial_epoch=3)
    assert (found.number, found.wanted, found.seen) == (4, 2, 300)
    found.round_closed(closed(50), 1.0, 1.0)
    assert (found.seen, found.done_with(50), found.done_with(1000)) == (350, 0.5, 1.0)


def test_what_is_told_of_an_epoch_is_of_that_epoch_alone() -> None:
    found = epochs()
    found.began(10.0)
    found.began(11.0)
    found.round_closed(closed(60, loss=1.0), 3.0, 4.0)
    found.round_closed(closed(40, loss=0.5), 3.0, 8.0)
    assert found.metrics() == {"loss": pytest.approx(0.8)}
    told = found.summary(14.0, found.metrics(), 77)
    assert (told.epoch, told.samples, told.seconds, told.rounds) == (1, 100, 4.0, 2)
    assert (told.computing, told.exchanged_bytes) == (0.5, 77)
    ended(found, at=20.0)
    assert found.metrics() == {}
    told = found.summary(21.0, {}, 0)
    assert (told.seconds, told.rounds, told.computing) == (1.0, 0, 0.0)


def test_a_metric_that_no_epoch_will_have_is_told_after_the_first_round() -> None:
    found = epochs(monitor="val_auc")
    found.check_monitor()
    found.round_closed(closed(10, loss=1.0), 1.0, 1.0)
    with pytest.raises(InvalidRequest, match=r"'val_auc'.*with validation data val_ ones"):
        found.check_monitor()
    with pytest.raises(InvalidRequest, match="this job has loss, val_loss"):
        found.summary(1.0, {"loss": 1.0, "val_loss": 1.0}, 0)
    counted = epochs(monitor="val_accuracy")
    counted.round_closed(closed(10, loss=1.0), 1.0, 1.0)
    counted.check_monitor()
