"""Upkeep: makes the nodes hold what deployments want, again whenever replicas, nodes or memory come and go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from coordinator.membership import Member, Membership
from coordinator.plans.checking import wrong_signature
from coordinator.plans.placement import RUNTIME_OF, WORDS
from coordinator.registry import Registry, pixel_scale
from coordinator.serving import memory
from coordinator.serving.deployments import Deployment, Load, Place, name_of
from coordinator.serving.endpoints import Endpoint
from coordinator.serving.inference import Inference
from coordinator.serving.records import AnyDeploymentEvent, Measured, Parked, Records, Settled, Woken, model_of
from coordinator.serving.room import Room
from potluck.bus.outbox import Outbox
from potluck.errors import EngineFailed, ModelCrashed
from potluck.logs import fields
from potluck.settings import CoordinatorSettings
from potluck.wire.births import NodeTelemetry
from potluck.wire.commands import LoadModel, UnloadModel
from potluck.wire.failures import error_info
from potluck.wire.reports import ModelLoaded, ModelLoadFailed, ModelUnloaded
from potluck.wire.topics import Topics
from potluck.wire.values import BlobRef, ErrorInfo, Message
from potluck.wording import on_nodes

log = logging.getLogger(__name__)


class Upkeep:
    """For all deployments. `record` journals an event and applies it; `changed` is set when something may be ready.
    `endpoint(replica_id, node_id)` makes the endpoint of a replica.
    """

    def __init__(
        self,
        records: Records,
        *,
        topics: Topics,
        outbox: Outbox,
        inference: Inference,
        membership: Membership,
        registry: Registry,
        settings: CoordinatorSettings,
        holders: Callable[[str], tuple[str, ...]],
        epoch: int,
        record: Callable[[AnyDeploymentEvent], None],
        endpoint: Callable[[str, str], Endpoint],
        clock: Callable[[], float],
    ) -> None:
        self._records = records
        self._topics = topics
        self._outbox = outbox
        self._inference = inference
        self._membership = membership
        self._registry = registry
        self._settings = settings
        self._holders = holders
        self._epoch = epoch
        self._record = record
        self._endpoint = endpoint
        self._clock = clock
        self._room = Room(records, inference)
        self._seen: dict[str, NodeTelemetry] = {}
        self.changed = asyncio.Event()

    # --- what nodes say -----------------------------------------------------------------------------------------------

    def on_node_event(self, node_id: str, message: Message) -> None:
        """Handle an event of a node about its own replicas; other events are ignored."""
        if not isinstance(message, ModelLoaded | ModelLoadFailed | ModelUnloaded):
            return
        deployment = self._records.deployments.get(name_of(message.replica_id))
        replica = deployment.replicas.get(message.replica_id) if deployment is not None else None
        if replica is not None and replica.node_id != node_id:
            log.debug("word on a replica of another ignored %s", fields(node=node_id, replica=message.replica_id))
        elif isinstance(message, ModelLoaded):
            self._on_loaded(node_id, message)
        else:
            self.replica_gone(node_id, message.replica_id, message.error)

    def replica_gone(self, node_id: str, replica_id: str, error: ErrorInfo | None) -> None:
        """A node does not hold a replica any more."""
        deployment = self._records.deployments.get(name_of(replica_id))
        if deployment is not None and deployment.lost(replica_id, error, self._clock()):
            crashed = error is not None and error.code == ModelCrashed.code
            self._inference.remove_replica(replica_id, crashed=crashed)
            reason = error.message if error else "asked for"
            log.info("replica gone %s", fields(replica=replica_id, node=node_id, reason=reason))
            self.reconcile(deployment)

    def node_lost(self, node_id: str) -> None:
        self._inference.node_lost(node_id)
        for deployment in self._records.deployments.values():
            if deployment.node_lost(node_id):
                self.reconcile(deployment)

    def node_joined(self, node_id: str) -> None:
        self.changed.set()
        if (member := self._membership.get(node_id)) is not None:
            self._take_stock([member])
        for deployment in self._records.deployments.values():
            self.reconcile(deployment)

    def _take_stock(self, members: Iterable[Member]) -> None:
        """Adopt replicas that nodes say they hold and a deployment needs. Unload replicas that no deployment wants.

        Such replicas are left from before we restarted, or from a time when the node could not be reached.
        """
        places: list[Place] | None = None
        for member in members:
            node_id, telemetry = member.node_id, member.telemetry
            if telemetry is None or self._seen.get(node_id) is telemetry:
                continue
            self._seen[node_id] = telemetry
            for replica_id in telemetry.replicas:
                places = self.places() if places is None else places
                deployment = self._records.deployments.get(name_of(replica_id))
                if deployment is None or not deployment.adopt(replica_id, node_id, places):
                    self.unload(node_id, replica_id)

    def _on_loaded(self, node_id: str, message: ModelLoaded) -> None:
        name = name_of(message.replica_id)
        deployment = self._records.deployments.get(name)
        if deployment is None or message.replica_id not in deployment.replicas:
            # It is left from before a restart, or not wanted any more: the node need not hold it.
            self.unload(node_id, message.replica_id)
            return
        if reason := wrong_signature(message.signature):
            self.unload(node_id, message.replica_id)
            self.replica_gone(node_id, message.replica_id, error_info(EngineFailed(f"node {node_id}: {reason}")))
            return
        settled = deployment.settled
        if deployment.loaded(message.replica_id, message.signature, message.warm_rows):
            if not settled:
                self._record(Settled(name=name))
            log.info("replica ready %s", fields(model=name, node=node_id))
            member = self._membership.get(node_id)
            most = member.capacity.memory_bytes if member is not None else 0
            # The more memory is shared, the less is measured; and no replica takes more memory than its machine has.
            if self._records.resident.get(name, 0) < message.resident_bytes <= most:
                self._record(Measured(name=name, resident_bytes=message.resident_bytes))
            self._registry.describe(name, message.signature)
            self._inference.add_replica(name, self._endpoint(message.replica_id, node_id))
            self.changed.set()

    # --- keeping things as wanted ----------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Let time pass: look at what nodes report, and ask again for what is missing."""
        self._take_stock(self._membership.online())
        for deployment in list(self._records.deployments.values()):
            if deployment.parked and self._inference.router_of(deployment.name).queue:
                self.wake(deployment)  # its last replica died with requests on the way
            self.reconcile(deployment)

    def reconcile(self, deployment: Deployment) -> None:
        """Bring a deployment nearer to what it wants; other deployments make room if they must."""
        load: dict[str, int] = {}
        for other in self._records.deployments.values():
            for replica in other.replicas.values():
                load[replica.node_id] = load.get(replica.node_id, 0) + 1
        resend = max(1.0, self._settings.resend_seconds)
        deployment.need_bytes = self._room.needed(deployment)
        busy = self._inference.busy(deployment.name)
        commands = deployment.plan(self.places(), load, self._clock(), resend, busy=busy)
        if deployment.cramped and (victims := self._room.victims(deployment, self._clock())):
            for name in victims:
                self._evict(name, deployment)
            commands += deployment.plan(self.places(), load, self._clock(), resend, busy=busy)
        for command in commands:
            if isinstance(command, Load):
                held_by = self._holders(command.model.sha256)
                ref = BlobRef(sha256=command.model.sha256, size=command.model.size, holders=held_by)
                message = LoadModel(
                    epoch=self._epoch,
                    replica_id=command.replica_id,
                    name=command.name,
                    model=ref,
                    format=command.format,
                    warm_rows=self._settings.batch_limit,
                    warm_seconds=self._settings.warm_seconds,
                    pixel_scale=pixel_scale(self._registry.model(command.name)),
                )
                self._command(command.node_id, message)
            else:
                self._inference.remove_replica(command.replica_id)
                self.unload(command.node_id, command.replica_id)
        self.changed.set()

    def _evict(self, name: str, other: Deployment) -> None:
        quiet_seconds = self._clock() - self._inference.asked_at[name]
        reason = f"evicted for {other.name}, whose replica needs {memory.bytes_text(other.need_bytes)}: not asked for {quiet_seconds:.0f} s"
        log.info("deployment evicted %s", fields(model=name, reason=reason))
        self._record(Parked(name=name, why="evicted", reason=reason))
        self.reconcile(self._records.deployments[name])

    def stage(self, deployment: Deployment) -> str:
        """A text for people: which replicas are ready and answer, and what the nodes of the others do."""
        doing = on_nodes(
            (self._loading(replica.node_id, deployment), replica.node_id)
            for replica in deployment.replicas.values()
            if replica.state == "loading"
        )
        if not deployment.ready:
            return doing
        nodes = ", ".join(sorted(replica.node_id for replica in deployment.ready))
        model = model_of(deployment.name)
        plain = self._records.traffic[model].stable == deployment.name
        answers = f"{deployment.name} on {nodes} is ready and answers to {model if plain else deployment.name}"
        return "; ".join(filter(None, (answers, doing)))

    def _loading(self, node_id: str, deployment: Deployment) -> str:
        member = self._membership.get(node_id)
        if member is None or member.telemetry is None or member.telemetry.serving:
            return "loading the model"
        return f"starting engine ({WORDS[RUNTIME_OF[deployment.format]]})"

    def places(self) -> list[Place]:
        """The nodes that are online, and what each has."""
        members = self._membership.online()
        left = self._room.left(members)
        return [
            Place(member.node_id, member.capacity.gflops, left[member.node_id], frozenset(member.capacity.runtimes))
            for member in members
        ]

    def wake(self, deployment: Deployment) -> None:
        """The deployment got a request: it is not parked any more."""
        log.info("deployment woken %s", fields(model=deployment.name, was=deployment.parked))
        self._record(Woken(name=deployment.name))
        self.reconcile(deployment)

    def unload(self, node_id: str, replica_id: str) -> None:
        self._command(node_id, UnloadModel(epoch=self._epoch, replica_id=replica_id))

    def _command(self, node_id: str, message: Message) -> None:
        self._outbox.publish(self._topics.node(node_id, "inbox"), message)
