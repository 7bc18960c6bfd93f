"""The node daemon's composition root: bus, blobs, capacity, leases, replicas, advertisement."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, NoReturn
from weakref import WeakSet

from msgspec.structs import replace

from node import capacity as capacities
from node import identity, member
from node.assignments import FENCE_SECONDS, Assignments, Effect, GiveUp, Prefetch, Run, Send, Stop
from node.copies import HeldCopies
from node.engine.process import Engine, EngineInfo
from node.engine.watch import Limits
from node.executor import Executor
from node.giving_way import GivingWay
from node.guests import Guests
from node.inputs import Inputs
from node.member import Member
from node.own_data import OwnData
from node.presence import Presence
from node.replicas import Replicas
from node.sandbox.policy import Confinement
from node.scratch import clear
from node.slot import EngineSlot
from potluck import lifecycle, reloading
from potluck.blobs import server as blob_server
from potluck.blobs.download import Downloader
from potluck.blobs.rights import OPEN, AtANode
from potluck.blobs.store import BlobStore
from potluck.bus.mqtt import Addresses, Envelope, MqttBus, Will
from potluck.bus.outbox import Outbox
from potluck.credentials import Credentials
from potluck.errors import Conflict, PotluckError, Unavailable
from potluck.logs import Seldom, fields
from potluck.net.addresses import bind, reachable_addresses
from potluck.net.discovery import Discovery, broker_addresses
from potluck.net.http import serve_http
from potluck.net.side import Side, ca_hint
from potluck.settings import NodeSettings, check_listen, state_folder
from potluck.sole_use import sole_use
from potluck.surviving import surviving
from potluck.wire.addresses import place, placed
from potluck.wire.births import OURS, CoordinatorProof, CoordinatorStatus, Versions, versions_of
from potluck.wire.commands import (
    AcknowledgeResult,
    CancelInference,
    ForgetJob,
    HoldBlob,
    LeaseShard,
    LoadModel,
    Rebirth,
    ReleaseBlob,
    RunInference,
    UnloadModel,
    WithdrawLease,
)
from potluck.wire.refs import hinted
from potluck.wire.reports import BlobsStored
from potluck.wire.topics import Topics

if TYPE_CHECKING:
    from node.trust import Trust

log = logging.getLogger(__name__)

DRAIN_SECONDS = 5.0
"""How long a stop may wait for work that is nearly done, and for answers to requests."""
IDLE_CHECK_SECONDS = 5.0
PAUSE_CHECK_SECONDS = 0.25
WATCH_SECONDS = 5.0
"""The watch of an engine looks at least twice a second. After so long without a look, it hangs."""
LOG_SECONDS = 60.0
"""How often to log again what is wrong with others' messages."""
DATA_RETRIES_SLOW_DOWN = 20
"""The pause before data are tried again grows to this many times its length: a large wrong data set takes as long to read each time."""


CHANGEABLE = reloading.ALL | {
    "allow_code", "engine_start_seconds", "engine_silence_seconds", "engine_batch_seconds", "engine_memory_bytes", "data",
    "data_retry_seconds",
}  # fmt: skip
"""The settings that a node takes over while it runs; those of engines count for engines that start afterwards."""


class Node:
    """One node. `run` returns after `stop` is set, when everything is given back and closed in order.

    With the credentials of a closed cluster in its state folder, it belongs to that one, and never speaks without TLS.
    Raises InvalidSettings for a listen address that is not allowed or not free, an unusable node id, or credentials that cannot be used;
    Conflict when another node uses the same state folder or id.
    """

    def __init__(self, settings: NodeSettings) -> None:
        self.folder = state_folder(settings.state_dir, "node")
        self.member = member.of(self.folder)
        if self.member is None:
            check_listen(settings.listen)
        else:
            settings = self.member.settings(settings)
        self.settings = settings
        self.topics = Topics(settings.cluster)
        self.session = uuid.uuid4().hex
        self.node_id = identity.node_id(settings.node_id, self.folder)
        self.credentials = self.member.credentials if self.member else Credentials.of("node", self.node_id)
        self._trust = self._trusted()
        self._outbox_topic = self.topics.node(self.node_id, "outbox")
        self._assignments = Assignments()
        if self._trust is not None:
            self._assignments = Assignments(only=self._trust.cluster_id, epoch=self._trust.epoch)
        self._giving_way = GivingWay(settings.give_way_share)
        self._gave_way = False
        self._said_gpus_idle = False
        self._said_unconfined = False
        self._conflict: Conflict | None = None
        self._coordinated = False
        """Whether a coordinator is there, as far as the present broker tells."""
        self._foreign: Versions | None = None
        """The coordinator's versions of the protocol, where we speak none of them."""
        self._unproved: Envelope | None = None
        """The status of a coordinator that has not proved its epoch yet."""
        self._coordinator_http: tuple[str, ...] = ()
        """`host:port` of its server, as it last said."""
        self._seldom = Seldom(LOG_SECONDS)
        self._data_changed = asyncio.Event()
        self._to_pack = asyncio.Event()
        self._store: BlobStore | None = None
        self._own_data: OwnData | None = None
        self._free = asyncio.Event()
        """Set when this node holds no lease any more."""
        self._engines: WeakSet[Engine] = WeakSet()

    def _trusted(self) -> Trust | None:
        if self.member is None:
            return None
        from node.trust import Trust  # imports cryptography, which costs an open cluster nothing

        return Trust(self.member.where, self.member.known, self.session, self.topics.coordinator_proof)

    def take(self, settings: NodeSettings) -> None:
        """Take over what CHANGEABLE names. What forbids something counts at once, not after what is being packed."""
        self.settings = settings if self.member is None else self.member.settings(settings)
        if self._store is not None:
            self._store.limit_bytes = settings.blob_limit_bytes
        if self._own_data is not None:
            known = self._own_data.announced, self._own_data.missing
            self._own_data.change(settings.data)
            self._executor.recheck()
            if known != (self._own_data.announced, self._own_data.missing):
                self._data_changed.set()
            self._to_pack.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Join the cluster as soon as it exists, and work for it until `stop`."""
        settings = self.settings
        async with AsyncExitStack() as stack:
            self._tell_lock = stack.enter_context(sole_use(self.folder, "node", settings.cluster))
            sock = bind(settings.listen)
            stack.callback(sock.close)
            collective = ""
            if (
                settings.listen.insecure
            ):  # TensorFlow's own server has no protection, and listens on all addresses; never if closed
                meeting = replace(settings.listen, port=settings.sync_port)
                meeting_point = stack.enter_context(bind(meeting, "sync_port", listening=False))
                host = reachable_addresses(settings.listen.host)[0]
                collective = place(host, meeting_point.getsockname()[1])
            self._presence = Presence(
                settings, self.topics, self.node_id, self.session, sock.getsockname()[1], collective, self.credentials.scheme
            )  # fmt: skip
            store = self._store = BlobStore(self.folder / "blobs", self.settings.blob_limit_bytes)
            downloader = await stack.enter_async_context(Downloader(store, self.credentials))
            inputs = await stack.enter_async_context(Inputs(self.folder / "inputs", self.credentials))
            discovery = await self._discovery(stack)
            self._bus = MqttBus(
                self._addresses(discovery),
                self.topics,
                self.credentials,
                client_id=self.credentials.identity if self.member else f"node-{self.node_id}-{self.session[:8]}",
                will=Will(self._presence.status_topic, self._presence.status("offline")),
                timings=settings.bus,
                # Our messages are complete without MQTT 5, and reading its properties costs a fifth of an inference.
                highest_version=4,
            )
            self._outbox = Outbox(self._bus)
            fast = Outbox(self._bus)
            loop = asyncio.get_running_loop()

            def pack_again() -> None:
                for event in (self._to_pack, self._data_changed):
                    loop.call_soon_threadsafe(event.set)

            own_data = self._own_data = OwnData(self.folder / "data", self.settings.data, pack_again)
            self._make_engines(store, downloader, inputs, fast, own_data)
            self._copies = HeldCopies(
                store, downloader, lambda message: self._outbox.publish(self._outbox_topic, message)
            )
            stack.push_async_callback(self._work_slot.stop)
            stack.push_async_callback(self._serve_slot.stop)
            stack.push_async_callback(self._replicas.stop)
            inbox = self.topics.node(self.node_id, "inbox")
            guests = None
            if self._trust is not None:
                self._bus.open_on(inbox, self._trust.opened)
                trust = self._trust
                guests = Guests(trust.is_revoked, lambda: trust.proved)
                self._bus.subscribe(self.topics.coordinator_proof, partial(self._on_proof, self._trust, guests))
            self._bus.subscribe(inbox, self._on_command)
            self._bus.subscribe(self.topics.coordinator_status, self._on_coordinator)

            def give_up(conflict: Conflict) -> None:
                self._conflict = conflict
                stop.set()

            self._presence.watch(self._bus, self._outbox, give_up)
            self._bus.on_connect(self._birth)

            if lifecycle.in_older_unit():
                lifecycle.ready()
            async with asyncio.TaskGroup() as tasks:
                parts = {
                    "bus": self._bus.run(),
                    "outbox": self._outbox.run(),
                    "answers": fast.run(),
                    "executor": self._executor.run(),
                    "replicas": self._replicas.run(),
                    "inputs": inputs.run(),
                    "copies": self._copies.run(),
                    "renewals": self._every(settings.renew_seconds, self._assignments.on_renewal_due),
                    "resends": self._every(settings.resend_seconds, self._assignments.on_resend_due),
                    "telemetry": self._presence.telemetry(
                        self._outbox,
                        lambda: self._assignments.attempt_ids,
                        lambda: self._replicas.ids,
                        lambda: self._serve_slot.engine is not None,
                        lambda: self._giving_way.paused,
                        store.shortage,
                    ),
                    "idle": self._stop_idle(),
                    "giving way": self._pause_and_resume(),
                    "measure": self._presence.measure(
                        self._bus, self.folder / "speed", lambda: bool(self._assignments.attempt_ids)
                    ),
                    "data": self._keep_data(own_data),
                    "changed data": self._tell_changed_data(own_data),
                    "report": lifecycle.report(lambda: self._standing(own_data), self._unwell),
                }
                if discovery is not None:
                    parts["advertise"] = self._presence.advertise(discovery, self._side.ca)
                if self.member is not None:
                    parts["certificate"] = self._keep_renewed(self.member)
                running = [tasks.create_task(part, name=name) for name, part in parts.items()]
                rights = OPEN if guests is None else AtANode(self._replicas.is_output)
                routes = blob_server.routes(store, inputs.store, writable=False, max_bytes=0, rights=rights)
                routes += inputs.routes(self._replicas.no_inputs, rights)
                doors = (guests.middleware,) if guests is not None else ()
                async with serve_http(sock, routes, self.credentials, doors, settings.http):
                    http = self._presence.urls[0]
                    log.info("node started %s", fields(node=self.node_id, cluster=settings.cluster, http=http))
                    await stop.wait()
                    lifecycle.notify("STOPPING=1")
                    log.info("node stopping %s", fields(node=self.node_id))
                    if discovery is not None:
                        await discovery.withdraw()
                    await self._drain(fast)
                    await self._presence.goodbye(self._bus, self._outbox)
                for task in running:
                    task.cancel()
        if self._conflict is not None:
            raise self._conflict

    async def _drain(self, answers: Outbox) -> None:
        """Finish the shard that is nearly done, answer the requests under way, and give back the other leases.

        Nobody waits for these until they run out. Takes at most DRAIN_SECONDS, and no time when there is nobody to tell. A coordinator
        that is offline may be stopping too: then it still takes answers, but no results.
        """
        heard = self._presence.joined and self._conflict is None
        finishing = heard and self._coordinated and self._executor.seconds_left <= DRAIN_SECONDS
        self._perform_all(self._assignments.on_drain(finishing=finishing))
        if heard:
            try:
                async with asyncio.timeout(DRAIN_SECONDS):
                    if self._coordinated:
                        await self._free.wait()
                    await self._replicas.drained()
                    await answers.drained()
            except TimeoutError:
                log.info("not all work is finished %s", fields(leases=len(self._assignments.held)))
        self._perform_all(self._assignments.on_drain())

    # --- joining and leaving --------------------------------------------------------------------------------------------

    async def _discovery(self, stack: AsyncExitStack) -> Discovery | None:
        settings = self.settings
        if not settings.discovery.enabled:
            return None
        try:
            return await stack.enter_async_context(Discovery(settings.cluster, listen_host=settings.listen.host))
        except Unavailable as error:
            if not settings.seeds:
                raise
            log.warning("no discovery, only seeds %s", fields(reason=error.message))
            return None

    @property
    def _side(self) -> Side:
        if self.member is None:
            return Side()
        from potluck.security import certificates, folder

        ca = folder.public(self.member.where / folder.CA_CERTIFICATE)
        return Side(ca_hint(certificates.read(ca).fingerprint))

    async def _keep_renewed(self, member: Member) -> NoReturn:
        from potluck import enrolment

        await enrolment.keep_renewed(member.where, "node", self.credentials, lambda: self._coordinator_http)

    def _addresses(self, discovery: Discovery | None) -> Addresses:
        following = broker_addresses(self.settings, discovery, self._side)

        async def addresses() -> tuple[str, int]:
            self._coordinated = False
            self._presence.lost()  # addresses are asked for when the connection is lost
            self._assignments.on_disconnected()
            return await following()

        return addresses

    async def _birth(self) -> None:
        self._tell_lock(self._bus.place)
        await self._presence.birth(self._bus)
        lifecycle.ready()
        self._perform_all(self._assignments.on_connected())

    def _standing(self, own_data: OwnData) -> tuple[str, str]:
        """This node's state, for systemd; and what is wrong with its data."""
        node, cluster = f"node {self.node_id}", f"cluster {self.settings.cluster}"
        if self._presence.joined:
            missing = f", whose coordinator speaks version {self._foreign} of the protocol, but this node speaks {OURS}"
            # The broker of a closed cluster lets a removed node connect, and tells it nothing.
            alone = ", which has no coordinator" + (
                ", or has removed this node: then join again with a new token" if self.member else ""
            )
            missing = missing if self._foreign else alone
            where = f"{node} is in {cluster}" + ("" if self._coordinated and not self._foreign else missing)
        elif self._presence.births:
            where = f"{node} has no connection to the broker of {cluster}, trying again"
        else:
            where = f"{node} looks for {cluster}"
        return where, "".join(f"; data {name} not available: {why}" for name, why in own_data.missing.items())

    def _unwell(self) -> str:
        """What of this node hangs, so that a restart would help. A lost broker is no reason: the bus goes on trying."""
        if self._bus.stalled_seconds() > lifecycle.STALLED_SECONDS:
            return "the bus has stopped trying to connect"
        if any(engine.unwatched_seconds > WATCH_SECONDS for engine in self._engines):
            return "nobody watches an engine any more"
        return ""

    # --- commands ---------------------------------------------------------------------------------------------------------

    def _on_coordinator(self, envelope: Envelope) -> None:
        status = envelope.message
        if not isinstance(status, CoordinatorStatus):
            return
        theirs = versions_of(status)
        self._foreign = None if OURS.shared(theirs) else theirs
        if self._foreign:
            if self._seldom.due("version") is not None:
                versions = fields(version=theirs, ours=OURS)
                log.error("coordinator of another protocol ignored: install the same potluck on both %s", versions)
            return
        if self._trust is not None and status.state == "online":
            self._coordinator_http = tuple(
                found[1] for one in status.http if (found := placed(one)) and found[0] == "https"
            )
            if (status.epoch, status.cluster_id) != (self._trust.epoch, self._trust.cluster_id):
                self._unproved = envelope  # its proof may come later
                return
            self._unproved = None
        self._coordinated = status.state == "online"
        known = self._assignments
        online = self._coordinated and known.on_coordinator(status.epoch, time.monotonic(), status.cluster_id)
        if online or (not self._coordinated and known.on_offline(status.epoch, status.cluster_id)):
            self._presence.on_coordinator(status, retained=envelope.retained)
            if online:
                self._presence.tell_anew(status.session, self._outbox)
        elif self._coordinated and self._seldom.due("epoch") is not None:
            seen = fields(epoch=status.epoch, seen=self._assignments.epoch, seconds=FENCE_SECONDS)
            log.warning("coordinator of an older epoch ignored until the newer one is silent for some seconds %s", seen)

    def _on_proof(self, trust: Trust, guests: Guests, envelope: Envelope) -> None:
        if not isinstance(envelope.message, CoordinatorProof):
            return
        try:
            new = trust.take(envelope.message)
        except PotluckError as error:
            if (more := self._seldom.due("proof")) is not None:
                log.warning("proof of a coordinator refused %s", fields(reason=error.message[:300], more=more or None))
            return
        if new:
            guests.end()
        if self._unproved is not None:
            self._on_coordinator(self._unproved)

    def _on_command(self, envelope: Envelope) -> None:
        match envelope.message:
            case RunInference() as command:
                self._replicas.infer(command)
            case CancelInference() as command:
                self._replicas.cancel(command)
            case LeaseShard() as lease:
                self._perform_all(self._assignments.on_lease(hinted(lease)))
            case WithdrawLease() as withdrawal:
                self._perform_all(self._assignments.on_withdrawn(withdrawal))
            case AcknowledgeResult() as acknowledged:
                self._perform_all(self._assignments.on_acknowledged(acknowledged))
            case ForgetJob() as command:
                if not command.epoch or self._assignments.accepts(command.epoch):
                    self._executor.forget(command.job_id)
            case LoadModel() as command:
                if self._assignments.accepts(command.epoch) and not self._assignments.draining:
                    self._replicas.load(command)
            case UnloadModel() as command:
                if self._assignments.accepts(command.epoch):
                    self._replicas.unload(command)
            case HoldBlob() as command:
                if self._assignments.accepts(command.epoch) and not self._assignments.draining:
                    self._copies.hold(command)
            case ReleaseBlob() as command:
                if self._assignments.accepts(command.epoch):
                    self._copies.release(command)
            case Rebirth():
                self._presence.tell_again(self._outbox)
            case other:
                if (more := self._seldom.due("command")) is not None:
                    log.info("command ignored %s", fields(type=type(other).__name__, more=more or None))

    def _perform_all(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            self._perform(effect)
        if self._assignments.held:
            self._free.clear()
        else:
            self._free.set()

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(message):
                self._outbox.publish(self._outbox_topic, message)
            case Prefetch(lease):
                self._executor.prefetch(lease)
            case Run(lease):
                log.debug("shard begun %s", fields(job=lease.job_id, shard=lease.shard_id, attempt=lease.attempt_id))
                self._executor.start(lease)
            case Stop(attempt_id):
                self._executor.stop(attempt_id)
            case GiveUp(attempt_id):
                self._executor.give_up(attempt_id)

    # --- parts ----------------------------------------------------------------------------------------------------------

    def _make_engines(
        self, store: BlobStore, downloader: Downloader, inputs: Inputs, fast: Outbox, own_data: OwnData
    ) -> None:
        scratch = self.folder / "scratch"
        clear(scratch)

        def urls() -> tuple[str, ...]:
            return self._presence.urls

        reads = tuple(str(folder) for folder in (store.folder, inputs.store.folder, self.folder / "data"))

        def make(name: str, connected: bool, *, quick_kernels: bool = False) -> Engine:
            clear(scratch / name)  # files that a dead engine was writing
            settings = self.settings  # as they are now: they may have been reloaded
            engine = Engine(
                scratch / name,
                threads=settings.threads or capacities.cores(),
                limits=Limits(
                    start_seconds=settings.engine_start_seconds,
                    silence_seconds=settings.engine_silence_seconds,
                    batch_seconds=settings.engine_batch_seconds,
                    memory_bytes=settings.engine_memory_bytes or capacities.memory_for_an_engine(),
                ),
                allow_code=settings.allow_code,
                quick_kernels=quick_kernels,
                confinement=Confinement(mode=settings.sandbox, reads=reads, network=connected),
            )
            self._engines.add(engine)
            return engine

        idle = self.settings.engine_idle_seconds
        self._work_slot = EngineSlot(
            "work", lambda connected: make("work", connected), idle_seconds=idle, on_start=self._on_engine_start
        )

        def serving(name: str) -> EngineSlot:
            return EngineSlot(
                name,
                lambda connected: make(name, connected, quick_kernels=True),
                idle_seconds=idle,
                on_start=self._on_engine_start,
                on_death=lambda engine: self._replicas.on_engine_death(engine),
            )

        self._serve_slot = serving("serve")
        self._executor = Executor(
            store=store,
            downloader=downloader,
            own_data=own_data,
            slot=self._work_slot,
            scratch=scratch / "work",
            urls=urls,
            on_progress=self._assignments.on_progress,
            on_stage=lambda attempt_id, stage: self._perform_all(self._assignments.on_stage(attempt_id, stage)),
            on_outcome=lambda outcome: self._perform_all(self._assignments.on_outcome(outcome)),
            on_stored=lambda blobs: self._outbox.publish(self._outbox_topic, BlobsStored(blobs=blobs)),
            sandboxed=self.settings.sandbox != "off",
            closed=self.member is not None,
        )
        self._replicas = Replicas(
            store=store,
            downloader=downloader,
            inputs=inputs,
            slot=self._serve_slot,
            alone=serving,
            outbox=self._outbox,
            fast=fast,
            topic=self._outbox_topic,
            urls=urls,
            on_served=self._on_served,
        )

    def _on_served(self, objective_seconds: float, seconds: float) -> None:
        if self._executor.computing:
            self._giving_way.served(objective_seconds, seconds, time.monotonic())
            self._give_way()

    async def _pause_and_resume(self) -> None:
        while True:
            await asyncio.sleep(PAUSE_CHECK_SECONDS)
            with surviving("giving way"):
                self._giving_way.passed(time.monotonic())
                self._give_way()

    def _give_way(self) -> None:
        if self._giving_way.paused != self._gave_way:
            self._gave_way = self._giving_way.paused
            log.info("jobs %s", "give way to inference" if self._gave_way else "go on")
            self._executor.give_way(self._gave_way)

    async def _keep_data(self, own_data: OwnData) -> None:
        """Prepare the data that live on this node for training; announces each data set as soon as it is ready.

        Unavailable data are tried again: a disk is mounted late, permissions are given, a file is repaired. Data that were changed
        are packed at once, or after what is being packed.
        """
        pause = self.settings.data_retry_seconds
        while True:
            for name in own_data.unpacked:
                before = own_data.missing
                with surviving(f"packing of data {name}"):
                    if await own_data.packed(name) or own_data.missing != before:
                        await self._announce_data(own_data)
            try:
                async with asyncio.timeout(pause if own_data.missing else None):
                    await self._to_pack.wait()
            except TimeoutError:
                pause = min(2 * pause, DATA_RETRIES_SLOW_DOWN * self.settings.data_retry_seconds)
                continue
            self._to_pack.clear()
            pause = self.settings.data_retry_seconds

    async def _tell_changed_data(self, own_data: OwnData) -> None:
        """When the settings have fewer or other data than before: announce what is left, and delete the files of the rest."""
        while True:
            await self._data_changed.wait()
            self._data_changed.clear()
            with surviving("announcing of data"):
                await self._announce_data(own_data)
            await asyncio.to_thread(own_data.sweep)

    async def _announce_data(self, own_data: OwnData) -> None:
        await self._presence.announce(self._bus, own_data.announced, own_data.missing)

    def _on_engine_start(self, info: EngineInfo) -> None:
        self._presence.engine_runs(self._outbox, info.runtimes)
        if info.unconfined and not self._said_unconfined:
            self._said_unconfined = True
            log.warning("engines are not kept from all of this machine %s", fields(missing="; ".join(info.unconfined)))
        # Users with a GPU want to use it, but TensorFlow does not tell when it cannot.
        gpus = [gpu.name for gpu in self._presence.capacity.gpus]
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ  # the user chose which GPUs TensorFlow sees
        if gpus and not info.gpus and not hidden and not self._said_gpus_idle and "tensorflow" in info.runtimes:
            self._said_gpus_idle = True
            log.warning(
                "GPUs are not used %s",
                fields(
                    gpus=", ".join(gpus),
                    reason="TensorFlow does not see them: install the extra gpu instead of engine, and give a service access to the "
                    "devices (docs/install.md)",
                ),
            )

    async def _every(self, seconds: float, due: Callable[[], Iterable[Effect]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            # Before that it would wait in the outbox, and after a reconnect go out before more urgent messages.
            if self._presence.joined:
                with surviving("what is due"):
                    self._perform_all(due())

    async def _stop_idle(self) -> None:
        seconds = min(IDLE_CHECK_SECONDS, self.settings.engine_idle_seconds / 2)
        while True:
            await asyncio.sleep(seconds)
            with surviving("stop of idle engines"):
                await self._work_slot.stop_idle(needed=self._assignments.busy)
                await self._serve_slot.stop_idle(needed=self._replicas.needed)
