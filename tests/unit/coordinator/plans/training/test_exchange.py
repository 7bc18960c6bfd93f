"""The weights of a training job, from round to round."""

from __future__ import annotations

from coordinator.plans.events import RoundClosed
from coordinator.plans.training.exchange import Exchange
from potluck.wire.values import BlobRef, Step


def blob(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size=1)


def of_updates(number: int) -> RoundClosed:
    return RoundClosed(
        at=1.0, round=number, base=blob(number), step=blob(10 + number), weights=blob(number + 1), velocity=blob(20 + number),
        samples=1, agreement=0.5,
    )  # fmt: skip


def test_a_job_begins_with_the_models_own_weights_or_those_of_another() -> None:
    assert (Exchange(None).weights, Exchange(None).kept(), Exchange(None).used_up()) == (None, set(), ())
    assert Exchange(blob(7)).weights == blob(7)


def test_a_round_of_updates_gives_weights_and_how_to_get_there() -> None:
    found = Exchange(blob(0))
    found.closed(of_updates(0), sent_bytes=100)
    assert (found.weights, found.velocity, found.agreement) == (blob(1), blob(20), 0.5)
    assert found.step == Step(base=blob(0), update=blob(10))
    assert found.used_up() == (blob(1), blob(20), blob(10))
    assert found.kept() == {ref.sha256 for ref in (blob(0), blob(1), blob(10), blob(20))}, "also what it began from"


def test_a_synchronous_round_after_it_leaves_nothing_of_the_outer_step() -> None:
    found = Exchange(None)
    found.closed(of_updates(0), sent_bytes=100)
    found.closed(RoundClosed(at=2.0, round=1, weights=blob(5), optimizer=blob(6), samples=1), sent_bytes=0)
    assert (found.step, found.velocity) == (None, None)
    assert found.used_up() == (blob(5), blob(6))
    assert found.kept() == {blob(5).sha256, blob(6).sha256}


def test_what_was_sent_is_told_by_epoch() -> None:
    found = Exchange(None)
    found.closed(of_updates(0), sent_bytes=100)
    found.epoch_ended()
    found.closed(of_updates(1), sent_bytes=30)
    assert (found.bytes, found.bytes_in_epoch) == (130, 30)
