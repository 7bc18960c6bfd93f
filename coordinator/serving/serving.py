"""Serving: deployments kept as wanted, and requests routed to their replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from msgspec import Struct

from coordinator.journal import Journal
from coordinator.membership import Membership
from coordinator.serving.deployments import Deployment, Load, Place
from coordinator.serving.metrics import ServingMetrics
from coordinator.serving.registry import Registry
from coordinator.serving.router import Batch, Request, Router
from potluck.bus import Bus, Envelope
from potluck.errors import (
    InvalidRequest,
    NotFound,
    PotluckError,
    TimedOut,
    Unavailable,
    from_code,
)
from potluck.logs import fields
from potluck.messages import (
    BlobRef,
    DeploymentInfo,
    ErrorInfo,
    Infer,
    InferenceFinished,
    Inferred,
    LoadModel,
    Message,
    ModelLoaded,
    ModelLoadFailed,
    ModelUnloaded,
    RequestOutcome,
    RunInference,
    Signature,
    Tensor,
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
BATCH_SECONDS = 10.0
"""A batch that is away for longer is asked again elsewhere: it runs at QoS 0, and a node may be frozen."""


class DeploymentEvent(Struct, frozen=True, kw_only=True, tag_field="event", tag=True):
    """Base of what is in the stream."""

    name: str


class Deployed(DeploymentEvent, frozen=True):
    model: BlobRef
    wanted: int


class Undeployed(DeploymentEvent, frozen=True):
    pass


AnyDeploymentEvent = Deployed | Undeployed


class Serving:
    """All deployments of the coordinator. `run` must be under way."""

    def __init__(
        self,
        *,
        bus: Bus,
        topics: Topics,
        outbox: Outbox,
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
        self._fast = Outbox(bus)
        self._membership = membership
        self._registry = registry
        self._journal = journal
        self._settings = settings
        self._urls = urls
        self._epoch = epoch
        self._clock = clock
        self._deployments: dict[str, Deployment] = {}
        self._routers: dict[str, Router] = {}
        self._newest: dict[str, str] = {}
        self._changed = asyncio.Event()
        self.metrics = ServingMetrics()
        for event in journal.replay(_STREAM, AnyDeploymentEvent):  # type: ignore[arg-type, var-annotated]
            self._apply(event)

    # --- deployments --------------------------------------------------------------------------------------------------

    async def deploy(self, model: str, replicas: int) -> str:
        """Deploy, or change the number of replicas; returns the deployment's name once all are ready.

        Raises NotFound, InvalidRequest (more replicas than nodes), and what made loading fail.
        """
        info = self._registry.model(model)
        name = f"{info.name}:{info.version}"
        await self._wait_for_nodes(max(1, replicas))
        known = self._deployments.get(name)
        if known is None or known.wanted != replicas or known.failed:
            self._record(Deployed(name=name, model=info.model, wanted=replicas))
        deployment = self._deployments[name]
        self._reconcile(deployment)
        deadline = self._clock() + DEPLOY_SECONDS
        while not deployment.complete(self._places()):
            if deployment.failed or name not in self._deployments:
                error = deployment.error or ErrorInfo(code="cancelled", message=f"{name} was undeployed")
                self._remove(name)
                raise from_code(error.code, f"{name} could not be loaded: {error.message}")
            if self._clock() > deadline:
                ready = len(deployment.ready)
                raise TimedOut(f"{ready} of {deployment.target(self._places())} replicas of {name} are ready so far")
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
        return self._deployments[self._find(model).name].signature

    def ready(self, model: str) -> bool:
        """Whether a replica of it can answer now. Raises NotFound."""
        return bool(self._find(model).lanes)

    def versions(self, name: str) -> tuple[str, ...]:
        """The deployed versions of `name`."""
        return tuple(key.partition(":")[2] for key in self._deployments if key.partition(":")[0] == name)

    # --- requests -------------------------------------------------------------------------------------------------------

    def on_infer(self, envelope: Envelope) -> None:
        """Handler for `models/<name>/infer`."""
        message = envelope.message
        if not isinstance(message, Infer):
            self._fast.refuse(envelope, InvalidRequest(f"{type(message).__name__} is not Infer: see docs/protocol.md"))
            return
        model = self._topics.segment(envelope.topic, 1)
        now = self._clock()
        deadline = min(message.expires or float("inf"), now + self._settings.inference_seconds)

        def answer(outcome: RequestOutcome | PotluckError) -> None:
            self.metrics.answered(name, self._clock() - now, _failure(outcome))
            if isinstance(outcome, PotluckError):
                self._fast.refuse(envelope, outcome)
            elif outcome.error is not None:
                self._fast.refuse(envelope, from_code(outcome.error.code, outcome.error.message))
            else:
                self._fast.reply(envelope, Inferred(model=name, outputs=outcome.outputs))

        name = model
        try:
            router = self._find(model)
            name = router.name
            self._submit(router, message.inputs, answer, deadline)
        except PotluckError as error:
            answer(error)

    async def infer(self, model: str, inputs: tuple[Tensor, ...], timeout_seconds: float) -> Inferred:
        """One request of the gateway. Raises NotFound, InvalidRequest, Overloaded, TimedOut, Unavailable."""
        router = self._find(model)
        now = self._clock()
        answered: asyncio.Future[RequestOutcome] = asyncio.get_running_loop().create_future()

        def answer(outcome: RequestOutcome | PotluckError) -> None:
            self.metrics.answered(router.name, self._clock() - now, _failure(outcome))
            if answered.done():
                return
            if isinstance(outcome, PotluckError):
                answered.set_exception(outcome)
            elif outcome.error is not None:
                answered.set_exception(from_code(outcome.error.code, outcome.error.message))
            else:
                answered.set_result(outcome)

        self._submit(router, inputs, answer, now + timeout_seconds)
        outcome = await answered
        return Inferred(model=router.name, outputs=outcome.outputs)

    def _submit(
        self,
        router: Router,
        inputs: tuple[Tensor, ...],
        answer: Callable[[RequestOutcome | PotluckError], None],
        deadline: float,
    ) -> None:
        if not inputs:
            raise InvalidRequest("a request needs at least one input tensor")
        router.submit(Request(inputs, answer, deadline, sum(_size(tensor) for tensor in inputs)))
        self._pump(router)

    def _pump(self, router: Router) -> None:
        for batch in router.dispatch(self._clock()):
            self._send(batch)

    def _send(self, batch: Batch) -> None:
        message = RunInference(
            id=batch.batch_id,
            replica_id=batch.replica_id,
            expires=max(request.deadline for request in batch.requests),
            requests=tuple(request.inputs for request in batch.requests),
        )
        self._fast.publish(self._topics.node(batch.node_id, "inbox"), message, qos=0)

    def _find(self, model: str) -> Router:
        router = self._routers.get(self._newest.get(model, model))
        if router is None:
            self._registry.model(model)  # a name that is not even registered has its own answer
            raise NotFound(f"{model} is not deployed: deploy it with `potluck deploy {model}`")
        return router

    # --- what nodes say -----------------------------------------------------------------------------------------------

    def on_node_event(self, node_id: str, message: Message) -> None:
        """Any event of a node that concerns replicas; others are not ours."""
        match message:
            case InferenceFinished():
                router = self._routers.get(_name_of(message.replica_id))
                if router is not None:
                    router.finished(message.replica_id, message.id, message.outcomes, self._clock())
                    self._pump(router)
            case ModelLoaded():
                self._on_loaded(node_id, message)
            case ModelLoadFailed() | ModelUnloaded():
                deployment = self._deployments.get(_name_of(message.replica_id))
                if deployment is not None and deployment.lost(message.replica_id, message.error, self._clock()):
                    self._routers[deployment.name].remove_replica(message.replica_id, self._clock())
                    reason = message.error.message if message.error else "asked for"
                    log.info("replica gone %s", fields(replica=message.replica_id, node=node_id, reason=reason))
                    self._reconcile(deployment)
                    self._pump(self._routers[deployment.name])
            case _:
                pass

    def node_lost(self, node_id: str) -> None:
        for deployment in self._deployments.values():
            gone = deployment.node_lost(node_id)
            for replica_id in gone:
                self._routers[deployment.name].remove_replica(replica_id, self._clock())
            if gone:
                self._reconcile(deployment)
                self._pump(self._routers[deployment.name])

    def node_joined(self, node_id: str) -> None:
        self._changed.set()
        for deployment in self._deployments.values():
            self._reconcile(deployment)

    def _on_loaded(self, node_id: str, message: ModelLoaded) -> None:
        name = _name_of(message.replica_id)
        deployment = self._deployments.get(name)
        if deployment is None or message.replica_id not in deployment.replicas:
            # Of before a restart, or not wanted any more: the node need not hold it.
            self._command(node_id, UnloadModel(epoch=self._epoch, replica_id=message.replica_id))
            return
        if deployment.loaded(message.replica_id, message.signature):
            log.info("replica ready %s", fields(model=name, node=node_id))
            self._registry.describe(name, message.signature)
            router = self._routers[name]
            router.add_replica(message.replica_id, node_id)
            self._changed.set()
            self._pump(router)

    # --- keeping things as wanted -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Let time pass for deployments and requests, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._fast.run(), name="inference outbox")
            while True:
                await asyncio.sleep(TICK_SECONDS)
                now = self._clock()
                for deployment in list(self._deployments.values()):
                    self._reconcile(deployment)
                for router in list(self._routers.values()):
                    router.expire(now, BATCH_SECONDS)
                    self._pump(router)

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
                self._routers[deployment.name].remove_replica(command.replica_id, self._clock())
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
        router = self._routers[name]
        self._record(Undeployed(name=name))
        router.close(Unavailable(f"{name} was undeployed"))
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
                    self._routers[event.name] = Router(
                        event.name, queue_limit=self._settings.queue_limit, batch_limit=self._settings.batch_limit
                    )
                else:
                    known.wanted, known.failures, known.error = event.wanted, 0, None
            case Undeployed():
                self._deployments.pop(event.name, None)
                self._routers.pop(event.name, None)
        self._newest = {}
        for name in self._deployments:
            plain, _, version = name.partition(":")
            newest = self._newest.get(plain, ":0").partition(":")[2]
            if int(version) > int(newest):
                self._newest[plain] = name

    def _command(self, node_id: str, message: Message) -> None:
        self._outbox.publish(self._topics.node(node_id, "inbox"), message)

    def _info(self, deployment: Deployment) -> DeploymentInfo:
        router = self._routers[deployment.name]
        return DeploymentInfo(
            name=deployment.name,
            wanted=deployment.wanted,
            replicas=tuple(replica.info() for replica in deployment.replicas.values()),
            queued=len(router.queue),
            served=router.served,
        )


def _name_of(replica_id: str) -> str:
    return replica_id.split("/", 1)[0]


def _size(tensor: Tensor) -> int:
    data = tensor.data
    if isinstance(data, bytes):
        return len(data)
    return 9 * len(data) if isinstance(data, list) else 200  # a msgpack float, or a reference


def _failure(outcome: RequestOutcome | PotluckError) -> str:
    if isinstance(outcome, PotluckError):
        return outcome.code
    return outcome.error.code if outcome.error is not None else ""
