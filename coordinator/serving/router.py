"""The router of one deployment: a bounded queue, batches, and the replica with the least expected wait. Pure.

A request goes out at once when a replica has room; while all are busy, requests wait and leave together (natural
batching), no more of them than the replica computes in BATCH_TARGET_SECONDS. Of two replicas picked at random the one with
less expected wait gets the batch (the power of two choices, Mitzenmacher, 2001). A batch that is lost is put back at the head
of the queue, and whichever answer comes first counts: a request is answered once, by its deadline. A replica that answers
with failures rests for a moment: failing is quick, and would draw everything to it.
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
BATCH_TARGET_SECONDS = 1.0
"""A slow model gets smaller batches: nobody waits long behind one, and what runs is not taken for lost."""
PATIENCE = 4
"""A batch is lost when it takes so many times what its replica needs for all it has; at most so many times the usual limit."""
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
    overdue: dict[str, Batch] = field(default_factory=dict)
    """Batches that are asked again elsewhere, but may still come back."""
    requests: int = 0
    seconds_each: float = 0.0
    seconds_last: float = 0.0
    """The same, of the last batch alone: after a slow start the mean is too high for a while."""
    finished_at: float = 0.0
    open_at: int = -1
    """Where it is in the router's list of lanes with room; -1: it has none."""
    silent: bool = False
    """A batch was lost here, and nothing was heard since."""
    rests_until: float = 0.0

    @property
    def wait(self) -> tuple[bool, float, int]:
        """Expected until one more request is answered. A new replica counts as quick, so that it is tried."""
        return self.silent, (self.requests + 1) * (self.seconds_each or 1e-3), self.requests

    def batch_limit(self, at_most: int) -> int:
        """Requests that make a batch of BATCH_TARGET_SECONDS here."""
        if self.seconds_each * at_most <= BATCH_TARGET_SECONDS:
            return at_most
        return max(1, int(BATCH_TARGET_SECONDS / self.seconds_each))

    def patience_seconds(self, usual: float) -> float:
        """How long a batch may be away."""
        return min(max(usual, PATIENCE * self.seconds_each * self.requests), PATIENCE * usual)

    def learn(self, batch: Batch, now: float) -> None:
        """How long a request takes here, from a batch that came back. It began when the one before it was done."""
        each = max(0.0, now - max(batch.sent_at, self.finished_at)) / len(batch.requests)
        self.seconds_each += (SMOOTHING if self.seconds_each else 1.0) * (each - self.seconds_each)
        self.seconds_last, self.finished_at = each, now


class Router:
    """`pick` chooses among lanes (for tests, not at random)."""

    def __init__(self, name: str, *, queue_limit: int, batch_limit: int, rng: random.Random | None = None) -> None:
        self.name = name
        self.queue: deque[Request] = deque()
        self.lanes: dict[str, _Lane] = {}
        self._open: list[_Lane] = []
        """Lanes with room for a batch, in no order: a message costs the same with three replicas as with a thousand."""
        self._requests_per_second = 0.0
        self.served = 0
        self._queue_limit = queue_limit
        self._batch_limit = batch_limit
        self._rng = rng or random.Random()
        self._number = 0

    @property
    def in_flight(self) -> int:
        return sum(lane.requests for lane in self.lanes.values())

    def add_replica(self, replica_id: str, node_id: str) -> None:
        self._note_room(self.lanes.setdefault(replica_id, _Lane(replica_id, node_id)))

    def remove_replica(self, replica_id: str, now: float) -> None:
        """It is gone: what was on its way to it is asked again elsewhere."""
        lane = self.lanes.pop(replica_id, None)
        if lane is not None:
            self._shut(lane)
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
            requests = self._take(now, lane)
            if not requests:
                break
            self._number += 1
            batch = Batch(f"{self.name}/{self._number}", lane.replica_id, lane.node_id, requests, now)
            lane.batches[batch.batch_id] = batch
            lane.requests += len(requests)
            self._note_room(lane)
            batches.append(batch)
        return batches

    def finished(self, replica_id: str, batch_id: str, outcomes: tuple[RequestOutcome, ...], now: float) -> None:
        """Answer a batch. One that is asked again elsewhere by now is as good, if it did not fail; others are ignored."""
        lane = self.lanes.get(replica_id)
        if lane is None:
            return
        lane.silent = False
        batch = lane.batches.pop(batch_id, None)
        if batch is None:
            self._finished_late(lane, batch_id, outcomes, now)
            return
        lane.requests -= len(batch.requests)
        self._note_room(lane)
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
        lane.learn(batch, now)

    def _finished_late(self, lane: _Lane, batch_id: str, outcomes: tuple[RequestOutcome, ...], now: float) -> None:
        batch = lane.overdue.pop(batch_id, None)
        if batch is None or len(outcomes) != len(batch.requests):
            return
        lane.learn(batch, now)
        for request, outcome in zip(batch.requests, outcomes, strict=True):
            if outcome.error is None and not request.answered:
                self.served += 1
                request.settle(outcome)
        if any(request.answered for request in self.queue):
            self.queue = deque(request for request in self.queue if not request.answered)

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
            patience = lane.patience_seconds(batch_seconds)
            for batch in list(lane.overdue.values()):
                if all(request.answered for request in batch.requests):
                    del lane.overdue[batch.batch_id]
            for batch in list(lane.batches.values()):
                if now - batch.sent_at > patience:
                    del lane.batches[batch.batch_id]
                    lane.requests -= len(batch.requests)
                    lane.silent = True  # others come first now
                    lane.overdue[batch.batch_id] = batch
                    self._put_back(batch, now)
                else:
                    for request in batch.requests:
                        if request.deadline <= now:
                            self._time_out(request)
            self._note_room(lane)
        self._requests_per_second = sum(1 / lane.seconds_each for lane in self.lanes.values() if lane.seconds_each > 0)

    def close(self, error: PotluckError) -> None:
        """Answer everything with `error`: the deployment is gone."""
        for lane in self.lanes.values():
            for batch in lane.batches.values():
                for request in batch.requests:
                    request.settle(error)
        self.lanes.clear()
        self._open.clear()
        while self.queue:
            self.queue.popleft().settle(error)

    def _pick(self, now: float) -> _Lane | None:
        if len(self._open) > 8:
            pair = [lane for lane in self._rng.sample(self._open, 2) if lane.rests_until <= now]
            if pair:
                return min(pair, key=lambda lane: lane.wait)
        awake = [lane for lane in self._open if lane.rests_until <= now]
        if len(awake) > 1:
            awake = self._rng.sample(awake, 2)
        return min(awake, key=lambda lane: lane.wait, default=None)

    def _note_room(self, lane: _Lane) -> None:
        """Keep the list of lanes with room after something was sent to this one or came back."""
        if len(lane.batches) >= BATCHES_IN_FLIGHT:
            self._shut(lane)
        elif lane.open_at < 0:
            lane.open_at = len(self._open)
            self._open.append(lane)

    def _shut(self, lane: _Lane) -> None:
        if lane.open_at >= 0:
            last = self._open.pop()
            if last is not lane:
                self._open[lane.open_at], last.open_at = last, lane.open_at
            lane.open_at = -1

    def _take(self, now: float, lane: _Lane) -> list[Request]:
        taken: list[Request] = []
        size = 0
        limit = lane.batch_limit(self._batch_limit)
        # Those of a batch are answered together, when all of it is computed.
        done_at = now + (lane.requests + min(limit, len(self.queue))) * min(lane.seconds_each, lane.seconds_last)
        while self.queue and len(taken) < limit:
            request = self.queue[0]
            # Computing what comes too late is a waste; an idle replica gets one to try, lest the estimate never mends.
            if request.deadline <= now or (request.deadline < done_at and (taken or lane.requests)):
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
        rate = self._requests_per_second
        return max(0.1, len(self.queue) / rate) if rate else 1.0
