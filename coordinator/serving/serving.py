"""Serving: deployments kept as wanted, and requests routed to their replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from coordinator.journal import Journal
from coordinator.membership import Membership
from coordinator.serving.deployments import Deployment, Load, Place
from coordinator.serving.metrics import ServingMetrics
from coordinator.serving.registry import Registry
from coordinator.serving.router import Batch, Request, Router
from potluck.bus import Bus, Envelope
from potluck.errors import (
    Cancelled,
    InvalidRequest,
    NotFound,
    PotluckError,
    TimedOut,
    TooLarge,
    Unavailable,
    from_code,
)
from potluck.logs import fields
from potluck.messages import (
    INLINE_LIMIT_BYTES,
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
    NodeTelemetry,
    RequestOutcome,
    RunInference,
    Signature,
    Tensor,
    UnloadModel,
)
from potluck.outbox import Outbox
from potluck.settings import CoordinatorSettings
from potluck.tensors import to_numpy
from potluck.topics import Topics

log = logging.getLogger(__name__)

_STREAM = "deployments"
TICK_SECONDS = 0.25
DEPLOY_SECONDS = 300.0
"""How long all replicas of a new deployment may take to become ready."""
JOIN_SECONDS = 5.0
"""How long a deployment waits for nodes that may be about to join."""
INPUT_LIMIT_BYTES = INLINE_LIMIT_BYTES - 16 * 1024
"""Inputs of one request: with what goes around them they fit into a message."""
BATCH_SECONDS = 10.0
"""A batch that is away for longer is asked again elsewhere: it runs at QoS 0, and a node may be frozen.

Where requests may take longer than usual (`inference_seconds`), a third of that: there are two tries more.
"""


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
        self._seen: dict[str, NodeTelemetry] = {}
        self.metrics = ServingMetrics()
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

        name = ""  # names that are not deployed are whatever is asked for: they are counted as one
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

        try:
            self._submit(router, inputs, answer, now + timeout_seconds)
        except PotluckError as error:
            answer(error)
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
        # Lists as bytes: they are checked here, where only their own request can fail, and do not grow on their way.
        inputs = tuple([_plain(tensor) if isinstance(tensor.data, list) else tensor for tensor in inputs])
        size = sum([_size(tensor) for tensor in inputs])
        if size > INPUT_LIMIT_BYTES:
            raise TooLarge(
                f"the inputs are {size} bytes, and {INPUT_LIMIT_BYTES} go into a message: send fewer rows at once, or a blob"
            )
        router.submit(Request(inputs, answer, deadline, size))
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
                    for outcome in message.outcomes:
                        if outcome.error is not None and outcome.error.code == "not_found":
                            self._replica_gone(node_id, message.replica_id, outcome.error)
                            break
                    self._pump(router)
            case ModelLoaded():
                self._on_loaded(node_id, message)
            case ModelLoadFailed() | ModelUnloaded():
                self._replica_gone(node_id, message.replica_id, message.error)
            case _:
                pass

    def _replica_gone(self, node_id: str, replica_id: str, error: ErrorInfo | None) -> None:
        deployment = self._deployments.get(_name_of(replica_id))
        if deployment is not None and deployment.lost(replica_id, error, self._clock()):
            self._routers[deployment.name].remove_replica(replica_id, self._clock())
            reason = error.message if error else "asked for"
            log.info("replica gone %s", fields(replica=replica_id, node=node_id, reason=reason))
            self._reconcile(deployment)
            self._pump(self._routers[deployment.name])

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
                for member in self._membership.online():
                    self._take_stock(member.node_id)
                for deployment in list(self._deployments.values()):
                    self._reconcile(deployment)
                for router in list(self._routers.values()):
                    router.expire(now, max(BATCH_SECONDS, self._settings.inference_seconds / 3))
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
            case Settled():
                self._deployments[event.name].settled = True
            case Undeployed():
                self._deployments.pop(event.name, None)
                self._routers.pop(event.name, None)
        # The plain name means the newest version that was ready once: while the next one loads, the one before answers.
        order = sorted(self._deployments.values(), key=lambda one: (one.settled, int(one.name.partition(":")[2])))
        self._newest = {deployment.name.partition(":")[0]: deployment.name for deployment in order}

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


def _plain(tensor: Tensor) -> Tensor:
    """With its list as bytes (texts: as a flat list). Raises InvalidRequest where data, datatype and shape do not agree."""
    array = to_numpy(tensor)
    data = array.ravel().tolist() if tensor.datatype == "BYTES" else array.tobytes()
    return replace(tensor, data=data)


def _size(tensor: Tensor) -> int:
    """What it takes in a message, at most: a batch that is too large would be lost with all who are in it."""
    data = tensor.data
    rest = 64 + len(tensor.name.encode()) + len(tensor.datatype.encode()) + 9 * len(tensor.shape)
    if isinstance(data, bytes):
        return len(data) + rest
    if isinstance(data, list):
        return sum([5 + len(text if isinstance(text, bytes) else text.encode()) for text in data]) + rest
    return rest + sum([5 + len(holder.encode()) for holder in data.holders]) + 120


def _failure(outcome: RequestOutcome | PotluckError) -> str:
    if isinstance(outcome, PotluckError):
        return outcome.code
    return outcome.error.code if outcome.error is not None else ""
