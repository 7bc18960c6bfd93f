"""The ready replicas of a deployment, as its router sees them. A **lane** is one of them, with its batches and times. Pure."""

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
"""A replica computes one batch, and has one more that it can begin at once."""
HEADROOM = 0.8
"""A request is taken if its answer is expected within this share of its time: estimates err, and the way back takes time."""
BATCHES_AHEAD = 3
"""Batches that a request waits for, with its own: one is computed, one waits at the replica, one gathers here."""
BATCH_TARGET_SECONDS = 1.0
"""A slow model gets batches that take this long. So requests wait less, and a running batch is not taken for lost."""
SLOW = 1.5
"""A replica is slow if batches take this many times longer than on the quickest. It gets only what it would answer sooner."""
USUAL = 0.05
"""The share of the newest batch in the usual number of rows."""
QUICK_LANES = 8
"""How many of the quickest are compared with, so that a message costs the same with any number of replicas."""
FIRST_ROWS = 8
"""How many rows an unknown replica gets at first, if there are others: it may be slow."""
LATE_SECONDS = 10.0
LATE_LEAST = 3
LATE = 2.0
"""A batch is late if it takes this many times longer than expected. Once is chance. LATE_LEAST times within LATE_SECONDS have a
cause (a quota of the processor, for example): from then on, the replica is expected to be as late again."""
PROBE_SECONDS = 10.0
"""A slow replica that got nothing for this long is tried with a copy of a quick one's request: it may be quicker by now."""
ROUNDING = 1e-6
"""A sum of rates below this is an error of rounding, and counts as 0."""
PATIENCE = 4
"""A batch is lost after this many times what its replica needs for all it has, and at most this many times the usual limit."""


@dataclass(eq=False, slots=True)
class Lane:
    """One replica."""

    replica_id: str
    near: str = ""
    """The node whose inputs it need not fetch (`Request.held_by`); "": it must fetch all."""
    time: TimeModel = field(default_factory=TimeModel)
    limit: int = 0
    """The most rows of a batch for this replica."""
    rows_per_second: float = 0.0
    """Its speed with full batches; 0: not known yet, or no batch comes back."""
    batches: dict[str, Batch] = field(default_factory=dict)
    overdue: dict[str, Batch] = field(default_factory=dict)
    """Batches that were asked again elsewhere, but may still come back."""
    rows: int = 0
    """Rows on their way, without those of overdue batches."""
    finished_at: float = 0.0
    sent_at: float = 0.0
    """When the last batch was sent to it."""
    slip_seconds: float = 0.0
    """How late it is repeatedly, on top of the time of a batch."""
    late: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=LATE_LEAST))
    """The last times when it was late, and by how much."""
    open_at: int = -1
    """Its place in the list of lanes with room (`Lanes.open`); -1: it has no room."""
    silent: bool = False
    """Whether a batch was lost here, and no answer came since."""
    rests_until: float = 0.0

    @property
    def full(self) -> bool:
        return len(self.batches) >= BATCHES_IN_FLIGHT

    def busy_seconds(self, now: float) -> float:
        """Expected time until all its batches are done. If they are late already, the same delay is added once more."""
        if not self.batches:
            return 0.0
        first = next(iter(self.batches.values()))
        begun_at = max(first.sent_at, self.finished_at)
        left = abs(self.time.seconds(first.rows) - (now - begun_at))
        rest = len(self.batches) - 1
        return left + rest * self.time.fixed_seconds + (self.rows - first.rows) * self.time.row_seconds

    def wait(self, now: float, rows: int) -> tuple[bool, float]:
        """Expected time until so many more rows are answered; silent lanes come last."""
        return self.silent, self.busy_seconds(now) + self.time.seconds(rows)

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
        """Learn from a batch that came back. It began when the one before was done, and took at least the engine's time."""
        alone = batch.sent_at >= self.finished_at
        seconds = max(engine_seconds, now - max(batch.sent_at, self.finished_at))
        expected = self.time.seconds(batch.rows)
        if self.time.known and seconds > LATE * expected:
            self.late.append((now, seconds - expected))
            self.note_lateness(now)
        self.time.learn(batch.rows, seconds, alone=alone)

    def note_lateness(self, now: float) -> None:
        """Compute `slip_seconds` again: time passed, or the lane was late just now."""
        again = len(self.late) == LATE_LEAST and now - self.late[0][0] <= LATE_SECONDS
        self.slip_seconds = min([seconds for _, seconds in self.late]) if again else 0.0

    def expected_seconds(self, rows: float) -> float:
        """For a batch of so many rows, with the lane's usual delay."""
        return self.time.seconds(rows) + self.slip_seconds


class Lanes(dict[str, Lane]):
    """Lanes by replica id. Sums over all lanes are updated when a lane changes: only `tick` goes through all lanes.

    `limit` of a lane is at most `batch_limit`, and at most what it computes in time for the objective (0: no objective).
    """

    def __init__(self, batch_limit: int, objective_seconds: float, rng: random.Random) -> None:
        super().__init__()
        self.set_objective(objective_seconds)
        self.rows_out = 0
        """Rows on their way to any lane."""
        self.rows_per_second = 0.0
        """The speed of all together. `rows_at_once`: the rows of one full batch for each lane, together."""
        self.rows_at_once = 0
        self.quick: list[Lane] = []
        """The quickest of the lanes whose speed is known."""
        self.open: list[Lane] = []
        """Lanes with room for a batch, in no order. So a message costs the same with three replicas as with a thousand."""
        self._near: dict[str, list[Lane]] = {}
        """Lanes by their `near`."""
        self._quickest: tuple[float, float, float] | None = None
        """Of the quickest lane: the rows of its batches, and the fixed seconds and those of a row. None: no lane is known yet."""
        self._usual_rows = 1.0
        """About how many rows recent batches had, on any lane."""
        self._slow: list[Lane] = []
        """Slow lanes that may be tried because they got nothing for long."""
        self._batch_limit = batch_limit
        self._rng = rng

    def add(self, lane: Lane) -> None:
        self[lane.replica_id] = lane
        if lane.near:
            self._near.setdefault(lane.near, []).append(lane)
        self.measure(lane)
        self.note_room(lane)

    def remove(self, replica_id: str) -> Lane | None:
        """Remove and return the lane; None: it is not here."""
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
        self._usual_rows += USUAL * (batch.rows - self._usual_rows)
        self.note_room(lane)

    def came_back(self, lane: Lane, batch_id: str) -> Batch | None:
        """The batch, which is on its way no more; None when it was not."""
        batch = lane.came_back(batch_id)
        if batch is not None:
            self.rows_out -= batch.rows
            self.note_room(lane)
        return batch

    def measure(self, lane: Lane) -> None:
        """Set a lane's `limit` and `rows_per_second` from its times."""
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
        """The most rows of a batch with a request that has so many seconds: they count like an objective."""
        return min(lane.limit, lane.time.rows_within(HEADROOM * seconds / BATCHES_AHEAD, self._batch_limit))

    def silence(self, lane: Lane) -> None:
        """A batch was lost there: other lanes come first now, and its speed counts as 0."""
        lane.silent = True
        self._count(lane, lane.limit, 0.0)

    def seconds_for(self, rows: int) -> float:
        """How long all lanes together take for so many rows; 0: no speed is known."""
        return rows / self.rows_per_second if self.rows_per_second > 0.0 else 0.0

    def pick(self, now: float, rows: int) -> Lane | None:
        """Picks two lanes with room at random, and returns the one with less expected wait for so many rows; None: no lane
        has room.
        """
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
            return self.least_wait(lanes, now, rows)
        return one if one.wait(now, rows) <= other.wait(now, rows) else other

    def pick_for(self, request: Request, holders: Set[str], now: float) -> Lane | None:
        """The lane for this request: one near its inputs. Another lane fetches the inputs only if it is idle, no request waits
        for it (`holders` is `held_by` of all waiting requests), and this is quicker. None: the request waits.
        """
        rows = request.rows
        other = self.pick(now, rows)
        own = self.holder(request, now)
        if own is None or own is other:
            return other
        idle = other is not None and not other.batches and not other.silent and other.near not in holders
        if other is not None and idle and request.moving_seconds + other.wait(now, rows)[1] < own.wait(now, rows)[1]:
            return other
        return None if own.full else own

    def holder(self, request: Request, now: float) -> Lane | None:
        """The lane near the inputs, unless it is silent or rests. Of several lanes: one with room, then the shortest wait."""
        own: Lane | None = None
        for lane in self._near.get(request.held_by, ()):
            if lane.silent or lane.rests_until > now:
                continue
            if own is None or (lane.full, lane.wait(now, request.rows)) < (own.full, own.wait(now, request.rows)):
                own = lane
        return own

    def least_wait(self, lanes: list[Lane], now: float, rows: int) -> Lane | None:
        """The lane with the least expected wait for so many rows, of those that do not rest."""
        awake = (lane for lane in lanes if lane.rests_until <= now)
        return min(awake, key=lambda lane: lane.wait(now, rows), default=None)

    def slow(self, lane: Lane) -> bool:
        """Whether it is far slower than the quickest lane, or its speed is not known while others are known.

        A fit says little about batches of a size that it has not seen. So the lane must be slower at the usual size of its own
        batches, and at that of the quickest lane's.
        """
        if not lane.time.known:
            return bool(self.quick)
        if self._quickest is None:
            return False
        rows, fixed, each = self._quickest
        own = lane.time.mean_rows
        return (
            lane.expected_seconds(own) > SLOW * (fixed + each * own)
            and lane.expected_seconds(rows) > SLOW * (fixed + each * rows)
        )  # fmt: skip

    def most_rows(self, lane: Lane, first_rows: int, rows_waiting: int, now: float) -> int:
        """How many rows this lane may get now, beginning with a request of `first_rows`; 0: they should wait for another lane.

        A slow lane gets only what it is expected to answer sooner than a quick lane would after its own work.
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
        """Expected time until a quick lane has answered the next of the waiting rows; infinity: there is no quick lane."""
        return min(
            [
                other.busy_seconds(now) + other.time.seconds(min(other.limit, rows_waiting))
                for other in self.quick
                if other is not lane and not other.silent and other.rests_until <= now
            ],
            default=inf,
        )

    def quick_with_room(self, now: float, *, beyond: int = 0) -> list[Lane]:
        """The quickest lanes with room for a batch, counting `beyond` more places for each."""
        return [
            lane
            for lane in self.quick
            if len(lane.batches) < BATCHES_IN_FLIGHT + beyond and not lane.silent and lane.rests_until <= now
        ]

    def to_probe(self, now: float) -> Lane | None:
        """A slow lane that got nothing for long. Each is returned at most once between two ticks."""
        while self._slow:
            lane = self._slow.pop()
            if self.get(lane.replica_id) is lane and not lane.batches and now - lane.sent_at > PROBE_SECONDS:
                return lane
        return None

    def tick(self, now: float) -> None:
        """Compare all lanes. Called from time to time."""
        for lane in self.values():
            if lane.slip_seconds:
                lane.note_lateness(now)
        self._compare()
        self._slow = [lane for lane in self.values() if not lane.silent and not lane.batches and self.slow(lane)]

    def _compare(self) -> None:
        known = [lane for lane in self.values() if lane.rows_per_second > 0.0]
        self.quick = nsmallest(QUICK_LANES, known, key=lambda lane: lane.expected_seconds(self._usual_rows))
        self._quickest = None
        if self.quick:
            first = self.quick[0]
            self._quickest = first.time.mean_rows, first.time.fixed_seconds + first.slip_seconds, first.time.row_seconds
        self.quick = [lane for lane in self.quick if not self.slow(lane)]

    def note_room(self, lane: Lane) -> None:
        """Update the list of lanes with room, after a batch was sent to this lane or came back."""
        if lane.full:
            self._shut(lane)
        elif lane.open_at < 0:
            lane.open_at = len(self.open)
            self.open.append(lane)

    def check_invariants(self) -> None:
        for lane in self.values():
            assert len(lane.batches) <= BATCHES_IN_FLIGHT + 1  # one more if it takes over from a slow replica
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
