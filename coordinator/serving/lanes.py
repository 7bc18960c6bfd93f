"""The ready replicas of a deployment as its router sees them: what is on its way to each, how long that takes, and which is next. Pure."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from heapq import nsmallest
from math import inf

from coordinator.serving.batches import Batch, Request
from coordinator.serving.timing import TimeModel

BATCHES_IN_FLIGHT = 2
"""A replica has one batch to compute and one to begin with at once."""
HEADROOM = 0.8
"""Expected within so much of its time, a request is taken: what is expected errs, and the way back takes a moment too."""
BATCHES_AHEAD = 3
"""Batches that a request may wait for, its own among them: one computed, one that waits at the replica, one that gathers here."""
BATCH_TARGET_SECONDS = 1.0
"""A slow model gets smaller batches: nobody waits long behind one, and what runs is not taken for lost."""
SLOW = 1.5
"""A replica that takes so many times longer for a row than the quickest gets only what it answers sooner than that one would."""
QUICK_LANES = 8
"""So many of the quickest are compared with: a message costs the same however many replicas there are."""
FIRST_ROWS = 8
"""So many a replica of which nothing is known gets at first, where there are others: it may be slow."""
LATE_SECONDS = 10.0
LATE_LEAST = 3
LATE = 2.0
"""A replica that takes so many times longer than expected, so often in so many seconds, has a habit of it (a quota of its processor, say):
once is chance. From then on it is expected to be as late as it was each time."""
PROBE_SECONDS = 10.0
"""A slow replica that got nothing for so long is tried with what a quick one answers anyway: it may be quicker by now."""
ROUNDING = 1e-6
"""A sum of rates that is less is what rounding left of one that is none."""
PATIENCE = 4
"""A batch is lost when it takes so many times what its replica needs for all it has; at most so many times the usual limit."""


@dataclass(eq=False, slots=True)
class Lane:
    """One replica."""

    replica_id: str
    near: str = ""
    """It need not fetch inputs that are held there (`Request.held_by`); "": it must fetch all."""
    time: TimeModel = field(default_factory=TimeModel)
    limit: int = 0
    """Rows of a batch here."""
    rows_per_second: float = 0.0
    """What it does when it has always such a batch; 0 while nothing is known, or nothing comes back."""
    batches: dict[str, Batch] = field(default_factory=dict)
    overdue: dict[str, Batch] = field(default_factory=dict)
    """Batches that are asked again elsewhere, but may still come back."""
    rows: int = 0
    """On their way, overdue ones apart."""
    finished_at: float = 0.0
    sent_at: float = 0.0
    """When it got its last batch."""
    slip_seconds: float = 0.0
    """How late it is again and again, beside what a batch takes."""
    late: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=LATE_LEAST))
    """When it was late the last times, and by how much."""
    open_at: int = -1
    """Where it is in the router's list of lanes with room; -1: it has none."""
    silent: bool = False
    """A batch was lost here, and nothing was heard since."""
    rests_until: float = 0.0

    @property
    def full(self) -> bool:
        return len(self.batches) >= BATCHES_IN_FLIGHT

    def busy_seconds(self, now: float) -> float:
        """Expected until all that is on its way is done. Where that is late, as much more as it is late already."""
        if not self.batches:
            return 0.0
        first = next(iter(self.batches.values()))
        begun_at = max(first.sent_at, self.finished_at)
        left = abs(self.time.seconds(first.rows) - (now - begun_at))
        rest = len(self.batches) - 1
        return left + rest * self.time.fixed_seconds + (self.rows - first.rows) * self.time.row_seconds

    def wait(self, now: float) -> tuple[bool, float]:
        """Expected until one more row is answered; those from which nothing is heard come last."""
        return self.silent, self.busy_seconds(now) + self.time.seconds(1)

    def patience_seconds(self, usual: float) -> float:
        """How long a batch may be away."""
        needed = len(self.batches) * self.time.fixed_seconds + self.rows * self.time.row_seconds
        return min(max(usual, PATIENCE * needed), PATIENCE * usual) if self.time.known else usual

    def sent(self, batch: Batch) -> None:
        self.batches[batch.batch_id] = batch
        self.rows += batch.rows
        self.sent_at = batch.sent_at

    def came_back(self, batch_id: str) -> Batch | None:
        """The batch, which is on its way no more; None when it was not."""
        batch = self.batches.pop(batch_id, None)
        if batch is not None:
            self.rows -= batch.rows
            batch.out = False
        return batch

    def learn(self, batch: Batch, now: float, engine_seconds: float) -> None:
        """What a batch that came back took. It began when the one before it was done, and took the engine's time at least."""
        alone = batch.sent_at >= self.finished_at
        seconds = max(engine_seconds, now - max(batch.sent_at, self.finished_at))
        expected = self.time.seconds(batch.rows)
        if self.time.known and seconds > LATE * expected:
            self.late.append((now, seconds - expected))
            self.note_lateness(now)
        self.time.learn(batch.rows, seconds, alone=alone)

    def note_lateness(self, now: float) -> None:
        """Time passes, or it was late just now."""
        again = len(self.late) == LATE_LEAST and now - self.late[0][0] <= LATE_SECONDS
        self.slip_seconds = min([seconds for _, seconds in self.late]) if again else 0.0

    @property
    def row_expected(self) -> float:
        """Seconds for one row, as late as it is used to be."""
        return self.time.seconds(1) + self.slip_seconds


class Lanes(dict[str, Lane]):
    """By replica id. What they can do together is kept up to date as each changes: nothing here looks at all but `tick`.

    `limit` of a lane is `batch_limit` at most, and what it computes in time for the objective (0: nobody said).
    """

    def __init__(self, batch_limit: int, objective_seconds: float, rng: random.Random) -> None:
        super().__init__()
        self.set_objective(objective_seconds)
        self.rows_out = 0
        """On their way to any."""
        self.rows_per_second = 0.0
        """Of all together, as is `rows_at_once`: of the next batch of each."""
        self.rows_at_once = 0
        self.quick: list[Lane] = []
        """The quickest, of those that are known."""
        self.open: list[Lane] = []
        """Those with room for a batch, in no order: a message costs the same with three replicas as with a thousand."""
        self._near: dict[str, list[Lane]] = {}
        """By their `near`."""
        self._quickest_seconds = 0.0
        """What a row takes on the quickest; 0: nothing is known of any."""
        self._slow: list[Lane] = []
        """Those that may be tried, since they got nothing for long."""
        self._batch_limit = batch_limit
        self._rng = rng

    def add(self, lane: Lane) -> None:
        self[lane.replica_id] = lane
        if lane.near:
            self._near.setdefault(lane.near, []).append(lane)
        self.measure(lane)
        self.note_room(lane)

    def remove(self, replica_id: str) -> Lane | None:
        """It, unless it is not here."""
        lane = self.pop(replica_id, None)
        if lane is not None:
            if lane.near:
                self._near[lane.near].remove(lane)
                if not self._near[lane.near]:
                    del self._near[lane.near]
            self._shut(lane)
            self._count(lane, 0, 0.0)
            self.rows_out -= lane.rows
            self._compare()
        return lane

    def clear(self) -> None:
        super().clear()
        self.open.clear()
        self._near.clear()
        self._compare()

    def sent(self, lane: Lane, batch: Batch) -> None:
        lane.sent(batch)
        self.rows_out += batch.rows
        self.note_room(lane)

    def came_back(self, lane: Lane, batch_id: str) -> Batch | None:
        """The batch, which is on its way no more; None when it was not."""
        batch = lane.came_back(batch_id)
        if batch is not None:
            self.rows_out -= batch.rows
            self.note_room(lane)
        return batch

    def measure(self, lane: Lane) -> None:
        """How much it gets at once, and does in a second."""
        limit = lane.time.rows_within(self._batch_seconds, self._batch_limit)
        self._count(lane, limit, lane.time.rows_per_second(limit))
        if not self.quick and lane.rows_per_second > 0.0:
            self._compare()

    def set_objective(self, seconds: float) -> None:
        self.objective_seconds = seconds
        target = HEADROOM * seconds / BATCHES_AHEAD
        self._batch_seconds = min(BATCH_TARGET_SECONDS, target) if seconds else BATCH_TARGET_SECONDS
        for lane in self.values():
            self.measure(lane)

    def limit_within(self, lane: Lane, seconds: float) -> int:
        """Rows of a batch for one whose answer may take so long: its own time counts like an objective."""
        return min(lane.limit, lane.time.rows_within(HEADROOM * seconds / BATCHES_AHEAD, self._batch_limit))

    def silence(self, lane: Lane) -> None:
        """A batch was lost there: others come first now, and it counts for nothing."""
        lane.silent = True
        self._count(lane, lane.limit, 0.0)

    def seconds_for(self, rows: int) -> float:
        """How long all together take for so many rows; 0 while nothing is known."""
        return rows / self.rows_per_second if self.rows_per_second > 0.0 else 0.0

    def pick(self, now: float) -> Lane | None:
        """Of two with room, picked at random, the one with less expected wait; None when none has room."""
        lanes = self.open
        count = len(lanes)
        if count == 1:
            return lanes[0] if lanes[0].rests_until <= now else None
        if not count:
            return None
        first, second = 0, 1
        if count > 2:
            first, second = int(self._rng.random() * count), int(self._rng.random() * (count - 1))
            second += second >= first
        one, other = lanes[first], lanes[second]
        if one.rests_until > now or other.rests_until > now:
            return self.least_wait(lanes, now)
        return one if one.wait(now) <= other.wait(now) else other

    def pick_for(self, request: Request, holders: Set[str], now: float) -> Lane | None:
        """Where this request goes: to a replica near its inputs. Another one fetches them only while it has nothing to do (nor do
        requests wait for it: `holders` is `held_by` of all that wait), and where that is quicker. None: it waits.
        """
        other = self.pick(now)
        own = self.holder(request, now)
        if own is None or own is other:
            return other
        idle = other is not None and not other.batches and not other.silent and other.near not in holders
        if other is not None and idle and request.moving_seconds + other.wait(now)[1] < own.wait(now)[1]:
            return other
        return None if own.full else own

    def holder(self, request: Request, now: float) -> Lane | None:
        """The lane near its inputs, if it is worth waiting for. Of several lanes, one with room, or else the one with the shortest wait."""
        own: Lane | None = None
        for lane in self._near.get(request.held_by, ()):
            if lane.silent or lane.rests_until > now:
                continue
            if own is None or (lane.full, lane.wait(now)) < (own.full, own.wait(now)):
                own = lane
        return own

    def least_wait(self, lanes: list[Lane], now: float) -> Lane | None:
        """Of those that do not rest."""
        awake = (lane for lane in lanes if lane.rests_until <= now)
        return min(awake, key=lambda lane: lane.wait(now), default=None)

    def slow(self, lane: Lane) -> bool:
        """Whether it is far slower than another one, or nothing is known of it while others are known."""
        if not lane.time.known:
            return bool(self.quick)
        return lane.row_expected > SLOW * self._quickest_seconds > 0.0

    def most_rows(self, lane: Lane, first_rows: int, rows_waiting: int, now: float) -> int:
        """How many rows, beginning with a request of `first_rows`, this replica may get now; 0: they had better wait for another.

        A slow one gets no more than it is expected to answer sooner than a quick one would, behind all that this has to do.
        """
        if not self.slow(lane):
            unknown = not lane.time.known and len(self) > 1
            return min(lane.limit, max(FIRST_ROWS, first_rows)) if unknown else lane.limit
        seconds = self.seconds_elsewhere(lane, rows_waiting, now)
        if seconds == inf:
            return lane.limit
        if not lane.time.known:
            return 0 if lane.batches else first_rows
        left = HEADROOM * seconds - lane.busy_seconds(now) - lane.slip_seconds - lane.time.fixed_seconds
        if left < first_rows * lane.time.row_seconds:
            return 0
        return min(lane.limit, int(left / lane.time.row_seconds)) if lane.time.row_seconds > 0.0 else lane.limit

    def seconds_elsewhere(self, lane: Lane, rows_waiting: int, now: float) -> float:
        """Until a quick one is expected to have answered the next of those that wait; infinity where there is none."""
        return min(
            [
                other.busy_seconds(now) + other.time.seconds(min(other.limit, rows_waiting))
                for other in self.quick
                if other is not lane and not other.silent and other.rests_until <= now
            ],
            default=inf,
        )

    def quick_with_room(self, now: float, *, beyond: int = 0) -> list[Lane]:
        """Those of the quickest that have room for a batch, or would with so many places more."""
        return [
            lane
            for lane in self.quick
            if len(lane.batches) < BATCHES_IN_FLIGHT + beyond and not lane.silent and lane.rests_until <= now
        ]

    def to_probe(self, now: float) -> Lane | None:
        """A slow one that got nothing for long; each is named once between two ticks."""
        while self._slow:
            lane = self._slow.pop()
            if self.get(lane.replica_id) is lane and not lane.batches and now - lane.sent_at > PROBE_SECONDS:
                return lane
        return None

    def tick(self, now: float) -> None:
        """Compare them, now and then."""
        for lane in self.values():
            if lane.slip_seconds:
                lane.note_lateness(now)
        self._compare()
        self._slow = [lane for lane in self.values() if not lane.silent and not lane.batches and self.slow(lane)]

    def _compare(self) -> None:
        known = [lane for lane in self.values() if lane.rows_per_second > 0.0]
        self.quick = nsmallest(QUICK_LANES, known, key=lambda lane: lane.row_expected)
        self._quickest_seconds = self.quick[0].row_expected if self.quick else 0.0
        self.quick = [lane for lane in self.quick if not self.slow(lane)]

    def note_room(self, lane: Lane) -> None:
        """Keep the list of those with room after something was sent to this one or came back."""
        if lane.full:
            self._shut(lane)
        elif lane.open_at < 0:
            lane.open_at = len(self.open)
            self.open.append(lane)

    def check_invariants(self) -> None:
        for lane in self.values():
            assert len(lane.batches) <= BATCHES_IN_FLIGHT + 1  # one more where it takes over from a slow replica
            assert lane.rows == sum(batch.rows for batch in lane.batches.values())
            assert (lane.open_at >= 0) == (not lane.full)
            assert lane.open_at < 0 or self.open[lane.open_at] is lane
            assert all(batch.out for batch in lane.batches.values())
        near = [lane for place, lanes in self._near.items() for lane in lanes if lane.near == place]
        assert all(self[lane.replica_id] is lane for lane in near)
        assert len(near) == sum(bool(lane.near) for lane in self.values()) == sum(map(len, self._near.values()))
        assert len(self.open) == sum(lane.open_at >= 0 for lane in self.values())
        assert self.rows_out == sum(lane.rows for lane in self.values())
        assert self.rows_at_once == sum(lane.limit for lane in self.values())
        assert abs(self.rows_per_second - sum(lane.rows_per_second for lane in self.values())) < 1e-3

    def _count(self, lane: Lane, limit: int, rows_per_second: float) -> None:
        self.rows_at_once += limit - lane.limit
        total = self.rows_per_second + rows_per_second - lane.rows_per_second
        self.rows_per_second = total if total > ROUNDING else 0.0
        lane.limit, lane.rows_per_second = limit, rows_per_second

    def _shut(self, lane: Lane) -> None:
        if lane.open_at >= 0:
            last = self.open.pop()
            if last is not lane:
                self.open[lane.open_at], last.open_at = last, lane.open_at
            lane.open_at = -1
