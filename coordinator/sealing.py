"""The seals of what a closed cluster's coordinator tells its nodes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from potluck.logs import Seldom, fields
from potluck.wire.commands import Sealed
from potluck.wire.seals import Sealer
from potluck.wire.topics import Topics

log = logging.getLogger(__name__)

_LOG_SECONDS = 60.0


class ForwardClock:
    """Seconds since the epoch, by a clock that never goes back. It goes on while the machine sleeps.

    If the machine's clock is set forward, as one without a battery is after its start, this follows. If it is set back, this goes on.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self._wall = wall
        self._elapsed = elapsed
        self._now, self._at = wall(), elapsed()

    def __call__(self) -> float:
        at = self._elapsed()
        self._now, self._at = max(self._wall(), self._now + at - self._at), at
        return self._now


class Sealing:
    """Seals commands just before they are sent: for the session in which the node is now, and valid for seconds only.

    `session_of`: the present session of a node; "": it is not known. Such a node gets no command.
    """

    def __init__(
        self, sealer: Sealer, topics: Topics, session_of: Callable[[str], str], clock: Callable[[], float]
    ) -> None:
        self._sealer = sealer
        self._topics = topics
        self._session_of = session_of
        self._clock = clock
        self._seldom = Seldom(_LOG_SECONDS)
        self.withheld = 0
        """Commands that were not sent, because nothing is known of their node's session."""

    @property
    def topic_filter(self) -> str:
        """The topics of commands."""
        return self._topics.node("+", "inbox")

    def seal(self, topic: str, body: bytes) -> Sealed | None:
        """As `potluck.bus.exchange.Seal`."""
        node_id = self._topics.segment(topic, 1)
        session = self._session_of(node_id)
        if not session:
            self.withheld += 1
            if (more := self._seldom.due(node_id)) is not None:
                log.info("command not sent: the node is not known %s", fields(node=node_id, more=more or None))
            return None
        found = self._sealer.seal(topic, f"node:{node_id}", session, body, self._clock())
        return Sealed(seal=found.seal, body=found.body, signature=found.signature)
