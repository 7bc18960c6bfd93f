"""Whose commands a node of a closed cluster carries out: only those that its coordinator sealed for it, now, in this epoch."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from node import trust
from node.trust import Epochs, Trust
from potluck.errors import InvalidRequest, InvalidSettings, PotluckError
from potluck.security import certificates
from potluck.security.cluster_file import ClusterFile
from potluck.wire import seals
from potluck.wire.births import Revoked
from potluck.wire.seals import PROOF_PURPOSE, SealRefused
from support.closed import DAY, Authority
from support.leader import COMMAND, INBOX, TOPICS, Leader

KNOWN = ClusterFile(cluster="test", cluster_id="cluster-id", brokers=("a:1",), http=("a:2",), identity="node:n1")


class Clock:
    def __init__(self) -> None:
        import time

        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def where(tmp_path: Path, authority: Authority) -> Path:
    return authority.member(tmp_path / "identity", "node", certificates.node_profile("n1"))


def trusting(where: Path, clock: Clock, session: str = "s1") -> Trust:
    return Trust(where, KNOWN, session, TOPICS.coordinator_proof, now=clock, elapsed=clock)


def test_only_who_proved_itself_commands(where: Path, authority: Authority, clock: Clock) -> None:
    node, leader = trusting(where, clock), Leader(authority, clock.now)
    with pytest.raises(SealRefused, match="no coordinator has proved itself"):
        node.opened(INBOX, leader.command())
    assert node.take(leader.proof())
    assert node.opened(INBOX, leader.command()) == COMMAND
    with pytest.raises(SealRefused, match="not signed"):
        node.opened(INBOX, Leader(authority, clock.now).command())
    assert not node.take(leader.proof(number=1))  # retained from before
    assert node.opened(INBOX, leader.command()) == COMMAND


@pytest.mark.parametrize(
    "leader",
    [
        lambda authority, now: Leader(Authority(), now),
        lambda authority, now: Leader(authority, now, profile=certificates.node_profile("n2")),
        lambda authority, now: Leader(authority, now, profile=certificates.coordinator_profile("attic")),
        lambda authority, now: Leader(
            authority, now, profile=certificates.Profile("node:n2", unit=certificates.COMMANDS, client=False)
        ),
        lambda authority, now: Leader(authority, now, days=1.0, ago=2.0),
    ],
)
def test_no_other_certificate_proves_a_coordinator(
    where: Path, authority: Authority, clock: Clock, leader: Any
) -> None:
    node, false = trusting(where, clock), leader(authority, clock.now)
    with pytest.raises((SealRefused, InvalidRequest)):
        node.take(false.proof())
    with pytest.raises(SealRefused):
        node.opened(INBOX, false.command())


def test_a_node_with_a_tls_key_of_this_cluster_proves_nothing(where: Path, authority: Authority, clock: Clock) -> None:
    """Its key is P-256: even under a certificate with the right words, it is no key for commands."""
    leader = Leader(authority, clock.now)
    leader.certificate = authority.issue(
        certificates.public_key_of(certificates.new_key()), certificates.commands_profile("attic")
    )
    with pytest.raises(InvalidRequest, match="Ed25519"):
        trusting(where, clock).take(leader.proof())


@pytest.mark.parametrize(
    "changes",
    [
        {"topic": INBOX},
        {"purpose": seals.PURPOSE},
        {"cluster_id": "other"},
        {"term": 4},
        {"sender": "c9"},
        {"standing": {"epoch": 9}},
        {"standing": {"session": "c9"}},
        {"standing": {"cluster_id": "other"}},
    ],
)
def test_a_proof_for_something_else_is_refused(where: Path, authority: Authority, clock: Clock, changes: Any) -> None:
    with pytest.raises(SealRefused):
        trusting(where, clock).take(Leader(authority, clock.now).proof(**changes))


def test_altered_proofs_are_refused(where: Path, authority: Authority, clock: Clock) -> None:
    node, good = trusting(where, clock), Leader(authority, clock.now).proof()
    other = Leader(authority, clock.now).proof()
    for changes in (
        {"body": other.body + b"\xc0"}, {"seal": other.seal[:-1]}, {"signature": bytes(64)}, {"signature": b""},
        {"certificate": other.certificate}, {"certificate": b""}, {"certificate": b"\x30" * 9000}, {"body": b""},
    ):  # fmt: skip
        with pytest.raises(PotluckError):
            node.take(replace(good, **changes))
    assert node.epoch == 0
    assert node.take(good)


@pytest.mark.parametrize(
    "changes",
    [
        {"topic": TOPICS.node("n2", "inbox")},
        {"audience": "node:n2"},
        {"session": "s0"},
        {"cluster_id": "other"},
        {"term": 2},
        {"sender": "c9"},
        {"number": 1},
        {"valid_until": 1.0, "sent_at": 0.0},
        {"purpose": PROOF_PURPOSE},
        {"kind": "none"},
    ],
)
def test_commands_that_are_not_for_us_now_are_refused(
    where: Path, authority: Authority, clock: Clock, changes: Any
) -> None:
    node, leader = trusting(where, clock), Leader(authority, clock.now)
    node.take(leader.proof())
    assert node.opened(INBOX, leader.command(number=1)) == COMMAND
    with pytest.raises(SealRefused):
        node.opened(INBOX, leader.command(**changes))


def test_a_lower_epoch_is_refused_for_ever_also_after_a_restart(
    where: Path, authority: Authority, clock: Clock
) -> None:
    old, new = Leader(authority, clock.now), Leader(authority, clock.now, session="c2", epoch=4)
    node = trusting(where, clock)
    node.take(old.proof())
    node.opened(INBOX, old.command())
    node.take(new.proof())
    assert node.opened(INBOX, new.command()) == COMMAND
    for again in (node, trusting(where, clock, "s2")):
        clock.now += 3600
        assert again.epoch == 4
        old.now = new.now = clock.now
        with pytest.raises(SealRefused, match="term"):
            again.take(old.proof())
        with pytest.raises(SealRefused):
            again.opened(INBOX, old.command(session="s2" if again is not node else "s1"))
    path = where / trust.EPOCHS
    assert json.loads(path.read_text()) == {"cluster-id": 4}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_command_of_a_newer_epoch_is_kept_too(where: Path, authority: Authority, clock: Clock) -> None:
    """The key is the same: the coordinator was restarted, and its command came before its proof."""
    node, leader = trusting(where, clock), Leader(authority, clock.now)
    node.take(leader.proof())
    leader.session, leader.epoch = "c2", 5
    assert node.opened(INBOX, leader.command(number=1)) == COMMAND
    assert Epochs(where).of("cluster-id") == 5


def test_the_disk_is_written_only_when_the_epoch_rises(where: Path, authority: Authority, clock: Clock) -> None:
    node, leader = trusting(where, clock), Leader(authority, clock.now)
    node.take(leader.proof())
    (where / trust.EPOCHS).unlink()
    node.take(leader.proof())
    node.opened(INBOX, leader.command())
    assert not (where / trust.EPOCHS).exists()


def test_two_coordinators_of_one_epoch(where: Path, authority: Authority, clock: Clock) -> None:
    node, first = trusting(where, clock), Leader(authority, clock.now)
    second = Leader(authority, clock.now, session="c2")
    node.take(first.proof())
    second.number = 100
    with pytest.raises(SealRefused, match="another one"):
        node.take(second.proof())
    assert node.opened(INBOX, first.command()) == COMMAND


def test_a_renewed_key_replaces_the_one_before(where: Path, authority: Authority, clock: Clock) -> None:
    node, leader = trusting(where, clock), Leader(authority, clock.now)
    node.take(leader.proof())
    renewed = Leader(authority, clock.now)
    renewed.number = leader.number
    node.take(renewed.proof())
    assert node.opened(INBOX, renewed.command()) == COMMAND
    with pytest.raises(SealRefused, match="not signed"):
        node.opened(INBOX, leader.command())


def test_a_key_ends_with_its_certificate(where: Path, authority: Authority, clock: Clock) -> None:
    node, leader = trusting(where, clock), Leader(authority, clock.now)
    node.take(leader.proof())
    clock.now += 7 * DAY + seals.CLOCK_SECONDS + 5
    leader.now = clock.now
    with pytest.raises(SealRefused, match="has ended"):
        node.opened(INBOX, leader.command())


def test_who_was_removed_is_known_until_its_certificate_ends(where: Path, authority: Authority, clock: Clock) -> None:
    node, leader = trusting(where, clock), Leader(authority, clock.now)
    assert not node.proved
    node.take(leader.proof(Revoked("node:n2", clock.now + 60), Revoked("node:n3", clock.now - 1)))
    assert [node.is_revoked(f"node:n{number}") for number in (1, 2, 3)] == [False, True, False]
    assert node.proved
    clock.now += 61
    assert not node.is_revoked("node:n2")
    node.take(leader.proof())
    clock.now -= 61
    assert not node.is_revoked("node:n2")  # it was let in again


@pytest.mark.parametrize("text", ["", "[]", '{"a": -1}', '{"a": "1"}', '{"a": true}', "[" * 100_000])
def test_damaged_epochs_are_not_taken_for_none(where: Path, clock: Clock, text: str) -> None:
    (where / trust.EPOCHS).write_text(text)
    with pytest.raises(InvalidSettings, match=r"epochs.json is damaged"):
        trusting(where, clock)


def test_epochs_of_other_clusters_stay(where: Path) -> None:
    known = Epochs(where)
    for number in range(trust.CLUSTERS_KNOWN + 3):
        known.rise(f"c{number}", number + 1)
    known.rise("c5", 2)  # lower
    again = Epochs(where)
    assert again.of("c5") == 6
    assert again.of("c0") == 0
    assert len(json.loads((where / trust.EPOCHS).read_text())) == trust.CLUSTERS_KNOWN


def test_a_full_disk_does_not_let_an_old_epoch_in(
    where: Path, authority: Authority, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise InvalidSettings("no room")

    monkeypatch.setattr(trust.folder, "write", full)
    node, leader = trusting(where, clock), Leader(authority, clock.now, epoch=5)
    node.take(leader.proof())
    assert node.opened(INBOX, leader.command()) == COMMAND
    with pytest.raises(SealRefused):
        node.take(Leader(authority, clock.now, session="c0", epoch=4).proof())
