"""The coordinator daemon's composition root: broker, bus, journal, dispatcher, serving, gateway, advertisement."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from coordinator.blob_rights import BlobRights
from coordinator.callers import Callers
from coordinator.control import Control
from coordinator.copies.locations import Holders
from coordinator.copies.pins import Keeping
from coordinator.copies.replication import Copies
from coordinator.dispatch.announcer import Announcer
from coordinator.dispatch.collecting import Collector
from coordinator.dispatch.deletion import Deletion
from coordinator.dispatch.dispatcher import Dispatcher
from coordinator.dispatch.jobstore import JobStore
from coordinator.dispatch.leases import Leases
from coordinator.dispatch.packed import Packed
from coordinator.events.stream import Events
from coordinator.gateway import routes as gateway
from coordinator.gateway.answers import in_words
from coordinator.gateway.gate import Gate
from coordinator.gateway.shelf import Shelf
from coordinator.journal import FATAL, Journal
from coordinator.membership import Change, Membership, NodeJoined, NodeLost, NodeRefused, NodeUnknown, Rebirths
from coordinator.neighbours import Neighbours
from coordinator.plans import node_data as federated
from coordinator.registry import Registry
from coordinator.requests import Requests
from coordinator.rival import RIVAL_SECONDS, STATUS_SECONDS, Rival
from coordinator.serving.bus_requests import BusRequests
from coordinator.serving.endpoints import OneNode
from coordinator.serving.inference import Inference
from coordinator.serving.serving import Serving
from potluck import __version__, lifecycle, reloading
from potluck.blobs import server as blob_server
from potluck.blobs.download import Downloader
from potluck.blobs.rights import OPEN, Rights
from potluck.blobs.store import BlobStore
from potluck.bus.filters import matches
from potluck.bus.mqtt import Addresses, Envelope, MqttBus, Will, in_turn
from potluck.bus.outbox import Outbox
from potluck.credentials import FOLDER, Credentials
from potluck.errors import GaveWay, InvalidSettings, PotluckError, Unavailable
from potluck.logs import Seldom, fields
from potluck.net.addresses import base_urls, bind_gateway, reachable_addresses
from potluck.net.broker import Broker, start_broker
from potluck.net.discovery import Discovery, Service
from potluck.net.http import serve_http
from potluck.net.side import ca_hint
from potluck.settings import (
    CoordinatorSettings,
    check_coordinator,
    is_closed,
    is_loopback,
    parse_address,
    short_hostname,
    state_folder,
)
from potluck.sole_use import sole_use
from potluck.surviving import surviving
from potluck.wire.births import (
    OURS,
    CoordinatorStatus,
    NodeCapacity,
    NodeStatus,
    NodeTelemetry,
    in_our_versions,
    versions_of,
)
from potluck.wire.commands import Rebirth
from potluck.wire.reports import BlobsStored, HoldFailed, InferenceFinished, ModelLoaded, ModelLoadFailed, ModelUnloaded
from potluck.wire.topics import NODE_ID, Topics

if TYPE_CHECKING:
    from coordinator.identities.closed import Closed

log = logging.getLogger(__name__)

CHANGEABLE = reloading.ALL | {"client_quota_bytes"}
"""The settings that can change while it runs."""

DRAIN_SECONDS = 5.0
"""How long a stop may wait until the requests that were taken are answered."""
TICK_SECONDS = 0.5
BROKER_CHECK_SECONDS = 1.0
LOG_SECONDS = 60.0
"""After so long, the same fault in what others send is logged again."""
UPLOAD_LIMIT_BYTES = 16 * 2**30


class Coordinator:
    """One coordinator. `run` returns after `stop` is set and everything is put down in order.

    Raises InvalidSettings for a listen address that is not allowed or taken, Conflict when another coordinator uses the
    same state folder, Unavailable when no broker can be reached or started, or when it died.
    """

    def __init__(self, settings: CoordinatorSettings) -> None:
        check_coordinator(settings)
        self.settings = settings
        self.topics = Topics(settings.cluster)
        self.session = uuid.uuid4().hex
        self.folder = state_folder(settings.state_dir, "coordinator")
        self._name = f"{short_hostname()}-{self.session[:6]}"
        self.credentials = Credentials.of("coordinator", self._name)
        self._seldom = Seldom(LOG_SECONDS)
        self._rebirths = Rebirths()
        self._announced = asyncio.Event()
        self._rival = Rival(settings.cluster, self.session, self._announced)
        self._urls: tuple[str, ...] = ()
        self._neighbours: Neighbours | None = None
        self._gave_way: GaveWay | None = None
        self._stopping_since = 0.0
        """Since when it is known that we stop, as Unix time; 0: we do not."""
        self._store: BlobStore | None = None
        self._closed: Closed | None = None

    def take(self, settings: CoordinatorSettings) -> None:
        """Take over what CHANGEABLE names."""
        self.settings = settings
        if self._store is not None:
            self._store.limit_bytes = settings.blob_limit_bytes
            self._store.quota_bytes = settings.client_quota_bytes

    async def run(self, stop: asyncio.Event) -> None:
        """Start, say ready, serve until `stop`, and stop in reverse order."""
        settings = self.settings
        async with AsyncExitStack() as stack:
            tell_lock = stack.enter_context(sole_use(self.folder, "coordinator", settings.cluster))
            journal = Journal(self.folder / "journal.sqlite")
            stack.callback(journal.close)
            store = self._store = BlobStore(
                self.folder / "blobs", settings.blob_limit_bytes, quota_bytes=settings.client_quota_bytes
            )
            self._membership = Membership(settings.node_timeout_seconds)
            closed = self._closed = self._found(journal)
            callers = None if closed is None else Callers(closed.role_of, closed.bearer)
            broker, addresses = await self._broker(stack)
            sock = bind_gateway(settings.listen)
            stack.callback(sock.close)
            port = sock.getsockname()[1]
            if closed is not None:
                closed.serve(port)
            self._urls = base_urls(settings.listen.host, port, self.credentials.scheme)

            def urls() -> tuple[str, ...]:
                return self._urls

            downloader = await stack.enter_async_context(Downloader(store, self.credentials))

            offline = in_our_versions(
                CoordinatorStatus(
                    session=self.session, epoch=journal.epoch, state="offline", cluster_id=journal.cluster_id
                )
            )
            since = time.time()

            def status() -> CoordinatorStatus:
                if self._stopping_since:
                    return replace(offline, since=self._stopping_since)
                return replace(
                    offline,
                    state="online",
                    closed=closed is not None,
                    http=self._urls,
                    software=lifecycle.software(),
                    since=since,
                    # There may be room for a small blob, but none for a large one.
                    shortage=store.shortage() or self._dispatcher.shortage,
                    founded=journal.founded,
                    empty=journal.empty,
                    others=self._neighbours.others if self._neighbours is not None else (),
                )

            status_topic = self.topics.coordinator_status
            bus = MqttBus(
                addresses,
                self.topics,
                self.credentials,
                client_id=f"coordinator-{self.session[:12]}" if closed is None else closed.credentials.identity,
                will=Will(status_topic, offline),
                timings=settings.bus,
            )
            self._outbox = Outbox(bus, before=journal.flush)
            holders = Holders(self._membership, urls)
            registry = Registry(journal)
            keeping = Keeping(registry, store)
            self._copies = Copies(
                registry=registry,
                store=store,
                downloader=downloader,
                membership=self._membership,
                holders=holders,
                journal=journal,
                topics=self.topics,
                outbox=self._outbox,
            )
            # Answers and batches have an outbox of their own, so that they wait for nothing else.
            answers = Outbox(bus)
            self._inference = Inference(
                registry=registry,
                settings=settings,
                node_at=self._membership.node_at,
            )
            stack.callback(self._inference.stop)
            bus_requests = BusRequests(
                self._inference, topics=self.topics, outbox=answers, settings=settings, callers=callers
            )
            self._serving = Serving(
                topics=self.topics,
                outbox=self._outbox,
                inference=self._inference,
                membership=self._membership,
                registry=registry,
                journal=journal,
                settings=settings,
                holders=holders.of,
                endpoint=partial(OneNode, topics=self.topics, outbox=answers),
                epoch=journal.epoch,
            )
            jobs = JobStore(
                journal,
                registry,
                store,
                urls,
                lambda name: federated.joined(name, self._membership.data().get(name, {})),
                synchronous=closed is None,
            )
            leases = Leases(
                topics=self.topics,
                outbox=self._outbox,
                membership=self._membership,
                settings=settings,
                epoch=journal.epoch,
                holders=holders,
            )
            self._events = Events(journal, jobs.jobs.get)
            self._events.tell("coordinator", settings.cluster, "started", f"potluck {__version__}")
            deletion = Deletion(registry, self._serving, jobs, store)
            packed = Packed(registry, deletion)
            self._dispatcher = Dispatcher(
                announcer=Announcer(self.topics, self._outbox, jobs, leases, urls),
                registry=registry,
                serving=self._serving,
                jobs=jobs,
                leases=leases,
                collector=Collector(store, downloader),
                packed=packed,
                settings=settings,
            )
            rights: Rights = OPEN
            if closed is not None:
                rights = BlobRights(
                    closed.role_of,
                    named=keeping.names,
                    results=lambda: [job.ended for job in jobs.jobs.values() if job.ended is not None],
                    sent=store.sent,
                )
            control = Control(
                dispatcher=self._dispatcher,
                registry=registry,
                serving=self._serving,
                membership=self._membership,
                deletion=deletion,
                packed=packed,
                holders=holders,
                store=store,
                urls=urls,
                sync=journal.sync,
                events=self._events,
                members=None if closed is None else closed.questions,
                may_get=rights.allowed,
            )
            # Of its own: whoever asks, while thousands of commands wait to be sent, is answered before them.
            replies = Outbox(bus, before=journal.flush)
            requests = Requests(replies, control, bus.reply, callers)
            self._subscribe(bus, requests, bus_requests)

            async def announce() -> None:
                await self._rival.check_none(shared=bool(settings.seeds))
                tell_lock(bus.place)
                if closed is not None:
                    await bus.publish(self.topics.coordinator_proof, closed.proof(), retain=True)
                await bus.publish(status_topic, status(), retain=True)
                self._announced.set()
                self._dispatcher.republish()

            bus.on_connect(announce)
            if closed is not None:
                bus.seal_on(closed.sealing.topic_filter, closed.sealing.seal)
                self._follow_members(closed)

            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(part, name=name)
                    for name, part in (
                        ("bus", bus.run()),
                        ("outbox", self._outbox.run()),
                        ("dispatcher", self._dispatcher.run()),
                        ("serving", self._serving.run()),
                        ("answers", answers.run()),
                        ("replies", replies.run()),
                        ("requests", requests.run()),
                        ("copies", self._copies.run()),
                        ("ticks", self._tick()),
                        ("status", self._say_again(status, port)),
                    )
                ]
                running.append(
                    tasks.create_task(
                        lifecycle.report(lambda: self._standing(bus), lambda: _unwell(bus)), name="report"
                    )
                )
                if broker is not None:
                    running.append(tasks.create_task(_watch(broker), name="broker watch"))
                if closed is not None:
                    running.append(tasks.create_task(closed.rules.run(), name="rules"))
                    running.append(tasks.create_task(closed.keep_certificates(), name="certificates"))
                shelf = Shelf(store, downloader, urls, settings.http_body_limit_bytes)
                routes = [
                    *blob_server.routes(store, writable=True, max_bytes=UPLOAD_LIMIT_BYTES, rights=rights),
                    *gateway.routes(
                        control,
                        self._serving,
                        self._inference,
                        self._membership,
                        settings,
                        shelf,
                        bus,
                        closed=closed is not None,
                        more_metrics=(lambda: "") if closed is None else closed.metrics,
                    ),
                ]
                middlewares: tuple[Any, ...] = (in_words,)
                if closed is not None and callers is not None:
                    gate = Gate(callers)
                    routes = gate.routes([*routes, *closed.routes()])
                    middlewares = (gate.middleware, closed.visitors.middleware(), in_words)
                async with (
                    serve_http(sock, routes, self.credentials, middlewares, settings.http),
                    AsyncExitStack() as advertisement,
                ):
                    await self._join(bus)
                    if broker is not None:
                        running.append(
                            tasks.create_task(_need_answers(bus, self._patience_seconds), name="broker answers")
                        )
                    if settings.discovery.enabled:
                        mine = dataclasses.replace(
                            self._service(port, broker), founded=journal.founded, empty=journal.empty
                        )
                        discovery = await self._advertise(advertisement, mine)
                        visiting = self.credentials if closed is None else closed.operator
                        self._neighbours = Neighbours(discovery, mine, self.topics, status, visiting, settings.bus)
                        running.append(tasks.create_task(self._give_way(self._neighbours, stop), name="neighbours"))
                        running.append(tasks.create_task(_say_once_kept(discovery, mine, journal), name="kept"))
                    broker_at = f"{broker.host}:{broker.port}" if broker else "external"
                    log.info(
                        "coordinator ready %s",
                        fields(
                            cluster=settings.cluster,
                            http=self._urls[0],
                            broker=broker_at,
                            clients=None if closed is None else f"{closed.broker.host}:{closed.broker.client_port}",
                            epoch=journal.epoch,
                        ),
                    )
                    lifecycle.ready()
                    await stop.wait()
                    lifecycle.notify("STOPPING=1")
                    log.info("coordinator stopping")
                    self._events.close()
                    await advertisement.aclose()
                    # Clients hear it first: they ask the next coordinator then, while this one answers what it has taken.
                    self._stopping_since = time.time()
                    try:
                        await bus.publish(status_topic, status(), retain=True)
                        await self._drain(requests, (answers, replies, self._outbox))
                    except Unavailable as error:
                        log.info("offline status not published %s", fields(reason=error.message))
                        self._inference.give_up()
                for task in running:
                    task.cancel()
        if self._gave_way is not None:
            raise self._gave_way

    async def _drain(self, requests: Requests, outboxes: Iterable[Outbox]) -> None:
        """Answer the requests and questions that were taken; takes at most DRAIN_SECONDS."""
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._inference.drained()
                await requests.drained()
                for outbox in outboxes:
                    await outbox.drained()
        except TimeoutError:
            log.warning("some requests are not answered %s", fields(seconds=DRAIN_SECONDS))
            self._inference.give_up()

    async def _give_way(self, neighbours: Neighbours, stop: asyncio.Event) -> None:
        """Stop in order when another coordinator serves the cluster. Otherwise a broker that is not ours would retain our "online"."""
        try:
            await neighbours.run()
        except GaveWay as error:
            self._gave_way = error
            stop.set()

    @property
    def _patience_seconds(self) -> float:
        """How long a broker may take to let us in."""
        return self.settings.bus.connect_timeout_seconds * 4

    async def _join(self, bus: MqttBus) -> None:
        """Return once we are announced. Raises Unavailable if there is no bus, Conflict if another coordinator stays on it."""
        limit_seconds = self._patience_seconds + RIVAL_SECONDS
        await bus.connected(limit_seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                await self._announced.wait()
                return
        self._rival.refuse()
        raise Unavailable(f"the bus did not take our birth within {limit_seconds:g} s")

    async def _broker(self, stack: AsyncExitStack) -> tuple[Broker | None, Addresses]:
        """The configured broker, or one of our own."""
        settings = self.settings
        if self._closed is not None:
            closed = await self._closed.start_broker()
            stack.push_async_callback(closed.stop)
            return closed, in_turn([(closed.host, closed.port)])
        if settings.seeds or settings.broker.mode == "external":
            seeds = [parse_address(seed) for seed in settings.seeds] or [("127.0.0.1", settings.broker.port)]
            given = ",".join(settings.seeds) or f"127.0.0.1:{settings.broker.port}"
            log.info("no broker is started: one is given %s", fields(broker=given))
            return None, in_turn(seeds)
        broker = await start_broker(settings.broker, settings.listen, self.folder)
        stack.push_async_callback(broker.stop)
        host = "127.0.0.1" if broker.host in ("0.0.0.0", "::", "") else broker.host  # noqa: S104 - recognised, not bound
        return broker, in_turn([(host, broker.port)])

    def _found(self, journal: Journal) -> Closed | None:
        """The closed cluster that this coordinator serves, founded at the first start; None: it is an open one."""
        if not is_closed(self.settings):
            if (self.folder / FOLDER / "ca.key").exists():
                why = (
                    "--insecure (listen.insecure) was given"
                    if self.settings.listen.insecure
                    else "it listens on loopback"
                )
                raise InvalidSettings(
                    f"{self.folder} is the state folder of a closed cluster, and {why}, where everybody may ask everything: set closed, or "
                    "choose another --state-dir"
                )
            return None
        from coordinator.identities.closed import Closed  # imports cryptography, which an open cluster does not need

        def session_of(node_id: str) -> str:
            known = self._membership.get(node_id)
            return "" if known is None else known.session

        closed = Closed(self.settings, self.folder, journal, self.session, session_of)
        self.credentials = closed.credentials
        return closed

    def _follow_members(self, closed: Closed) -> None:
        """Whoever was removed is none of ours any more: tell the nodes, and give its work to others."""

        def prove() -> None:
            if self._announced.is_set():
                self._outbox.publish(self.topics.coordinator_proof, closed.proof(), retain=True)

        async def removed(identity: str) -> None:
            role, _, name = identity.partition(":")
            known = self._membership.get(name) if role == "node" else None
            if role == "node":
                for leaf in ("status", "capacity"):
                    self._outbox.clear(self.topics.node(name, leaf))
            if known is not None:  # the broker publishes no will of a member without rights
                gone = NodeStatus(node_id=name, session=known.session, state="offline", left=True)
                self._notice(self._membership.on_status(gone, time.time()))

        closed.publish_proof = prove
        closed.on_removed = removed

    def _subscribe(self, bus: MqttBus, requests: Requests, bus_requests: BusRequests) -> None:
        topics = self.topics
        asked = {
            topics.coordinator_inbox: requests.on_request,
            topics.jobs_submit: requests.on_request,
            topics.infer("+"): bus_requests.on_infer,
        }
        if self._closed is not None:
            bus.subscribe_asked(asked)
        else:
            for topic_filter, handler in asked.items():
                bus.subscribe(topic_filter, handler)
        bus.subscribe(topics.coordinator_status, self._rival.on_status)
        bus.subscribe(topics.node("+", "outbox"), self._on_outbox)
        bus.subscribe(topics.node("+", "status"), self._on_presence)
        bus.subscribe(topics.node("+", "capacity"), self._on_presence)
        bus.subscribe(topics.node("+", "telemetry"), self._on_presence, qos=0)
        bus.on_refused = self._on_refused

    def _on_outbox(self, envelope: Envelope) -> None:
        node_id = self.topics.segment(envelope.topic, 1)
        if not self._takes_part(node_id):
            return
        self._notice(self._membership.heard(node_id, time.time()))
        match envelope.message:
            case InferenceFinished() as answers:
                self._inference.on_answers(node_id, answers)
            case BlobsStored() | HoldFailed() as of_blobs:
                self._copies.on_node_message(node_id, of_blobs)
            case ModelLoaded() | ModelLoadFailed() | ModelUnloaded() as of_a_replica:
                self._serving.on_node_event(node_id, of_a_replica)
            case of_a_shard:
                self._dispatcher.on_node_message(node_id, of_a_shard)

    def _on_presence(self, envelope: Envelope) -> None:
        message, now = envelope.message, time.time()
        node_id = self.topics.segment(envelope.topic, 1)
        if getattr(message, "node_id", None) != node_id or not NODE_ID.fullmatch(node_id):
            if (more := self._seldom.due(envelope.topic)) is not None:
                log.warning("message of another node ignored %s", fields(topic=envelope.topic[:200], more=more or None))
            return
        if not self._takes_part(node_id):
            return
        match message:
            case NodeStatus():
                self._notice(self._membership.on_status(message, now))
                theirs = versions_of(message)
                if not OURS.shared(theirs) and self._seldom.due(f"version of {node_id}") is not None:
                    versions = fields(node=node_id, version=theirs, ours=OURS)
                    log.error("node of another protocol left out: install the same potluck on both %s", versions)
                if message.state == "online":
                    self._inference.ask_again(node_id)
            case NodeCapacity():
                self._notice(self._membership.on_capacity(message, now))
            case NodeTelemetry():
                self._notice(self._membership.on_telemetry(message, now))
            case _:
                pass

    def _takes_part(self, node_id: str) -> bool:
        """Whether a node may be heard. Of one that was removed, messages may be under way, and the broker has old rules for a while."""
        return self._closed is None or self._closed.role_of(f"node:{node_id}") is not None

    def _on_refused(self, topic: str, error: PotluckError) -> None:
        """A message could not be read. If it was a capacity, note why that of its node is unknown: `potluck nodes` says it."""
        if matches(self.topics.node("+", "capacity"), topic) and NODE_ID.fullmatch(self.topics.segment(topic, 1)):
            self._membership.on_unreadable_capacity(self.topics.segment(topic, 1), error.message, time.time())

    def _notice(self, changes: Iterable[Change]) -> None:
        for change in changes:
            match change:
                case NodeLost():
                    log.info("node lost %s", fields(node=change.node_id, reason=change.reason))
                    self._events.tell("node", change.node_id, "lost", change.reason)
                    self._dispatcher.node_lost(change.node_id, change.reason)
                    self._serving.node_lost(change.node_id)
                case NodeUnknown():
                    if self._rebirths.due(change.node_id, time.time()):
                        self._outbox.publish(self.topics.node(change.node_id, "inbox"), Rebirth())
                case NodeRefused():
                    if (more := self._seldom.due(f"node refused: {change.reason}")) is not None:
                        facts = fields(node=change.node_id, reason=change.reason, more=more or None)
                        log.error("node refused %s", facts)
                case NodeJoined():
                    log.info("node joined %s", fields(node=change.node_id))
                    self._events.tell("node", change.node_id, "joined")
                    self._dispatcher.node_joined()
                    self._copies.node_joined(change.node_id)
                    self._serving.node_joined(change.node_id)

    def _standing(self, bus: MqttBus) -> tuple[str, str]:
        """Whether this coordinator serves its cluster, and a remark: for `lifecycle.report`."""
        cluster = f"cluster {self.settings.cluster}"
        if trouble := bus.trouble():
            return f"{cluster} is not served", f": {trouble}"
        if not self._announced.is_set():
            return f"{cluster} is not served yet", ""
        count = len(self._membership.online())
        rival = "; another coordinator is on this bus: stop one" if self._rival.here else ""
        if self._neighbours is not None and self._neighbours.others:
            rival += f"; other coordinators serve a cluster of this name, at {', '.join(self._neighbours.others)}: stop all but one"
        return f"{cluster} is served", f": {count} node{'' if count == 1 else 's'}{rival}"

    async def _say_again(self, status: Callable[[], CoordinatorStatus], port: int) -> None:
        """Publish our status again and again.

        A tool may have cleared what is retained, and a late will may have replaced it. Besides, the machine's addresses change, and
        the disk may become full.
        """
        while True:
            await asyncio.sleep(STATUS_SECONDS)
            self._urls = base_urls(self.settings.listen.host, port, self.credentials.scheme)
            if self._announced.is_set():
                self._outbox.publish(self.topics.coordinator_status, status(), retain=True)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            with surviving("membership", fatal=FATAL):
                self._notice(self._membership.tick(time.time()))

    async def _advertise(self, stack: AsyncExitStack, mine: Service) -> Discovery:
        settings = self.settings
        discovery = await stack.enter_async_context(Discovery(settings.cluster, listen_host=settings.listen.host))
        await discovery.advertise(mine)
        return discovery

    def _service(self, port: int, broker: Broker | None) -> Service:
        """How we are found by mDNS."""
        settings = self.settings
        broker_host, broker_port = "", broker.port if broker is not None else settings.broker.port
        if broker is None and settings.seeds:
            broker_host, broker_port = parse_address(settings.seeds[0])
            if is_loopback(broker_host):
                broker_host = ""
        return Service(
            id=self._name,
            cluster=settings.cluster,
            role="coordinator",
            host=reachable_addresses(settings.listen.host)[0],
            port=port,
            broker_port=broker_port,
            broker_host=broker_host,
            ca="" if self._closed is None else ca_hint(self._closed.fingerprint),
            client_port=0 if self._closed is None else self._closed.broker.client_port,
        )


async def _say_once_kept(discovery: Discovery, mine: Service, journal: Journal) -> None:
    """Advertise anew once the journal has something: who finds two coordinators tries such a one first."""
    while mine.empty:
        await asyncio.sleep(STATUS_SECONDS)
        if journal.empty:
            continue
        kept = dataclasses.replace(mine, empty=False)
        try:
            await discovery.update(kept)
            mine = kept
        except Unavailable as error:  # the network went away; it may come back
            log.debug("not advertised anew %s", fields(reason=error.message))


def _unwell(bus: MqttBus) -> str:
    """What hangs, so that a restart would help; for `lifecycle.report`."""
    return "the bus has stopped trying to connect" if bus.stalled_seconds() > lifecycle.STALLED_SECONDS else ""


async def _watch(broker: Broker) -> None:
    await broker.wait()
    raise Unavailable("the broker process ended: the coordinator stops, so that its supervisor starts both again")


async def _need_answers(bus: MqttBus, limit_seconds: float) -> None:
    """Raises Unavailable if our broker runs, but lets nobody in for so long: it was stopped, or it hangs."""
    while True:
        try:
            await bus.connected(limit_seconds)
        except Unavailable as error:
            raise Unavailable(
                f"the broker process does not answer: {error.message}; the coordinator stops, so that its supervisor starts both again"
            ) from error
        await asyncio.sleep(BROKER_CHECK_SECONDS)
