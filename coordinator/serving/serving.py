"""Serving: deployments kept as wanted on the nodes; `inference` routes requests to their replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from msgspec import Struct

from coordinator.journal import Journal
from coordinator.membership import Membership
from coordinator.serving.deployments import Deployment, Load, Place
from coordinator.serving.inference import Inference
from coordinator.serving.registry import Registry
from potluck.errors import (
    Cancelled,
    InvalidRequest,
    NotFound,
    TimedOut,
    Unavailable,
    from_code,
)
from potluck.logs import fields
from potluck.messages import (
    BlobRef,
    DeploymentInfo,
    ErrorInfo,
    InferenceFinished,
    LoadModel,
    Message,
    ModelLoaded,
    ModelLoadFailed,
    ModelUnloaded,
    NodeTelemetry,
    Signature,
    UnloadModel,
)
from potluck.outbox import Outbox
from potluck.settings import CoordinatorSettings
from potluck.topics import Topics

log = logging.getLogger(__name__)

_STREAM = "deployments"
TICK_SECONDS = 0.25
DEPLOY_SECONDS = 300.0
"""How long all replicas of a new deployment may take to become ready."""
JOIN_SECONDS = 5.0
"""How long a deployment waits for nodes that may be about to join."""


class DeploymentEvent(Struct, frozen=True, kw_only=True, tag_field="event", tag=True):
    """Base of what is in the stream."""

    name: str


class Deployed(DeploymentEvent, frozen=True):
    model: BlobRef
    wanted: int


class Settled(DeploymentEvent, frozen=True):
    """A replica was ready for the first time."""


class Undeployed(DeploymentEvent, frozen=True):
    pass


AnyDeploymentEvent = Deployed | Settled | Undeployed


class Serving:
    """All deployments of the coordinator. `run` must be under way."""

    def __init__(
        self,
        *,
        topics: Topics,
        outbox: Outbox,
        inference: Inference,
        membership: Membership,
        registry: Registry,
        journal: Journal,
        settings: CoordinatorSettings,
        urls: tuple[str, ...],
        epoch: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._topics = topics
        self._outbox = outbox
        self._inference = inference
        self._membership = membership
        self._registry = registry
        self._journal = journal
        self._settings = settings
        self._urls = urls
        self._epoch = epoch
        self._clock = clock
        self._deployments: dict[str, Deployment] = {}
        self._changed = asyncio.Event()
        self._seen: dict[str, NodeTelemetry] = {}
        for event in journal.replay(_STREAM, AnyDeploymentEvent):  # type: ignore[arg-type, var-annotated]
            self._apply(event)

    # --- deployments --------------------------------------------------------------------------------------------------

    async def deploy(self, model: str, replicas: int) -> str:
        """Deploy, or change the number of replicas; returns the deployment's name once all are ready.

        Raises NotFound, InvalidRequest (more replicas than nodes), Unavailable (nodes were lost meanwhile), and what made
        loading fail; a deployment that was ready before goes on with what it has.
        """
        info = self._registry.model(model)
        name = f"{info.name}:{info.version}"
        await self._wait_for_nodes(max(1, replicas))
        known = self._deployments.get(name)
        if known is None or known.wanted != replicas or known.failing:
            self._record(Deployed(name=name, model=info.model, wanted=replicas))
        deployment = self._deployments[name]
        self._reconcile(deployment)
        deadline = self._clock() + DEPLOY_SECONDS
        enough_at = self._clock()
        while not deployment.complete(places := self._places()):
            now, ready, wanted = self._clock(), len(deployment.ready), max(1, deployment.target(places))
            if self._deployments.get(name) is not deployment:
                raise Cancelled(f"{name} was undeployed before it was ready")
            if deployment.failing and deployment.error is not None:
                if deployment.failed:
                    self._remove(name)
                left = f"; {ready} of {wanted} replicas are ready" if ready else ""
                raise from_code(deployment.error.code, f"{name} could not be loaded: {deployment.error.message}{left}")
            if now > deadline:
                raise TimedOut(f"{ready} of {wanted} replicas of {name} are ready so far")
            if len(places) >= wanted:
                enough_at = now
            elif now - enough_at > JOIN_SECONDS:
                self.give_up(name)
                raise Unavailable(
                    f"{ready} of {wanted} replicas of {name} are ready, and only {len(places)} nodes with TensorFlow are "
                    "online any more: start more nodes, or ask for fewer"
                )
            await self._wait_for_change()
        log.info("deployed %s", fields(model=name, replicas=len(deployment.ready)))
        return name

    async def _wait_for_nodes(self, count: int) -> None:
        """Return once so many nodes can hold a replica; nodes may be about to join, after a restart of ours above all."""
        deadline = self._clock() + JOIN_SECONDS
        while len(self._places()) < count:
            if self._clock() > deadline:
                raise InvalidRequest(
                    f"{count} replicas were asked for, but {len(self._places())} nodes with TensorFlow are online "
                    "(each holds one replica): start more nodes, or ask for fewer"
                )
            await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(TICK_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            return  # time passes, too

    async def undeploy(self, model: str) -> tuple[str, ...]:
        """Take down `name:version`, or every version of `name`. Raises NotFound."""
        names = tuple(name for name in self._deployments if model in (name, name.partition(":")[0]))
        if not names:
            raise NotFound(f"{model} is not deployed: `potluck deployments` lists what is")
        for name in names:
            self._remove(name)
        return names

    def give_up(self, name: str) -> None:
        """Take a deployment down of which nothing is ready: whoever asked for it does not want it any more."""
        deployment = self._deployments.get(name)
        if deployment is not None and not deployment.ready:
            self._remove(name)

    def deployments(self) -> tuple[DeploymentInfo, ...]:
        return tuple(self._info(deployment) for _, deployment in sorted(self._deployments.items()))

    def signature(self, model: str) -> Signature | None:
        """Of a deployed model (`name` or `name:version`). Raises NotFound."""
        return self._deployments[self._inference.router(model).name].signature

    def ready(self, model: str) -> bool:
        """Whether a replica of it can answer now. Raises NotFound."""
        return bool(self._inference.router(model).lanes)

    def versions(self, name: str) -> tuple[str, ...]:
        """The deployed versions of `name`."""
        return tuple(key.partition(":")[2] for key in self._deployments if key.partition(":")[0] == name)

    # --- what nodes say -----------------------------------------------------------------------------------------------

    def on_node_event(self, node_id: str, message: Message) -> None:
        """Any event of a node that concerns replicas; others are not ours."""
        match message:
            case InferenceFinished():
                self._inference.finished(_name_of(message.replica_id), message)
                for outcome in message.outcomes:
                    if outcome.error is not None and outcome.error.code == "not_found":
                        self._replica_gone(node_id, message.replica_id, outcome.error)
                        break
            case ModelLoaded():
                self._on_loaded(node_id, message)
            case ModelLoadFailed() | ModelUnloaded():
                self._replica_gone(node_id, message.replica_id, message.error)
            case _:
                pass

    def _replica_gone(self, node_id: str, replica_id: str, error: ErrorInfo | None) -> None:
        deployment = self._deployments.get(_name_of(replica_id))
        if deployment is not None and deployment.lost(replica_id, error, self._clock()):
            self._inference.remove_replica(deployment.name, replica_id)
            reason = error.message if error else "asked for"
            log.info("replica gone %s", fields(replica=replica_id, node=node_id, reason=reason))
            self._reconcile(deployment)

    def node_lost(self, node_id: str) -> None:
        for deployment in self._deployments.values():
            gone = deployment.node_lost(node_id)
            for replica_id in gone:
                self._inference.remove_replica(deployment.name, replica_id)
            if gone:
                self._reconcile(deployment)

    def node_joined(self, node_id: str) -> None:
        self._changed.set()
        self._take_stock(node_id)
        for deployment in self._deployments.values():
            self._reconcile(deployment)

    def _take_stock(self, node_id: str) -> None:
        """Adopt what a node says it holds and a deployment misses; what nobody wants is to go.

        That is left over from before a restart of ours, or from a time when the node could not be reached.
        """
        member = self._membership.get(node_id)
        telemetry = member.telemetry if member is not None else None
        if telemetry is None or self._seen.get(node_id) is telemetry:
            return
        self._seen[node_id] = telemetry
        places = self._places()
        for replica_id in telemetry.replicas:
            deployment = self._deployments.get(_name_of(replica_id))
            if deployment is None or not deployment.adopt(replica_id, node_id, places):
                self._command(node_id, UnloadModel(epoch=self._epoch, replica_id=replica_id))

    def _on_loaded(self, node_id: str, message: ModelLoaded) -> None:
        name = _name_of(message.replica_id)
        deployment = self._deployments.get(name)
        if deployment is None or message.replica_id not in deployment.replicas:
            # Of before a restart, or not wanted any more: the node need not hold it.
            self._command(node_id, UnloadModel(epoch=self._epoch, replica_id=message.replica_id))
            return
        settled = deployment.settled
        if deployment.loaded(message.replica_id, message.signature):
            if not settled:
                self._record(Settled(name=name))
            log.info("replica ready %s", fields(model=name, node=node_id))
            self._registry.describe(name, message.signature)
            self._inference.add_replica(name, message.replica_id, node_id)
            self._changed.set()

    # --- keeping things as wanted -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Let time pass for deployments and requests, until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for member in self._membership.online():
                self._take_stock(member.node_id)
            for deployment in list(self._deployments.values()):
                self._reconcile(deployment)
            self._inference.expire()

    def _reconcile(self, deployment: Deployment) -> None:
        load: dict[str, int] = {}
        for other in self._deployments.values():
            for replica in other.replicas.values():
                load[replica.node_id] = load.get(replica.node_id, 0) + 1
        resend = max(1.0, self._settings.resend_seconds)
        for command in deployment.plan(self._places(), load, self._clock(), resend):
            if isinstance(command, Load):
                ref = BlobRef(sha256=command.model.sha256, size=command.model.size, holders=self._urls)
                message = LoadModel(epoch=self._epoch, replica_id=command.replica_id, name=command.name, model=ref)
                self._command(command.node_id, message)
            else:
                self._inference.remove_replica(deployment.name, command.replica_id)
                self._command(command.node_id, UnloadModel(epoch=self._epoch, replica_id=command.replica_id))
        self._changed.set()

    def _places(self) -> list[Place]:
        return [
            Place(member.node_id, member.capacity.gflops)
            for member in self._membership.online()
            if "tensorflow" in member.capacity.runtimes
        ]

    def _remove(self, name: str) -> None:
        deployment = self._deployments.get(name)
        if deployment is None:
            return
        self._record(Undeployed(name=name))
        for replica in deployment.replicas.values():
            self._command(replica.node_id, UnloadModel(epoch=self._epoch, replica_id=replica.replica_id))
        log.info("undeployed %s", fields(model=name))

    def _record(self, event: AnyDeploymentEvent) -> None:
        self._journal.append(_STREAM, event)
        self._apply(event)

    def _apply(self, event: AnyDeploymentEvent) -> None:
        match event:
            case Deployed():
                known = self._deployments.get(event.name)
                if known is None:
                    self._deployments[event.name] = Deployment(event.name, event.model, event.wanted)
                    self._inference.open(event.name)
                else:
                    known.wanted, known.failures, known.error = event.wanted, 0, None
            case Settled():
                self._deployments[event.name].settled = True
            case Undeployed():
                self._deployments.pop(event.name, None)
                self._inference.close(event.name, Unavailable(f"{event.name} was undeployed"))
        # The plain name means the newest version that was ready once: while the next one loads, the one before answers.
        order = sorted(self._deployments.values(), key=lambda one: (one.settled, int(one.name.partition(":")[2])))
        self._inference.prefer({deployment.name.partition(":")[0]: deployment.name for deployment in order})

    def _command(self, node_id: str, message: Message) -> None:
        self._outbox.publish(self._topics.node(node_id, "inbox"), message)

    def _info(self, deployment: Deployment) -> DeploymentInfo:
        router = self._inference.router(deployment.name)
        return DeploymentInfo(
            name=deployment.name,
            wanted=deployment.wanted,
            replicas=tuple(replica.info() for replica in deployment.replicas.values()),
            queued=len(router.queue),
            served=router.served,
        )


def _name_of(replica_id: str) -> str:
    return replica_id.split("/", 1)[0]
