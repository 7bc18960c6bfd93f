"""Who does how much: pure functions from measured speed to shares of the work.

A node's speed is what it was measured to do in this very job; before that, its float32 product rate stands in, scaled to
those nodes that were measured. Data distribution is proportional to speed, so that all finish together: the
makespan-optimal split of divisible work when the cost of communication is left out (divisible load theory, Bharadwaj et al., 1996).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from potluck.wire.messages import ModelFormat, NodeData

RUNTIME_OF: dict[ModelFormat, str] = {
    "keras": "tensorflow",
    "h5": "tensorflow",
    "savedmodel": "tensorflow",
    "tflite": "litert",
}
"""What a node needs to serve a model of that format."""
WORDS = {"tensorflow": "TensorFlow", "litert": "LiteRT"}
"""Runtimes as people write them."""

LEAST_SHARE = 0.06
"""A node that would do less than this share of what the fastest does brings less than it costs: all wait for it a little ..."""
SLOW_FACTOR = 2.0
SLOW_SECONDS = 0.25
"""... and so does one that needs so many times, and so many seconds, longer for a single batch than the others for the round."""


@dataclass(frozen=True)
class NodeView:
    """A node that may be given work now: `free_slots` more attempts fit into its queue, `idle` when it has none at all."""

    node_id: str
    gflops: float
    free_slots: int
    idle: bool = True
    collective: str = ""
    """`host:port` at which it may take part in synchronous training."""
    data: tuple[NodeData, ...] = ()
    """Data sets that live on it."""
    runtimes: frozenset[str] = frozenset({"tensorflow"})
    gives_way: bool = False
    """Whether jobs stand still on it while inference has an objective to keep."""

    def holds(self, name: str) -> NodeData | None:
        """What it says of its data set of that name; None where it has none."""
        return next((one for one in self.data if one.name == name), None)


@dataclass(frozen=True)
class ClusterView:
    """What a plan may depend on: the nodes that can compute, and the time."""

    nodes: tuple[NodeView, ...]
    now: float
    resting: frozenset[str] = frozenset()
    """Nodes that reported an error and are not among `nodes` for some seconds."""

    def having(self, runtime: str) -> ClusterView:
        """The same with only those nodes that have it."""
        if all(runtime in node.runtimes for node in self.nodes):
            return self
        return replace(self, nodes=tuple(node for node in self.nodes if runtime in node.runtimes))

    @property
    def node_ids(self) -> set[str]:
        return {node.node_id for node in self.nodes}


def speeds(nodes: Sequence[NodeView], measured: Mapping[str, float]) -> dict[str, float]:
    """Items per second of each node; relative figures when none was measured. Always positive."""
    rates = {node.node_id: max(node.gflops, 0.0) for node in nodes}
    known = [rate for rate in rates.values() if rate > 0]
    typical = sum(known) / len(known) if known else 1.0
    rates = {node_id: rate if rate > 0 else typical for node_id, rate in rates.items()}
    both = {node_id: None for node_id in rates if measured.get(node_id, 0.0) > 0}
    factor = sum(measured[node_id] for node_id in both) / sum(rates[node_id] for node_id in both) if both else 1.0
    return {node_id: measured[node_id] if node_id in both else rate * factor for node_id, rate in rates.items()}


def split(total: int, rates: Mapping[str, float]) -> dict[str, int]:
    """`total` items by speed, in whole items that add up to `total` (largest remainder); nodes that get none are left out."""
    if not rates or total <= 0:
        return {}
    whole = sum(rates.values())
    exact = {node_id: total * rate / whole for node_id, rate in rates.items()}
    parts = {node_id: int(share) for node_id, share in exact.items()}
    by_remainder = sorted(exact, key=lambda node_id: (parts[node_id] - exact[node_id], node_id))
    for node_id in by_remainder[: total - sum(parts.values())]:
        parts[node_id] += 1
    return {node_id: part for node_id, part in sorted(parts.items()) if part > 0}


def split_in_time(total: int, rates: Mapping[str, float], delays: Mapping[str, float]) -> dict[str, int]:
    """As `split`, so that all end together where node i takes `delays[i]` seconds beside its items.

    Divisible load with costs to start (affine cost model; Beaumont et al., 2005): n_i = v_i (T - o_i), with T such that they
    add up to `total`; nodes that would not have started by then are left out. `rates` in items a second.
    """
    taking = set(rates)
    while taking:
        whole = sum(rates[node_id] for node_id in taking)
        end = (total + sum(rates[node_id] * delays.get(node_id, 0.0) for node_id in taking)) / whole
        late = {node_id for node_id in taking if delays.get(node_id, 0.0) >= end}
        if not late:
            return split(total, {node_id: rates[node_id] * (end - delays.get(node_id, 0.0)) for node_id in taking})
        taking -= late
    return {}


def without_slow(
    total: int, rates: dict[str, float], delays: dict[str, float], batch: int
) -> tuple[dict[str, int], dict[str, str]]:
    """`total` items split so that all nodes end together, without those that cost more than they bring; and why they are left out.

    `rates` in items/s, `delays` in seconds beside computing, `batch` the fewest items that a node can do. At least one stays.
    """
    taking, slow = dict(rates), dict[str, str]()
    while True:
        parts = split_in_time(total, taking, delays)
        ends = {node_id: delays.get(node_id, 0.0) + parts[node_id] / taking[node_id] for node_id in parts}
        end, most = max(ends.values()), max(parts.values())
        out = ""
        fastest = max(parts, key=lambda name: (parts[name], name))
        for node_id in sorted(taking.keys() - {fastest}, key=lambda name: (taking[name], name)):
            alone = delays.get(node_id, 0.0) + min(batch, total) / taking[node_id]
            if alone > SLOW_FACTOR * end + SLOW_SECONDS:
                slow[node_id] = f"a batch takes {alone:.1f} s there, and the others do their parts in {end:.1f} s"
                out = node_id
            elif parts.get(node_id, 0) < LEAST_SHARE * most:
                slow[node_id] = f"it would do {parts.get(node_id, 0)} items while the fastest does {most}"
                out = node_id
            if out:
                break
        if not out:
            return {node_id: parts.get(node_id, 0) for node_id in taking}, slow
        del taking[out]


def assign(
    counts: Sequence[int], rates: Mapping[str, float], before: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """Data shards (by index, with their item counts) to nodes, in proportion to speed, moving as few as need be.

    A node keeps what it had (`before`) up to its share; what is over, and what lost nodes had, goes to whoever is
    furthest below its share. With fewer shards than nodes, the nodes left over share the largest shards with others.
    """
    if not rates or not counts:
        return {}
    total, whole = sum(counts), sum(rates.values())
    goal = {node_id: total * rate / whole for node_id, rate in rates.items()}
    held: dict[str, list[int]] = {node_id: [] for node_id in sorted(rates)}
    load = dict.fromkeys(held, 0)
    taken: set[int] = set()
    for node_id in held:
        for index in before.get(node_id, ()):
            fits = load[node_id] + counts[index] / 2 <= goal[node_id]
            if index < len(counts) and index not in taken and fits:
                held[node_id].append(index)
                load[node_id] += counts[index]
                taken.add(index)
    loose = sorted(
        (index for index in range(len(counts)) if index not in taken), key=lambda index: (-counts[index], index)
    )
    for index in loose:
        # Lowest load in proportion to the goal: greedy list scheduling on uniform machines (Graham, 1969).
        node_id = min(held, key=lambda name: ((load[name] + counts[index]) / goal[name], name))
        held[node_id].append(index)
        load[node_id] += counts[index]
    empty = [node_id for node_id in held if not held[node_id]]
    largest = sorted(range(len(counts)), key=lambda index: (-counts[index], index))
    for number, node_id in enumerate(empty):
        held[node_id].append(largest[number % len(largest)])
    return {node_id: tuple(sorted(indexes)) for node_id, indexes in held.items()}
