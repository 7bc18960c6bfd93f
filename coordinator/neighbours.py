"""Other coordinators with this cluster's name on the network, each with its own bus: tells people, and decides who gives way.

Nodes and clients that look for the cluster by name may find any of them, so a person has to choose. If one of two has nothing to
lose, it ends by itself. mDNS is only a hint: what it shows counts when the bus there says the same.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterable

from potluck.bus.connecting import refusal
from potluck.bus.mqtt import Envelope, MqttBus, in_turn
from potluck.credentials import Credentials
from potluck.errors import GaveWay, Unavailable
from potluck.logs import Seldom, fields
from potluck.net.discovery import Discovery, Service
from potluck.settings import BusTimings
from potluck.surviving import surviving
from potluck.wire.births import CoordinatorStatus
from potluck.wire.topics import Topics

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
BROWSE_AGAIN_SECONDS = 30.0
ASK_SECONDS = 5.0
"""How long a bus may take to accept us and show who serves it."""
ASK_AGAIN_SECONDS = 30.0
FAILED_SECONDS = 5.0
"""The pause after the first failed question; twice as long after each further one, up to ASK_AGAIN_SECONDS."""
ASKED_AT_ONCE = 8
"""How many of the coordinators found are asked each time: a network full of forged ones costs no more."""
OTHERS_NAMED = 8
ID_SHOWN = 16
"""How many characters of a cluster id from others are logged."""
LOG_SECONDS = 60.0


def gives_way(ours: CoordinatorStatus, theirs: CoordinatorStatus) -> bool:
    """Whether our coordinator ends: theirs has that cluster's journal, or is older while both journals are empty."""
    if not ours.empty:
        return False
    return not theirs.empty or (theirs.founded, theirs.cluster_id) < (ours.founded, ours.cluster_id)


class Neighbours:
    """Watches for other coordinators. `mine` is our advertisement, `own` returns our present status.

    `credentials`: in a closed cluster those of a client. Nobody visits the bus of a cluster with another CA.
    """

    def __init__(
        self,
        discovery: Discovery,
        mine: Service,
        topics: Topics,
        own: Callable[[], CoordinatorStatus],
        credentials: Credentials,
        timings: BusTimings,
    ) -> None:
        self._discovery = discovery
        self._mine = mine
        self._topics = topics
        self._own = own
        self._credentials = credentials
        self._timings = timings
        self._due: dict[tuple[str, int], tuple[float, float]] = {}
        """When to ask each one again, on the monotonic clock, and the last pause after a failure."""
        self._found: set[tuple[str, int]] = set()
        self._seldom = Seldom(LOG_SECONDS)

    @property
    def others(self) -> tuple[str, ...]:
        """`host:port` of the brokers of coordinators that were found there; only the first few."""
        return tuple(f"{host}:{port}" for host, port in sorted(self._found)[:OTHERS_NAMED])

    async def run(self) -> None:
        """Work until cancelled. Raises GaveWay when this coordinator must end."""
        browse_at = time.monotonic() + BROWSE_AGAIN_SECONDS
        while True:
            with surviving("look for other coordinators", fatal=(GaveWay,)):
                try:
                    # Look at the network as it is now: a cable is plugged in, a switch is on again, an address comes late.
                    if not await self._discovery.refresh() and time.monotonic() >= browse_at:
                        browse_at = time.monotonic() + BROWSE_AGAIN_SECONDS
                        await self._discovery.look_again()
                except Unavailable as error:
                    if self._seldom.due("network") is not None:
                        log.warning("the network cannot be searched %s", fields(reason=error.message))
                await asyncio.gather(*(self._look(place) for place in self._choose(time.monotonic())))
            await asyncio.sleep(LOOK_SECONDS)

    def _choose(self, now: float) -> list[tuple[str, int]]:
        """Whom to ask now: those that were there last time first, the others at random, so that forged ones keep nobody out."""
        # A coordinator on our own bus is heard there. An advertisement with our address may be left from an earlier session.
        services = self._discovery.services("coordinator")
        around = {_broker(one) for one in services if one.ca == self._mine.ca} - {_broker(self._mine)}
        self._name_others(services)
        self._found &= around
        for gone in self._due.keys() - around:
            del self._due[gone]
        due = [place for place in around if self._due.get(place, (now, 0.0))[0] <= now]
        random.shuffle(due)
        due.sort(key=lambda place: place not in self._found)
        return due[:ASKED_AT_ONCE]

    def _name_others(self, services: Iterable[Service]) -> None:
        """Say that there is a cluster of our name which is not ours: whoever has no certificate of its CA is not even asked."""
        for one in services:
            if one.ca != self._mine.ca and (more := self._seldom.due(f"other CA at {one.host}")) is not None:
                theirs, ours = one.ca or "none: it is open", self._mine.ca or "none: it is open"
                facts = fields(cluster=self._topics.cluster, host=one.host, theirs=theirs, ours=ours, more=more or None)
                log.warning(
                    "a cluster of the same name with another CA is on this network: choose another --cluster %s", facts
                )

    async def _look(self, place: tuple[str, int]) -> None:
        theirs = await self._ask(place)
        ours = self._own()
        if theirs is None:
            waited = min(2 * self._due.get(place, (0.0, FAILED_SECONDS / 2))[1], ASK_AGAIN_SECONDS)
            self._due[place] = time.monotonic() + waited, waited
        else:
            self._due[place] = time.monotonic() + ASK_AGAIN_SECONDS, FAILED_SECONDS / 2
        if theirs is None or theirs.session == ours.session:  # nobody, or ourselves
            self._found.discard(place)
            return
        self._found.add(place)
        where = f"{place[0]}:{place[1]}"
        if gives_way(ours, theirs):
            raise GaveWay(
                f"cluster {self._topics.cluster!r} already has a coordinator on this network, with its broker at {where}. This "
                "one has an empty journal, so it gives way. Join that one, or choose another --cluster"
            )
        if self._seldom.due(where) is not None:
            theirs_id = theirs.cluster_id[:ID_SHOWN]
            facts = fields(cluster=self._topics.cluster, broker=where, theirs=theirs_id, ours=ours.cluster_id)
            log.error(
                "another coordinator serves a cluster with this name: nodes and clients may find either; stop one, or give it another "
                "--cluster %s",
                facts,
            )

    async def _ask(self, place: tuple[str, int]) -> CoordinatorStatus | None:
        """The status of the online coordinator on that bus; None if there is none."""
        said: asyncio.Future[CoordinatorStatus] = asyncio.get_running_loop().create_future()

        def on_status(envelope: Envelope) -> None:
            status = envelope.message
            if isinstance(status, CoordinatorStatus) and status.state == "online" and not said.done():
                said.set_result(status)

        # An advertisement may outlive its coordinator, and the bus would log warnings.
        if await refusal(*place, self._credentials, ASK_SECONDS):
            return None
        bus = MqttBus(
            in_turn([place]),
            self._topics,
            self._credentials,
            client_id=f"neighbour-{uuid.uuid4().hex[:12]}",
            timings=self._timings,
            visiting=True,
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
    # The port for clients of a closed cluster: on the other, we would take the connection of a coordinator with our name over.
    return service.broker_host or service.host, service.client_port if service.ca else service.broker_port
