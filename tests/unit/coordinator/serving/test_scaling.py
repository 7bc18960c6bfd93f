"""Scaling: always within its bounds, and steady when the load is."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.serving.scaling import DOWN_SECONDS, UP_SECONDS, Scaler, Seen

TICK_SECONDS = 0.25
TARGET_SECONDS = 0.2


class Pond:
    """Requests that go through a queue; each replica takes `capacity` per second, and a new one needs some seconds to load."""

    def __init__(self, least: int, most: int, capacity: float, loading_seconds: float) -> None:
        self.scaler = Scaler()
        self.least, self.most, self.capacity, self.loading_seconds = least, most, capacity, loading_seconds
        self.replicas = least
        self.queue = self.now = 0.0
        self.loaded_at, self.coming = 0.0, 0
        self.history: list[tuple[float, int]] = [(0.0, least)]

    def flow(self, load: float, seconds: float) -> None:
        for _ in range(int(seconds / TICK_SECONDS)):
            self.now += TICK_SECONDS
            if self.coming and self.now >= self.loaded_at:
                self.replicas, self.coming = self.coming, 0
            able = self.replicas * self.capacity
            self.queue = max(0.0, self.queue + (load - able) * TICK_SECONDS)
            self.queue = min(self.queue, 1000.0)
            busy = 1.0 if self.queue else min(1.0, load / able)
            if self.coming:
                continue
            seen = Seen(self.replicas, self.queue / able, busy)
            wanted = self.scaler.wanted(seen, self.least, self.most, TARGET_SECONDS, self.now)
            assert self.least <= wanted <= self.most
            if wanted > self.replicas:
                self.coming, self.loaded_at = wanted, self.now + self.loading_seconds
            self.replicas = min(self.replicas, wanted)
            if wanted != self.history[-1][1]:
                self.history.append((self.now, wanted))


@settings(max_examples=50, deadline=None)
@given(
    least=st.integers(1, 3),
    more=st.integers(0, 5),
    capacity=st.floats(1, 500),
    loads=st.lists(st.floats(0, 2000), max_size=3),
    constant=st.floats(0, 3000),
    loading_seconds=st.floats(0, 20),
)
def test_a_constant_load_ends_at_a_constant_number(
    least: int, more: int, capacity: float, loads: list[float], constant: float, loading_seconds: float
) -> None:
    pond = Pond(least, least + more, capacity, loading_seconds)
    for load in loads:
        pond.flow(load, 100)
    began = pond.now
    drained = 1000.0 / max(1e-3, (least + more) * capacity - constant) if constant < (least + more) * capacity else 0.0
    pond.flow(constant, 200 + min(drained, 2000) + (more + 1) * (DOWN_SECONDS + 15))
    settled = pond.now
    pond.flow(constant, 600)
    assert pond.history[-1][0] <= settled
    turns = [number for at, number in pond.history if at > began]
    falls = [one > other for one, other in pairwise(turns)]
    assert sum(a != b for a, b in pairwise(falls)) <= 1  # up and then down, never up again
    if constant < 0.5 * (least + more) * capacity:
        assert pond.queue == 0


def test_up_after_some_seconds_and_down_after_many() -> None:
    scaler = Scaler()
    slow, easy = Seen(1, 0.4, 1.0), Seen(2, 0.0, 0.2)
    asked = [scaler.wanted(slow, 1, 4, TARGET_SECONDS, now / 4) for now in range(20)]
    first = asked.index(2) / 4
    assert UP_SECONDS <= first <= UP_SECONDS + 2
    begin = 100.0
    held = [scaler.wanted(easy, 1, 4, TARGET_SECONDS, begin + now / 4) for now in range(400)]
    assert DOWN_SECONDS <= held.index(1) / 4 <= DOWN_SECONDS + 30


def test_a_moments_queue_asks_for_nothing() -> None:
    scaler = Scaler()
    for tick in range(100):
        queue_seconds = 0.4 if tick % 8 == 0 else 0.0
        assert scaler.wanted(Seen(1, queue_seconds, 1.0), 1, 4, TARGET_SECONDS, tick / 4) == 1


def test_a_queue_of_many_times_the_target_doubles_at_most() -> None:
    scaler = Scaler()
    asked = [scaler.wanted(Seen(3, 50.0, 1.0), 1, 10, TARGET_SECONDS, now / 4) for now in range(12)]
    assert set(asked) == {3, 6}


def test_bounds_that_were_changed_hold_at_once() -> None:
    assert Scaler().wanted(Seen(1, 0.0, 0.0), 3, 4, TARGET_SECONDS, 0.0) == 3
    assert Scaler().wanted(Seen(9, 9.0, 1.0), 3, 4, TARGET_SECONDS, 0.0) == 4
