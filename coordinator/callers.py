"""Who asks, and what they may: for all transports of a closed cluster's coordinator."""

from __future__ import annotations

import logging
from collections.abc import Callable

from potluck.errors import NotAllowed, NotAuthenticated
from potluck.logs import Seldom, fields
from potluck.wire import roles
from potluck.wire.roles import Caller
from potluck.wire.values import Message

log = logging.getLogger(__name__)

_LOG_SECONDS = 60.0
RoleOf = Callable[[str], str | None]
"""The role of a member: `coordinator`, or as `potluck.wire.members.MemberRole`; None: there is none of this identity now.

It is asked for each request, so it must be quick.
"""
Bearer = Callable[[str], str | None]
"""The identity of the member that has this bearer token; None: nobody has it. It compares in constant time."""

ANY_MEMBER = "member"
"""What every member may do, also nodes."""


class Callers:
    """The members of a closed cluster as those who ask. An open cluster has none of this: there, everybody may do everything."""

    def __init__(self, role_of: RoleOf, bearer: Bearer = lambda token: None) -> None:
        self._role_of = role_of
        self._bearer = bearer
        self._seldom = Seldom(_LOG_SECONDS)

    def member(self, identity: str, key: str = "") -> Caller:
        """Whoever has proved this identity ("": nobody); `key` as in Caller. Raises NotAuthenticated."""
        role = self._role_of(identity) if identity else None
        if role is None:
            raise NotAuthenticated(
                f"{identity[:80]} is no member of this cluster: join it with `potluck join`"
                if identity
                else "this cluster is closed: show the certificate of a member, or send a bearer token"
            )
        return Caller(identity, role, key)

    def bearer(self, token: str, key: str = "") -> Caller:
        """Whoever has this bearer token. Raises NotAuthenticated, which does not say what is wrong with it."""
        identity = self._bearer(token)
        if identity is None:
            raise NotAuthenticated("this bearer token is not valid: ask an operator of the cluster for one")
        return self.member(identity, key)

    def check(self, identity: str, question: type[Message]) -> None:
        """Raises NotAuthenticated, and NotAllowed as `roles.check`."""
        roles.check(self.member(identity), question)

    def note(self, who: str, what: str, code: str) -> None:
        """Log that somebody is refused, but seldom. `code`: that of the error."""
        if (more := self._seldom.due(f"{code} {who}")) is not None:
            log.warning("refused %s", fields(who=who[:100], what=what, code=code, more=more or None))


def require(caller: Caller, needed: str, what: str) -> None:
    """Whether a member may do what needs this role, or ANY_MEMBER. Raises NotAllowed."""
    if needed != ANY_MEMBER and not caller.may(needed):
        raise NotAllowed(roles.lacking(caller, what, needed))
