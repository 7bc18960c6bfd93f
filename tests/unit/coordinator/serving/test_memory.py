"""Memory: what is left is what was reported, with what was given and taken since; the longest unused replica makes room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.serving import memory
from coordinator.serving.memory import RECENT_SECONDS, Tenant

MIB = 2**20


def test_what_a_replica_needs_is_what_was_measured() -> None:
    assert memory.needed(700, 100) == 700
    assert memory.needed(0, 100) == 300


def test_what_is_left_heeds_what_came_and_went_since_the_node_told() -> None:
    needs = {"old": 100, "new": 30, "gone": 7}
    assert memory.free(1000, ["old", "gone"], ["old", "new"], needs) == 1000 - 30 + 7
    assert memory.free(10, [], ["new"], needs) == 0
    assert memory.free(0, [], [], {}) is None
    assert memory.free(1000, [], ["new"], needs, 700) == 1000 - 700 - 30  # its engine must still start
    assert memory.free(1000, ["old"], ["old"], needs, 700) == 1000


def tenant(name: str, need: int, asked_at: float, *nodes: str, held: bool = False) -> Tenant:
    return Tenant(name, need, frozenset(nodes), asked_at, held)


def test_who_was_not_asked_for_longest_goes() -> None:
    tenants = [
        tenant("recent:1", 900, 990.0, "a"),
        tenant("held:1", 900, 0.0, "a", held=True),
        tenant("elsewhere:1", 900, 0.0, "b"),
        tenant("older:1", 300, 100.0, "a"),
        tenant("newer:1", 300, 200.0, "a"),
    ]
    assert memory.make_room(400, {"a": 100}, tenants, 1000.0) == ("older:1",)
    assert memory.make_room(600, {"a": 100}, tenants, 1000.0) == ("older:1", "newer:1")
    assert memory.make_room(600, {"a": 100, "b": 0}, tenants, 1000.0) == ("elsewhere:1",)  # one is fewer than two
    assert memory.make_room(800, {"a": 100}, tenants, 1000.0) == ()


def test_why_it_fits_nowhere_names_need_and_rest() -> None:
    assert memory.nowhere(3 * 2**30, {"b": 5 * MIB, "a": 100 * MIB}) == (
        "a replica needs 3.0 GiB, and no node has as much free: a 100.0 MiB, b 5.0 MiB"
    )


_TENANTS = st.lists(
    st.builds(
        Tenant,
        name=st.uuids().map(str),
        need_bytes=st.integers(0, 1000),
        nodes=st.frozensets(st.sampled_from("abc"), max_size=2),
        asked_at=st.floats(0, 1000),
        held=st.booleans(),
    ),
    max_size=8,
)


@given(st.integers(1, 3000), st.dictionaries(st.sampled_from("abc"), st.integers(0, 1000), min_size=1), _TENANTS)
def test_nobody_is_evicted_for_nothing(need: int, left: dict[str, int], tenants: list[Tenant]) -> None:
    now = 1000.0
    victims = memory.make_room(need, left, tenants, now)
    gone = [one for one in tenants if one.name in victims]
    assert all(not one.held and now - one.asked_at >= RECENT_SECONDS for one in gone)
    enough = {
        node_id: size + sum(one.need_bytes for one in gone if node_id in one.nodes) >= need
        for node_id, size in left.items()
    }
    if victims:
        assert any(enough.values())
