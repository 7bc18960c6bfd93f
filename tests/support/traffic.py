"""Simulated requests and replicas around a router, in simulated time."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.serving.batches import Batch, Request
from coordinator.serving.hedging import LEAST_SECONDS
from coordinator.serving.router import Router
from potluck.errors import Overloaded, PotluckError
from potluck.wire.reports import RequestOutcome

OK = RequestOutcome()
TICK_SECONDS = 0.25


@dataclass
class Replica:
    """Computes one batch after the other. A batch takes `fixed_seconds`, plus `row_seconds` for each row, give or take a fifth."""

    fixed_seconds: float
    row_seconds: float
    pauses: Sequence[tuple[float, float]] = ()
    """(from, to) of pauses in which it does nothing."""
    free_at: float = 0.0
    rows: int = 0

    def done_at(self, now: float, rows: int, rng: random.Random) -> float:
        start = max(now, self.free_at)
        for begin, end in self.pauses:
            if begin <= start < end:
                start = end
        done = start + (self.fixed_seconds + self.row_seconds * rows) * rng.uniform(0.8, 1.2)
        for begin, end in self.pauses:
            if start < begin < done:
                done += end - begin
        self.free_at = done
        self.rows += rows
        return done

    def rows_per_second(self, rows: int) -> float:
        """Its speed with batches of this many rows."""
        return rows / (self.fixed_seconds + self.row_seconds * rows)


@dataclass
class Answers:
    """Outcomes of requests: `seconds` of each request with outputs, in the order of the answers."""

    asked: int = 0
    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    retry_after: list[float | None] = field(default_factory=list)

    def percentile(self, percent: float) -> float:
        found = sorted(self.seconds)
        return found[min(len(found) - 1, int(len(found) * percent / 100))]

    @property
    def answered(self) -> int:
        return len(self.seconds) + self.failures.total()


class Traffic:
    """A router with these replicas. `run` can be called again: time goes on."""

    def __init__(
        self, replicas: Mapping[str, Replica], *, objective_seconds: float = 0.0, queue_limit: int = 1000, seed: int = 1
    ) -> None:
        self.rng = random.Random(seed)
        self.router = Router(
            "m:1", queue_limit=queue_limit, batch_limit=64, objective_seconds=objective_seconds, rng=random.Random(seed)
        )
        self.replicas = dict(replicas)
        self.now = 0.0
        self.longest_queue = 0
        self.hedged = 0
        self._hedge_at = math.inf
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        for replica_id in replicas:
            self.router.add_replica(replica_id, f"node of {replica_id}")

    def run(
        self,
        requests_per_second: float,
        seconds: float,
        *,
        deadline_seconds: float = 30.0,
        rows: Sequence[int] = (1,),
        priorities: Sequence[int] = (0,),
    ) -> Mapping[int, Answers]:
        """Outcomes of the requests that came in this time, by priority; returns when all are answered."""
        found = {priority: Answers() for priority in priorities}
        end = self.now + seconds
        at = self.now
        while (at := at + self.rng.expovariate(requests_per_second)) < end:
            self._at(at, self._ask(found, rows, priorities, deadline_seconds))
        for tick in range(int((seconds + deadline_seconds) / TICK_SECONDS) + 2):
            self._at(self.now + tick * TICK_SECONDS, self._tick)
        self._go(lambda: self.now > end and all(one.answered == one.asked for one in found.values()))
        return found

    def clients(
        self, count: int, seconds: float, *, deadline_seconds: float = 30.0, rows: Sequence[int] = (1,)
    ) -> Answers:
        """Outcomes for this many clients in this time; each asks again when it has its answer."""
        found = Answers()
        end = self.now + seconds

        def again() -> None:
            if self.now < end:
                self._at(self.now, self._ask({0: found}, rows, (0,), deadline_seconds, again))

        for _ in range(count):
            self._at(self.now, self._ask({0: found}, rows, (0,), deadline_seconds, again))
        for tick in range(int((seconds + deadline_seconds) / TICK_SECONDS) + 2):
            self._at(self.now + tick * TICK_SECONDS, self._tick)
        self._go(lambda: self.now > end and found.answered == found.asked)
        return found

    def _go(self, done: Callable[[], bool]) -> None:
        while self._events and not done():
            self.now, _, event = heapq.heappop(self._events)
            event()
            self._send()
            self.longest_queue = max(self.longest_queue, len(self.router.queue))

    def _at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), event))

    def _ask(
        self,
        found: Mapping[int, Answers],
        rows: Sequence[int],
        priorities: Sequence[int],
        deadline_seconds: float,
        then: Callable[[], None] = lambda: None,
    ) -> Callable[[], None]:
        def ask() -> None:
            priority, asked_at = self.rng.choice(priorities), self.now
            answers = found[priority]
            answers.asked += 1

            def answer(outcome: RequestOutcome | PotluckError) -> None:
                if isinstance(outcome, PotluckError):
                    answers.failures[outcome.code] += 1
                    answers.retry_after.append(outcome.retry_after_seconds)
                else:
                    answers.seconds.append(self.now - asked_at)
                then()

            request = Request((), answer, asked_at + deadline_seconds, 10, self.rng.choice(rows), priority)
            try:
                self.router.submit(request, self.now)
            except Overloaded as error:
                answer(error)

        return ask

    def _tick(self) -> None:
        self.router.expire(self.now, batch_seconds=10.0)

    def _hedge(self) -> None:
        self._hedge_at = math.inf
        batches = self.router.hedge(self.now)
        self.hedged += sum(len(batch.requests) for batch in batches)
        self._compute(batches)

    def _send(self) -> None:
        self._compute(self.router.dispatch(self.now))
        self.router.withdrawn.clear()  # they are computed anyway, which is the worse case
        due = max(self.router.hedge_at(), self.now + LEAST_SECONDS)
        if due < self._hedge_at:
            self._hedge_at = due
            self._at(due, self._hedge)

    def _compute(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            done_at = self.replicas[batch.replica_id].done_at(self.now, batch.rows, self.rng)
            self._at(done_at, self._done(batch))

    def _done(self, batch: Batch) -> Callable[[], None]:
        def done() -> None:
            self.router.finished(batch.replica_id, batch.batch_id, (OK,) * len(batch.requests), self.now)

        return done
