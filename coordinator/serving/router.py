"""The router of one deployment: a bounded queue, batches, and the replica with the least expected wait. Pure.

A request is sent at once if a replica has room. While all replicas are busy, requests wait and leave together (natural
batching). A batch has no more requests than the replica computes in time. With an objective, that time is a third of it: while
one batch is computed, a second waits at the replica and a third gathers here. The router picks two replicas at random, and the
one with less expected wait gets the batch (the power of two choices, Mitzenmacher, 2001).

A request that cannot be answered by its deadline, or within the objective, is refused at once. The refusal says when the queue
will be short. A lost batch is put back at the head of the queue, and the first answer that comes counts: a request is answered
once, by its deadline. A replica that answers with failures rests for a moment. Failing is quick, so it would get all requests.

A request whose inputs are held by a node goes to a replica near them. Another replica fetches the inputs only if it is idle and
that is quicker: a busy replica loses nothing by waiting for its own requests.

A replica that is far slower than another gets only what it is expected to answer sooner than the quick one, with its queue,
would. So it delays no request. If it gets nothing for long, it is tried with a request that a quick replica answers too.

A batch that is slow to come back is asked again elsewhere (`hedging`). A batch that no request waits for is withdrawn.

The router knows a replica by its id. Only the endpoint knows its nodes; `inference` asks the endpoint, and tells the router.
"""

from __future__ import annotations

import random
from heapq import heappop, heappush
from itertools import islice
from math import inf

from coordinator.serving.batches import Batch, Request
from coordinator.serving.hedging import LEAST_SECONDS, Hedging
from coordinator.serving.lanes import BATCH_TARGET_SECONDS, BATCHES_AHEAD, HEADROOM, LATE, Lane, Lanes
from coordinator.serving.queueing import RequestQueue
from potluck.errors import Cancelled, InputsLost, ModelCrashed, Overloaded, PotluckError, TimedOut, Unavailable
from potluck.wire.reports import RequestOutcome
from potluck.wording import counted

BATCH_BYTES = 160 * 1024
"""Limit of the inline tensors of a batch, so that it fits into a message."""
UNHURRIED_SECONDS = BATCH_TARGET_SECONDS * BATCHES_AHEAD / HEADROOM
"""A request with at least this much time needs no smaller batches."""
ATTEMPTS_LIMIT = 4
CRASHES_LIMIT = 2
"""A request that ended an engine is tried once more, alone."""
REST_SECONDS = 0.5
LEAST_RETRY_SECONDS = 0.1


class Router:
    """`objective_seconds`: how long an answer may take; 0: no objective. `rng` chooses among lanes."""

    def __init__(
        self,
        name: str,
        *,
        queue_limit: int,
        batch_limit: int,
        objective_seconds: float = 0.0,
        rng: random.Random | None = None,
        series: str = "",
    ) -> None:
        """`series` begins the ids of its batches: an answer to a batch of an earlier router of this name must find none here."""
        self.name = name
        self._series = series
        self.queue = RequestQueue()
        self.lanes = Lanes(batch_limit, objective_seconds, rng or random.Random())
        self._hedging = Hedging()
        self._away: dict[str, Batch] = {}
        """Batches that may be asked again elsewhere, by id."""
        self._late: list[tuple[float, int, Batch]] = []
        """A heap of batches by the time when they are late. A batch that came back stays in it until its turn."""
        self.withdrawn: list[Batch] = []
        """Batches that no request waits for any more. `inference` takes them out, and tells their replicas."""
        self.served = 0
        self.trouble = ""
        """Why no replica is ready, as told to requests that time out."""
        self._queue_limit = queue_limit
        self._number = 0

    @property
    def in_flight(self) -> int:
        """How many requests are on their way."""
        return sum(len(batch.requests) for lane in self.lanes.values() for batch in lane.batches.values())

    @property
    def queue_seconds(self) -> float:
        """Expected time until the queue is empty."""
        return self.lanes.seconds_for(self.queue.rows)

    @property
    def busy(self) -> float:
        """The share of its replicas that are at work."""
        return sum(bool(lane.batches) for lane in self.lanes.values()) / len(self.lanes) if self.lanes else 0.0

    @property
    def objective_seconds(self) -> float:
        return self.lanes.objective_seconds

    def set_objective(self, seconds: float) -> None:
        self.lanes.set_objective(seconds)

    def add_replica(self, replica_id: str, near: str = "") -> None:
        """A replica takes batches from now on. `near` as in `Lane`."""
        if replica_id not in self.lanes:
            self.lanes.add(Lane(replica_id, near))

    def remove_replica(self, replica_id: str, now: float, *, crashed: bool = False) -> None:
        """A replica is gone: its batches are asked again elsewhere. `crashed`: the batch that it computed ended its engine."""
        lane = self.lanes.remove(replica_id)
        if lane is not None:
            for batch in islice(lane.batches.values(), int(crashed)):
                for request in batch.requests:
                    request.crashes += 1
                    request.failure = request.failure or "its engine died of it"
            for batch in reversed(lane.batches.values()):
                batch.out = False
                self._away.pop(batch.batch_id, None)
                self._put_back(batch, batch.requests, now)

    def submit(self, request: Request, now: float) -> None:
        """Queue a request. Raises Overloaded if there is no room or no time for it. Lower priorities make room for higher ones."""
        request.asked_at = now
        if self.queue.rows:
            self._admit(request, now)
        self.queue.push(request)
        self._hedging.asked()

    def cancel(self, request: Request) -> None:
        """The client does not want the answer any more: the request is Cancelled, unless it was answered already."""
        if request.answered:
            return
        self.queue.remove(request)
        request.settle(Cancelled(f"the request to {self.name} was cancelled"))
        if request.batch is not None:
            self._withdraw(request.batch)
            self._withdraw(request.batch.twin)

    def dispatch(self, now: float) -> list[Batch]:
        """Batches to send now."""
        batches: list[Batch] = []
        lanes = self.lanes
        while lanes.open and self.queue.rows:
            lane, first = self._turn(now)
            if lane is None:
                break
            limit = lane.limit
            if not first.held_by or first.held_by != lane.near:
                limit = lanes.most_rows(lane, first.rows, self.queue.rows, now)
            if not limit:
                # The slow lane should not take it. Another lane fetches held inputs only if it is idle, as in `pick_for`.
                own = lanes.holder(first, now)
                lane = own or lanes.least_wait(lanes.quick_with_room(now), now, first.rows)
                if lane is None or lane.full:
                    break
                limit = lane.limit
            requests, rows = self._take(now, lane, first, limit)
            if not requests:  # all were too late
                continue
            batch = self._batch(lane, requests, rows, now)
            for request in requests:
                request.batch = batch
            batches.append(batch)
            if not lanes.slow(lane) and not requests[0].held_by and (idle := lanes.to_probe(now)) is not None:
                probe = self._batch(idle, requests[:1], requests[0].rows, now)
                probe.probe, probe.twin, batch.twin = True, batch, probe
                batches.append(probe)
            else:
                self._watch(batch, now)
        return batches

    def hedge(self, now: float) -> list[Batch]:
        """Copies of slow batches, to send now to other replicas."""
        batches: list[Batch] = []
        late = self._late
        again: list[Batch] = []
        while late and late[0][0] <= now:
            batch = heappop(late)[2]
            if self._away.get(batch.batch_id) is not batch:
                continue
            slow = self.lanes.slow(self.lanes[batch.replica_id])
            others = self.lanes.quick_with_room(now, beyond=1) if slow else self.lanes.open
            others = [one for one in others if one.replica_id != batch.replica_id]
            lane = self.lanes.least_wait(others, now, batch.rows)
            # Waiting requests come first, unless a slow replica holds the batch. A batch is expected to stay away for as long
            # again as it has been away.
            first = self.queue.rows and not slow
            if first or lane is None or lane.silent or lane.wait(now, batch.rows)[1] > now - batch.sent_at:
                again.append(batch)
                continue
            waiting = [request for request in batch.requests if not request.answered]
            allowed = self._hedging.spend(len(waiting))
            if allowed < len(waiting):
                waiting = waiting[:allowed]
            del self._away[batch.batch_id]
            if waiting:
                twin = self._batch(lane, waiting, sum([request.rows for request in waiting]), now)
                twin.twin, batch.twin = batch, twin
                batches.append(twin)
        for batch in again:
            self._numbered(now + LEAST_SECONDS, batch)
        return batches

    def hedge_at(self) -> float:
        """When `hedge` may next have something to send; infinity: no batch is late, or there is no other replica."""
        late = self._late
        while late and self._away.get(late[0][2].batch_id) is not late[0][2]:
            heappop(late)
        return late[0][0] if late and len(self.lanes) > 1 else inf

    def _watch(self, batch: Batch, now: float) -> None:
        """Note when to ask a batch again elsewhere: when most would be back, or when a slow replica is later than expected."""
        self._away[batch.batch_id] = batch
        lane = self.lanes[batch.replica_id]
        after_seconds = self._hedging.after_seconds
        if self.lanes.slow(lane):
            after_seconds = max(LEAST_SECONDS, LATE * lane.busy_seconds(now))
        if after_seconds < inf and len(self.lanes) > 1:
            self._numbered(now + after_seconds, batch)

    def _numbered(self, due_at: float, batch: Batch) -> None:
        self._number += 1
        heappush(self._late, (due_at, self._number, batch))

    def finished(
        self,
        replica_id: str,
        batch_id: str,
        outcomes: tuple[RequestOutcome, ...],
        now: float,
        engine_seconds: float = 0.0,
    ) -> None:
        """Answer the requests of a batch. A batch that was asked again elsewhere counts if it did not fail; others do not."""
        lane = self.lanes.get(replica_id)
        if lane is None:
            return
        if lane.silent:
            lane.silent = False
            self.lanes.measure(lane)
        batch = self.lanes.came_back(lane, batch_id)
        if batch is None:
            self._finished_late(lane, batch_id, outcomes, now, engine_seconds)
            return
        self._away.pop(batch_id, None)
        if len(outcomes) != len(batch.requests):
            lane.rests_until = now + REST_SECONDS
            self._put_back(batch, batch.requests, now)
            return
        failed = False
        retried: list[Request] = []
        for request, outcome in zip(batch.requests, outcomes, strict=True):
            error = outcome.error
            if error is not None:
                failed = True
                # Only that node had them, so no other finds them. But a batch that has them may be under way there.
                lost = error.code == InputsLost.code and request.held_by
                if lost and batch.twin is not None and batch.twin.out and request in batch.twin.requests:
                    continue
                if not lost and (error.retryable or error.code == "not_found"):
                    request.failure = error.message
                    request.crashes += error.code == ModelCrashed.code
                    retried.append(request)
                    continue
            self.served += not request.answered
            request.settle(outcome)
        if retried:
            if any(request.deadline > now for request in retried if not request.answered):
                lane.rests_until = now + REST_SECONDS
            self._put_back(batch, retried, now)
        if not failed:  # a failure is quick, and says nothing of the time
            self._learn(lane, batch, now, engine_seconds)
            if not self.lanes.slow(lane):
                self._hedging.came_back(now - batch.sent_at)
        lane.finished_at = now
        if batch.twin is not None:
            self._withdraw(batch.twin)

    def _finished_late(
        self, lane: Lane, batch_id: str, outcomes: tuple[RequestOutcome, ...], now: float, engine_seconds: float
    ) -> None:
        batch = lane.overdue.pop(batch_id, None)
        if batch is None or len(outcomes) != len(batch.requests):
            return
        self._learn(lane, batch, now, engine_seconds)
        lane.finished_at = now
        for request, outcome in zip(batch.requests, outcomes, strict=True):
            if outcome.error is None and not request.answered:
                self.served += 1
                request.settle(outcome)
                self.queue.remove(request)

    def ask_again(self, replica_id: str, now: float) -> None:
        """Batches to or from this replica may be lost: they are asked again, and the first answer that comes counts."""
        lane = self.lanes.get(replica_id)
        if lane is not None:
            for batch in reversed(list(lane.batches.values())):
                self._overdue(lane, batch, now)

    def expire(self, now: float, batch_seconds: float) -> None:
        """Answer requests past their deadline, and ask batches that have not come back again elsewhere."""
        for request in self.queue.remove_if(lambda request: request.deadline <= now):
            self._time_out(request)
        for lane in self.lanes.values():
            patience = lane.patience_seconds(batch_seconds)
            for batch in list(lane.overdue.values()):
                if not batch.wanted:
                    del lane.overdue[batch.batch_id]
            for batch in list(lane.batches.values()):
                if now - batch.sent_at > patience:
                    self._overdue(lane, batch, now)
                    self.lanes.silence(lane)
                else:
                    for request in batch.requests:
                        if request.deadline <= now:
                            self._time_out(request)
        self.lanes.tick(now)

    def inputs_lost(self, holder: str) -> None:
        """The node that held some inputs (`Request.held_by`) is gone. Clients can send these inputs again."""
        for lane in self.lanes.values():
            for batch in lane.batches.values():
                for request in batch.requests:
                    request.inputs_lost = request.inputs_lost or request.held_by == holder
        for request in self.queue.remove_if(lambda request: request.held_by == holder):
            request.settle(self._lost())

    def close(self, error: PotluckError) -> None:
        """Answer everything with `error`: the deployment is gone."""
        for lane in self.lanes.values():
            for batch in lane.batches.values():
                for request in batch.requests:
                    request.settle(error)
        self.lanes.clear()
        self._away.clear()
        self._late.clear()
        while len(self.queue):
            self.queue.pop().settle(error)

    # --- who may wait ---------------------------------------------------------------------------------------------------

    def _admit(self, request: Request, now: float) -> None:
        """Raises Overloaded for a request that must not join the queue."""
        rows = self.lanes.rows_out + self.queue.rows_before(request.priority) + request.rows
        if rows > self.lanes.rows_per_second * HEADROOM * (request.deadline - now) and self.lanes.rows_per_second > 0.0:
            raise self._overloaded("cannot be answered by its deadline")
        if self._has_room(request):
            return
        crowded_out = self.queue.crowd_out(request.priority)
        if crowded_out is None:
            raise self._overloaded("cannot be taken")
        crowded_out.settle(self._overloaded("had to make room for higher priorities"))

    def _has_room(self, request: Request) -> bool:
        """Whether the queue takes this request. If the objective cannot be met at all, only the next batches may wait."""
        queue = self.queue
        if len(queue) >= self._queue_limit:
            return False
        rows = queue.rows + request.rows
        objective = self.objective_seconds
        return (
            not objective
            or rows <= self.lanes.rows_at_once
            or self.lanes.seconds_for(self.lanes.rows_out + rows) <= HEADROOM * objective
        )

    def _overloaded(self, what: str) -> Overloaded:
        seconds = self.lanes.seconds_for(self.queue.rows) or 1.0
        seconds = max(LEAST_RETRY_SECONDS, seconds)
        return Overloaded(
            f"{counted(len(self.queue), 'request')} for {self.name} in the queue already, and this one {what}: try again in {seconds:.1f} s",
            retry_after_seconds=seconds,
        )

    # --- which replica, and what it gets --------------------------------------------------------------------------------

    def _turn(self, now: float) -> tuple[Lane | None, Request]:
        """The next request and its lane: the head of the queue, unless it waits for a replica near its inputs."""
        if not self.queue.held:
            head = self.queue.head()
            return self.lanes.pick(now, head.rows), head
        waiting = list(self.queue.first())
        holders = {request.held_by for request in waiting}
        for request in waiting:
            if (lane := self.lanes.pick_for(request, holders, now)) is not None:
                return lane, request
        return None, waiting[0]

    def _take(self, now: float, lane: Lane, first: Request, limit: int) -> tuple[list[Request], int]:
        """The requests of the next batch, and their rows: at most `limit`, unless the first request alone has more."""
        queue = self.queue
        taken: list[Request] = []
        rows = size = 0
        if first.deadline - first.asked_at < UNHURRIED_SECONDS:
            limit = min(limit, self.lanes.limit_within(lane, first.deadline - first.asked_at))
        # All requests of a batch are answered together, when the whole batch is computed.
        done_at = now
        if lane.time.known and (lane.batches or len(queue) > 1):
            done_at += lane.busy_seconds(now) + lane.time.seconds(min(limit, queue.rows))
        following: Request | None = first
        while (request := following) is not None:
            # A late answer is a waste. But an idle replica gets one request to try, or a bad estimate would never improve.
            if request.deadline <= now or (request.deadline < done_at and (taken or lane.batches)):
                queue.take(request)
                if request.deadline <= now:
                    self._time_out(request)
                else:
                    request.settle(self._overloaded("cannot be answered by its deadline any more"))
                following = queue.next_for(lane.near)
                continue
            if taken and (rows + request.rows > limit or size + request.size_bytes > BATCH_BYTES):
                break
            if taken and (request.crashes or first.crashes):
                break
            queue.take(request)
            request.attempts += 1
            rows += request.rows
            size += request.size_bytes
            taken.append(request)
            following = queue.next_for(lane.near)
        return taken, rows

    def _batch(self, lane: Lane, requests: list[Request], rows: int, now: float) -> Batch:
        """Make a batch, which counts as sent to this replica from now on."""
        self._number += 1
        batch = Batch(
            f"{self.name}/{self._series}{self._number}", lane.replica_id, requests, rows, now, self.objective_seconds
        )
        self.lanes.sent(lane, batch)
        return batch

    def _withdraw(self, batch: Batch | None) -> None:
        """Withdraw a batch, unless it is back or a request waits for it. The replica may finish it if it has begun."""
        if batch is not None and batch.out and not batch.probe and not batch.wanted:
            self.withdrawn.append(batch)

    def _overdue(self, lane: Lane, batch: Batch, now: float) -> None:
        """Queue the requests of a batch again. If it comes back after all, its answers count."""
        self.lanes.came_back(lane, batch.batch_id)
        lane.overdue[batch.batch_id] = batch
        self._away.pop(batch.batch_id, None)
        self._put_back(batch, batch.requests, now)

    def _put_back(self, batch: Batch, requests: list[Request], now: float) -> None:
        """Put unanswered requests of a batch at the head of the queue, unless another replica has them too."""
        elsewhere = batch.twin.requests if batch.twin is not None and batch.twin.out else ()
        for request in reversed(requests):
            if request.answered or request in elsewhere:
                continue
            if request.deadline <= now:
                self._time_out(request)
            elif request.inputs_lost:
                request.settle(self._lost())
            elif request.attempts >= ATTEMPTS_LIMIT or request.crashes >= CRASHES_LIMIT:
                reason = f": {request.failure}" if request.failure else ""
                request.settle(
                    Unavailable(
                        f"{self.name} did not answer in {counted(request.attempts, 'attempt')} on its replicas{reason}"
                    )
                )
            else:
                self.queue.push_front(request)

    def _lost(self) -> InputsLost:
        return InputsLost(f"the node that had the inputs for {self.name} is gone: send them again")

    def _time_out(self, request: Request) -> None:
        reason = "" if self.lanes else f": no replica is ready{self.trouble and f' ({self.trouble})'}"
        if request.failure:
            reason = f": {request.failure}"
        request.settle(TimedOut(f"{self.name} gave no answer in time{reason}"))

    def _learn(self, lane: Lane, batch: Batch, now: float, engine_seconds: float) -> None:
        lane.learn(batch, now, engine_seconds)
        self.lanes.measure(lane)
