"""Requests for inference and their answers, from the bus as from the gateway: which router, which endpoint, and what is counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

from coordinator.registry import Registry
from coordinator.serving.batches import Request
from coordinator.serving.endpoints import Endpoint
from coordinator.serving.hedging import LEAST_SECONDS
from coordinator.serving.inputs import as_sent, batched, rows_of, taken
from coordinator.serving.metrics import ServingMetrics
from coordinator.serving.router import Router
from coordinator.serving.traffic import Traffic
from potluck.errors import InvalidRequest, ModelFailed, NotFound, PotluckError
from potluck.logs import fields
from potluck.settings import CoordinatorSettings
from potluck.wire.failures import as_error
from potluck.wire.messages import BlobRef, ErrorInfo, InferenceFinished, Inferred, RequestOutcome, Signature, Tensor
from potluck.wire.specs import matched

log = logging.getLogger(__name__)

BATCH_SECONDS = 10.0
"""A batch that is away for longer is asked again elsewhere: it may be lost on its way, and a node may be frozen.

Where requests may take longer than usual (`inference_seconds`), a third of that: there are two tries more.
"""
MOVED_BYTES_PER_SECOND = 100e6
"""How fast a node fetches inputs that another one has: what a gigabit network carries, about."""
SHADOW_QUEUE_LIMIT = 8
"""A shadow that is further behind gets no copies: it must cost nobody anything."""


@dataclass(eq=False, slots=True)
class Asked:
    """A request, for the one who asked: `Inference.cancel` cancels it."""

    answer: Callable[[Inferred | PotluckError], None]
    metrics: ServingMetrics
    clock: Callable[[], float]
    at: float
    router: Router | None = None
    """None: what was asked for is not deployed."""
    request: Request | None = None
    """None: it was refused, or is answered."""

    @property
    def waits(self) -> bool:
        """Whether its answer is still to come."""
        return self.request is not None and not self.request.answered

    def settle(self, outcome: RequestOutcome | PotluckError) -> None:
        """Count the outcome, and answer."""
        self.request = None  # which holds this in turn: neither is to wait for the garbage collector
        # All names that are not deployed are counted as one: anybody can make up such names.
        name = self.router.name if self.router is not None else ""
        found: Inferred | PotluckError
        if isinstance(outcome, PotluckError):
            found = outcome
        elif outcome.error is not None:
            found = as_error(outcome.error)  # one of ours, whatever its node said
        else:
            found = Inferred(model=name, outputs=outcome.outputs)
        now = self.clock()
        self.metrics.answered(name, now, now - self.at, found.code if isinstance(found, PotluckError) else "")
        self.answer(found)


class Inference:
    """One router for each deployment, and an endpoint for each of its replicas that are ready."""

    def __init__(
        self,
        *,
        registry: Registry,
        settings: CoordinatorSettings,
        node_at: Callable[[str], str] = lambda url: "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`node_at` says which node has an HTTP address; "": none."""
        self._node_at = node_at
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._routers: dict[str, Router] = {}
        self._endpoints: dict[str, tuple[Endpoint, Router]] = {}
        """By replica id, with the router whose batches go there."""
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

    def stop(self) -> None:
        """Look for late batches no more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

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
            for replica_id in router.lanes:
                del self._endpoints[replica_id]
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

    def add_replica(self, name: str, endpoint: Endpoint) -> None:
        """A replica of this deployment is ready."""
        router = self._routers[name]
        self.asked_at[name] = self._clock()
        self._endpoints[endpoint.replica_id] = endpoint, router
        router.add_replica(endpoint.replica_id, endpoint.takes_at)
        self._pump(router)

    def remove_replica(self, replica_id: str, *, crashed: bool = False) -> None:
        """A replica is gone: what is on its way to it is asked again elsewhere. `crashed`: its engine died of what it computed."""
        if replica_id in self._endpoints:
            _, router = self._endpoints.pop(replica_id)
            router.remove_replica(replica_id, self._clock(), crashed=crashed)
            self._pump(router)

    def ask_again(self, node_id: str) -> None:
        """This node connected anew, or we did: batches may be lost, and none is kept for whoever is not there."""
        for endpoint, router in self._on(node_id):
            router.ask_again(endpoint.replica_id, self._clock())
            self._pump(router)

    def node_lost(self, node_id: str) -> None:
        """A node is gone, and with it the replicas on it and the inputs that it had. Requests with those are answered InputsLost, and not
        tried elsewhere.
        """
        for router in self._routers.values():
            router.inputs_lost(node_id)
        for endpoint, _ in self._on(node_id):
            self.remove_replica(endpoint.replica_id)

    def _on(self, node_id: str) -> list[tuple[Endpoint, Router]]:
        return [found for found in self._endpoints.values() if node_id in found[0].nodes]

    def nodes_of(self, model: str) -> list[str]:
        """The nodes that inputs of a deployed model may be sent to: where replicas take batches that are ready, answer, and are not far
        slower than others. Raises NotFound.

        None while it has a shadow, which may ask for the inputs when the other's node has done with them.
        """
        traffic = self._traffic.get(model)
        if traffic is not None and traffic.shadow:
            return []
        lanes = self.router(model).lanes
        good = [replica_id for replica_id, lane in lanes.items() if not lane.silent and not lanes.slow(lane)]
        return list(dict.fromkeys([self._endpoints[replica_id][0].takes_at for replica_id in good]))

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

    def ask(
        self,
        model: str,
        inputs: tuple[Tensor, ...],
        answer: Callable[[Inferred | PotluckError], None],
        now: float,
        until: float,
        priority: int = 0,
    ) -> Asked:
        """Ask a deployed model: `name`, `name:version` or `name:alias`. `answer` gets its outputs or the error, `until` at the latest. It
        may be called before this returns.
        """
        asked = Asked(answer, self.metrics, self._clock, now)
        try:
            router = asked.router = self._route(model)
            asked.request = self._submit(router, model, inputs, asked.settle, now, until, priority)
            self._copy(model, inputs, now, until)
        except PotluckError as error:
            asked.settle(error)
        return asked

    async def infer(
        self, model: str, inputs: tuple[Tensor, ...], timeout_seconds: float, *, priority: int = 0
    ) -> Inferred:
        """Ask, and wait for the answer. Cancelling this cancels the request.

        Raises NotFound, InvalidRequest, Overloaded, TimedOut, Unavailable.
        """
        answered: asyncio.Future[Inferred] = asyncio.get_running_loop().create_future()

        def answer(found: Inferred | PotluckError) -> None:
            if answered.done():  # whoever asked has given up
                return
            if isinstance(found, PotluckError):
                answered.set_exception(found)
            else:
                answered.set_result(found)

        now = self._clock()
        asked = self.ask(model, inputs, answer, now, now + timeout_seconds, priority)
        try:
            return await answered
        except asyncio.CancelledError:
            self.cancel(asked)
            raise

    def cancel(self, asked: Asked) -> None:
        """Nobody waits for the answer any more: unless there was one, it is Cancelled."""
        if asked.router is not None and asked.request is not None:
            asked.router.cancel(asked.request)
            self._pump(asked.router)

    def on_answers(self, node_id: str, message: InferenceFinished) -> None:
        """A batch came back from a node."""
        endpoint, router = self._endpoints.get(message.replica_id, (None, None))
        if endpoint is None or router is None:
            return  # gone meanwhile
        if endpoint.answers_from != node_id:
            log.debug("answers of a replica of another ignored %s", fields(node=node_id, replica=message.replica_id))
            return
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
        until: float,
        priority: int = 0,
    ) -> Request:
        signature = self._registry.model(router.name).signature
        inputs, size = as_sent(batched(inputs, signature))
        if signature is not None and signature.inputs:  # else nothing is known of what it takes
            self._check(router.name, model, inputs, signature)
        self.asked_at[router.name] = now
        if not router.lanes:
            self.on_demand(router)
        request = Request(inputs, answer, until, size, rows_of(inputs[0]), priority)
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

    def _copy(self, model: str, inputs: tuple[Tensor, ...], now: float, until: float) -> None:
        """Ask the model's shadow the same, if it has one that keeps up; its answer is measured, and goes nowhere."""
        traffic = self._traffic.get(model)
        router = self._routers.get(traffic.shadow) if traffic is not None and traffic.shadow else None
        limit = min(SHADOW_QUEUE_LIMIT, self._settings.queue_limit)
        if router is None or not router.lanes or len(router.queue) >= limit:
            return
        asked = Asked(_to_nobody, self.metrics, self._clock, now, router)
        try:
            self._submit(router, model, inputs, asked.settle, now, until)
        except PotluckError as error:  # it is behind, by its objective: the copy goes nowhere, and is counted so
            asked.settle(error)

    def _pump(self, router: Router) -> None:
        """Send what can be sent, withdraw what nobody wants, and look again when something is late."""
        now = self._clock()
        for batch in router.dispatch(now):
            self._endpoints[batch.replica_id][0].send(batch)
        while router.withdrawn:
            batch = router.withdrawn.pop()
            if batch.replica_id in self._endpoints:
                self._endpoints[batch.replica_id][0].withdraw(batch)
        if len(router.lanes) > 1 and (due := router.hedge_at()) < inf:
            loop = asyncio.get_running_loop()
            at = loop.time() + max(LEAST_SECONDS, due - now)
            timer = self._timers.get(router.name)
            if timer is None or timer.when() > at + LEAST_SECONDS:  # what was sent last may be late first
                if timer is not None:
                    timer.cancel()
                self._timers[router.name] = loop.call_at(at, self._hedge, router)

    def _hedge(self, router: Router) -> None:
        self._timers.pop(router.name, None)
        for batch in router.hedge(self._clock()):
            self._endpoints[batch.replica_id][0].send(batch)
        self._pump(router)


def _to_nobody(answer: Inferred | PotluckError) -> None:
    """Nobody waits for it."""
