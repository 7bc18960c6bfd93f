"""Who belongs to a closed cluster: tokens used up, late or for others, and removed members, who never come back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from coordinator.identities.members import (
    REMEMBERED_SECONDS,
    REVOKED_LIMIT,
    TOKENS_LIMIT,
    AnyIdentityEvent,
    CertificateRenewed,
    Member,
    MemberAdded,
    Members,
    bearer_text,
)
from potluck.errors import Conflict, NotAllowed, NotAuthenticated, NotFound, Overloaded, PotluckError
from potluck.wire import codec
from potluck.wire.members import CreateBearer, CreateToken

NOW, WEEK = 1_800_000_000.0, 7 * 86400.0
ID, SECRET = b"12345", b"0123456789abcdef"
WRONG = (b"0" * 16).hex()


class Table:
    """A table of members, and the events that made it."""

    def __init__(self) -> None:
        self.members = Members()
        self.events: list[AnyIdentityEvent] = []

    def take(self, events: list[AnyIdentityEvent]) -> None:
        for event in events:
            # as the journal keeps it
            kept = codec.unpack(codec.pack(event), AnyIdentityEvent)  # type: ignore[arg-type, var-annotated]
            self.events.append(kept)
            self.members.apply(kept)

    def token(self, token_id: bytes = ID, made_by: str = "client:ann", now: float = NOW, **asked: object) -> str:
        self.take(self.members.make_token(CreateToken(**asked), made_by, token_id, SECRET, now))  # type: ignore[arg-type]
        return token_id.hex()

    def join(self, token_id: str, name: str, key: str = "", now: float = NOW, until: float | None = None) -> str:
        token = self.members.token(token_id, SECRET.hex())
        identity = self.members.may_join(token, name, key or name, now)
        self.take(self.members.join(token, identity, key or name, now + WEEK if until is None else until, now))
        return identity

    def replayed(self) -> Members:
        found = Members()
        for event in self.events:
            found.apply(event)
        return found


@pytest.fixture
def table() -> Table:
    return Table()


def rights(members: Members, now: float = NOW) -> list[str]:
    return [one.identity for one in members.allowed(now)]


def test_a_token_lets_one_in_and_no_more(table: Table) -> None:
    token = table.token()
    assert table.join(token, "kitchen") == "node:kitchen"
    assert rights(table.members) == ["node:kitchen"]
    assert not table.members.token_infos(NOW)
    with pytest.raises(NotAllowed, match="used up: an operator makes a new one with `potluck token create"):
        table.join(token, "attic")


def test_a_token_with_uses_lets_so_many_in(table: Table) -> None:
    token = table.token(uses=3)
    for name in ("a", "b", "c"):
        table.join(token, name)
    with pytest.raises(NotAllowed):
        table.join(token, "d")
    assert rights(table.members) == ["node:a", "node:b", "node:c"]


@pytest.mark.parametrize("late", [3600.0, 1e6])
def test_a_late_token_lets_nobody_in(table: Table, late: float) -> None:
    token = table.token(ttl_seconds=3600.0)
    with pytest.raises(NotAllowed, match="expired"):
        table.join(token, "kitchen", now=NOW + late)
    assert not table.members.token_infos(NOW + late)
    table.join(token, "kitchen", now=NOW + 3599)


def test_a_token_for_a_name_is_for_no_other(table: Table) -> None:
    table.token(name="kitchen")
    with pytest.raises(NotAllowed, match="'kitchen' only"):
        table.join(ID.hex(), "attic")
    table.join(ID.hex(), "kitchen")
    # the machine was set up anew: it has another key
    again = table.token(b"again", name="kitchen")
    table.join(again, "kitchen", "other key", until=NOW + 1)
    assert table.members.known["node:kitchen"].certificate_until == NOW + WEEK, "the certificate before is valid still"


def test_the_name_of_a_member_is_taken_until_its_certificate_has_ended(table: Table) -> None:
    token = table.token(uses=2)
    table.join(token, "kitchen")
    with pytest.raises(Conflict, match="--name kitchen"):
        table.join(token, "kitchen", "other key")
    late = table.token(b"later", now=NOW + WEEK)
    table.join(late, "kitchen", "other key", now=NOW + WEEK)


def test_a_lost_answer_is_given_again_and_counts_once(table: Table) -> None:
    token = table.token(uses=2)
    table.join(token, "kitchen", "key")
    assert table.join(token, "kitchen", "key", until=NOW + 2 * WEEK) == "node:kitchen"
    assert [one.uses_left for one in table.members.token_infos(NOW)] == [1]
    assert table.members.known["node:kitchen"].certificate_until == NOW + 2 * WEEK
    with pytest.raises(NotAllowed, match="joined as node:kitchen already"):
        table.join(token, "attic", "key")
    with pytest.raises(NotAllowed, match="expired"):
        table.join(token, "kitchen", "key", now=NOW + 3600)
    table.join(token, "attic", "key 2")
    assert table.join(token, "kitchen", "key") == "node:kitchen", "also when the token is used up"
    table.take(table.members.remove("node:kitchen", NOW))
    with pytest.raises(NotAllowed, match="removed"):
        table.join(token, "kitchen", "key")


@pytest.mark.parametrize(
    ("token_id", "secret"),
    [
        (ID.hex(), WRONG),
        ("00" * 5, SECRET.hex()),
        (ID.hex(), ""),
        (ID.hex(), "no hex"),
        (ID.hex(), SECRET.hex() + "00"),
    ],
)
def test_a_wrong_token_is_refused_and_not_told_why(table: Table, token_id: str, secret: str) -> None:
    table.token()
    with pytest.raises(NotAuthenticated, match="does not let anybody in"):
        table.members.token(token_id, secret)


def test_a_token_that_was_taken_away(table: Table) -> None:
    token = table.token()
    table.take(table.members.take_token(token))
    with pytest.raises(NotAuthenticated):
        table.join(token, "kitchen")
    with pytest.raises(NotFound):
        table.members.take_token(token)


def test_clients_have_the_role_of_the_token(table: Table) -> None:
    table.join(table.token(role="viewer"), "ann")
    assert table.members.known["client:ann"].role == "viewer"
    assert [(one.identity, one.role) for one in table.members.allowed(NOW)] == [("client:ann", "viewer")]
    # a node of the same name is another member
    table.join(table.token(b"other"), "ann")
    assert rights(table.members) == ["client:ann", "node:ann"]


def test_who_was_removed_has_no_rights_and_its_name_is_gone(table: Table) -> None:
    table.join(table.token(uses=9), "kitchen")
    table.take(table.members.remove("node:kitchen", NOW + 5))
    assert not rights(table.members)
    assert table.members.standing("node:kitchen", NOW + 5) is None
    assert [(one.identity, one.until) for one in table.members.revoked(NOW + 5)] == [("node:kitchen", NOW + WEEK)]
    assert table.members.remove("node:kitchen", NOW + 6) == [], "a question that was asked twice"
    table.take(table.members.renew("node:kitchen", NOW + 9 * WEEK))
    assert not rights(table.members, NOW + 8)
    with pytest.raises(NotAllowed, match="removed"):
        table.join(ID.hex(), "kitchen", "new key")
    named = table.token(b"named", name="kitchen", ttl_seconds=2 * WEEK)
    with pytest.raises(NotAllowed, match="removed"):
        table.join(named, "kitchen", "new key")
    # no certificate of the former one is valid any more
    assert not table.members.revoked(NOW + WEEK)
    table.join(named, "kitchen", "new key", now=NOW + WEEK)
    assert rights(table.members, NOW + WEEK) == ["node:kitchen"]


def test_what_a_removed_client_made_goes_too(table: Table) -> None:
    table.join(table.token(role="operator", made_by=""), "ann")
    table.token(b"nodes", made_by="client:ann")
    table.take(table.members.make_bearer(CreateBearer(name="bot", role="operator"), "client:ann", b"b", SECRET, NOW))
    table.token(b"bots!", made_by="client:bot")
    table.take(table.members.make_bearer(CreateBearer(name="bot2"), "client:bot", b"c", SECRET, NOW))
    table.join(b"nodes".hex(), "kitchen")
    table.take(table.members.remove("client:ann", NOW))
    assert not table.members.token_infos(NOW)
    assert table.members.bearer(bearer_text(b"b", SECRET), NOW) is None
    assert table.members.bearer(bearer_text(b"c", SECRET), NOW) is None
    assert rights(table.members) == ["node:kitchen"], "whoever came by its token stays"


def test_the_coordinators_machine_cannot_be_removed_or_imitated(table: Table) -> None:
    for identity, role in (("coordinator:attic", "coordinator"), ("client:operator-attic", "operator")):
        table.take(table.members.found(identity, role, NOW + WEEK, NOW))
    table.members.own = frozenset(table.members.known)
    for identity in table.members.own:
        with pytest.raises(Conflict, match="own machine"):
            table.members.remove(identity, NOW)
    token = table.token(role="operator", name="operator-attic")
    with pytest.raises(Conflict):
        table.join(token, "operator-attic", now=NOW + 60)
    with pytest.raises(Conflict):
        table.members.make_bearer(CreateBearer(name="operator-attic"), "", b"b", SECRET, NOW)
    assert table.members.found("coordinator:attic", "coordinator", NOW + WEEK, NOW) == []
    table.take(table.members.found("coordinator:attic", "coordinator", NOW + 2 * WEEK, NOW))
    assert rights(table.members, NOW + WEEK + 1) == ["coordinator:attic"]


def test_bearer_tokens(table: Table) -> None:
    asked = CreateBearer(name="bot", role="viewer", ttl_seconds=60.0)
    table.take(table.members.make_bearer(asked, "client:ann", b"bearr", SECRET, NOW))
    right = bearer_text(b"bearr", SECRET)
    found = table.members.bearer(right, NOW + 59)
    assert found is not None
    assert (found.identity, found.role) == ("client:bot", "viewer")
    assert not rights(table.members), "it has no certificate"
    for wrong in ("", "Bearer", right[:-1], right + "00", bearer_text(b"other", SECRET), bearer_text(b"bearr", b"no")):
        assert table.members.bearer(wrong, NOW) is None
    assert table.members.bearer(right, NOW + 60) is None
    with pytest.raises(Conflict, match="is or was a member"):
        table.members.make_bearer(asked, "client:ann", b"again", SECRET, NOW)
    table.take(table.members.make_bearer(asked, "client:ann", b"again", SECRET, NOW + 60))
    assert table.members.bearer(right, NOW + 60) is None
    assert table.members.bearer(bearer_text(b"again", SECRET), NOW + 61) is not None
    table.take(table.members.remove("client:bot", NOW + 62))
    assert table.members.bearer(bearer_text(b"again", SECRET), NOW + 62) is None
    for_ever = CreateBearer(name="bot2")
    table.take(table.members.make_bearer(for_ever, "", b"bear2", SECRET, NOW))
    table.members.forget(NOW + 1e8)
    assert table.members.bearer(bearer_text(b"bear2", SECRET), NOW + 1e8) is not None


def test_secrets_are_kept_as_hashes(table: Table) -> None:
    table.token()
    table.take(table.members.make_bearer(CreateBearer(name="bot"), "", b"bearr", SECRET, NOW))
    kept = b"".join(codec.pack(event) for event in table.events)
    assert SECRET not in kept
    assert SECRET.hex().encode() not in kept


def test_there_are_limits(table: Table) -> None:
    for number in range(TOKENS_LIMIT):
        table.token(number.to_bytes(5))
    with pytest.raises(Overloaded):
        table.token(b"lasty")
    member = Member(identity="", role="node", joined_at=NOW, certificate_until=NOW + WEEK, removed_at=NOW)
    for number in range(REVOKED_LIMIT + 1):
        until = NOW + WEEK - number
        table.members.apply(MemberAdded(member=replace(member, identity=f"node:{number}", certificate_until=until)))
    revoked = table.members.revoked(NOW)
    assert len(revoked) == REVOKED_LIMIT
    assert revoked[0].identity == "node:0"


def test_what_is_long_over_is_forgotten(table: Table) -> None:
    table.join(table.token(uses=2), "kitchen")
    table.join(ID.hex(), "attic")
    table.take(table.members.remove("node:kitchen", NOW))
    listed = [one.identity for one in table.members.infos(NOW + WEEK)]
    assert listed == ["node:attic", "node:kitchen"]
    assert [one.identity for one in table.members.infos(NOW, "node:attic")] == ["node:kitchen"]
    table.members.forget(NOW + WEEK + REMEMBERED_SECONDS + 1)
    assert list(table.members.known) == ["node:attic"], "its machine may come back"
    assert not table.members.tokens


NAMES = st.sampled_from(["a", "b", "c"])
KEYS = st.sampled_from(["k1", "k2", "k3"])


class History(RuleBasedStateMachine):
    """Anything in any order: what was journaled gives the same state, and nobody comes back who was removed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.now = NOW
        self.made = 0
        self.uses: dict[str, int] = {}
        self.removed: dict[str, float] = {}
        """Until when a removed member's certificates are valid."""

    def tried(self, events: object) -> None:
        try:
            self.table.take(events())  # type: ignore[operator]
        except PotluckError:
            return

    @rule(uses=st.integers(1, 3), ttl=st.sampled_from([10.0, 3 * WEEK]), name=st.sampled_from(["", "a"]))
    def make_token(self, uses: int, ttl: float, name: str) -> None:
        self.made += 1
        made_by = "client:a" if self.made % 2 else ""
        role = "user" if self.made % 3 else "node"
        asked = {"uses": uses, "ttl_seconds": ttl, "name": name, "role": role}
        self.uses[self.table.token(self.made.to_bytes(5), made_by, self.now, **asked)] = uses

    @rule(which=st.integers(1, 5), name=NAMES, key=KEYS, lasts=st.sampled_from([5.0, WEEK]))
    def join(self, which: int, name: str, key: str, lasts: float) -> None:
        token_id = which.to_bytes(5).hex()
        try:
            identity = self.table.join(token_id, name, key, self.now, self.now + lasts)
        except PotluckError:
            return
        assert self.removed.pop(identity, 0.0) <= self.now, "while a certificate of the removed one was valid"

    @rule(name=NAMES, lasts=st.sampled_from([5.0, WEEK]))
    def renew(self, name: str, lasts: float) -> None:
        """Also of those that were removed, or never there."""
        self.table.take([CertificateRenewed(identity=f"client:{name}", certificate_until=self.now + lasts)])

    @rule(name=NAMES, kind=st.sampled_from(["node", "client"]))
    def remove(self, name: str, kind: str) -> None:
        self.tried(lambda: self.table.members.remove(f"{kind}:{name}", self.now))
        for one in self.table.members.known.values():  # and those whose bearer tokens it made
            if one.removed_at:
                self.removed.setdefault(one.identity, one.certificate_until)

    @rule(name=NAMES)
    def bear(self, name: str) -> None:
        self.made += 1
        asked = CreateBearer(name=name, ttl_seconds=20.0)
        before = len(self.table.events)
        self.tried(lambda: self.table.members.make_bearer(asked, "client:a", self.made.to_bytes(5), SECRET, self.now))
        if len(self.table.events) > before:
            assert self.removed.pop(f"client:{name}", 0.0) <= self.now

    @rule(seconds=st.sampled_from([1.0, 30.0, WEEK]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def a_replay_gives_the_same(self) -> None:
        again = self.table.replayed()
        assert again.known == self.table.members.known
        assert again.tokens == self.table.members.tokens
        short = Members()
        for event in again.snapshot():
            short.apply(event)
        assert (short.known, short.tokens) == (again.known, again.tokens)

    @invariant()
    def rights_end_when_they_are_said_to(self) -> None:
        until = self.table.members.next_end(self.now)
        before, after = rights(self.table.members, self.now), rights(self.table.members, until - 1e-6)
        assert (before == after) or until == math.inf
        assert len(rights(self.table.members, until)) < len(before) or until == math.inf

    @invariant()
    def who_was_removed_stays_away(self) -> None:
        there = set(rights(self.table.members, self.now))
        assert not there & set(self.removed)
        for identity in self.removed:
            assert self.table.members.standing(identity, self.now) is None
        revoked = {one.identity for one in self.table.members.revoked(self.now)}
        assert revoked == {one for one, until in self.removed.items() if until > self.now}

    @invariant()
    def no_token_is_used_too_often(self) -> None:
        for token in self.table.members.tokens.values():
            assert token.uses_left >= 0
            assert len(token.joined) + token.uses_left == self.uses[token.token_id]


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(st.text(max_size=100))
def test_no_text_is_a_bearer_token_by_chance(text: str) -> None:
    table = Table()
    table.take(table.members.make_bearer(CreateBearer(name="bot"), "", b"bearr", SECRET, NOW))
    for wrong in (text, f"potluck-bearer-{b'bearr'.hex()}-{text}"):
        assert table.members.bearer(wrong, NOW) is None
