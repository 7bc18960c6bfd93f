"""Requests for inference and their answers, from the bus and the gateway. It finds the router and the endpoint, and counts."""

from __future__ import annotations

import asyncio
import logging
import secrets
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
from potluck.errors import InvalidRequest, ModelFailed, NotFound, PotluckError, Unavailable
from potluck.logs import fields
from potluck.settings import CoordinatorSettings
from potluck.wire.failures import as_error
from potluck.wire.questions import Inferred
from potluck.wire.reports import InferenceFinished, RequestOutcome
from potluck.wire.specs import matched
from potluck.wire.values import BlobRef, ErrorInfo, Signature, Tensor

log = logging.getLogger(__name__)

BATCH_SECONDS = 10.0
"""A batch that is away for longer is asked again at another replica: it may be lost on its way, or a node may be frozen.

If requests may take longer than usual (`inference_seconds`), it is a third of that: this leaves time for two more tries.
"""
MOVED_BYTES_PER_SECOND = 100e6
"""How fast a node fetches inputs from another node: about the speed of a gigabit network."""
SHADOW_QUEUE_LIMIT = 8
"""A shadow with more waiting requests gets no copies: it must not slow down others."""


@dataclass(eq=False, slots=True)
class Asked:
    """A request as its caller holds it: `Inference.cancel` cancels it."""

    answer: Callable[[Inferred | PotluckError], None]
    metrics: ServingMetrics
    clock: Callable[[], float]
    at: float
    router: Router | None = None
    """None: the model is not deployed."""
    request: Request | None = None
    """None: the request was refused, or is answered."""

    @property
    def waits(self) -> bool:
        """Whether it still waits for its answer."""
        return self.request is not None and not self.request.answered

    def settle(self, outcome: RequestOutcome | PotluckError) -> None:
        """Count the outcome, and answer."""
        self.request = None  # the request refers to this object too: without the cycle, both are freed at once
        # All names that are not deployed are counted as one: any client can make up such names.
        name = self.router.name if self.router is not None else ""
        found: Inferred | PotluckError
        if isinstance(outcome, PotluckError):
            found = outcome
        elif outcome.error is not None:
            found = as_error(outcome.error)  # one of our own errors, whatever the node said
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
        """The endpoint of each replica, by replica id, with the router that sends it batches."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        """The timer of each router: when it looks for late batches."""
        self._traffic: Mapping[str, Traffic] = {}
        self.retired: set[str] = set()
        """Deployments that take no more requests; they still answer those that they have."""
        self.on_demand: Callable[[Router], None] = lambda router: None
        """Called with a router that gets a request while it has no replica. An error that it raises is the answer."""
        self.on_missing: Callable[[str, str, ErrorInfo], None] = lambda node_id, replica_id, error: None
        """Called with a replica that its node does not have, and the error that the node sent."""
        self._drained: asyncio.Event | None = None
        """While this coordinator stops: set once no request waits for its answer."""
        self.asked_at: dict[str, float] = {}
        """When each deployment last got a request, or a replica."""
        self.metrics = ServingMetrics()

    def stop(self) -> None:
        """Stop looking for late batches."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    @property
    def stopping(self) -> bool:
        """Whether no more requests are taken."""
        return self._drained is not None

    async def drained(self) -> None:
        """Take no more requests, and return when all that were taken are answered."""
        self._drained = asyncio.Event()
        self._note_drained()
        await self._drained.wait()

    def give_up(self) -> None:
        """Answer those that still wait with Unavailable, and take no more: this coordinator ends now."""
        self._drained = self._drained or asyncio.Event()
        for router in self._routers.values():
            router.close(Unavailable(f"the coordinator stopped before {router.name} answered: try again"))

    def _note_drained(self) -> None:
        if self._drained is not None and not any(map(self.busy, self._routers)):
            self._drained.set()

    # --- deployments come and go ----------------------------------------------------------------------------------------

    def open(self, name: str) -> None:
        """Take requests for this deployment, `name:version`."""
        settings = self._settings
        self.retired.discard(name)
        self.asked_at[name] = self._clock()
        self._routers[name] = Router(
            name, queue_limit=settings.queue_limit, batch_limit=settings.batch_limit, series=f"{secrets.token_hex(4)}-"
        )

    def close(self, name: str, error: PotluckError) -> None:
        """Answer all waiting requests of this deployment with the error, and take no more."""
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
        """Set how long an answer of this deployment may take; 0: no objective."""
        self._routers[name].set_objective(seconds)

    def busy(self, name: str) -> bool:
        """Whether requests of this deployment wait for their answer."""
        router = self._routers[name]
        return bool(router.queue or router.in_flight)

    def prefer(self, traffic: Mapping[str, Traffic]) -> None:
        """Set which deployments answer for each plain name; the map may change later."""
        self._traffic = traffic

    def add_replica(self, name: str, endpoint: Endpoint) -> None:
        """A replica of this deployment is ready."""
        router = self._routers[name]
        self.asked_at[name] = self._clock()
        self._endpoints[endpoint.replica_id] = endpoint, router
        router.add_replica(endpoint.replica_id, endpoint.takes_at)
        self._pump(router)

    def remove_replica(self, replica_id: str, *, crashed: bool = False) -> None:
        """A replica is gone: its batches are asked again elsewhere. `crashed`: the batch that it computed ended its engine."""
        if replica_id in self._endpoints:
            _, router = self._endpoints.pop(replica_id)
            router.remove_replica(replica_id, self._clock(), crashed=crashed)
            self._pump(router)

    def ask_again(self, node_id: str) -> None:
        """Ask the batches of this node again: it reconnected, or we did. The broker keeps no batches, so some may be lost."""
        for endpoint, router in self._on(node_id):
            router.ask_again(endpoint.replica_id, self._clock())
            self._pump(router)

    def node_lost(self, node_id: str) -> None:
        """A node is gone, with its replicas and the inputs that it had. Requests with such inputs are answered InputsLost,
        and are not tried elsewhere.
        """
        for router in self._routers.values():
            router.inputs_lost(node_id)
        for endpoint, _ in self._on(node_id):
            self.remove_replica(endpoint.replica_id)

    def _on(self, node_id: str) -> list[tuple[Endpoint, Router]]:
        return [found for found in self._endpoints.values() if node_id in found[0].nodes]

    def nodes_of(self, model: str) -> list[str]:
        """The nodes that inputs of a deployed model may be sent to. Their replicas are ready, answer, and are not far slower
        than others. Raises NotFound.

        There are none while the model has a shadow: it may need the inputs after the first node has dropped them.
        """
        traffic = self._traffic.get(model)
        if traffic is not None and traffic.shadow:
            return []
        lanes = self.router(model).lanes
        good = [replica_id for replica_id, lane in lanes.items() if not lane.silent and not lanes.slow(lane)]
        return list(dict.fromkeys([self._endpoints[replica_id][0].takes_at for replica_id in good]))

    def expire(self) -> None:
        """Let time pass: late batches are asked again elsewhere, and requests past their deadline are answered."""
        for router in list(self._routers.values()):
            router.expire(self._clock(), max(BATCH_SECONDS, self._settings.inference_seconds / 3))
            self._pump(router)

    def router_of(self, name: str) -> Router:
        """The router of this deployment, in whatever state the deployment is."""
        return self._routers[name]

    def router(self, model: str) -> Router:
        """The router of a deployed model: `name` (its stable version), `name:version` or `name:alias`. Raises NotFound."""
        traffic = self._traffic.get(model)
        return self._router(traffic.stable if traffic is not None else model)

    def _route(self, model: str) -> Router:
        """The router of the version whose turn it is to answer for this model. Raises NotFound."""
        traffic = self._traffic.get(model)
        return self._router(traffic.pick(self._ready) if traffic is not None else model)

    def _router(self, model: str) -> Router:
        router = self._routers.get(model)
        if router is None:
            info = self._registry.model(model)  # raises another error for a name that is not registered
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
        *,
        items: bool = False,
    ) -> Asked:
        """Ask a deployed model: `name`, `name:version` or `name:alias`. `answer` is called with its outputs or the error, at
        the latest at `until`. It may be called before this returns. `items`: a single item may come without a batch axis.
        """
        asked = Asked(answer, self.metrics, self._clock, now)
        try:
            if self.stopping:
                raise Unavailable("the coordinator is stopping: try again when it runs again")
            router = asked.router = self._route(model)
            asked.request = self._submit(router, model, inputs, asked.settle, now, until, priority, items=items)
            self._copy(model, inputs, now, until, items=items)
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
            if answered.done():  # the caller gave up
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
        """The caller does not wait any more: the request is answered Cancelled, unless it was answered already."""
        if asked.router is not None and asked.request is not None:
            asked.router.cancel(asked.request)
            self._pump(asked.router)

    def on_answers(self, node_id: str, message: InferenceFinished) -> None:
        """A batch came back from a node."""
        endpoint, router = self._endpoints.get(message.replica_id, (None, None))
        if endpoint is None or router is None:
            return  # the replica is gone meanwhile
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
        *,
        items: bool,
    ) -> Request:
        signature = self._registry.model(router.name).signature
        inputs, size = as_sent(batched(inputs, signature) if items else inputs)
        if signature is not None and signature.inputs:  # if not, the inputs of the model are not known
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
        """Check that the deployment `name`, which answers for `model` now, takes these inputs. Raises InvalidRequest.

        If the version beside it takes them, the client is not at fault: this raises ModelFailed, which counts against `name`.
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

    def _copy(self, model: str, inputs: tuple[Tensor, ...], now: float, until: float, *, items: bool) -> None:
        """Send a copy to the model's shadow, if it has one that keeps up. The answer is measured and dropped."""
        traffic = self._traffic.get(model)
        router = self._routers.get(traffic.shadow) if traffic is not None and traffic.shadow else None
        limit = min(SHADOW_QUEUE_LIMIT, self._settings.queue_limit)
        if router is None or not router.lanes or len(router.queue) >= limit:
            return
        asked = Asked(_to_nobody, self.metrics, self._clock, now, router)
        try:
            self._submit(router, model, inputs, asked.settle, now, until, items=items)
        except PotluckError as error:  # the shadow misses its objective: the copy is dropped and counted
            asked.settle(error)

    def _pump(self, router: Router) -> None:
        """Send batches, withdraw those that no request waits for, and set the timer for late ones."""
        now = self._clock()
        for batch in router.dispatch(now):
            self._endpoints[batch.replica_id][0].send(batch)
        while router.withdrawn:
            batch = router.withdrawn.pop()
            if batch.replica_id in self._endpoints:
                self._endpoints[batch.replica_id][0].withdraw(batch)
        if self._drained is not None:
            self._note_drained()
        if len(router.lanes) > 1 and (due := router.hedge_at()) < inf:
            loop = asyncio.get_running_loop()
            at = loop.time() + max(LEAST_SECONDS, due - now)
            timer = self._timers.get(router.name)
            if timer is None or timer.when() > at + LEAST_SECONDS:  # the newest batch may be late first
                if timer is not None:
                    timer.cancel()
                self._timers[router.name] = loop.call_at(at, self._hedge, router)

    def _hedge(self, router: Router) -> None:
        self._timers.pop(router.name, None)
        for batch in router.hedge(self._clock()):
            self._endpoints[batch.replica_id][0].send(batch)
        self._pump(router)


def _to_nobody(answer: Inferred | PotluckError) -> None:
    """Drop an answer that nobody waits for."""
