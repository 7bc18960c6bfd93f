"""What the cluster knows of this node: birth and goodbye, capacity, telemetry, and the mDNS advertisement."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from node import capacity as capacities
from node.speed import Speed, idle
from potluck import __version__, lifecycle
from potluck.bus.mqtt import Bus, Envelope
from potluck.bus.outbox import Outbox
from potluck.errors import Conflict, PotluckError, Unavailable
from potluck.logs import fields
from potluck.net.addresses import base_urls, reachable_addresses
from potluck.net.discovery import Discovery, Service
from potluck.settings import NodeSettings
from potluck.surviving import surviving
from potluck.wire.addresses import Scheme
from potluck.wire.births import CoordinatorStatus, NodeCapacity, NodeStatus, NodeTelemetry, in_our_versions
from potluck.wire.topics import Topics
from potluck.wire.values import Capacity, NodeData

log = logging.getLogger(__name__)

GOODBYE_SECONDS = 2.0
LOOK_SECONDS = 2.0
"""How long the machine is watched to see whether it is idle."""
PUT_RIGHT_SECONDS = 1.0
"""When others overwrite our retained birth or capacity, we publish it again at once; if that goes on, only with telemetry."""
COORDINATORS_KNOWN = 64
RIVALS_NAMED = 64


class Presence:
    """One session of a node in its cluster. `joined`: the broker has our birth, on the present connection."""

    def __init__(
        self,
        settings: NodeSettings,
        topics: Topics,
        node_id: str,
        session: str,
        port: int,
        collective: str,
        scheme: Scheme,
    ) -> None:
        self._settings = settings
        self._topics = topics
        self._node_id = node_id
        self._session = session
        self._port = port
        self._scheme: Scheme = scheme
        self._capacity = capacities.read()
        self._data: tuple[NodeData, ...] = ()
        self._data_missing: dict[str, str] = {}
        self._rivals: set[str] = set()
        self._living: set[str] = set()
        """Those of `_rivals` that sent telemetry: two nodes with one id must not replace each other for ever."""
        self._overwritten: set[str] = set()
        """Topics where a message of others is retained instead of ours."""
        self._put_right_at: dict[str, float] = {}
        self._coordinators: dict[str, None] = {}
        """Coordinator sessions that we have told of us, or that were there when we came."""
        self._before: dict[str, str] = {}
        """Sessions of this id that were there when we came, and their addresses. They are our own earlier ones, unless one is heard again."""
        self.urls = base_urls(settings.listen.host, port, scheme)
        """Present addresses of this node's blobs: a machine's addresses change."""
        self.status_topic = topics.node(node_id, "status")
        self._capacity_topic = topics.node(node_id, "capacity")
        self.collective = collective
        self.joined = False
        self._being_born = False
        self.births = 0
        self._told_again_at = -PUT_RIGHT_SECONDS
        self._lost_at = 0.0
        """On the monotonic clock: since when the broker that we had joined is gone; 0: it is there, or we never joined."""
        self._coordinator_lost_at = time.time()

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def status(self, state: Literal["online", "offline"], *, left: bool = False) -> NodeStatus:
        """A birth or a will; a goodbye when we have `left`."""
        if state == "offline":
            return in_our_versions(NodeStatus(node_id=self._node_id, session=self._session, state=state, left=left))
        return in_our_versions(
            NodeStatus(
                node_id=self._node_id,
                session=self._session,
                state=state,
                http=self.urls,
                collective=self.collective,
                software=lifecycle.software() | self._capacity.runtimes,
            )
        )

    def watch(self, bus: Bus, outbox: Outbox, give_up: Callable[[Conflict], None]) -> None:
        """Keep our retained birth in place: the will of an earlier session may come after it, and would make us look offline.

        (The broker sends a will only when it notices the loss: that may be long after a dead node was started again.)
        Calls `give_up` where another living node had this id before us: both would carry out each command.
        """

        def on_status(envelope: Envelope) -> None:
            message = envelope.message
            if message == self.status("online"):
                self._overwritten.discard(self.status_topic)
                return
            if not self.joined:
                if isinstance(message, NodeStatus) and message.session != self._session and message.state == "online":
                    self._before[message.session] = ", ".join(message.http)
                if self._being_born:  # it may come after our birth, which is not confirmed yet
                    self._overwritten.add(self.status_topic)
                return
            other = ""
            if isinstance(message, NodeStatus) and message.session != self._session:
                other = message.session
                if message.state == "online" and other not in self._rivals and len(self._rivals) < RIVALS_NAMED:
                    self._rivals.add(other)
                    where = fields(node=self._node_id, http=",".join(message.http) or None)
                    log.error("another node uses this id: give one of them another --node-id or --state-dir %s", where)
            if other not in self._living:
                self._put_right(self.status_topic, outbox)

        def on_capacity(envelope: Envelope) -> None:
            if not self.joined or envelope.message == self._capacity_message():
                self._overwritten.discard(self._capacity_topic)
            else:
                self._put_right(self._capacity_topic, outbox)

        def on_telemetry(envelope: Envelope) -> None:
            message = envelope.message
            if isinstance(message, NodeTelemetry) and message.session in self._rivals:
                self._living.add(message.session)
            if isinstance(message, NodeTelemetry) and message.session in self._before:
                where = f" at {http}" if (http := self._before[message.session]) else ""
                give_up(
                    Conflict(
                        f"the node{where} has the id {self._node_id!r} too, and was here first: "
                        "give one of them another --node-id or --state-dir"
                    )
                )

        bus.subscribe(self.status_topic, on_status)
        bus.subscribe(self._capacity_topic, on_capacity)
        bus.subscribe(self._topics.node(self._node_id, "telemetry"), on_telemetry)

    def _put_right(self, topic: str, outbox: Outbox) -> None:
        """Publish again what must be retained on this topic, in place of what others have published."""
        self._overwritten.add(topic)
        now = time.monotonic()
        if now - self._put_right_at.get(topic, -PUT_RIGHT_SECONDS) < PUT_RIGHT_SECONDS:
            return
        self._put_right_at[topic] = now
        log.info("messages of others about this node replaced %s", fields(topic=topic))
        message = self._capacity_message() if topic == self._capacity_topic else self.status("online")
        outbox.publish(topic, message, retain=True)

    def tell_anew(self, session: str, outbox: Outbox) -> None:
        """A new coordinator has come after us: our retained messages may be lost or forged, so publish them again."""
        if session in self._coordinators or not self.joined:
            return
        self._know(session)
        self.tell_again(outbox)

    def tell_again(self, outbox: Outbox) -> None:
        """Publish who we are and what we have, as at birth; not often, whoever asks."""
        now = time.monotonic()
        if self.joined and now - self._told_again_at >= PUT_RIGHT_SECONDS:
            self._told_again_at = now
            outbox.publish(self.status_topic, self.status("online"), retain=True)
            outbox.publish(self._capacity_topic, self._capacity_message(), retain=True)

    def _know(self, session: str) -> None:
        self._coordinators[session] = None
        while len(self._coordinators) > COORDINATORS_KNOWN:
            del self._coordinators[next(iter(self._coordinators))]

    def lost(self) -> None:
        """The connection is lost, and so, as far as we know, the coordinator: its retained status will tell again."""
        self._coordinator_lost_at = self._coordinator_lost_at or time.time()
        if self.joined:
            self.joined = False
            self._lost_at = time.monotonic()

    def on_coordinator(self, status: CoordinatorStatus, *, retained: bool) -> None:
        """Remember since when there is no coordinator: `potluck status` hears it from us when nobody else is left."""
        if status.state == "online":
            self._coordinator_lost_at = 0.0
            if retained or not self.joined:  # it was there before us, and gets our birth
                self._know(status.session)
        elif not self._coordinator_lost_at:
            self._coordinator_lost_at = status.since or time.time()

    async def birth(self, bus: Bus) -> None:
        """Publish our birth after each connect: the broker may have forgotten us, or published our will."""
        self.urls = base_urls(self._settings.listen.host, self._port, self._scheme)
        self._being_born = True
        try:
            await bus.publish(self.status_topic, self.status("online"), retain=True)
        finally:
            self._being_born = False
        self.joined = True
        self.births += 1
        await self._publish_capacity(bus)
        log.info("node joined %s", fields(node=self._node_id, cluster=self._settings.cluster))
        if self._lost_at:
            away_seconds = round(time.monotonic() - self._lost_at, 1)
            self._lost_at = 0.0
            # A warning, as for the loss: people who saw that want to know that it is over.
            log.warning("node reconnected %s", fields(node=self._node_id, after_seconds=away_seconds))

    async def goodbye(self, bus: Bus, outbox: Outbox) -> None:
        """Send what waits in `outbox`, and then our goodbye; takes at most GOODBYE_SECONDS, and only if somebody listens."""
        if not self.joined and not self._being_born:  # a birth under way may be known already
            return
        self.joined = False
        try:
            async with asyncio.timeout(GOODBYE_SECONDS):
                await outbox.drained()
                await bus.publish(self.status_topic, self.status("offline", left=True), retain=True)
        except (TimeoutError, PotluckError) as error:
            log.info("no goodbye %s", fields(reason=str(error) or "the bus did not take it in time"))

    async def measure(self, bus: Bus, kept_in: Path, at_work: Callable[[], bool]) -> None:
        """Measure how fast this machine is, after the birth (which must not wait for it), and again while it is idle (`speed`)."""
        threads = self._settings.threads
        gflops = 0.0
        with surviving("measuring of speed"):
            gflops = await capacities.measure(kept_in, threads)
        speed = Speed(gflops)
        await self._tell_speed(bus, speed)
        while (wait_seconds := speed.wait_seconds) is not None:
            await asyncio.sleep(wait_seconds)
            busy_seconds, all_seconds = capacities.processor_seconds()
            await asyncio.sleep(LOOK_SECONDS)
            busy_now, all_now = capacities.processor_seconds()
            if at_work() or not idle(busy_now - busy_seconds, all_now - all_seconds):
                continue
            gflops = 0.0
            with surviving("measuring of speed"):
                gflops = await capacities.benchmark(threads, gently=True)
            if speed.measured(gflops):
                with surviving("keeping of the speed"):
                    await capacities.keep(kept_in, speed.gflops, threads)
                await self._tell_speed(bus, speed)

    async def _tell_speed(self, bus: Bus, speed: Speed) -> None:
        self._capacity = replace(self._capacity, gflops=speed.gflops)
        log.info("speed known %s", fields(node=self._node_id, gflops=speed.gflops))
        await self._tell_capacity(bus)

    def engine_runs(self, outbox: Outbox, runtimes: Mapping[str, str]) -> None:
        """Note the versions of a started engine. They differ from ours where packages were upgraded after we started."""
        if (engine := runtimes.get("potluck", __version__)) != __version__:
            log.warning("engine of another version: restart this node %s", fields(engine=engine, node=__version__))
        known = self._capacity.runtimes
        if (found := {name: runtimes.get(name, version) for name, version in known.items()}) != known:
            self._capacity = replace(self._capacity, runtimes=found)
            if self.joined:
                outbox.publish(self.status_topic, self.status("online"), retain=True)
                outbox.publish(self._capacity_topic, self._capacity_message(), retain=True)

    async def announce(self, bus: Bus, data: tuple[NodeData, ...], missing: Mapping[str, str]) -> None:
        """Publish which data sets live here, and which of them are unavailable."""
        self._data, self._data_missing = data, dict(missing)
        await self._tell_capacity(bus)

    async def telemetry(
        self,
        outbox: Outbox,
        attempts: Callable[[], tuple[str, ...]],
        replicas: Callable[[], tuple[str, ...]],
        serving: Callable[[], bool],
        gives_way: Callable[[], bool],
        shortage: Callable[[], str],
    ) -> None:
        """Publish how busy this machine is, every `telemetry_seconds`, until cancelled."""
        readings = capacities.Telemetry()
        topic = self._topics.node(self._node_id, "telemetry")
        while True:
            await asyncio.sleep(self._settings.telemetry_seconds)
            if not self.joined:
                continue
            with surviving("telemetry"):
                for overwritten in tuple(self._overwritten):
                    self._put_right(overwritten, outbox)
                reading = readings.read(
                    self._node_id, self._session, attempts(), replicas(), serving=serving(), gives_way=gives_way(),
                    coordinator_lost_at=self._coordinator_lost_at, shortage=shortage(),
                )  # fmt: skip
                outbox.publish(topic, reading, qos=0, encoding="json")

    async def advertise(self, discovery: Discovery, ca: str = "") -> None:
        """Advertise facts that do not change by mDNS. It is for people and tools, and may fail: the bus is what counts.

        `ca` names the closed cluster, as in `Service`.
        """
        service = Service(
            id=self._node_id,
            cluster=self._settings.cluster,
            role="node",
            host=reachable_addresses(self._settings.listen.host)[0],
            port=self._port,
            cores=self._capacity.cores,
            memory_bytes=self._capacity.memory_bytes,
            gpus=len(self._capacity.gpus),
            ca=ca,
        )
        try:
            await discovery.advertise(service)
        except Unavailable as error:
            log.warning("not advertised %s", fields(reason=error.message))

    async def _tell_capacity(self, bus: Bus) -> None:
        if self.joined:
            try:
                await self._publish_capacity(bus)
            except PotluckError as error:  # the next birth will tell it
                log.debug("capacity not published yet %s", fields(reason=error.message))

    async def _publish_capacity(self, bus: Bus) -> None:
        await bus.publish(self._capacity_topic, self._capacity_message(), retain=True)

    def _capacity_message(self) -> NodeCapacity:
        return NodeCapacity(
            node_id=self._node_id, capacity=self._capacity, data=self._data, data_missing=self._data_missing
        )
