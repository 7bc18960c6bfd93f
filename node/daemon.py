"""The node daemon's composition root: bus, blobs, capacity, leases, replicas, advertisement."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path

from msgspec.structs import replace

from node import capacity as capacities
from node.assignments import Assignments, Effect, Prefetch, Run, Send, Stop
from node.engine.process import Engine
from node.executor import Executor
from node.replicas import Replicas
from node.slot import EngineSlot
from potluck import lifecycle
from potluck.blobs import server as blob_server
from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore
from potluck.bus import Envelope, MqttBus, Will
from potluck.discovery import Discovery, Service, broker_addresses
from potluck.errors import EngineFailed, PotluckError, Unavailable
from potluck.http import serve_http
from potluck.logs import fields
from potluck.messages import (
    AcknowledgeResult,
    BlobsStored,
    Capacity,
    CoordinatorStatus,
    ForgetJob,
    LeaseShard,
    LoadModel,
    NodeCapacity,
    NodeStatus,
    RunInference,
    UnloadModel,
    WithdrawLease,
)
from potluck.network import base_urls, bind, reachable_addresses
from potluck.outbox import Outbox
from potluck.settings import NodeSettings, check_listen, short_hostname, state_folder
from potluck.topics import Topics

log = logging.getLogger(__name__)

IDLE_CHECK_SECONDS = 5.0
GOODBYE_SECONDS = 2.0


class Node:
    """One node. `run` returns after `stop` is set and everything is given back and put down in order.

    Raises InvalidSettings for a listen address that is not allowed or taken.
    """

    def __init__(self, settings: NodeSettings) -> None:
        check_listen(settings.listen)
        self.settings = settings
        self.topics = Topics(settings.cluster)
        self.session = uuid.uuid4().hex
        self.folder = state_folder(settings.state_dir, "node")
        self.node_id = settings.node_id or _kept_id(self.folder)
        self._status_topic = self.topics.node(self.node_id, "status")
        self._outbox_topic = self.topics.node(self.node_id, "outbox")
        self._assignments = Assignments()

    async def run(self, stop: asyncio.Event) -> None:
        """Join the cluster as soon as there is one, and work for it until `stop`."""
        settings = self.settings
        async with AsyncExitStack() as stack:
            sock = bind(settings.listen)
            stack.callback(sock.close)
            port = sock.getsockname()[1]
            self._urls = base_urls(settings.listen.host, port)
            store = BlobStore(self.folder / "blobs", settings.blob_limit_bytes)
            downloader = await stack.enter_async_context(Downloader(store))
            discovery = None
            if settings.discovery.enabled:
                discovery = await stack.enter_async_context(
                    Discovery(settings.cluster, listen_host=settings.listen.host)
                )
            self._capacity: Capacity = capacities.read()
            self._bus = MqttBus(
                broker_addresses(settings, discovery),
                self.topics,
                client_id=f"node-{self.node_id}-{self.session[:8]}",
                will=Will(self._status_topic, self._status("offline")),
                timings=settings.bus,
                # Our own messages are complete without MQTT 5, and reading its properties costs a fifth of an inference.
                highest_version=4,
            )
            self._outbox = Outbox(self._bus)
            fast = Outbox(self._bus)
            self._make_engines(store, downloader, fast)
            stack.push_async_callback(self._work_slot.stop)
            stack.push_async_callback(self._serve_slot.stop)
            self._bus.subscribe(self.topics.node(self.node_id, "inbox"), self._on_command)
            self._bus.subscribe(self.topics.coordinator_status, self._on_coordinator)
            self._bus.on_connect(self._birth)

            async with asyncio.TaskGroup() as tasks:
                parts = {
                    "bus": self._bus.run(),
                    "outbox": self._outbox.run(),
                    "answers": fast.run(),
                    "executor": self._executor.run(),
                    "replicas": self._replicas.run(),
                    "renewals": self._every(settings.renew_seconds, self._assignments.on_renewal_due),
                    "resends": self._every(settings.resend_seconds, self._assignments.on_resend_due),
                    "telemetry": self._telemetry(),
                    "idle": self._stop_idle(),
                    "measure": self._measure(),
                }
                running = [tasks.create_task(part, name=name) for name, part in parts.items()]
                async with serve_http(sock, blob_server.routes(store, writable=False, max_bytes=0)):
                    log.info("node started %s", fields(node=self.node_id, cluster=settings.cluster, http=self._urls[0]))
                    if discovery is not None:
                        await self._advertise(discovery, port)
                    lifecycle.notify("READY=1")
                    await stop.wait()
                    lifecycle.notify("STOPPING=1")
                    log.info("node stopping %s", fields(node=self.node_id))
                    if discovery is not None:
                        await discovery.withdraw()
                    await self._say_goodbye()
                for task in running:
                    task.cancel()

    # --- joining and leaving --------------------------------------------------------------------------------------------

    def _status(self, state: str) -> NodeStatus:
        urls = self._urls if state == "online" else ()
        return NodeStatus(node_id=self.node_id, session=self.session, state=state, http=urls)  # type: ignore[arg-type]

    async def _birth(self) -> None:
        """After each connect: the broker may have forgotten us, or published our will."""
        await self._bus.publish(self._status_topic, self._status("online"), retain=True)
        await self._publish_capacity()
        log.info("node joined %s", fields(node=self.node_id, cluster=self.settings.cluster))
        lifecycle.notify(f"STATUS=node {self.node_id} is in cluster {self.settings.cluster}")

    async def _publish_capacity(self) -> None:
        message = NodeCapacity(node_id=self.node_id, capacity=self._capacity)
        await self._bus.publish(self.topics.node(self.node_id, "capacity"), message, retain=True)

    async def _say_goodbye(self) -> None:
        """Give leases back and say offline, so that nobody has to wait for a lease to run out."""
        for effect in self._assignments.on_drain():
            self._perform(effect)
        try:
            async with asyncio.timeout(GOODBYE_SECONDS):
                await self._outbox.drained()
                await self._bus.publish(self._status_topic, self._status("offline"), retain=True)
        except (TimeoutError, PotluckError) as error:
            log.info("no goodbye %s", fields(reason=error or "the bus did not take it in time"))

    async def _advertise(self, discovery: Discovery, port: int) -> None:
        service = Service(
            id=self.node_id,
            cluster=self.settings.cluster,
            role="node",
            host=reachable_addresses(self.settings.listen.host)[0],
            port=port,
            cores=self._capacity.cores,
            memory_bytes=self._capacity.memory_bytes,
            gpus=len(self._capacity.gpus),
        )
        try:
            await discovery.advertise(service)
        except Unavailable as error:  # the bus is what counts: the advertisement is for people and tools
            log.warning("not advertised %s", fields(reason=error.message))

    # --- commands ---------------------------------------------------------------------------------------------------------

    def _on_coordinator(self, envelope: Envelope) -> None:
        if isinstance(envelope.message, CoordinatorStatus):
            self._assignments.on_epoch(envelope.message.epoch)

    def _on_command(self, envelope: Envelope) -> None:
        match envelope.message:
            case RunInference() as command:
                self._replicas.infer(command)
            case LeaseShard() as lease:
                self._perform_all(self._assignments.on_lease(lease))
            case WithdrawLease() as withdrawal:
                self._perform_all(self._assignments.on_withdrawn(withdrawal))
            case AcknowledgeResult() as acknowledged:
                self._perform_all(self._assignments.on_acknowledged(acknowledged))
            case ForgetJob(job_id=job_id):
                self._executor.forget(job_id)
            case LoadModel() as command if command.epoch >= self._assignments.epoch:
                self._replicas.load(command)
            case UnloadModel() as command if command.epoch >= self._assignments.epoch:
                self._replicas.unload(command)
            case other:
                log.info("command ignored %s", fields(type=type(other).__name__))

    def _perform_all(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(message):
                self._outbox.publish(self._outbox_topic, message)
            case Prefetch(lease):
                self._executor.prefetch(lease)
            case Run(lease):
                log.info("shard begun %s", fields(job=lease.job_id, shard=lease.shard_id, attempt=lease.attempt_id))
                self._executor.start(lease)
            case Stop():
                self._executor.stop()

    # --- parts ----------------------------------------------------------------------------------------------------------

    def _make_engines(self, store: BlobStore, downloader: Downloader, fast: Outbox) -> None:
        settings = self.settings
        scratch = self.folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)

        def make(name: str) -> Engine:
            return Engine(
                scratch / name,
                threads=settings.threads or capacities.cores(),
                start_seconds=settings.engine_start_seconds,
                silence_seconds=settings.engine_silence_seconds,
            )

        idle = settings.engine_idle_seconds
        self._work_slot = EngineSlot("work", lambda: make("work"), idle_seconds=idle)
        self._serve_slot = EngineSlot("serve", lambda: make("serve"), idle_seconds=idle, on_death=self._on_serve_death)
        self._executor = Executor(
            store=store,
            downloader=downloader,
            slot=self._work_slot,
            scratch=scratch / "work",
            urls=self._urls,
            on_progress=self._assignments.on_progress,
            on_outcome=lambda outcome: self._perform_all(self._assignments.on_outcome(outcome)),
            on_stored=lambda blobs: self._outbox.publish(self._outbox_topic, BlobsStored(blobs=blobs)),
        )
        self._replicas = Replicas(
            store=store,
            downloader=downloader,
            slot=self._serve_slot,
            outbox=self._outbox,
            fast=fast,
            topic=self._outbox_topic,
        )

    def _on_serve_death(self, failure: EngineFailed) -> None:
        self._replicas.on_engine_death(failure)

    async def _every(self, seconds: float, due: Callable[[], Iterable[Effect]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            self._perform_all(due())

    async def _telemetry(self) -> None:
        telemetry = capacities.Telemetry()
        topic = self.topics.node(self.node_id, "telemetry")
        while True:
            await asyncio.sleep(self.settings.telemetry_seconds)
            reading = telemetry.read(self.node_id, self.session, self._assignments.attempt_ids, self._replicas.ids)
            self._outbox.publish(topic, reading, qos=0, encoding="json")

    async def _stop_idle(self) -> None:
        while True:
            await asyncio.sleep(IDLE_CHECK_SECONDS)
            await self._work_slot.stop_idle(needed=self._assignments.busy)
            await self._serve_slot.stop_idle(needed=self._replicas.needed)

    async def _measure(self) -> None:
        """After the birth, which must not wait for it."""
        gflops = await capacities.measure(self.folder / "speed")
        self._capacity = replace(self._capacity, gflops=gflops)
        log.info("speed measured %s", fields(node=self.node_id, gflops=gflops))
        try:
            await self._publish_capacity()
        except Unavailable as error:  # not joined yet: the birth will tell
            log.debug("capacity not published yet %s", fields(reason=error.message))


def _kept_id(folder: Path) -> str:
    """This node's id, made once: the machine's name, and something that tells it from others of that name."""
    file = folder / "node-id"
    if file.exists() and (kept := file.read_text().strip()):
        return kept
    made = f"{short_hostname()}-{uuid.uuid4().hex[:6]}"
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(made)
    temporary.replace(file)
    return made
