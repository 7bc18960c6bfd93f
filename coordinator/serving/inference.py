"""Inference requests: from the bus and the gateway through the routers of deployments to replicas, and their answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from math import inf

from coordinator.registry import Registry
from coordinator.serving.batches import Batch, Request
from coordinator.serving.deployments import name_of, node_of
from coordinator.serving.hedging import LEAST_SECONDS
from coordinator.serving.inputs import as_sent, batched, rows_of, taken
from coordinator.serving.metrics import ServingMetrics
from coordinator.serving.router import Router
from coordinator.serving.traffic import Traffic
from potluck.bus.mqtt import Bus, Envelope
from potluck.bus.outbox import Outbox
from potluck.errors import InvalidRequest, ModelFailed, NotFound, PotluckError, TimedOut
from potluck.logs import fields
from potluck.settings import CoordinatorSettings
from potluck.wire.deadlines import deadline, too_late
from potluck.wire.failures import as_error
from potluck.wire.messages import (
    BlobRef,
    CancelInfer,
    CancelInference,
    ErrorInfo,
    Infer,
    InferenceFinished,
    Inferred,
    RequestOutcome,
    RunInference,
    Signature,
    Tensor,
)
from potluck.wire.specs import matched
from potluck.wire.topics import Topics

log = logging.getLogger(__name__)

BATCH_SECONDS = 10.0
"""A batch that is away for longer is asked again elsewhere: it runs at QoS 0, and a node may be frozen.

Where requests may take longer than usual (`inference_seconds`), a third of that: there are two tries more.
"""
MOVED_BYTES_PER_SECOND = 100e6
"""How fast a node fetches inputs that another one has: what a gigabit network carries, about."""
SHADOW_QUEUE_LIMIT = 8
"""A shadow that is further behind gets no copies: it must cost nobody anything."""


class Inference:
    """One router for each deployment. `run` must be under way."""

    def __init__(
        self,
        *,
        bus: Bus,
        topics: Topics,
        registry: Registry,
        settings: CoordinatorSettings,
        node_at: Callable[[str], str] = lambda url: "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`node_at` says which node has an HTTP address; "": none."""
        self._topics = topics
        self._node_at = node_at
        self._outbox = Outbox(bus)
        """Of its own: nothing of control goes before an answer."""
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._routers: dict[str, Router] = {}
        self._asked: dict[tuple[str, str], tuple[Router, Request]] = {}
        """What waits for its answer, by where that goes and the question's id."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        """When a router is to look for batches that are late."""
        self._traffic: Mapping[str, Traffic] = {}
        self.retired: set[str] = set()
        """Deployments that take no more requests; those that they have are answered."""
        self.on_demand: Callable[[Router], None] = lambda router: None
        """Called with a router that is asked while it has no replica; what it raises is the answer."""
        self.on_missing: Callable[[str, str, ErrorInfo], None] = lambda node_id, replica_id, error: None
        """Called with a replica that its node does not have, and what that said."""
        self.asked_at: dict[str, float] = {}
        """When each deployment was last asked, or got a replica to be asked."""
        self.metrics = ServingMetrics()

    async def run(self) -> None:
        """Send answers, until cancelled."""
        try:
            await self._outbox.run()
        finally:
            for timer in self._timers.values():
                timer.cancel()

    # --- deployments come and go ----------------------------------------------------------------------------------------

    def open(self, name: str) -> None:
        """Take requests for this deployment, `name:version`."""
        settings = self._settings
        self.retired.discard(name)
        self.asked_at[name] = self._clock()
        self._routers[name] = Router(name, queue_limit=settings.queue_limit, batch_limit=settings.batch_limit)

    def close(self, name: str, error: PotluckError) -> None:
        """Answer what waits for this deployment with the error, and take no more."""
        self.retired.discard(name)
        self.asked_at.pop(name, None)
        self.metrics.windows.pop(name, None)
        router = self._routers.pop(name, None)
        if router is not None:
            router.close(error)
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()

    def set_objective(self, name: str, seconds: float) -> None:
        """How long an answer of this deployment may take; 0: nobody said."""
        self._routers[name].set_objective(seconds)

    def busy(self, name: str) -> bool:
        """Whether requests of this deployment wait for their answer."""
        router = self._routers[name]
        return bool(router.queue or router.in_flight)

    def prefer(self, traffic: Mapping[str, Traffic]) -> None:
        """Which deployments a plain name means, by name; the map may change."""
        self._traffic = traffic

    def add_replica(self, name: str, replica_id: str, node_id: str) -> None:
        """A replica is ready."""
        router = self._routers[name]
        self.asked_at[name] = self._clock()
        router.add_replica(replica_id, node_id)
        self._pump(router)

    def remove_replica(self, name: str, replica_id: str, *, crashed: bool = False) -> None:
        """A replica is gone: what is on its way to it is asked again elsewhere. `crashed`: its engine died of what it computed."""
        router = self._routers[name]
        router.remove_replica(replica_id, self._clock(), crashed=crashed)
        self._pump(router)

    def ask_again(self, node_id: str) -> None:
        """This node connected anew, or we did: batches travel at QoS 0, and none is kept for whoever is not there."""
        for router in self._routers.values():
            router.ask_again(node_id, self._clock())
            self._pump(router)

    def inputs_lost(self, node_id: str) -> None:
        """A node is gone, and the inputs that it had: requests with those are answered so, and not tried elsewhere."""
        for router in self._routers.values():
            router.inputs_lost(node_id)

    def nodes_of(self, model: str) -> list[str]:
        """Those with a replica of a deployed model that is ready, heard of, and not far slower than others; inputs may be sent there.
        Raises NotFound.

        None while it has a shadow, which may ask for the inputs when the other's node has done with them.
        """
        traffic = self._traffic.get(model)
        if traffic is not None and traffic.shadow:
            return []
        lanes = self.router(model).lanes
        return [lane.node_id for lane in lanes.values() if not lane.silent and not lanes.slow(lane)]

    def expire(self) -> None:
        """Time passes: late batches are asked again elsewhere, and requests past their deadline answered."""
        for router in list(self._routers.values()):
            router.expire(self._clock(), max(BATCH_SECONDS, self._settings.inference_seconds / 3))
            self._pump(router)

    def router_of(self, name: str) -> Router:
        """That of this deployment, whatever became of it."""
        return self._routers[name]

    def router(self, model: str) -> Router:
        """That of a deployed model: `name` (the stable version's), `name:version` or `name:alias`. Raises NotFound."""
        traffic = self._traffic.get(model)
        return self._router(traffic.stable if traffic is not None else model)

    def _route(self, model: str) -> Router:
        """Whose turn it is to answer to this model. Raises NotFound."""
        traffic = self._traffic.get(model)
        return self._router(traffic.pick(self._ready) if traffic is not None else model)

    def _router(self, model: str) -> Router:
        router = self._routers.get(model)
        if router is None:
            info = self._registry.model(model)  # a name that is not even registered has its own answer
            router = self._routers.get(f"{info.name}:{info.version}")
        if router is None or router.name in self.retired:
            raise NotFound(f"{model} is not deployed: deploy it with `potluck deploy {model}`")
        return router

    def _ready(self, name: str) -> bool:
        router = self._routers.get(name)
        return router is not None and bool(router.lanes)

    # --- requests -------------------------------------------------------------------------------------------------------

    def on_infer(self, envelope: Envelope) -> None:
        """Handler for `models/<name>/infer`."""
        message = envelope.message
        if isinstance(message, CancelInfer):
            self._cancel(self._asked.get((envelope.reply_to, message.id)))
            return
        if not isinstance(message, Infer):
            self._outbox.refuse(
                envelope, InvalidRequest(f"{type(message).__name__} is not Infer: see docs/protocol.md")
            )
            return
        model = self._topics.segment(envelope.topic, 1)
        now = self._clock()
        until = min(deadline(message, now), now + self._settings.inference_seconds)
        key = (envelope.reply_to, message.id)

        def answer(outcome: RequestOutcome | PotluckError) -> None:
            self._asked.pop(key, None)
            answered_at = self._clock()
            self.metrics.answered(name, answered_at, answered_at - now, _failure(outcome))
            if isinstance(outcome, PotluckError):
                self._outbox.refuse(envelope, outcome)
            elif outcome.error is not None:
                self._outbox.refuse(envelope, as_error(outcome.error))
            else:
                self._outbox.reply(envelope, Inferred(model=name, outputs=outcome.outputs))

        name = ""  # names that are not deployed are whatever is asked for: they are counted as one
        try:
            if until <= now:
                raise TimedOut(too_late(message, now, "the coordinator's"))
            router = self._route(model)
            name = router.name
            request = self._submit(router, model, message.inputs, answer, now, until, message.priority)
            if message.id and not request.answered:
                self._asked[key] = router, request
            self._copy(model, message.inputs, now, until)
        except PotluckError as error:
            answer(error)

    async def infer(
        self, model: str, inputs: tuple[Tensor, ...], timeout_seconds: float, *, priority: int = 0
    ) -> Inferred:
        """One request of the gateway; when it is cancelled, its answer is computed no more.

        Raises NotFound, InvalidRequest, Overloaded, TimedOut, Unavailable.
        """
        router = self._route(model)
        now = self._clock()
        answered: asyncio.Future[RequestOutcome] = asyncio.get_running_loop().create_future()
        request: Request | None = None

        def answer(outcome: RequestOutcome | PotluckError) -> None:
            answered_at = self._clock()
            self.metrics.answered(router.name, answered_at, answered_at - now, _failure(outcome))
            if answered.done():
                return
            if isinstance(outcome, PotluckError):
                answered.set_exception(outcome)
            elif outcome.error is not None:
                answered.set_exception(as_error(outcome.error))
            else:
                answered.set_result(outcome)

        try:
            request = self._submit(router, model, inputs, answer, now, now + timeout_seconds, priority)
            self._copy(model, inputs, now, now + timeout_seconds)
        except PotluckError as error:
            answer(error)
        try:
            outcome = await answered
        except asyncio.CancelledError:
            self._cancel((router, request) if request is not None else None)
            raise
        return Inferred(model=router.name, outputs=outcome.outputs)

    def on_answers(self, node_id: str, message: InferenceFinished) -> None:
        """A batch came back from a node."""
        if node_of(message.replica_id) != node_id:
            log.debug("answers of a replica of another ignored %s", fields(node=node_id, replica=message.replica_id))
            return
        router = self._routers.get(name_of(message.replica_id))
        if router is not None:
            router.finished(message.replica_id, message.id, message.outcomes, self._clock(), message.seconds)
            self._pump(router)
        for outcome in message.outcomes:
            if outcome.error is not None and outcome.error.code == NotFound.code:
                self.on_missing(node_id, message.replica_id, outcome.error)
                break

    def _submit(
        self,
        router: Router,
        model: str,
        inputs: tuple[Tensor, ...],
        answer: Callable[[RequestOutcome | PotluckError], None],
        now: float,
        deadline: float,
        priority: int = 0,
    ) -> Request:
        signature = self._registry.model(router.name).signature
        inputs, size = as_sent(batched(inputs, signature))
        if signature is not None and signature.inputs:  # else nothing is known of what it takes
            self._check(router.name, model, inputs, signature)
        self.asked_at[router.name] = now
        if not router.lanes:
            self.on_demand(router)
        request = Request(inputs, answer, deadline, size, rows_of(inputs[0]), priority)
        blobs = [tensor.data for tensor in inputs if isinstance(tensor.data, BlobRef)]
        if blobs:
            request.held_by = next(filter(None, [self._node_at(holder) for ref in blobs for holder in ref.holders]), "")
            request.moving_seconds = sum([ref.size for ref in blobs]) / MOVED_BYTES_PER_SECOND
        router.submit(request, now)
        self._pump(router)
        return request

    def _check(self, name: str, model: str, inputs: tuple[Tensor, ...], signature: Signature) -> None:
        """Whether the deployment that `model` means now takes such a request. Raises InvalidRequest, naming both shapes.

        Where the version beside it does, that one's clients are not to blame: it is ModelFailed, which counts against this one.
        """
        try:
            matched(inputs, signature.inputs)
        except InvalidRequest as error:
            traffic = self._traffic.get(model)
            other = traffic.beside(name) if traffic is not None else ""
            if other and taken(inputs, self._registry.model(other).signature):
                raise ModelFailed(
                    f"{error.message}; {other} takes this request, so {name} replaces it badly"
                ) from error
            raise

    def _cancel(self, asked: tuple[Router, Request] | None) -> None:
        if asked is not None:
            router, request = asked
            router.cancel(request)
            self._pump(router)

    def _copy(self, model: str, inputs: tuple[Tensor, ...], now: float, deadline: float) -> None:
        """Ask the model's shadow the same, if it has one that keeps up; its answer is measured, and goes nowhere."""
        traffic = self._traffic.get(model)
        router = self._routers.get(traffic.shadow) if traffic is not None and traffic.shadow else None
        limit = min(SHADOW_QUEUE_LIMIT, self._settings.queue_limit)
        if router is None or not router.lanes or len(router.queue) >= limit:
            return
        name = router.name

        def measure(outcome: RequestOutcome | PotluckError) -> None:
            answered_at = self._clock()
            self.metrics.answered(name, answered_at, answered_at - now, _failure(outcome))

        try:
            self._submit(router, model, inputs, measure, now, deadline)
        except PotluckError as error:  # it is behind, by its objective: the copy goes nowhere, and is counted so
            measure(error)

    def _pump(self, router: Router) -> None:
        """Send what can be sent, withdraw what nobody wants, and look again when something is late."""
        for batch in router.dispatch(self._clock()):
            self._send(router, batch)
        while router.withdrawn:
            batch = router.withdrawn.pop()
            message = CancelInference(id=batch.batch_id, replica_id=batch.replica_id)
            self._outbox.publish(self._topics.node(batch.node_id, "inbox"), message, qos=0)
        if len(router.lanes) > 1 and (due := router.hedge_at()) < inf:
            loop = asyncio.get_running_loop()
            at = loop.time() + max(LEAST_SECONDS, due - self._clock())
            timer = self._timers.get(router.name)
            if timer is None or timer.when() > at + LEAST_SECONDS:  # what was sent last may be late first
                if timer is not None:
                    timer.cancel()
                self._timers[router.name] = loop.call_at(at, self._hedge, router)

    def _hedge(self, router: Router) -> None:
        self._timers.pop(router.name, None)
        for batch in router.hedge(self._clock()):
            self._send(router, batch)
        self._pump(router)

    def _send(self, router: Router, batch: Batch) -> None:
        until = max([request.deadline for request in batch.requests])
        message = RunInference(
            id=batch.batch_id,
            replica_id=batch.replica_id,
            expires=until,
            valid_seconds=max(LEAST_SECONDS, until - self._clock()),
            requests=tuple([request.inputs for request in batch.requests]),
            objective_seconds=router.objective_seconds,
        )
        self._outbox.publish(self._topics.node(batch.node_id, "inbox"), message, qos=0)


def _failure(outcome: RequestOutcome | PotluckError) -> str:
    if isinstance(outcome, PotluckError):
        return outcome.code
    return as_error(outcome.error).code if outcome.error is not None else ""  # one of ours, whatever its node said
