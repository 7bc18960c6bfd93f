"""The router of one deployment: a bounded queue, batches, and the replica with the least expected wait. Pure.

A request goes out at once when a replica has room; while all are busy, requests wait and leave together (natural
batching). Of two replicas picked at random the one with less expected wait gets the batch (the power of two choices,
Mitzenmacher, 2001). A batch that is lost is put back at the head of the queue; a request is answered once, by its
deadline. A replica that answers with failures rests for a moment: failing is quick, and would draw everything to it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from potluck.errors import Overloaded, PotluckError, TimedOut, Unavailable
from potluck.messages import RequestOutcome, Tensor

BATCHES_IN_FLIGHT = 2
"""A replica has one batch to compute and one to begin with at once."""
BATCH_BYTES = 160 * 1024
"""Inline tensors of a batch: it must fit into a message."""
ATTEMPTS_LIMIT = 4
REST_SECONDS = 0.5
SMOOTHING = 0.2

Answer = Callable[[RequestOutcome | PotluckError], None]


@dataclass(eq=False, slots=True)
class Request:
    inputs: tuple[Tensor, ...]
    answer: Answer
    deadline: float
    size_bytes: int
    attempts: int = 0
    failure: str = ""
    """What the last attempt failed with."""
    answered: bool = False

    def settle(self, outcome: RequestOutcome | PotluckError) -> None:
        """Answer it, unless that was done."""
        if not self.answered:
            self.answered = True
            self.answer(outcome)


@dataclass(eq=False, slots=True)
class Batch:
    batch_id: str
    replica_id: str
    node_id: str
    requests: list[Request]
    sent_at: float


@dataclass(slots=True)
class _Lane:
    """A ready replica: what is on its way to it, and how long a request takes there."""

    replica_id: str
    node_id: str
    batches: dict[str, Batch] = field(default_factory=dict)
    requests: int = 0
    seconds_each: float = 0.0
    rests_until: float = 0.0

    @property
    def wait(self) -> tuple[float, int]:
        """Expected until one more request is answered. A new replica counts as quick, so that it is tried."""
        return (self.requests + 1) * (self.seconds_each or 1e-3), self.requests


class Router:
    """`pick` chooses among lanes (for tests, not at random)."""

    def __init__(self, name: str, *, queue_limit: int, batch_limit: int, rng: random.Random | None = None) -> None:
        self.name = name
        self.queue: deque[Request] = deque()
        self.lanes: dict[str, _Lane] = {}
        self.served = 0
        self._queue_limit = queue_limit
        self._batch_limit = batch_limit
        self._rng = rng or random.Random()
        self._number = 0

    @property
    def in_flight(self) -> int:
        return sum(lane.requests for lane in self.lanes.values())

    def add_replica(self, replica_id: str, node_id: str) -> None:
        self.lanes.setdefault(replica_id, _Lane(replica_id, node_id))

    def remove_replica(self, replica_id: str, now: float) -> None:
        """It is gone: what was on its way to it is asked again elsewhere."""
        lane = self.lanes.pop(replica_id, None)
        if lane is not None:
            for batch in reversed(lane.batches.values()):
                self._put_back(batch, now)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises Overloaded when the queue is full."""
        if len(self.queue) >= self._queue_limit:
            seconds = self._expected_seconds()
            raise Overloaded(
                f"{len(self.queue)} requests wait for {self.name} already: try again in {seconds:.1f} s",
                retry_after_seconds=seconds,
            )
        self.queue.append(request)

    def dispatch(self, now: float) -> list[Batch]:
        """Batches to send now."""
        batches: list[Batch] = []
        while self.queue:
            lane = self._pick(now)
            if lane is None:
                break
            requests = self._take(now)
            if not requests:
                break
            self._number += 1
            batch = Batch(f"{self.name}/{self._number}", lane.replica_id, lane.node_id, requests, now)
            lane.batches[batch.batch_id] = batch
            lane.requests += len(requests)
            batches.append(batch)
        return batches

    def finished(self, replica_id: str, batch_id: str, outcomes: tuple[RequestOutcome, ...], now: float) -> None:
        """Answer a batch. Outcomes of a batch that is not on its way any more are ignored: others answer it."""
        lane = self.lanes.get(replica_id)
        batch = lane.batches.pop(batch_id, None) if lane is not None else None
        if lane is None or batch is None:
            return
        lane.requests -= len(batch.requests)
        if len(outcomes) != len(batch.requests):
            lane.rests_until = now + REST_SECONDS
            self._put_back(batch, now)
            return
        retried: list[Request] = []
        for request, outcome in zip(batch.requests, outcomes, strict=True):
            if outcome.error is not None and (outcome.error.retryable or outcome.error.code == "not_found"):
                request.failure = outcome.error.message
                retried.append(request)
            else:
                self.served += not request.answered
                request.settle(outcome)
        if retried:
            lane.rests_until = now + REST_SECONDS
            self._put_back(Batch(batch_id, replica_id, lane.node_id, retried, now), now)
            return
        each = (now - batch.sent_at) / len(batch.requests)
        lane.seconds_each += (SMOOTHING if lane.seconds_each else 1.0) * (each - lane.seconds_each)

    def expire(self, now: float, batch_seconds: float) -> None:
        """Answer requests whose time is up, and ask those elsewhere whose batch has not come back."""
        while self.queue and self.queue[0].deadline <= now:
            self._time_out(self.queue.popleft())
        if any(request.deadline <= now for request in self.queue):
            late = [request for request in self.queue if request.deadline <= now]
            self.queue = deque(request for request in self.queue if request.deadline > now)
            for request in late:
                self._time_out(request)
        for lane in self.lanes.values():
            for batch in list(lane.batches.values()):
                if now - batch.sent_at > batch_seconds:
                    del lane.batches[batch.batch_id]
                    lane.requests -= len(batch.requests)
                    lane.seconds_each = max(lane.seconds_each, batch_seconds)  # others come first now
                    self._put_back(batch, now)
                else:
                    for request in batch.requests:
                        if request.deadline <= now:
                            self._time_out(request)

    def close(self, error: PotluckError) -> None:
        """Answer everything with `error`: the deployment is gone."""
        for lane in self.lanes.values():
            for batch in lane.batches.values():
                for request in batch.requests:
                    request.settle(error)
        self.lanes.clear()
        while self.queue:
            self.queue.popleft().settle(error)

    def _pick(self, now: float) -> _Lane | None:
        open_lanes = [
            lane for lane in self.lanes.values() if len(lane.batches) < BATCHES_IN_FLIGHT and lane.rests_until <= now
        ]
        if len(open_lanes) <= 1:
            return open_lanes[0] if open_lanes else None
        one, other = self._rng.sample(open_lanes, 2)
        return min(one, other, key=lambda lane: lane.wait)

    def _take(self, now: float) -> list[Request]:
        taken: list[Request] = []
        size = 0
        while self.queue and len(taken) < self._batch_limit:
            request = self.queue[0]
            if request.deadline <= now:
                self._time_out(self.queue.popleft())
                continue
            if taken and size + request.size_bytes > BATCH_BYTES:
                break
            self.queue.popleft()
            request.attempts += 1
            size += request.size_bytes
            taken.append(request)
        return taken

    def _put_back(self, batch: Batch, now: float) -> None:
        for request in reversed(batch.requests):
            if request.answered:
                continue
            if request.deadline <= now:
                self._time_out(request)
            elif request.attempts >= ATTEMPTS_LIMIT:
                reason = f": {request.failure}" if request.failure else ""
                request.settle(
                    Unavailable(f"{self.name} did not answer in {request.attempts} attempts on its replicas{reason}")
                )
            else:
                self.queue.appendleft(request)

    def _time_out(self, request: Request) -> None:
        reason = "" if self.lanes else ": no replica is ready"
        if request.failure:
            reason = f": {request.failure}"
        request.settle(TimedOut(f"{self.name} gave no answer in time{reason}"))

    def _expected_seconds(self) -> float:
        rates = [1 / lane.seconds_each for lane in self.lanes.values() if lane.seconds_each > 0]
        return max(0.1, len(self.queue) / sum(rates)) if rates else 1.0
