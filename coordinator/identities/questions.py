"""Answers the questions about members: `potluck.wire.members`. Whether the caller may ask is checked before, by its role."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from typing import TypeVar

from msgspec import Struct

from coordinator.identities.journaled import JournaledMembers
from coordinator.identities.members import MemberTaken, bearer_text
from coordinator.identities.rules import Rules
from potluck.errors import InvalidRequest, NotAuthenticated, PotluckError
from potluck.wire import codec
from potluck.wire.members import (
    BearerCreated,
    CreateBearer,
    CreateToken,
    ListMembers,
    ListTokens,
    MemberRemoved,
    MembersListed,
    RemoveMember,
    RemoveToken,
    TokenCreated,
    TokenRemoved,
    TokensListed,
)
from potluck.wire.roles import Caller
from potluck.wire.tokens import FINGERPRINT_BYTES, ID_BYTES, SECRET_BYTES, JoinToken
from potluck.wire.values import Message

P = TypeVar("P", bound=Struct)

MEMBER_QUESTIONS = CreateToken | ListTokens | RemoveToken | ListMembers | RemoveMember | CreateBearer
LISTED_BYTES = 96 * 1024
"""Size of the members in one answer, as msgpack."""
ENDPOINTS = 4
"""How many addresses a join token holds: a person copies it."""


class MemberQuestions:
    """`http` gives the `host:port` of our HTTP server; `fingerprint`: SHA-256 of the CA's public key."""

    def __init__(
        self,
        known: JournaledMembers,
        rules: Rules,
        http: Callable[[], tuple[str, ...]],
        fingerprint: bytes,
    ) -> None:
        self._known = known
        self._rules = rules
        self._http = http
        self._fingerprint = fingerprint

    async def answer(self, question: Message, caller: Caller) -> Message:
        """The answer, once what it says is on the disk and holds. Raises a PotluckError if that is the answer."""
        now, table = self._known.clock(), self._known.members
        asking = table.known.get(caller.identity)
        if asking is not None and not asking.stands(now):
            # Removed after its question was let in, and before this: what it makes now would outlast it.
            raise NotAuthenticated(f"{caller.identity} is no member of this cluster any more")
        match question:
            case CreateToken():
                token_id, secret = secrets.token_bytes(ID_BYTES), secrets.token_bytes(SECRET_BYTES)
                token = JoinToken(self._fingerprint[:FINGERPRINT_BYTES], self._http()[:ENDPOINTS], token_id, secret)
                self._known.record(table.make_token(question, caller.identity, token_id, secret, now))
                await self._known.safe()
                expires_at = table.tokens[token_id.hex()].expires_at
                return TokenCreated(token=token.text(), token_id=token_id.hex(), expires_at=expires_at)
            case ListTokens():
                return TokensListed(tokens=_page(table.token_infos(now))[0])
            case RemoveToken():
                self._known.record(table.take_token(question.token_id))
                await self._known.safe()
                return TokenRemoved(token_id=question.token_id)
            case ListMembers():
                found, more = _page(table.infos(now, question.after))
                return MembersListed(members=found, more=more)
            case RemoveMember():
                await self.remove(question.identity)
                return MemberRemoved(identity=question.identity)
            case CreateBearer():
                bearer_id, secret = secrets.token_bytes(ID_BYTES), secrets.token_bytes(SECRET_BYTES)
                self._known.record(table.make_bearer(question, caller.identity, bearer_id, secret, now))
                await self._known.safe()
                made = table.known[f"client:{question.name}"]
                return BearerCreated(
                    identity=made.identity, bearer=bearer_text(bearer_id, secret), expires_at=made.expires_at
                )
            case _:
                raise InvalidRequest(f"{type(question).__name__} is no question about members")

    async def remove(self, identity: str) -> None:
        """Remove a member, and the bearer tokens that it made. Raises NotFound, Conflict, Unavailable."""
        events = self._known.members.remove(identity, self._known.clock())
        self._known.record(events)
        await self._known.safe()
        gone = [event.identity for event in events if isinstance(event, MemberTaken)]
        failed: list[PotluckError] = []
        for one in gone or [identity]:
            try:
                await self._rules.remove(one)
            except PotluckError as error:  # the others go all the same
                failed.append(error)
        if failed:
            raise failed[0]


def _page(found: Iterable[P]) -> tuple[tuple[P, ...], bool]:
    """The first items, as many as fit into an answer, and whether there are more."""
    listed: list[P] = []
    size = 0
    for one in found:
        size += len(codec.pack(one))
        if size > LISTED_BYTES:
            return tuple(listed), True
        listed.append(one)
    return tuple(listed), False
