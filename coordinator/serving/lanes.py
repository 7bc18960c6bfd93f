"""The ready replicas of a deployment as its router sees them: what is on its way to each, how long that takes, and which is next. Pure."""

from __future__ import annotations

import random
from collections.abc import Set
from dataclasses import dataclass, field

from coordinator.serving.queueing import Request
from coordinator.serving.timing import TimeModel

BATCHES_IN_FLIGHT = 2
"""A replica has one batch to compute and one to begin with at once."""
HEADROOM = 0.8
"""Expected within so much of its time, a request is taken: what is expected errs, and the way back takes a moment too."""
BATCHES_AHEAD = 3
"""Batches that a request may wait for, its own among them: one computed, one that waits at the replica, one that gathers here."""
BATCH_TARGET_SECONDS = 1.0
"""A slow model gets smaller batches: nobody waits long behind one, and what runs is not taken for lost."""
WORTH_WAITING = 2.0
"""A replica that takes so many times longer than waiting for the others would stays idle."""
ROUNDING = 1e-6
"""A sum of rates that is less is what rounding left of one that is none."""
PATIENCE = 4
"""A batch is lost when it takes so many times what its replica needs for all it has; at most so many times the usual limit."""


@dataclass(eq=False, slots=True)
class Batch:
    batch_id: str
    replica_id: str
    node_id: str
    requests: list[Request]
    rows: int
    sent_at: float
    out: bool = True
    """Whether it is on its way, and waited for."""
    twin: Batch | None = None
    """The same requests, or some of them, at another replica."""

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for its answer."""
        return not all(request.answered for request in self.requests)


@dataclass(eq=False, slots=True)
class Lane:
    replica_id: str
    node_id: str
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
        self.time.learn(batch.rows, seconds, alone=alone)


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
        self.uneven = False
        """Whether one is so slow that it may be better to wait for another."""
        self.open: list[Lane] = []
        """Those with room for a batch, in no order: a message costs the same with three replicas as with a thousand."""
        self._at: dict[str, Lane] = {}
        """By the node that it is on."""
        self._quickest_seconds = 0.0
        """What a row takes on the quickest."""
        self._batch_limit = batch_limit
        self._rng = rng

    def add(self, lane: Lane) -> None:
        self[lane.replica_id] = lane
        self._at[lane.node_id] = lane
        self.measure(lane)
        self.note_room(lane)

    def remove(self, replica_id: str) -> Lane | None:
        """It, unless it is not here."""
        lane = self.pop(replica_id, None)
        if lane is not None:
            if self._at.get(lane.node_id) is lane:
                del self._at[lane.node_id]
            self._shut(lane)
            self._count(lane, 0, 0.0)
            self.rows_out -= lane.rows
        return lane

    def clear(self) -> None:
        super().clear()
        self.open.clear()
        self._at.clear()

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
        """Where this request goes: to the node that has its inputs. Another one fetches them only while it has nothing to do (nor do
        requests wait for it: `holders` are all who are waited for), and where that is quicker. None: it waits.
        """
        other = self.pick(now)
        own = self._at.get(request.held_by)
        if own is None or own is other or own.silent or own.rests_until > now:
            return other
        idle = other is not None and not other.batches and not other.silent and other.node_id not in holders
        if other is not None and idle and request.moving_seconds + other.wait(now)[1] < own.wait(now)[1]:
            return other
        return None if own.full else own

    def least_wait(self, lanes: list[Lane], now: float) -> Lane | None:
        """Of those that do not rest."""
        awake = (lane for lane in lanes if lane.rests_until <= now)
        return min(awake, key=lambda lane: lane.wait(now), default=None)

    def better_wait(self, lane: Lane, rows_waiting: int, waited_seconds: float, now: float) -> bool:
        """Whether the others, all busy, will be done with everything long before this slow replica would be with its first."""
        others = self.rows_per_second - lane.rows_per_second
        if others <= 0.0 or not lane.time.known:
            return False
        alone = lane.busy_seconds(now) + lane.time.seconds(1)
        if waited_seconds > alone:  # what it waited for did not come
            return False
        waiting = BATCHES_AHEAD * self._quickest_seconds + (self.rows_out - lane.rows + rows_waiting) / others
        return alone > WORTH_WAITING * waiting

    def tick(self) -> None:
        """Compare them, now and then."""
        each = [lane.time.seconds(1) for lane in self.values() if lane.rows_per_second > 0.0]
        self._quickest_seconds = min(each, default=0.0)
        self.uneven = max(each, default=0.0) > WORTH_WAITING * BATCHES_AHEAD * self._quickest_seconds

    def note_room(self, lane: Lane) -> None:
        """Keep the list of those with room after something was sent to this one or came back."""
        if lane.full:
            self._shut(lane)
        elif lane.open_at < 0:
            lane.open_at = len(self.open)
            self.open.append(lane)

    def check_invariants(self) -> None:
        for lane in self.values():
            assert len(lane.batches) <= BATCHES_IN_FLIGHT
            assert lane.rows == sum(batch.rows for batch in lane.batches.values())
            assert (lane.open_at >= 0) == (not lane.full)
            assert lane.open_at < 0 or self.open[lane.open_at] is lane
            assert all(batch.out for batch in lane.batches.values())
        assert all(self[lane.replica_id] is lane and lane.node_id == node for node, lane in self._at.items())
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
