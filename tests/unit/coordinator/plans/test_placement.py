"""Shares of work by measured speed."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.plans.placement import NodeView, assign, speeds, split, split_in_time, without_slow

rates_by_node = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.01, 1000), min_size=1)


def node(node_id: str, gflops: float) -> NodeView:
    return NodeView(node_id, gflops, free_slots=2)


def test_measured_speed_replaces_the_product_rate_and_scales_the_others() -> None:
    rates = speeds([node("a", 10), node("b", 20), node("c", 0)], {"a": 500.0})
    assert rates["a"] == 500
    assert rates["b"] == 1000  # twice a's product rate, so twice its measured speed
    assert rates["c"] == 750  # unknown speed: the average of the others


def test_without_any_measurement_all_are_alike() -> None:
    assert set(speeds([node("a", 0), node("b", 0)], {}).values()) == {1.0}


@given(st.integers(0, 100_000), rates_by_node)
def test_split_adds_up_and_follows_speed(total: int, rates: dict[str, float]) -> None:
    parts = split(total, rates)
    assert sum(parts.values()) == total
    for node_id, part in parts.items():
        assert abs(part - total * rates[node_id] / sum(rates.values())) < 1 + 1e-6 * total


@given(st.integers(1, 100_000), rates_by_node, st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 100)))
def test_parts_end_together_whatever_each_node_needs_beside(
    total: int, rates: dict[str, float], delays: dict[str, float]
) -> None:
    parts = split_in_time(total, rates, delays)
    assert sum(parts.values()) == total
    end = min((part - 1) / rates[node_id] + delays.get(node_id, 0.0) for node_id, part in parts.items())
    for node_id, part in parts.items():
        assert (part - 1) / rates[node_id] + delays.get(node_id, 0.0) <= end + 2 / min(rates.values()) + 1e-6 * total
    for node_id in rates.keys() - parts.keys():  # it could not have done more than one item by then
        assert delays.get(node_id, 0.0) + 1 / rates[node_id] >= end - 1e-6 * total


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0.1, 1000), min_size=1),
    st.integers(1, 100_000),
    st.floats(0, 5),
)
def test_leaving_nodes_out_keeps_the_fastest_and_every_item(rates: dict[str, float], total: int, delay: float) -> None:
    delays = {node_id: delay * place for place, node_id in enumerate(sorted(rates))}
    parts, slow = without_slow(total, rates, delays, batch=10)
    assert parts.keys() | slow.keys() == rates.keys()
    assert not parts.keys() & slow.keys()
    assert sum(parts.values()) == total


def test_without_delays_parts_follow_speed() -> None:
    assert split_in_time(100, {"a": 3.0, "b": 1.0}, {}) == {"a": 75, "b": 25}
    assert split_in_time(100, {"a": 10.0, "b": 10.0}, {"b": 2.0}) == {"a": 60, "b": 40}
    assert split_in_time(10, {"a": 10.0, "b": 10.0}, {"b": 2.0}) == {"a": 10}


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), rates_by_node, rates_by_node)
def test_every_data_shard_is_assigned_and_every_node_has_data(
    counts: list[int], before_rates: dict[str, float], rates: dict[str, float]
) -> None:
    before = assign(counts, before_rates, {})
    after = assign(counts, rates, before)
    assert set(after) == set(rates)
    assert {index for indexes in after.values() for index in indexes} == set(range(len(counts)))
    assert all(after.values())


def test_equal_shards_follow_unequal_speeds() -> None:
    held = assign([10] * 30, {"a": 1, "b": 2, "c": 4, "d": 8}, {})
    assert {name: len(indexes) for name, indexes in held.items()} == {"a": 2, "b": 4, "c": 8, "d": 16}


def test_a_lost_node_moves_only_its_own_shards() -> None:
    before = assign([10] * 12, {"a": 1, "b": 1, "c": 1}, {})
    after = assign([10] * 12, {"a": 1, "b": 1}, before)
    assert set(before["a"]) <= set(after["a"])
    assert set(before["b"]) <= set(after["b"])
