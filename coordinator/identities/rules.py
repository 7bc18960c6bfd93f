"""Makes the broker do what the table of members says: who has rights, whose connections end. And the proof of who commands."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

from coordinator.identities.authority import Authority, new_pair
from coordinator.identities.journaled import JournaledMembers
from potluck.bus.connecting import take_over
from potluck.credentials import Credentials
from potluck.errors import PotluckError, Unavailable
from potluck.logs import Seldom, fields
from potluck.net.broker import ClosedBroker
from potluck.security import certificates, contexts, folder
from potluck.surviving import surviving

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
"""How often to look whose certificate has ended, and whose connection has still to be ended."""
CERTIFICATE_SECONDS = 60.0
"""How long a certificate lasts that we make to take a connection over."""
CONNECT_SECONDS = 3.0
AT_ONCE = 8
"""Connections taken over at the same time."""
LOG_SECONDS = 60.0


class Rules:
    """`run` must be running. `on_removed` is called with the identity of each member that was removed, once its rights are gone."""

    def __init__(
        self, members: JournaledMembers, broker: ClosedBroker, authority: Authority, host: str, state: Path
    ) -> None:
        """`host`: where the broker listens for us. `state`: a folder for files of a moment."""
        self._members = members
        self._broker = broker
        self._authority = authority
        self._host = host
        self._state = state
        self._lock = asyncio.Lock()
        self._applied = -1
        self._holds = (0.0, 0.0)
        """From when until when the rules hold if nobody changes: then somebody's certificate ends, or our clock was set back."""
        self._allowed = {one.identity for one in members.members.allowed(members.clock())}
        """Who has rights at the broker."""
        self._to_end: set[str] = set()
        self._seldom = Seldom(LOG_SECONDS)
        self.on_removed: Callable[[str], Awaitable[None]] = _nothing

    @property
    def lingering(self) -> int:
        """How many connections of removed members there are, without any right."""
        gone = self._members.members.removed(self._members.clock())
        return sum(identity in gone for identity in self._broker.client_ids.values())

    async def apply(self) -> None:
        """Return when the broker judges by all that was recorded before this call. Raises Unavailable, InvalidSettings."""
        wanted = self._members.changes
        async with self._lock:
            # Those who wait here share the next reload: thousands may join at once.
            if self._applied < wanted:
                await self._apply()

    async def remove(self, identity: str) -> None:
        """Take the rights of a member that was removed, and end its connections. Returns when that is done, or was tried."""
        self._to_end.add(identity)
        try:
            await self.apply()
        finally:  # the broker has its rules later then, but nodes and our HTTP server must not wait for it
            await self.on_removed(identity)
        await self._end(identity)

    async def run(self) -> NoReturn:
        """Follow the clock, until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            with surviving("rules of the broker"):
                try:
                    await self._tick()
                except PotluckError as error:  # if the broker is gone, so are all rights, and soon the coordinator
                    if self._seldom.due("tick") is not None:
                        log.warning("the broker has old rules %s", fields(reason=error.message))

    async def _tick(self) -> None:
        since, until = self._holds
        if self._applied < self._members.changes or not since <= self._members.clock() < until:
            async with self._lock:
                await self._apply()
        for identity in sorted(self._to_end):
            await self._end(identity)
        if (count := self.lingering) and (more := self._seldom.due("lingering")) is not None:
            log.warning("removed members are connected without any right %s", fields(count=count, more=more or None))

    async def _apply(self) -> None:
        changes, now, table = self._members.changes, self._members.clock(), self._members.members
        holds, wanted = (now, table.next_end(now)), table.allowed(now)
        held = [one.identity for one in wanted if one.identity not in self._allowed and await self._cut(one.identity)]
        wanted = tuple(one for one in wanted if one.identity not in held)
        await self._broker.allow(wanted)
        self._allowed = {one.identity for one in wanted}
        if held:
            raise Unavailable(
                f"{held[0]} gets no rights while a connection of whoever had this name before cannot be ended: ask again",
                retry_after_seconds=1.0,
            )
        self._applied, self._holds = changes, holds

    async def _end(self, identity: str) -> None:
        """End the connections of a removed member: whoever connects with a client's id takes its connection over."""
        if self._members.members.standing(identity, self._members.clock()) is not None:
            self._to_end.discard(identity)  # it was let in anew meanwhile
            return
        count, failed = self._count(identity), await self._cut(identity)
        if not failed:
            self._to_end.discard(identity)
            log.info("connections of a removed member ended %s", fields(member=identity, count=count))
        elif (more := self._seldom.due(f"end {identity}")) is not None:
            facts = fields(member=identity, count=len(failed), reason=str(failed[0]), more=more or None)
            log.warning("connections of a removed member still stand, without any right %s", facts)

    async def _cut(self, identity: str) -> list[PotluckError]:
        """End the connections of this name, which has no rights at the broker; returns why some still stand.

        mosquitto keeps a connection for longer than its certificate, and judges by the name alone: whoever had a name before must be gone
        when it gets rights again.
        """
        # On the port for daemons an id is the identity, and nowhere else.
        ids = [one for one, who in self._broker.client_ids.items() if who == identity and one != identity]
        places = [(one, self._broker.client_port) for one in ids]
        if identity in self._broker.client_ids or (identity in self._to_end and identity.startswith("node:")):
            places.append((identity, self._broker.port))
        if not places:
            return []
        ours = self._credentials(identity)
        at_once = asyncio.Semaphore(AT_ONCE)

        async def end(client_id: str, port: int) -> None:
            async with at_once:
                await take_over((self._host, port), ours, client_id, CONNECT_SECONDS)

        ended = await asyncio.gather(*(end(*place) for place in places), return_exceptions=True)
        failed: list[PotluckError] = []
        for error in ended:
            if isinstance(error, PotluckError):
                failed.append(error)
            elif isinstance(error, BaseException):
                raise error
        return failed

    def _count(self, identity: str) -> int:
        return sum(who == identity for who in self._broker.client_ids.values())

    def _credentials(self, identity: str) -> Credentials:
        """Credentials in the member's name, for a minute."""
        kind, _, name = identity.partition(":")
        profile = certificates.node_profile(name) if kind == "node" else certificates.client_profile(name, "viewer")
        with tempfile.TemporaryDirectory(prefix=".take-over-", dir=self._state) as made:
            where = Path(made)
            folder.write(where / folder.CA_CERTIFICATE, self._authority.ca, folder.PUBLIC)
            folder.write_pair(where, kind, *new_pair(self._authority, profile, CERTIFICATE_SECONDS))
            context = contexts.client_context(where, kind, certificates.BROKER)
        return Credentials(identity, client_tls=context, broker_tls=context)


async def _nothing(identity: str) -> None:
    """Before anybody asks to be told."""
