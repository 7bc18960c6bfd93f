"""Who belongs to a closed cluster, and what lets others in: members, join tokens and bearer tokens. Pure: no clock, no randomness.

Questions are checked by methods that return events and change nothing. `apply` changes the state, and is all that a replay needs. So
whoever journals an event before it is applied loses nothing. (`coordinator.identities.standing` does.)
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from potluck.errors import Conflict, InvalidRequest, NotAllowed, NotAuthenticated, NotFound, Overloaded
from potluck.net import broker_rules
from potluck.wire.births import Revoked
from potluck.wire.members import CreateBearer, CreateToken, MemberInfo, TokenInfo
from potluck.wire.tokens import hashed

STREAM = "identities"
"""The journal's stream of these events."""
MEMBERS_LIMIT = 10_000
TOKENS_LIMIT = 1_000
"""Join tokens that still let somebody in."""
REVOKED_LIMIT = 2_000
"""How many removed members a proof names: those whose certificates last longest. Their rights are gone anyway."""
REMEMBERED_SECONDS = 7 * 86400.0
"""How long what is over is remembered and listed."""
BEARER_PREFIX = "potluck-bearer-"

_NO_HASH = bytes(32)
_WRONG = "this join token does not let anybody in: make one with `potluck token create`"


class IdentityEvent(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag=True):
    """Base of the events in the stream."""


class Token(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A join token. `hash`: that of its secret. `joined`: who joined with it, by the hash of the key (hex)."""

    token_id: str
    hash: bytes
    role: str
    expires_at: float
    uses_left: int
    name: str = ""
    made_by: str = ""
    joined: dict[str, str] = {}


class Member(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Somebody who was let in. It has a certificate, or a bearer token."""

    identity: str
    role: str
    """`coordinator`, or as `potluck.wire.members.MemberRole`."""
    joined_at: float
    certificate_until: float = 0.0
    """When the last of its certificates ends; 0: it never had one."""
    removed_at: float = 0.0
    bearer_id: str = ""
    bearer_hash: bytes = b""
    expires_at: float = 0.0
    """When its bearer token ends; 0: never."""
    made_by: str = ""
    """Of a bearer token."""

    def stands(self, now: float) -> bool:
        """Whether it may take part now."""
        return not self.removed_at and (self.certificate_until > now or self.bears(now))

    def bears(self, now: float) -> bool:
        """Whether its bearer token is valid now."""
        return bool(self.bearer_hash) and not self.removed_at and (not self.expires_at or self.expires_at > now)


class TokenMade(IdentityEvent, frozen=True):
    """Also of a token that was used: so a snapshot keeps it."""

    token: Token


class TokenTaken(IdentityEvent, frozen=True):
    """The token lets nobody in any more."""

    token_id: str


class MemberAdded(IdentityEvent, frozen=True):
    """Let in anew, or kept by a snapshot. With a `token_id`, one use of this token is over, by the key with this hash (hex)."""

    member: Member
    token_id: str = ""
    key: str = ""


class CertificateRenewed(IdentityEvent, frozen=True):
    identity: str
    certificate_until: float


class MemberTaken(IdentityEvent, frozen=True):
    """It was removed."""

    identity: str
    at: float


AnyIdentityEvent = TokenMade | TokenTaken | MemberAdded | CertificateRenewed | MemberTaken


class Members:
    """The state of all this. `own`: identities of the coordinator's own machine, which nobody can remove."""

    def __init__(self) -> None:
        self.own: frozenset[str] = frozenset()
        self.known: dict[str, Member] = {}
        self.tokens: dict[str, Token] = {}
        self._bearers: dict[str, str] = {}
        """The identity of each bearer token, by its id."""

    # --- who is who -----------------------------------------------------------------------------------------------------

    def standing(self, identity: str, now: float) -> Member | None:
        """The member of this name, if it may take part now."""
        found = self.known.get(identity)
        return found if found is not None and found.stands(now) else None

    def bearer(self, text: str, now: float) -> Member | None:
        """The member with this bearer token, if it is valid now. Secrets are compared in constant time."""
        bearer_id, _, secret = text.removeprefix(BEARER_PREFIX).partition("-")
        found = self.known.get(self._bearers.get(bearer_id, ""))
        right = _same(secret, found.bearer_hash if found is not None else _NO_HASH)
        return found if found is not None and right and found.bears(now) else None

    def allowed(self, now: float) -> tuple[broker_rules.Member, ...]:
        """Who has rights at the broker: who has a certificate that is valid now, and was not removed."""
        return tuple(
            broker_rules.Member(one.identity, one.role if one.identity.startswith("client:") else "")
            for one in self.known.values()
            if not one.removed_at and one.certificate_until > now
        )

    def next_end(self, now: float) -> float:
        """When the next certificate of somebody with rights ends."""
        ends = (one.certificate_until for one in self.known.values() if not one.removed_at)
        return min((until for until in ends if until > now), default=math.inf)

    def removed(self, now: float) -> set[str]:
        """Members that were removed, and can still show a certificate that is valid."""
        return {one.identity for one in self.known.values() if one.removed_at and one.certificate_until > now}

    def revoked(self, now: float) -> tuple[Revoked, ...]:
        """`removed`, for a proof: at most REVOKED_LIMIT of them, in an order that does not change."""
        found = sorted((-self.known[one].certificate_until, one) for one in self.removed(now))
        return tuple(Revoked(identity=one, until=-until) for until, one in found[:REVOKED_LIMIT])

    def infos(self, now: float, after: str = "") -> Iterator[MemberInfo]:
        """The members after this identity, with those that were removed in the last days."""
        for identity in sorted(self.known):
            one = self.known[identity]
            if identity > after and not _forgotten(one, now):
                yield MemberInfo(
                    identity=identity,
                    role=one.role,
                    joined_at=one.joined_at,
                    certificate_until=one.certificate_until,
                    removed_at=one.removed_at,
                    expires_at=one.expires_at,
                )

    def token_infos(self, now: float) -> tuple[TokenInfo, ...]:
        """The tokens that still let somebody in."""
        return tuple(
            TokenInfo(
                token_id=one.token_id,
                role=one.role,  # type: ignore[arg-type] # checked when it was made
                expires_at=one.expires_at,
                uses_left=one.uses_left,
                name=one.name,
                made_by=one.made_by,
            )
            for one in sorted(self.tokens.values(), key=lambda one: (one.expires_at, one.token_id))
            if one.uses_left and one.expires_at > now
        )

    # --- join tokens ------------------------------------------------------------------------------------------------------

    def make_token(
        self, asked: CreateToken, made_by: str, token_id: bytes, secret: bytes, now: float
    ) -> list[AnyIdentityEvent]:
        """Raises Overloaded for too many tokens."""
        if len(self.token_infos(now)) >= TOKENS_LIMIT:
            raise Overloaded(f"there are {TOKENS_LIMIT} join tokens: remove some, or wait until some expire")
        token = Token(
            token_id=token_id.hex(),
            hash=hashed(secret),
            role=asked.role,
            expires_at=now + asked.ttl_seconds,
            uses_left=asked.uses,
            name=asked.name,
            made_by=made_by,
        )
        return [TokenMade(token=token)]

    def take_token(self, token_id: str) -> list[AnyIdentityEvent]:
        """Raises NotFound."""
        if token_id not in self.tokens:
            raise NotFound(f"there is no join token {token_id!r}: `potluck token list` lists them")
        return [TokenTaken(token_id=token_id)]

    def token(self, token_id: str, secret: str) -> Token:
        """The token with this id and secret (hex), also one that is over. Raises NotAuthenticated, and does not say which is wrong."""
        found = self.tokens.get(token_id)
        if not _same(secret, found.hash if found is not None else _NO_HASH) or found is None:
            raise NotAuthenticated(_WRONG)
        return found

    # --- joining ------------------------------------------------------------------------------------------------------------

    def may_join(self, token: Token, name: str, key: str, now: float) -> str:
        """The identity of whoever joins with this token, this name, and a key with this hash (hex).

        The same key may ask again while the token lasts: the answer was lost. Raises NotAllowed, Conflict and Overloaded.
        """
        role = "node" if token.role == "node" else "client"
        identity = f"{role}:{name}"
        if token.expires_at <= now:
            raise NotAllowed(f"the join token has expired: {_another(token)}")
        before = token.joined.get(key)
        if before is not None and before != identity:
            raise NotAllowed(f"this key has joined as {before} already")
        if before is None and not token.uses_left:
            raise NotAllowed(f"the join token is used up: {_another(token)}")
        if token.name and token.name != name:
            raise NotAllowed(
                f"the join token is for {token.name!r} only, not for {name!r}: type `--name {token.name}` behind it"
            )
        found = self.known.get(identity)
        if found is None and len(self.known) >= MEMBERS_LIMIT:
            raise Overloaded(f"the cluster has {MEMBERS_LIMIT} members, and can have no more")
        if found is not None and found.removed_at and (found.certificate_until > now or before is not None):
            raise NotAllowed(
                f"{identity} was removed from the cluster. Its last certificate would count again if the name came back: choose another name"
            )
        if identity in self.own:
            raise Conflict(f"{identity} is the coordinator's machine: choose another name")
        if before is None and token.name != name and found is not None and found.stands(now):
            raise Conflict(
                f"{identity} is a member already: choose another name, or make a token for this name with "
                f"`potluck token create --name {name}`"
            )
        return identity

    def join(
        self, token: Token, identity: str, key: str, certificate_until: float, now: float
    ) -> list[AnyIdentityEvent]:
        """What follows from `may_join`, once there is a certificate that ends at `certificate_until`."""
        if key in token.joined:
            return self.renew(identity, certificate_until)
        found = self.known.get(identity)
        until = max(certificate_until, found.certificate_until if found is not None else 0.0)
        member = Member(identity=identity, role=token.role, joined_at=now, certificate_until=until)
        return [MemberAdded(member=member, token_id=token.token_id, key=key)]

    def renew(self, identity: str, certificate_until: float) -> list[AnyIdentityEvent]:
        return [CertificateRenewed(identity=identity, certificate_until=certificate_until)]

    def found(self, identity: str, role: str, certificate_until: float, now: float) -> list[AnyIdentityEvent]:
        """The coordinator, or its machine's operator: it gives itself its certificate."""
        known = self.known.get(identity)
        if known is None or known.removed_at:
            member = Member(identity=identity, role=role, joined_at=now, certificate_until=certificate_until)
            return [MemberAdded(member=member)]
        return self.renew(identity, certificate_until) if known.certificate_until != certificate_until else []

    # --- bearer tokens --------------------------------------------------------------------------------------------------------

    def make_bearer(
        self, asked: CreateBearer, made_by: str, bearer_id: bytes, secret: bytes, now: float
    ) -> list[AnyIdentityEvent]:
        """Raises Conflict for a name that is taken, and Overloaded for too many members."""
        identity = f"client:{asked.name}"
        found = self.known.get(identity)
        if found is not None and (found.stands(now) or found.certificate_until > now):
            raise Conflict(f"{identity} is or was a member: choose another name")
        if found is None and len(self.known) >= MEMBERS_LIMIT:
            raise Overloaded(f"the cluster has {MEMBERS_LIMIT} members, and can have no more")
        expires_at = now + asked.ttl_seconds if asked.ttl_seconds else 0.0
        if expires_at > 1e11:
            raise InvalidRequest("a bearer token cannot last so long: 0 means until it is removed")
        member = Member(
            identity=identity,
            role=asked.role,
            joined_at=now,
            bearer_id=bearer_id.hex(),
            bearer_hash=hashed(secret),
            expires_at=expires_at,
            made_by=made_by,
        )
        return [MemberAdded(member=member)]

    # --- removing -------------------------------------------------------------------------------------------------------------

    def remove(self, identity: str, now: float) -> list[AnyIdentityEvent]:
        """Remove a member, and the join and bearer tokens that it made; [] if it is removed already. Raises NotFound, Conflict."""
        found = self.known.get(identity)
        if found is None:
            raise NotFound(f"there is no member {identity!r}: `potluck nodes` and `potluck clients` list them")
        if identity in self.own:
            raise Conflict(f"{identity} is the coordinator's own machine: it cannot be removed")
        events: list[AnyIdentityEvent] = []
        going, gone = [identity] * (not found.removed_at), {identity}
        while going:
            one = going.pop()
            events.append(MemberTaken(identity=one, at=now))
            events += [TokenTaken(token_id=token.token_id) for token in self.tokens.values() if token.made_by == one]
            made = {m.identity for m in self.known.values() if m.made_by == one and not m.removed_at} - gone
            gone |= made
            going += made
        return events

    # --- the state --------------------------------------------------------------------------------------------------------------

    def apply(self, event: AnyIdentityEvent) -> None:
        match event:
            case TokenMade(token=token):
                self.tokens[token.token_id] = token
            case TokenTaken():
                self.tokens.pop(event.token_id, None)
            case MemberAdded(member=member):
                self._put(member)
                if (used := self.tokens.get(event.token_id)) is not None:
                    joined = {**used.joined, event.key: member.identity}
                    self.tokens[used.token_id] = replace(used, uses_left=max(0, used.uses_left - 1), joined=joined)
            case CertificateRenewed():
                found = self.known.get(event.identity)
                if found is not None and not found.removed_at:
                    until = max(found.certificate_until, event.certificate_until)
                    self._put(replace(found, certificate_until=until))
            case MemberTaken():
                found = self.known.get(event.identity)
                if found is not None and not found.removed_at:
                    self._put(replace(found, removed_at=event.at))

    def forget(self, now: float) -> None:
        """Forget what is over for long: tokens, and removed members of which no certificate is valid."""
        for token in [one for one in self.tokens.values() if one.expires_at + REMEMBERED_SECONDS < now]:
            del self.tokens[token.token_id]
        for member in [one for one in self.known.values() if _forgotten(one, now)]:
            self._bearers.pop(member.bearer_id, None)
            del self.known[member.identity]

    def snapshot(self) -> Sequence[AnyIdentityEvent]:
        """Events that make this state."""
        tokens: Iterable[AnyIdentityEvent] = (TokenMade(token=one) for one in self.tokens.values())
        return [*tokens, *(MemberAdded(member=one) for one in self.known.values())]

    def _put(self, member: Member) -> None:
        before = self.known.get(member.identity)
        if before is not None:
            self._bearers.pop(before.bearer_id, None)
        self.known[member.identity] = member
        if member.bearer_id:
            self._bearers[member.bearer_id] = member.identity


def bearer_text(bearer_id: bytes, secret: bytes) -> str:
    """What its holder sends in `Authorization: Bearer`."""
    return f"{BEARER_PREFIX}{bearer_id.hex()}-{secret.hex()}"


def _another(token: Token) -> str:
    """How an operator makes a token like this one."""
    role = "" if token.role == "node" else f" --role {token.role}"
    name = f" --name {token.name}" if token.name else ""
    return f"an operator makes a new one with `potluck token create{role}{name}`"


def _same(secret: str, expected: bytes) -> bool:
    """Whether this (hex) is the secret with this hash, in a time that does not tell how much of it is right."""
    try:
        found = hashed(bytes.fromhex(secret[:128]))
    except ValueError:
        found = hashed(b"")
    return hmac.compare_digest(found, expected)


def _forgotten(member: Member, now: float) -> bool:
    """Whether it is over for long. A member whose certificate ended is not: its machine may come back."""
    ended = member.removed_at or (member.expires_at if member.bearer_hash else 0.0)
    return bool(ended) and max(ended, member.certificate_until) + REMEMBERED_SECONDS < now
