"""Sealed commands: nothing altered, repeated, late, old or meant for another is opened."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.wire import seals
from potluck.wire.seals import WINDOW, Opener, Seal, Sealed, Sealer, SealRefused, Window

NOW = 1_800_000_000.0
TOPIC = "potluck/v1/home/nodes/n1/inbox"
BODY = b"\x81\xa4type\xabForgetJob"
SEAL = Seal(
    topic=TOPIC,
    audience="node:n1",
    session="s1",
    sender="c1",
    term=3,
    cluster_id="home-1",
    number=1,
    sent_at=NOW,
    valid_until=NOW + seals.VALID_SECONDS,
)


def sign(data: bytes, key: bytes = b"k") -> bytes:
    """Stands for a signature: what matters here is over which bytes it is."""
    return hmac.digest(key, data, hashlib.sha256)


def verify(signature: bytes, data: bytes) -> bool:
    return hmac.compare_digest(signature, sign(data))


def opener(**changes: Any) -> Opener:
    return Opener(**{"audience": "node:n1", "session": "s1", "cluster_id": "home-1", "verify": verify, **changes})


def sealed(**changes: Any) -> Sealed:
    return seals.close(msgspec.structs.replace(SEAL, **changes), BODY, sign)


def opened(by: Opener, what: Sealed, *, topic: str = TOPIC, now: float = NOW, elapsed: float = 0.0) -> bytes:
    return by.open(what, topic, now, elapsed)


@given(st.binary(max_size=200), st.text(max_size=50), st.integers(1, 2**53))
def test_there_and_back(body: bytes, session: str, number: int) -> None:
    found = seals.close(msgspec.structs.replace(SEAL, session=session, number=number), body, sign)
    assert opener(session=session).open(found, TOPIC, NOW, 0.0) == body


@given(st.data())
def test_no_flipped_bit_is_accepted(data: st.DataObject) -> None:
    good = sealed()
    parts = {"seal": good.seal, "body": good.body, "signature": good.signature}
    name = data.draw(st.sampled_from(sorted(parts)))
    place, bit = data.draw(st.integers(0, len(parts[name]) - 1)), data.draw(st.integers(0, 7))
    altered = bytearray(parts[name])
    altered[place] ^= 1 << bit
    with pytest.raises(SealRefused, match="not signed"):
        opened(opener(), Sealed(**{**parts, name: bytes(altered)}))


def test_a_coordinator_that_proved_itself_is_the_only_one_of_its_term() -> None:
    by = opener()
    assert opened(by, sealed()) == BODY
    by.prove(3, "c1")  # the same: nothing changes
    with pytest.raises(SealRefused, match="came before"):
        opened(by, sealed())
    for term, sender in ((3, "c2"), (2, "c1")):
        with pytest.raises(SealRefused, match="has spoken"):
            by.prove(term, sender)
    by.prove(4, "c2")
    for term, sender in ((3, "c1"), (4, "c1")):
        with pytest.raises(SealRefused, match="term"):
            opened(by, sealed(term=term, sender=sender, number=9))
    assert opened(by, sealed(term=4, sender="c2")) == BODY  # its numbers begin anew
    with pytest.raises(SealRefused, match="came before"):
        opened(by, sealed(term=4, sender="c2"))


@given(st.integers(-50, 50))
def test_no_byte_moves_between_seal_and_body(by: int) -> None:
    good = sealed()
    cut = len(good.seal) + by
    both = good.seal + good.body
    if by and 0 <= cut <= len(both):
        with pytest.raises(SealRefused, match="not signed"):
            opened(opener(), Sealed(both[:cut], both[cut:], good.signature))


def test_a_signature_by_another_key() -> None:
    with pytest.raises(SealRefused, match="not signed"):
        opened(opener(), seals.close(SEAL, BODY, lambda data: sign(data, b"other")))
    renewed = opener(verify=lambda signature, data: False)
    renewed.change_key(verify)
    assert opened(renewed, sealed()) == BODY


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"topic": TOPIC.replace("n1", "n2")}, "another"),
        ({"audience": "node:n2"}, "for 'node:n2'"),
        ({"session": "s0"}, "another session"),
        ({"cluster_id": "home-2"}, "cluster"),
        ({"purpose": "potluck proof 1"}, "not for commands"),
        ({"kind": "none"}, "not for commands"),
        ({"term": 2}, "term 2"),
        ({"valid_until": NOW - 301}, "1 s too late"),
    ],
)
def test_what_is_not_for_us_or_not_now(changes: dict[str, Any], reason: str) -> None:
    by = opener(term=3)
    with pytest.raises(SealRefused, match=reason):
        opened(by, sealed(**changes))
    assert opened(by, sealed()) == BODY, "what was refused has changed nothing"


def test_a_command_on_another_topic() -> None:
    with pytest.raises(SealRefused, match="came on another"):
        opened(opener(), sealed(), topic=TOPIC.replace("n1", "n2"))


@pytest.mark.parametrize("packed", [b"", b"\x80", b"\xc1", msgspec.msgpack.encode({"number": 0}), bytes(5000)])
def test_seals_that_cannot_be_read(packed: bytes) -> None:
    with pytest.raises(SealRefused, match=r"cannot be read|too large"):
        opened(opener(), Sealed(packed, BODY, sign(seals.signed_bytes(packed, BODY))))


def test_fields_of_a_later_version_are_covered_and_ignored() -> None:
    packed = msgspec.msgpack.encode({**msgspec.structs.asdict(SEAL), "later": 1})
    assert opened(opener(), Sealed(packed, BODY, sign(seals.signed_bytes(packed, BODY)))) == BODY


@given(st.lists(st.integers(1, 3 * WINDOW), max_size=300))
def test_nothing_is_accepted_twice(numbers: list[int]) -> None:
    window, taken = Window(), set[int]()
    for number in numbers:
        fresh = window.is_new(number)
        assert fresh == (number not in taken and number > max(taken, default=0) - WINDOW)
        if fresh:
            window.take(number)
            taken.add(number)


@given(st.permutations(range(1, 40)), st.integers(0, 2**40))
def test_out_of_order_within_the_window(order: list[int], above: int) -> None:
    by = opener()
    for number in order:
        assert opened(by, sealed(number=above + number)) == BODY
    for number in order:
        with pytest.raises(SealRefused, match="came before"):
            opened(by, sealed(number=above + number))


def test_the_oldest_that_may_still_come() -> None:
    by = opener()
    opened(by, sealed(number=5000))
    opened(by, sealed(number=5000 - WINDOW + 1))
    with pytest.raises(SealRefused, match="came before"):
        opened(by, sealed(number=5000 - WINDOW))
    assert not Window().is_new(0)


def test_a_number_far_ahead_costs_no_memory() -> None:
    window = Window()
    window.take(1)
    window.take(2**53)
    assert window._seen == 1
    assert not window.is_new(1)


def test_a_term_never_goes_back() -> None:
    by = opener()
    assert opened(by, sealed(term=4, sender="c2", number=7)) == BODY
    assert by.term == 4
    with pytest.raises(SealRefused, match="term 3"):
        opened(by, sealed(number=8))
    # A new term begins with a new session of a coordinator, which counts from 1 again.
    assert opened(by, sealed(term=5, sender="c3", number=1)) == BODY
    with pytest.raises(SealRefused, match="two coordinators"):
        opened(by, sealed(term=5, sender="c4", number=1))


def test_a_coordinator_that_restarts_cannot_be_replayed_by_its_former_session() -> None:
    by = opener()
    old = sealed(number=1)
    opened(by, old)
    opened(by, sealed(term=4, sender="c2", number=1))
    with pytest.raises(SealRefused, match="term 3"):
        opened(by, old)


def test_the_time_is_the_coordinators() -> None:
    by = opener()
    opened(by, sealed())
    # Our own clock is years behind: the time that has passed here still counts.
    opened(by, sealed(number=2), now=0.0, elapsed=30.0)
    with pytest.raises(SealRefused, match="1 s too late"):
        opened(by, sealed(number=3), now=0.0, elapsed=31.1)
    # Our own clock may be five minutes ahead, and the command was under way for its 30 s.
    assert opened(opener(), sealed(), now=NOW + 330) == BODY
    # What was held back for longer is refused, also as the first in a session.
    with pytest.raises(SealRefused, match="10 s too late"):
        opened(opener(), sealed(), now=NOW + 340)


def test_a_clock_that_drifts_refuses_nothing() -> None:
    by = opener()
    for hour in range(24 * 14):
        # Ours gains 50 millionths.
        sent_at = NOW + hour * 3600
        opened(
            by,
            sealed(number=hour + 1, sent_at=sent_at, valid_until=sent_at + 30),
            now=0.0,
            elapsed=hour * 3600 * 1.00005,
        )


def test_a_coordinator_that_starts_again_with_a_clock_set_right_is_believed() -> None:
    by = opener()
    opened(by, sealed(sent_at=NOW + 3600, valid_until=NOW + 3630), now=0.0)
    opened(by, sealed(sender="again", term=SEAL.term + 1), now=0.0)


def test_a_slow_message_does_not_set_the_time_back() -> None:
    by = opener()
    opened(by, sealed(sent_at=NOW + 60, valid_until=NOW + 90), now=0.0)
    opened(by, sealed(number=2, sent_at=NOW + 31, valid_until=NOW + 61), now=0.0)
    with pytest.raises(SealRefused, match="too late"):
        opened(by, sealed(number=3, valid_until=NOW + 59), now=0.0)


# --- the sealer ---------------------------------------------------------------------------------------------------------------


def sealer() -> Sealer:
    return Sealer("c1", 3, "home-1", sign)


def test_what_the_sealer_seals_opens_each_time_anew_and_no_copy_of_it_does() -> None:
    by, there = sealer(), opener()
    several = [by.seal(TOPIC, "node:n1", "s1", BODY, NOW + second) for second in range(3)]
    assert [opened(there, one, now=NOW) for one in several] == [BODY] * 3
    for one in several:
        with pytest.raises(SealRefused, match="came before"):
            opened(there, one)


def test_each_audience_has_its_own_numbers_which_go_on_through_its_sessions() -> None:
    by = sealer()
    found = [
        msgspec.msgpack.decode(by.seal(TOPIC, audience, session, BODY, NOW).seal, type=Seal)
        for audience, session in (("node:n1", "s1"), ("node:n2", "s1"), ("node:n1", "s2"), ("node:n1", "s1"))
    ]
    assert [one.number for one in found] == [1, 1, 2, 3]
    assert [one.session for one in found] == ["s1", "s1", "s2", "s1"]
    assert {one.sender for one in found} == {"c1"}
    assert all(one.valid_until == one.sent_at + seals.VALID_SECONDS for one in found)


def test_a_clock_that_goes_back_makes_no_command_older() -> None:
    by, there = sealer(), opener()
    for now in (NOW, NOW - 1000, NOW - 2000):
        assert opened(there, by.seal(TOPIC, "node:n1", "s1", BODY, now), now=NOW) == BODY
        assert msgspec.msgpack.decode(by.seal(TOPIC, "node:n1", "s1", BODY, now).seal, type=Seal).sent_at == NOW


def test_a_renewed_key_seals_and_opens() -> None:
    keys, there = [b"k"], opener()
    by = Sealer("c1", 3, "home-1", lambda data: sign(data, keys[-1]))
    assert opened(there, by.seal(TOPIC, "node:n1", "s1", BODY, NOW)) == BODY
    keys.append(b"new")
    one = by.seal(TOPIC, "node:n1", "s1", BODY, NOW)
    with pytest.raises(SealRefused, match="not signed"):
        opened(there, one)
    there.change_key(lambda signature, data: signature == sign(data, b"new"))
    assert opened(there, one) == BODY
