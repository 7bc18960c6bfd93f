"""The members of a cluster, kept in the journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from coordinator.identities.members import (
    STREAM,
    AnyIdentityEvent,
    CertificateRenewed,
    MemberAdded,
    Members,
    MemberTaken,
)
from coordinator.journal import Journal

MANY = 2_000
"""A stream with fewer events is not worth a snapshot."""


class JournaledMembers:
    """`members` is only read by others; `record` changes it."""

    def __init__(self, journal: Journal, clock: Callable[[], float] = time.time) -> None:
        self._journal = journal
        self.clock = clock
        self.members = Members()
        self.changes = 0
        """Grows with each change of who has rights at the broker."""
        self._events = 0
        """How many the stream has."""
        for event in journal.replay(STREAM, AnyIdentityEvent):  # type: ignore[arg-type, var-annotated]
            self.members.apply(event)
            self._events += 1
        self.members.forget(clock())
        self._shorten()

    def record(self, events: Sequence[AnyIdentityEvent]) -> None:
        """Write events and apply them. Raises Unavailable; then nothing has changed."""
        if not events:
            return
        self._journal.append(STREAM, *events)
        for event in events:
            self.changes += self._changes_rights(event)
            self.members.apply(event)
        self._events += len(events)
        self._shorten()

    async def safe(self) -> None:
        """Return when not even a power cut undoes what was recorded. Raises Unavailable."""
        await self._journal.sync()

    def _changes_rights(self, event: AnyIdentityEvent) -> bool:
        """Whether the broker has to know. A renewal of whoever has rights is none of its business, and is most of what happens."""
        if isinstance(event, CertificateRenewed):
            return self.members.standing(event.identity, self.clock()) is None
        return isinstance(event, MemberAdded | MemberTaken)

    def _shorten(self) -> None:
        """Begin the stream again if most of it is over: each renewal of each member is an event."""
        most = max(MANY, 2 * (len(self.members.known) + len(self.members.tokens)))
        if self._events > most:
            self.members.forget(self.clock())
            kept = self.members.snapshot()
            self._journal.snapshot(STREAM, kept)
            self._events = len(kept)
