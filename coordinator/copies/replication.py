"""Keeps each registered model on at least two machines: `plan` decides on the nodes' copies; our own copy is checked here."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from coordinator.copies.locations import Holders
from coordinator.copies.plan import REST_SECONDS, RETRY_SECONDS, Copy, CopyPlace, Hold, Holding
from coordinator.journal import FATAL, Journal
from coordinator.membership import Membership
from coordinator.registry import Registry
from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore
from potluck.bus.outbox import Outbox
from potluck.errors import DiskFull, PotluckError
from potluck.logs import Seldom, fields
from potluck.surviving import surviving
from potluck.wire.commands import HoldBlob, ReleaseBlob
from potluck.wire.reports import BlobsStored, HoldFailed
from potluck.wire.topics import Topics
from potluck.wire.values import BlobRef, Message

log = logging.getLogger(__name__)

_STREAM = "copies"
PLAN_SECONDS = 2.0
LOG_SECONDS = 60.0
MISSING_SECONDS = 5.0
"""How often our own copies are checked."""


class CopyHeld(Struct, frozen=True, kw_only=True, tag_field="event", tag=True):
    """The node holds a copy of the blob, and replaces the holder before."""

    sha256: str
    node_id: str


class Copies:
    """Copies of the registered models' blobs. `run` must be running."""

    def __init__(
        self,
        *,
        registry: Registry,
        store: BlobStore,
        downloader: Downloader,
        membership: Membership,
        holders: Holders,
        journal: Journal,
        topics: Topics,
        outbox: Outbox,
        hostname: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._registry = registry
        self._store = store
        self._downloader = downloader
        self._membership = membership
        self._holders = holders
        self._journal = journal
        self._topics = topics
        self._outbox = outbox
        self._hostname = hostname or socket.gethostname()
        self._clock = clock
        self._wake = asyncio.Event()
        self._holding = Holding()
        self._held_by: dict[str, str] = {}
        self._missed: set[str] = set()
        self._seldom = Seldom(LOG_SECONDS)
        registered = self._blobs()
        for event in journal.replay(_STREAM, CopyHeld):
            if event.sha256 in registered:
                self._held_by[event.sha256] = event.node_id
        journal.snapshot(_STREAM, [CopyHeld(sha256=key, node_id=node_id) for key, node_id in self._held_by.items()])
        for sha256, node_id in self._held_by.items():
            self._holding.copies[sha256] = Copy(node_id)
            holders.stored(node_id, [sha256])
        registry.on_change(self._wake.set)

    # --- what nodes say -----------------------------------------------------------------------------------------------

    def on_node_message(self, node_id: str, message: Message) -> None:
        """Handle a node's events about blobs; ignore others."""
        match message:
            case BlobsStored():
                self._holders.stored(node_id, message.blobs)
                for sha256 in message.blobs:
                    if self._holding.stored(node_id, sha256):
                        self._held(node_id, sha256)
            case HoldFailed():
                if (more := self._seldom.due(f"copy on {node_id}")) is not None:
                    why = fields(blob=message.sha256[:12], node=node_id, reason=message.error.message[:500])
                    log.warning("copy of a model not held %s", f"{why} {fields(more=more or None)}".rstrip())
                rest = REST_SECONDS if message.error.code == DiskFull.code else RETRY_SECONDS
                self._holding.failed(node_id, message.sha256, self._clock(), rest)
                self._wake.set()
            case _:
                pass

    def node_joined(self, node_id: str) -> None:
        self._holding.joined(node_id)
        self._wake.set()

    def _held(self, node_id: str, sha256: str) -> None:
        if self._held_by.get(sha256) != node_id:
            self._journal.append(_STREAM, CopyHeld(sha256=sha256, node_id=node_id))
            self._held_by[sha256] = node_id
            log.info("copy of a model held %s", fields(blob=sha256[:12], node=node_id))
        self._wake.set()  # the holder before can release it

    # --- keeping things as wanted ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_there(), name="copies on nodes")
            tasks.create_task(self._keep_here(), name="our own copies")

    async def _keep_there(self) -> None:
        while True:
            self._wake.clear()
            with surviving("copies on nodes", fatal=FATAL):
                self._ask_nodes()
            try:
                async with asyncio.timeout(PLAN_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass  # some nodes may have been away for too long by now

    def _ask_nodes(self) -> None:
        for command in self._holding.plan(self._blobs(), self._places(), self._clock()):
            topic = self._topics.node(command.node_id, "inbox")
            if isinstance(command, Hold):
                blob = replace(command.blob, holders=self._holders.of(command.blob.sha256))
                self._outbox.publish(topic, HoldBlob(epoch=self._journal.epoch, blob=blob))
            else:
                self._outbox.publish(topic, ReleaseBlob(epoch=self._journal.epoch, sha256=command.sha256))

    async def _keep_here(self) -> None:
        """Delete damaged copies when we start, and fetch missing ones from their holders."""
        for sha256 in self._blobs():
            with surviving("check of our copies", fatal=FATAL):
                if self._store.has(sha256) and not await asyncio.to_thread(self._store.check, sha256):
                    log.error("our copy of a model was damaged, and is gone %s", fields(blob=sha256[:12]))
        while True:
            for sha256, blob in self._blobs().items():
                with surviving("our own copies", fatal=FATAL):
                    if not self._store.has(sha256):
                        await self._bring_back(blob)
            await asyncio.sleep(MISSING_SECONDS)

    async def _bring_back(self, blob: BlobRef) -> None:
        sha256, nodes = blob.sha256, self._holders.nodes(blob.sha256)
        reason = "no holder is online"
        try:
            if nodes:
                await self._downloader.fetch(replace(blob, holders=nodes))
                log.info("our copy of a model is back %s", fields(blob=sha256[:12], holders=",".join(nodes)))
                self._missed.discard(sha256)
                return
        except PotluckError as error:
            reason = error.message
        if sha256 not in self._missed:
            self._missed.add(sha256)
            log.error("our copy of a model is missing %s", fields(blob=sha256[:12], reason=reason))

    def _blobs(self) -> dict[str, BlobRef]:
        return {info.model.sha256: info.model for info in self._registry.models()}

    def _places(self) -> list[CopyPlace]:
        return [
            CopyPlace(member.node_id, elsewhere=member.capacity.hostname != self._hostname)
            for member in self._membership.online()
            if member.http
        ]
