"""Other coordinators of this cluster's name on the network, each with a bus of its own: who is told, and who gives way.

Nodes and clients that look for the cluster by its name may find either, so a person has to choose. Where one of the two has
nothing to lose, it goes by itself. mDNS is a hint alone: what it shows counts once the bus there says the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable

from potluck.bus import Envelope, MqttBus, in_turn
from potluck.discovery import Discovery, Service
from potluck.errors import GaveWay, Unavailable
from potluck.logs import Seldom, fields
from potluck.messages import CoordinatorStatus
from potluck.network import refusal
from potluck.settings import BusTimings
from potluck.surviving import surviving
from potluck.topics import Topics

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
ASK_SECONDS = 5.0
"""So long a bus may take to let us in and say who serves it."""
ASK_AGAIN_SECONDS = 30.0
ASKED_AT_ONCE = 8
"""Of the coordinators that are found, so many are asked each time: a network full of forged ones costs no more."""
LOG_SECONDS = 60.0


def gives_way(ours: CoordinatorStatus, theirs: CoordinatorStatus) -> bool:
    """Whether our coordinator goes, because theirs has that cluster's journal, or is older where neither has anything in it."""
    if not ours.empty:
        return False
    return not theirs.empty or (theirs.founded, theirs.cluster_id) < (ours.founded, ours.cluster_id)


class Neighbours:
    """Watches for them. `mine` is how we are advertised, `own` gives our status as it is now."""

    def __init__(
        self,
        discovery: Discovery,
        mine: Service,
        topics: Topics,
        own: Callable[[], CoordinatorStatus],
        timings: BusTimings,
    ) -> None:
        self._discovery = discovery
        self._mine = mine
        self._topics = topics
        self._own = own
        self._timings = timings
        self._asked: dict[tuple[str, int], float] = {}
        self._found: dict[tuple[str, int], CoordinatorStatus] = {}
        self._seldom = Seldom(LOG_SECONDS)

    @property
    def others(self) -> tuple[str, ...]:
        """`host:port` of the brokers of those that were found to be there."""
        return tuple(f"{host}:{port}" for host, port in sorted(self._found))

    async def run(self) -> None:
        """Until cancelled. Raises GaveWay when this coordinator is the one that goes."""
        while True:
            # Whoever is on our own bus is heard there; and an advertisement of ours may be left of an earlier session.
            around = {_broker(one) for one in self._discovery.services("coordinator")} - {_broker(self._mine)}
            for gone in (self._asked.keys() | self._found.keys()) - around:
                self._asked.pop(gone, None)
                self._found.pop(gone, None)
            now = time.monotonic()
            due = [
                place
                for place in sorted(around)
                if now - self._asked.get(place, -ASK_AGAIN_SECONDS) >= ASK_AGAIN_SECONDS
            ]
            due.sort(key=lambda place: self._asked.get(place, 0.0))
            with surviving("look for other coordinators", fatal=(GaveWay,)):
                await asyncio.gather(*(self._look(place) for place in due[:ASKED_AT_ONCE]))
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self, place: tuple[str, int]) -> None:
        theirs = await self._ask(place)
        self._asked[place] = time.monotonic()
        ours = self._own()
        if theirs is None or theirs.session == ours.session:  # nobody, or ourselves
            self._found.pop(place, None)
            return
        self._found[place] = theirs
        where = f"{place[0]}:{place[1]}"
        if gives_way(ours, theirs):
            raise GaveWay(
                f"cluster {self._topics.cluster!r} has a coordinator on this network already, with its broker at {where}, and this "
                "one has kept nothing yet: it gives way. Join that one, or choose another --cluster"
            )
        if self._seldom.due(where) is not None:
            facts = fields(cluster=self._topics.cluster, broker=where, theirs=theirs.cluster_id, ours=ours.cluster_id)
            log.error(
                "another coordinator serves a cluster of this name: nodes and clients may find either; stop one, or give it another "
                "--cluster %s",
                facts,
            )

    async def _ask(self, place: tuple[str, int]) -> CoordinatorStatus | None:
        """The status of the coordinator that is online on that bus; None where there is none."""
        said: asyncio.Future[CoordinatorStatus] = asyncio.get_running_loop().create_future()

        def on_status(envelope: Envelope) -> None:
            status = envelope.message
            if isinstance(status, CoordinatorStatus) and status.state == "online" and not said.done():
                said.set_result(status)

        if await refusal(*place, ASK_SECONDS):  # a record that outlived its coordinator: the bus would warn of it
            return None
        bus = MqttBus(
            in_turn([place]), self._topics, client_id=f"neighbour-{uuid.uuid4().hex[:12]}", timings=self._timings
        )
        bus.subscribe(self._topics.coordinator_status, on_status)
        running = asyncio.create_task(bus.run(), name=f"bus of {place[0]}:{place[1]}")
        try:
            async with asyncio.timeout(ASK_SECONDS):
                await bus.connected(ASK_SECONDS)
                return await said
        except (TimeoutError, Unavailable) as error:
            log.debug("no coordinator there %s", fields(broker=f"{place[0]}:{place[1]}", reason=str(error) or None))
            return None
        finally:
            running.cancel()
            await asyncio.wait([running])
            said.cancel()


def _broker(service: Service) -> tuple[str, int]:
    return service.broker_host or service.host, service.broker_port
