"""Work in turn: in order, by whoever brought the first, with a limit, and without what was withdrawn."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.engine.turns import Turns
from potluck.errors import Overloaded

WAIT_SECONDS = 20


def test_whoever_brings_the_first_does_all_in_order() -> None:
    turns, done = Turns(10), list[int]()

    def work(number: int) -> Callable[[], None]:
        return lambda: done.append(number)

    def first() -> None:
        done.append(1)
        for number in (2, 3):  # while it is at work
            assert turns.add(number, work(number)) is None

    do = turns.add(1, first)
    assert do is not None
    assert done == []
    do()
    assert done == [1, 2, 3]
    again = turns.add(4, work(4))
    assert again is not None
    again()
    assert done == [1, 2, 3, 4]


def test_what_is_withdrawn_before_its_turn_is_left_out() -> None:
    turns, done = Turns(10), list[int]()

    def first() -> None:
        turns.add(2, lambda: done.append(2))
        turns.add(3, lambda: done.append(3))
        assert turns.withdraw(2)
        assert not turns.withdraw(2)
        assert not turns.withdraw(1)  # its turn has come

    do = turns.add(1, first)
    assert do is not None
    do()
    assert done == [3]
    assert not turns.withdraw(3)


def test_no_more_may_wait_than_its_limit() -> None:
    turns, done = Turns(2), list[int]()

    def first() -> None:
        for number in (2, 3):
            turns.add(number, lambda: done.append(0))
        with pytest.raises(Overloaded, match="2 batches wait for this engine"):
            turns.add(4, lambda: done.append(4))
        assert turns.withdraw(3)
        assert turns.add(5, lambda: done.append(5)) is None

    do = turns.add(1, first)
    assert do is not None
    do()
    assert done == [0, 5]


@given(st.lists(st.integers(1, 30), min_size=2, max_size=4))
def test_threads_that_bring_work_never_work_at_the_same_time(counts: list[int]) -> None:
    turns, done, one_at_a_time = Turns(1000), list[tuple[int, int]](), threading.Lock()

    def work(who: int, number: int) -> None:
        assert one_at_a_time.acquire(blocking=False)
        done.append((who, number))
        one_at_a_time.release()

    def bring(who: int, count: int) -> None:
        for number in range(count):
            do = turns.add(100 * who + number, lambda number=number: work(who, number))  # type: ignore[misc]
            if do is not None:
                do()

    threads = [threading.Thread(target=bring, args=(who, count)) for who, count in enumerate(counts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert sorted(done) == [(who, number) for who, count in enumerate(counts) for number in range(count)]
    for who, count in enumerate(counts):
        assert [number for one, number in done if one == who] == list(range(count))
