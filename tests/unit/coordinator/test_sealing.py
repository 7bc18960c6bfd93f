"""Commands are sealed for the session in which their node is now, and by a clock that never goes back."""

from __future__ import annotations

from coordinator.sealing import ForwardClock, Sealing
from potluck.security.signing import Signer, Verifier, new_key
from potluck.wire import codec, seals
from potluck.wire.commands import Rebirth
from potluck.wire.seals import Opener, Sealer
from potluck.wire.topics import Topics

TOPICS = Topics("home")
INBOX = TOPICS.node("n1", "inbox")
NOW = 1_800_000_000.0
SIGNER = Signer(new_key())
VERIFY = Verifier(SIGNER.public_key).verify


def sealing(sessions: dict[str, str]) -> Sealing:
    sealer = Sealer("c1", 3, "home-1", SIGNER.sign)
    return Sealing(sealer, TOPICS, lambda node_id: sessions.get(node_id, ""), lambda: NOW)


def test_a_command_is_for_the_present_session_of_its_node() -> None:
    sessions = {"n1": "s1"}
    by, body = sealing(sessions), codec.encode(Rebirth())
    for session in ("s1", "s2"):
        sessions["n1"] = session
        found = by.seal(INBOX, body)
        assert found is not None
        opener = Opener("node:n1", session, "home-1", VERIFY)
        opened = opener.open(seals.Sealed(found.seal, found.body, found.signature), INBOX, NOW, 0.0)
        assert codec.decode(opened)[0] == Rebirth()


def test_a_node_that_is_not_known_gets_nothing() -> None:
    by = sealing({"n2": "s1"})
    assert [by.seal(INBOX, b"") for _ in range(3)] == [None] * 3
    assert by.withheld == 3
    assert by.seal(TOPICS.node("n2", "inbox"), b"") is not None


def test_the_clock_follows_forward_and_never_goes_back() -> None:
    wall, elapsed = [1000.0], [5.0]
    clock = ForwardClock(lambda: wall[0], lambda: elapsed[0])
    assert clock() == 1000.0
    elapsed[0] += 10
    assert clock() == 1010.0, "it goes on by itself"
    wall[0] = 5000.0
    assert clock() == 5000.0, "it was set right"
    wall[0] = 100.0
    elapsed[0] += 1
    assert clock() == 5001.0, "it was set back"
