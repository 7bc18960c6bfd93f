"""Another coordinator of this cluster on the same bus: only one may serve it. (`neighbours` are those with a bus of their own.)"""

from __future__ import annotations

import asyncio
import logging
import time

from potluck.bus.mqtt import Envelope
from potluck.errors import Conflict
from potluck.logs import Seldom, fields
from potluck.wire.births import CoordinatorStatus

log = logging.getLogger(__name__)

STATUS_SECONDS = 5.0
"""How often a coordinator says its retained status again."""
RIVAL_SECONDS = 2 * STATUS_SECONDS + 1
"""Another coordinator that runs says within so long that it is there."""
RETAINED_SECONDS = 0.3
"""How long we wait for what another coordinator has retained. It comes at once after we subscribe, if there is any."""
LOG_SECONDS = 60.0


class Rival:
    """What the bus says of another coordinator. `session` is our own; `announced`: whether we have said that we are there."""

    def __init__(self, cluster: str, session: str, announced: asyncio.Event) -> None:
        self._cluster = cluster
        self._session = session
        self._announced = announced
        self._status: CoordinatorStatus | None = None
        self._heard_at = 0.0
        self._lives = False
        """Whether it has sent something now. What the broker retains may be from a coordinator that is gone."""
        self._heard = asyncio.Event()
        self._seldom = Seldom(LOG_SECONDS)

    @property
    def here(self) -> bool:
        return self._status is not None

    def on_status(self, envelope: Envelope) -> None:
        """Notice whether another coordinator is on this bus."""
        message = envelope.message
        if not isinstance(message, CoordinatorStatus) or message.session == self._session:
            return
        if message.state == "offline":
            if self._status is not None and self._status.session == message.session:
                self._status = None
        else:
            self._status, self._heard_at = message, time.monotonic()
            self._lives = self._lives or not envelope.retained
            self._heard.set()
            if self._announced.is_set() and self._seldom.due("rival") is not None:
                where = fields(cluster=self._cluster, http=",".join(message.http))
                log.error("another coordinator is on this bus: stop one %s", where)

    async def check_none(self, *, shared: bool) -> None:
        """Return if no other coordinator is on the bus; raises Conflict. `shared`: others may have connected to this broker before us."""
        if not self._announced.is_set() and shared:
            await self._hears(RETAINED_SECONDS)
            if self._status is not None and not self._lives:
                # The broker may have kept this over a power cut, and the coordinator may be gone. One that runs says it again.
                where = fields(http=",".join(self._status.http))
                log.warning("another coordinator was on this bus, is it there? %s", where)
                self._heard.clear()
                if not await self._hears(RIVAL_SECONDS):
                    self._status = None
        self._heard.clear()
        if self._announced.is_set() and time.monotonic() - self._heard_at > 3 * STATUS_SECONDS:
            # If it were still there, it would have said so by now.
            self._status = None
        self.refuse()

    def refuse(self) -> None:
        """Raises Conflict if another coordinator is on the bus."""
        if self._status is not None:
            raise Conflict(
                f"cluster {self._cluster!r} has a coordinator on this bus already ({', '.join(self._status.http)}): "
                "stop it, or choose another --cluster"
            )

    async def _hears(self, seconds: float) -> bool:
        """Whether another coordinator is heard of within this time."""
        try:
            async with asyncio.timeout(seconds):
                await self._heard.wait()
        except TimeoutError:
            return False
        return True
