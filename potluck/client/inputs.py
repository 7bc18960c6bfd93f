"""Inputs too large for a message: they go straight to a node with a replica, or through the coordinator's store."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from potluck.client.connection import Connection
from potluck.errors import InputsLost, PotluckError, TimedOut, TooLarge, Unavailable
from potluck.logs import fields
from potluck.wire.questions import FindReplicas, Infer, Inferred, ReplicaPlace, ReplicasFound
from potluck.wire.values import INPUT_BLOB_LIMIT_BYTES, BlobRef, Tensor

log = logging.getLogger(__name__)

KNOWN_SECONDS = 5.0
"""How long a list of a model's replicas is used before asking again."""
FIND_SECONDS = 2.0
"""How long to wait for the coordinator's list of replicas."""
LEFT_ALONE_SECONDS = 60.0
"""How long to send nothing to a node that could not be reached, or that lost its inputs."""
NODES_TRIED = 2
"""How many nodes to try before the coordinator's store: a client that cannot reach two may reach none."""


@dataclass
class Choice:
    """Chooses the node for the next inputs: the one with the fewest requests of ours; at random among equals."""

    rng: random.Random = field(default_factory=random.Random)
    under_way: Counter[str] = field(default_factory=Counter)
    """Our requests under way whose inputs a node has, by node id."""
    left_alone: dict[str, float] = field(default_factory=dict)
    """Nodes that failed, and until when to avoid them."""

    def order(self, places: Sequence[ReplicaPlace], now: float) -> list[ReplicaPlace]:
        """The nodes to try, the best first."""
        self.left_alone = {node_id: until for node_id, until in self.left_alone.items() if until > now}
        usable = [place for place in places if place.node_id not in self.left_alone]
        return sorted(usable, key=lambda place: (self.under_way[place.node_id], self.rng.random()))[:NODES_TRIED]

    def failed(self, node_id: str, now: float) -> None:
        self.left_alone[node_id] = now + LEFT_ALONE_SECONDS


@dataclass(frozen=True)
class _Found:
    places: tuple[ReplicaPlace, ...]
    until: float


class LargeInputs:
    """What one client knows of where replicas are, and which inputs it has sent there."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._choice = Choice()
        self._found: dict[str, _Found] = {}
        self._asking: dict[str, asyncio.Lock] = {}

    async def infer(
        self, connection: Connection, model: str, question: Infer, timeout_seconds: float | None
    ) -> Inferred:
        """Ask with inputs sent as blobs. If the node that has them is lost before it answers, they are sent again.

        Raises TooLarge for an input that no node takes.
        """
        began = self._clock()
        sizes = [len(tensor.data) for tensor in question.inputs if isinstance(tensor.data, bytes | memoryview)]
        if (largest := max(sizes)) > INPUT_BLOB_LIMIT_BYTES:
            raise TooLarge(
                f"an input of {largest} bytes is over the limit of {INPUT_BLOB_LIMIT_BYTES}: ask for fewer rows at once, "
                "or `predict` on all of them"
            )
        places = await self._places(connection, model, timeout_seconds)
        for place in self._choice.order(places, began):
            self._choice.under_way[place.node_id] += 1
            try:
                sent = await _in_time(self._sent(connection, place, question), self._left(timeout_seconds, began))
                return await connection.infer(model, sent, self._left(timeout_seconds, began))
            except InputsLost as error:
                log.info("inputs lost %s", fields(model=model, node=place.node_id, reason=error.message))
                self._found.pop(model, None)
                self._choice.failed(place.node_id, self._clock())
            finally:
                self._choice.under_way[place.node_id] -= 1
        sent = await _in_time(_pushed(connection, question), self._left(timeout_seconds, began))
        return await connection.infer(model, sent, self._left(timeout_seconds, began))

    def _left(self, timeout_seconds: float | None, began: float) -> float | None:
        return None if timeout_seconds is None else max(0.0, timeout_seconds - (self._clock() - began))

    async def _places(
        self, connection: Connection, model: str, timeout_seconds: float | None
    ) -> tuple[ReplicaPlace, ...]:
        """Nodes with replicas; empty where there are none, or where the coordinator is too old to tell."""
        limit_seconds = FIND_SECONDS if timeout_seconds is None else min(FIND_SECONDS, timeout_seconds)
        async with self._asking.setdefault(model, asyncio.Lock()):
            known = self._found.get(model)
            if known is None or known.until < self._clock():
                try:
                    async with asyncio.timeout(limit_seconds):
                        places = (await connection.ask(FindReplicas(model=model), ReplicasFound)).replicas
                except (PotluckError, TimeoutError) as error:
                    # If something is wrong with the model, its inference tells.
                    log.info("no replicas to send inputs to %s", fields(model=model, reason=str(error)))
                    places = ()
                known = self._found[model] = _Found(places, self._clock() + KNOWN_SECONDS)
            return known.places

    async def _sent(self, connection: Connection, place: ReplicaPlace, question: Infer) -> Infer:
        """The question, with its inputs on the node. Raises InputsLost."""
        reasons: list[str] = []
        for base in place.http:
            try:
                inputs = [
                    replace(tensor, data=await connection.send_inputs(tensor.data, base))
                    if isinstance(tensor.data, bytes | memoryview)
                    else tensor
                    for tensor in question.inputs
                ]
            except Unavailable as error:
                reasons.append(error.message)
            else:
                return replace(question, inputs=tuple(inputs))
        raise InputsLost("; ".join(reasons) or f"node {place.node_id} has no address")


async def _in_time(sending: Awaitable[Infer], limit_seconds: float | None) -> Infer:
    try:
        async with asyncio.timeout(limit_seconds):
            return await sending
    except TimeoutError:
        raise TimedOut("the inputs could not be sent within the request's timeout") from None


async def _pushed(connection: Connection, question: Infer) -> Infer:
    """The question, with its inputs in the coordinator's store. Raises Unavailable, TooLarge."""
    inputs: list[Tensor] = []
    for tensor in question.inputs:
        if isinstance(tensor.data, bytes | memoryview):
            ref = await connection.push(tensor.data)
            holders = ref.holders or (await connection.coordinator()).http
            tensor = replace(tensor, data=BlobRef(sha256=ref.sha256, size=ref.size, holders=holders))
        inputs.append(tensor)
    return replace(question, inputs=tuple(inputs))
