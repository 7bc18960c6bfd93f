"""Serving: keeps deployments on the nodes as users want them; `inference` routes requests to their replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from msgspec.structs import replace

from coordinator.journal import FATAL, Journal
from coordinator.membership import Membership
from coordinator.plans.placement import RUNTIME_OF, WORDS
from coordinator.registry import Registry
from coordinator.serving import deployments, memory
from coordinator.serving.autoscaling import Autoscaling
from coordinator.serving.deployments import Deployment, Place
from coordinator.serving.endpoints import Endpoint
from coordinator.serving.inference import Inference
from coordinator.serving.records import (
    STREAM,
    AnyDeploymentEvent,
    Deployed,
    Records,
    TakenDown,
    model_of,
)
from coordinator.serving.rollout import Rollout
from coordinator.serving.router import Router
from coordinator.serving.upkeep import Upkeep
from potluck.bus.outbox import Outbox
from potluck.errors import (
    Cancelled,
    InvalidRequest,
    NotFound,
    TimedOut,
    Unavailable,
)
from potluck.logs import fields
from potluck.settings import CoordinatorSettings
from potluck.surviving import surviving
from potluck.wire.failures import as_error
from potluck.wire.jobs import Deploy
from potluck.wire.questions import DeploymentInfo
from potluck.wire.topics import Topics
from potluck.wire.values import Signature
from potluck.wording import be, counted

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
DEPLOY_SECONDS = 300.0
"""How long all replicas of a new deployment may take to become ready."""
JOIN_SECONDS = 5.0
"""How long a deployment waits for nodes that may be about to join."""
LOADING_SECONDS = 5.0
"""A client should ask a deployment that is being loaded again after this time."""


class Serving:
    """All deployments of the coordinator. `run` must be running. `endpoint(replica_id, node_id)` makes a replica's endpoint."""

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
        endpoint: Callable[[str, str], Endpoint],
        epoch: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._inference = inference
        self._registry = registry
        self._journal = journal
        self._settings = settings
        self._clock = clock
        self._records = Records()
        self._deployments = self._records.deployments
        self._upkeep = Upkeep(
            self._records,
            topics=topics,
            outbox=outbox,
            inference=inference,
            membership=membership,
            registry=registry,
            settings=settings,
            holders=holders,
            epoch=epoch,
            record=self._record,
            endpoint=endpoint,
            clock=clock,
        )
        self.on_node_event = self._upkeep.on_node_event
        inference.on_missing = self._upkeep.replica_gone
        self.node_lost = self._upkeep.node_lost
        self.node_joined = self._upkeep.node_joined
        self.nodes_of = inference.nodes_of
        self._rollout = Rollout(self._records, inference, record=self._record, remove=self._remove)
        self._autoscaling = Autoscaling(self._records, inference, record=self._record)
        with journal.applying(STREAM):
            for event in journal.replay(STREAM, AnyDeploymentEvent):  # type: ignore[arg-type, var-annotated]
                self._records.apply(event)
        journal.snapshot(STREAM, self._records.events())
        for name, deployment in self._deployments.items():
            inference.open(name)
            inference.set_objective(name, deployment.asked.objective_seconds if deployment.asked is not None else 0.0)
            if deployment.retired:
                inference.retired.add(name)
        inference.prefer(self._records.traffic)
        inference.on_demand = self._on_demand

    # --- deployments --------------------------------------------------------------------------------------------------

    async def deploy(self, asked: Deploy, tell: Callable[[str], None] = lambda stage: None) -> str:
        """Deploy a model, or change its deployment. Returns the deployment's name once all replicas are ready and it has its
        traffic. `tell` is called with what it waits for.

        Raises NotFound, InvalidRequest (more replicas than nodes, a canary without a stable version), Unavailable (nodes were
        lost meanwhile), Cancelled, and the error that made loading fail. A deployment that was ready before keeps its replicas.
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
        self._upkeep.reconcile(deployment)
        deadline = self._clock() + DEPLOY_SECONDS
        enough_at = roomy_at = self._clock()
        while True:
            places = self._upkeep.places()
            now, ready, wanted = self._clock(), len(deployment.ready), max(1, deployment.target(places))
            if self._deployments.get(name) is not deployment:
                raise Cancelled(f"{name} was undeployed before it was ready")
            if deployment.put_away:
                raise Cancelled(f"{name} was withdrawn before it was ready: {deployment.reason}")
            if deployment.complete(places):
                break
            if deployment.failing and deployment.error is not None:
                if deployment.failed:
                    self._remove(name)
                left = f"; {ready} of {counted(wanted, 'replica')} {be(ready)} ready" if ready else ""
                raise as_error(deployment.error, f"{name} could not be loaded: {deployment.error.message}{left}")
            if now > deadline:
                raise TimedOut(f"{ready} of {counted(wanted, 'replica')} of {name} {be(ready)} ready so far")
            suited = deployment.suited(places)
            able = [place for place in suited if place.node_id not in deployment.refused]
            if len(able) < wanted <= len(suited) and ready == len(able) and deployment.refused:
                self.give_up(name)
                reason = next(deployment.refused[place.node_id] for place in suited if place not in able)
                raise as_error(
                    reason,
                    f"{ready} of {counted(wanted, 'replica')} of {name} {be(ready)} ready, and {counted(len(suited) - len(able), 'node')} "
                    f"cannot have it: {reason.message}",
                )
            if not deployment.cramped:
                roomy_at = now
            elif now - roomy_at > JOIN_SECONDS:
                self.give_up(name)
                raise Unavailable(
                    f"{ready} of {counted(wanted, 'replica')} of {name} {be(ready)} ready, and memory is short for the rest: "
                    f"{memory.nowhere(deployment.need_bytes, deployment.cramped)}. Undeploy a model, or ask for fewer"
                )
            if len(suited) >= wanted:
                enough_at = now
            elif now - enough_at > JOIN_SECONDS:
                self.give_up(name)
                raise Unavailable(
                    f"{ready} of {counted(wanted, 'replica')} of {name} {be(ready)} ready, and only {counted(len(suited), 'node')} with "
                    f"{WORDS[RUNTIME_OF[info.format]]} {be(len(suited))} online any more: start more nodes, or ask for fewer"
                )
            tell(self._upkeep.stage(deployment))
            await self._wait_for_change()
        tell("")
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
        """Wait until `count` nodes can hold a replica. Nodes may be about to join, above all after we restarted."""
        deadline = self._clock() + JOIN_SECONDS
        while (there := sum(runtime in place.runtimes for place in self._upkeep.places())) < count:
            if self._clock() > deadline:
                raise InvalidRequest(
                    f"{counted(count, 'replica')} {be(count)} asked for, but {counted(there, 'node')} with {WORDS[runtime]} {be(there)} online "
                    "(each holds one replica): start more nodes, or ask for fewer"
                )
            await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        self._upkeep.changed.clear()
        try:
            async with asyncio.timeout(TICK_SECONDS):
                await self._upkeep.changed.wait()
        except TimeoutError:
            return  # callers look again as time passes

    async def undeploy(self, model: str) -> tuple[str, ...]:
        """Take down `name:version`, or every version of `name`. Raises NotFound."""
        names = tuple(name for name in self._deployments if model in (name, model_of(name)))
        if not names:
            raise NotFound(f"{model} is not deployed: `potluck deployments` lists what is")
        for name in names:
            self._remove(name)
        return names

    def give_up(self, name: str) -> None:
        """Take down a deployment that has no ready replica: the client that asked for it gave up."""
        deployment = self._deployments.get(name)
        if deployment is not None and not deployment.ready:
            self._remove(name)

    def deployments(self, model: str = "") -> tuple[DeploymentInfo, ...]:
        """All deployments, or those of one model by its plain name."""
        places = self._upkeep.places()
        return tuple(
            self._info(deployment, places)
            for name, deployment in sorted(self._deployments.items())
            if model in ("", model_of(name))
        )

    def signature(self, model: str) -> Signature | None:
        """The signature of a deployed model (`name` or `name:version`). Raises NotFound."""
        return self._deployments[self._inference.router(model).name].signature

    def ready(self, model: str) -> bool:
        """Whether the model takes requests now: a replica is ready, or is loaded on demand. Raises NotFound."""
        router = self._inference.router(model)
        return bool(router.lanes) or self._deployments[router.name].parked is not None

    # --- keeping things as wanted -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Let time pass for deployments and requests, until cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            with surviving("upkeep of deployments", fatal=FATAL):
                # Without deployments, nobody looks at the places, and with a thousand nodes they take time.
                self._autoscaling.tick(self._upkeep.places() if self._deployments else [], self._clock())
                self._upkeep.tick()
                for deployment in self._deployments.values():
                    self._inference.router_of(deployment.name).trouble = self._reason(deployment)
            with surviving("deadlines of requests", fatal=FATAL):
                self._inference.expire()
            with surviving("rollout", fatal=FATAL):
                self._rollout.tick(self._clock())

    def _remove(self, name: str) -> None:
        deployment = self._deployments.get(name)
        if deployment is None:
            return
        self._record(TakenDown(name=name))
        for replica in deployment.replicas.values():
            self._upkeep.unload(replica.node_id, replica.replica_id)
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
        if isinstance(event, TakenDown):
            self._inference.close(event.name, Unavailable(f"{event.name} was undeployed"))

    def _on_demand(self, router: Router) -> None:
        """Load a deployment that got a request but has no replica. Raises Unavailable if too many requests wait for that."""
        deployment = self._deployments[router.name]
        if deployment.parked:
            self._upkeep.wake(deployment)
        if deployment.crashing and deployment.error is not None:
            raise Unavailable(f"{router.name} has no replica: {deployment.error.message}")
        if len(router.queue) >= self._settings.queue_limit:
            raise Unavailable(
                f"{counted(len(router.queue), 'request')} for {router.name} in the queue already, which is being loaded: try again in "
                f"{LOADING_SECONDS:.0f} s",
                retry_after_seconds=LOADING_SECONDS,
            )

    def _reason(self, deployment: Deployment) -> str:
        """Why the deployment is in its state; "" when all is well."""
        if deployment.cramped and not deployment.put_away:
            return memory.nowhere(deployment.need_bytes, deployment.cramped)
        if deployment.reason or deployment.error:
            return deployment.reason or (deployment.error.message if deployment.error else "")
        if deployment.refused and len(deployment.ready) < deployment.wanted and not deployment.put_away:
            node_id, why = next(iter(deployment.refused.items()))
            return f"node {node_id} cannot have it: {why.message}"
        warm = min((replica.warm_rows for replica in deployment.ready), default=0)
        if 0 < warm < self._settings.batch_limit:
            return f"warmed up for batches of at most {warm} rows: that took {self._settings.warm_seconds:.0f} s"
        inputs = deployment.signature.inputs if deployment.ready and deployment.signature is not None else ()
        fixed = inputs and all(size > 0 for spec in inputs for size in spec.shape[1:])
        if fixed and not warm and not self._inference.router_of(deployment.name).served:
            return "it takes nothing that could be made up to try it: its first request shows whether it runs"
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
