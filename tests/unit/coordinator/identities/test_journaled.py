"""Members are kept in the journal, in a stream that does not grow for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.identities import journaled
from coordinator.identities.journaled import JournaledMembers
from coordinator.identities.members import STREAM, AnyIdentityEvent, Member, MemberAdded
from coordinator.journal import Journal
from potluck.errors import Unavailable
from potluck.wire.members import CreateToken

NOW = 1_800_000_000.0


def length(journal: Journal) -> int:
    return len(list(journal.replay(STREAM, AnyIdentityEvent)))  # type: ignore[arg-type]


def add(known: JournaledMembers, name: str) -> None:
    known.record([MemberAdded(member=Member(identity=name, role="node", joined_at=NOW, certificate_until=NOW + 5))])


def test_many_renewals_are_a_short_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journaled, "MANY", 20)
    journal = Journal(tmp_path / "journal")
    known = JournaledMembers(journal, lambda: NOW)
    token = known.members.make_token(CreateToken(uses=5, ttl_seconds=60.0), "", b"12345", b"s" * 16, NOW)
    known.record(token)
    for name in ("node:a", "node:b"):
        add(known, name)
    known.record(known.members.remove("node:b", NOW))
    for number in range(100):
        known.record(known.members.renew("node:a", NOW + number))
        assert length(journal) <= 21
    before = known.members
    journal.close()
    journal = Journal(tmp_path / "journal")
    again = JournaledMembers(journal, lambda: NOW).members
    assert (again.known, again.tokens) == (before.known, before.tokens)
    assert not again.standing("node:b", NOW)
    journal.close()


def test_the_broker_has_to_know_who_gets_rights_or_loses_them(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    now = NOW
    known = JournaledMembers(journal, lambda: now)
    known.record(known.members.make_token(CreateToken(), "", b"12345", b"s" * 16, NOW))
    assert known.changes == 0
    add(known, "node:a")
    assert known.changes == 1
    known.record(known.members.renew("node:a", NOW + 9))
    known.record(known.members.take_token(b"12345".hex()))
    assert known.changes == 1
    now = NOW + 10  # its certificate has ended, and with it its rights
    known.record(known.members.renew("node:a", NOW + 20))
    assert known.changes == 2
    known.record(known.members.remove("node:a", NOW + 10))
    assert known.changes == 3
    journal.close()


def test_what_cannot_be_written_has_not_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal")
    known = JournaledMembers(journal, lambda: NOW)

    def full(*_: object) -> None:
        raise Unavailable("the disk is full")

    monkeypatch.setattr(journal, "append", full)
    with pytest.raises(Unavailable):
        add(known, "node:a")
    assert not known.members.known
    assert known.changes == 0
    journal.close()
