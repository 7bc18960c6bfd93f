"""Serving: deployments kept as wanted on the nodes; `inference` routes requests to their replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from msgspec.structs import replace

from coordinator.journal import Journal
from coordinator.membership import Membership
from coordinator.placement import RUNTIME_OF, WORDS
from coordinator.serving import deployments, memory
from coordinator.serving.autoscaling import Autoscaling
from coordinator.serving.deployments import Deployment, Load, Place
from coordinator.serving.inference import Inference
from coordinator.serving.records import (
    STREAM,
    AnyDeploymentEvent,
    Deployed,
    Measured,
    Parked,
    Records,
    Settled,
    Undeployed,
    Woken,
    model_of,
)
from coordinator.serving.registry import Registry
from coordinator.serving.rollout import Rollout
from coordinator.serving.room import Room
from coordinator.serving.router import Router
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
    Deploy,
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

TICK_SECONDS = 0.25
DEPLOY_SECONDS = 300.0
"""How long all replicas of a new deployment may take to become ready."""
JOIN_SECONDS = 5.0
"""How long a deployment waits for nodes that may be about to join."""
LOADING_SECONDS = 5.0
"""After so long it is worth to ask a deployment again that is being loaded."""


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
        holders: Callable[[str], tuple[str, ...]],
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
        self._holders = holders
        self._epoch = epoch
        self._clock = clock
        self._changed = asyncio.Event()
        self._seen: dict[str, NodeTelemetry] = {}
        self._records = Records()
        self._deployments = self._records.deployments
        self._rollout = Rollout(self._records, inference, record=self._record, remove=self._remove)
        self._room = Room(self._records, inference)
        self._autoscaling = Autoscaling(self._records, inference, record=self._record)
        for event in journal.replay(STREAM, AnyDeploymentEvent):  # type: ignore[arg-type, var-annotated]
            self._records.apply(event)
        journal.rewrite(STREAM, self._records.events())
        for name, deployment in self._deployments.items():
            inference.open(name)
            inference.set_objective(name, deployment.asked.objective_seconds if deployment.asked is not None else 0.0)
            if deployment.retired:
                inference.retired.add(name)
        inference.prefer(self._records.traffic)
        inference.on_demand = self._on_demand

    # --- deployments --------------------------------------------------------------------------------------------------

    async def deploy(self, asked: Deploy) -> str:
        """Deploy, or change how; returns the deployment's name once all replicas are ready and it has its traffic.

        Raises NotFound, InvalidRequest (more replicas than nodes, a canary beside nothing), Unavailable (nodes were lost
        meanwhile), Cancelled, and what made loading fail; a deployment that was ready before goes on with what it has.
        """
        info = self._registry.model(asked.model)
        name = f"{info.name}:{info.version}"
        asked = replace(asked, model=name)
        replicas = deployments.replicas_at_first(asked)
        self._rollout.check(name, asked)
        await self._wait_for_nodes(max(1, replicas), RUNTIME_OF[info.format])
        known = self._deployments.get(name)
        if known is None or known.asked != asked or known.failing or known.put_away:
            self._rollout.check(name, asked)
            self._rollout.hold(info.name)
            self._record(Deployed(name=name, model=info.model, wanted=replicas, asked=asked, format=info.format))
        deployment = self._deployments[name]
        self._reconcile(deployment)
        deadline = self._clock() + DEPLOY_SECONDS
        enough_at = roomy_at = self._clock()
        while not deployment.complete(places := self._places()):
            now, ready, wanted = self._clock(), len(deployment.ready), max(1, deployment.target(places))
            if self._deployments.get(name) is not deployment:
                raise Cancelled(f"{name} was undeployed before it was ready")
            if deployment.put_away:
                raise Cancelled(f"{name} was withdrawn before it was ready: {deployment.reason}")
            if deployment.failing and deployment.error is not None:
                if deployment.failed:
                    self._remove(name)
                left = f"; {ready} of {wanted} replicas are ready" if ready else ""
                raise from_code(deployment.error.code, f"{name} could not be loaded: {deployment.error.message}{left}")
            if now > deadline:
                raise TimedOut(f"{ready} of {wanted} replicas of {name} are ready so far")
            if not deployment.cramped:
                roomy_at = now
            elif now - roomy_at > JOIN_SECONDS:
                self.give_up(name)
                raise Unavailable(
                    f"{ready} of {wanted} replicas of {name} are ready, and memory is short for the rest: "
                    f"{memory.nowhere(deployment.need_bytes, deployment.cramped)}. Undeploy a model, or ask for fewer"
                )
            if len(suited := deployment.suited(places)) >= wanted:
                enough_at = now
            elif now - enough_at > JOIN_SECONDS:
                self.give_up(name)
                raise Unavailable(
                    f"{ready} of {wanted} replicas of {name} are ready, and only {len(suited)} nodes with "
                    f"{WORDS[RUNTIME_OF[info.format]]} are online any more: start more nodes, or ask for fewer"
                )
            await self._wait_for_change()
        self._rollout.ready(name, asked, self._clock())
        log.info("deployed %s", fields(model=name, replicas=len(deployment.ready)))
        return name

    def promote(self, model: str) -> tuple[DeploymentInfo, ...]:
        """Make the canary or shadow of `model` the stable version. Raises NotFound, Conflict."""
        self._rollout.promote(model, self._clock())
        return self.deployments(model_of(model))

    def roll_back(self, model: str) -> tuple[DeploymentInfo, ...]:
        """Withdraw the canary or shadow of `model`, or go back to the version before. Raises NotFound, Conflict."""
        self._rollout.roll_back(model)
        return self.deployments(model_of(model))

    async def _wait_for_nodes(self, count: int, runtime: str) -> None:
        """Return once so many nodes can hold a replica; nodes may be about to join, after a restart of ours above all."""
        deadline = self._clock() + JOIN_SECONDS
        while (there := sum(runtime in place.runtimes for place in self._places())) < count:
            if self._clock() > deadline:
                raise InvalidRequest(
                    f"{count} replicas were asked for, but {there} nodes with {WORDS[runtime]} are online "
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
        names = tuple(name for name in self._deployments if model in (name, model_of(name)))
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

    def deployments(self, model: str = "") -> tuple[DeploymentInfo, ...]:
        """All, or those of one model by its plain name."""
        places = self._places()
        return tuple(
            self._info(deployment, places)
            for name, deployment in sorted(self._deployments.items())
            if model in ("", model_of(name))
        )

    def signature(self, model: str) -> Signature | None:
        """Of a deployed model (`name` or `name:version`). Raises NotFound."""
        return self._deployments[self._inference.router(model).name].signature

    def ready(self, model: str) -> bool:
        """Whether it can be asked now: a replica is ready, or is loaded on demand. Raises NotFound."""
        router = self._inference.router(model)
        return bool(router.lanes) or self._deployments[router.name].parked is not None

    def versions(self, name: str) -> tuple[str, ...]:
        """The deployed versions of `name`."""
        return tuple(key.partition(":")[2] for key in self._deployments if model_of(key) == name)

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
        if deployment.loaded(message.replica_id, message.signature, message.warm_rows):
            if not settled:
                self._record(Settled(name=name))
            log.info("replica ready %s", fields(model=name, node=node_id))
            if message.resident_bytes > self._records.resident.get(name, 0):  # where more is shared, less is measured
                self._record(Measured(name=name, resident_bytes=message.resident_bytes))
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
            self._autoscaling.tick(self._places(), self._clock())
            for deployment in list(self._deployments.values()):
                router = self._inference.router_of(deployment.name)
                if deployment.parked and router.queue:
                    self._wake(deployment)  # its last replica died with requests on the way
                self._reconcile(deployment)
                router.trouble = self._reason(deployment)
            self._inference.expire()
            self._rollout.tick(self._clock())

    def _reconcile(self, deployment: Deployment) -> None:
        load: dict[str, int] = {}
        for other in self._deployments.values():
            for replica in other.replicas.values():
                load[replica.node_id] = load.get(replica.node_id, 0) + 1
        resend = max(1.0, self._settings.resend_seconds)
        deployment.need_bytes = self._room.needed(deployment)
        busy = self._inference.busy(deployment.name)
        commands = deployment.plan(self._places(), load, self._clock(), resend, busy=busy)
        if deployment.cramped and (victims := self._room.victims(deployment, self._clock())):
            for name in victims:
                self._evict(name, deployment)
            commands += deployment.plan(self._places(), load, self._clock(), resend, busy=busy)
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
                )
                self._command(command.node_id, message)
            else:
                self._inference.remove_replica(deployment.name, command.replica_id)
                self._command(command.node_id, UnloadModel(epoch=self._epoch, replica_id=command.replica_id))
        self._changed.set()

    def _evict(self, name: str, other: Deployment) -> None:
        quiet_seconds = self._clock() - self._inference.asked_at[name]
        reason = f"evicted for {other.name}, whose replica needs {memory.bytes_text(other.need_bytes)}: not asked for {quiet_seconds:.0f} s"
        log.info("deployment evicted %s", fields(model=name, reason=reason))
        self._record(Parked(name=name, why="evicted", reason=reason))
        self._reconcile(self._deployments[name])

    def _places(self) -> list[Place]:
        members = self._membership.online()
        left = self._room.left(members)
        return [
            Place(member.node_id, member.capacity.gflops, left[member.node_id], frozenset(member.capacity.runtimes))
            for member in members
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
        new = isinstance(event, Deployed) and event.name not in self._deployments
        self._journal.append(STREAM, event)
        self._records.apply(event)
        if new:
            self._inference.open(event.name)
        elif isinstance(event, Deployed):
            self._inference.retired.discard(event.name)
            self._inference.asked_at[event.name] = self._clock()
        if isinstance(event, Deployed) and event.asked is not None:
            self._inference.set_objective(event.name, event.asked.objective_seconds)
        if isinstance(event, Undeployed):
            self._inference.close(event.name, Unavailable(f"{event.name} was undeployed"))

    def _on_demand(self, router: Router) -> None:
        """A deployment is asked that has no replica now: it is loaded. Raises Unavailable when too many wait for that."""
        deployment = self._deployments[router.name]
        if deployment.parked:
            self._wake(deployment)
        if len(router.queue) >= self._settings.queue_limit:
            raise Unavailable(
                f"{len(router.queue)} requests wait for {router.name} already, which is being loaded: try again in "
                f"{LOADING_SECONDS:.0f} s",
                retry_after_seconds=LOADING_SECONDS,
            )

    def _wake(self, deployment: Deployment) -> None:
        log.info("deployment woken %s", fields(model=deployment.name, was=deployment.parked))
        self._record(Woken(name=deployment.name))
        self._reconcile(deployment)

    def _command(self, node_id: str, message: Message) -> None:
        self._outbox.publish(self._topics.node(node_id, "inbox"), message)

    def _reason(self, deployment: Deployment) -> str:
        """What there is to say of its state; "" when all is well."""
        if deployment.cramped and not deployment.put_away:
            return memory.nowhere(deployment.need_bytes, deployment.cramped)
        if deployment.reason or deployment.error:
            return deployment.reason or (deployment.error.message if deployment.error else "")
        warm = min((replica.warm_rows for replica in deployment.ready), default=0)
        if 0 < warm < self._settings.batch_limit:
            return f"warmed up for batches of at most {warm} rows: that took {self._settings.warm_seconds:.0f} s"
        return ""

    def _info(self, deployment: Deployment, places: list[Place]) -> DeploymentInfo:
        router = self._inference.router_of(deployment.name)
        traffic = self._records.traffic[model_of(deployment.name)]
        lately = self._inference.metrics.window(deployment.name).summary(self._clock())
        return DeploymentInfo(
            name=deployment.name,
            wanted=deployment.wanted,
            objective_seconds=router.objective_seconds,
            replicas=tuple(replica.info() for replica in deployment.replicas.values()),
            queued=len(router.queue),
            served=router.served,
            state=deployment.state(places),
            role=traffic.role(deployment.name),
            weight=traffic.share(deployment.name),
            reason=self._reason(deployment),
            resident_bytes=self._records.resident.get(deployment.name, 0),
            min_replicas=deployment.asked.min_replicas if deployment.asked else 0,
            max_replicas=deployment.asked.max_replicas if deployment.asked else 0,
            queue_seconds=router.queue_seconds,
            p50_seconds=lately.quantile(0.5),
            p99_seconds=lately.quantile(0.99),
            failure_rate=lately.failure_rate,
        )


def _name_of(replica_id: str) -> str:
    return replica_id.split("/", 1)[0]
