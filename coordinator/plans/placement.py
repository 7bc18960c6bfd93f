"""Who does how much: pure functions from measured speed to shares of the work.

A node's speed is the one measured in this very job; before that, its float32 product rate is used, scaled to the nodes that were
measured. Data are shared in proportion to speed, so that all nodes end together: the makespan-optimal split
of divisible work without the cost of communication (divisible load theory, Bharadwaj et al., 1996).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from potluck.wire.values import ModelFormat, NodeData

RUNTIME_OF: dict[ModelFormat, str] = {
    "keras": "tensorflow",
    "h5": "tensorflow",
    "savedmodel": "tensorflow",
    "tflite": "litert",
}
"""The runtime that a node needs for a model of each format."""
WORDS = {"tensorflow": "TensorFlow", "litert": "LiteRT"}
"""Names of runtimes for people."""

LEAST_SHARE = 0.06
"""A node that would do less than this share of the fastest node's work is left out: it brings less than waiting for it costs ..."""
SLOW_FACTOR = 2.0
SLOW_SECONDS = 0.25
"""... and so is a node that needs this many times, and this many seconds, longer for one batch than the others for the round."""


@dataclass(frozen=True)
class NodeView:
    """A node that may get work now: `free_slots` more attempts fit into its queue, `idle` when it has none at all."""

    node_id: str
    gflops: float
    free_slots: int
    idle: bool = True
    collective: str = ""
    """`host:port` where it takes part in synchronous training; empty if it must not."""
    data: tuple[NodeData, ...] = ()
    """Data sets that live on it."""
    runtimes: frozenset[str] = frozenset({"tensorflow"})
    gives_way: bool = False
    """Whether jobs stand still on it, so that inference meets its objective."""

    def holds(self, name: str) -> NodeData | None:
        """Its data set with that name; None if it has none."""
        return next((one for one in self.data if one.name == name), None)


@dataclass(frozen=True)
class ClusterView:
    """Everything that a plan may depend on: the nodes that can compute, and the time."""

    nodes: tuple[NodeView, ...]
    now: float
    resting: frozenset[str] = frozenset()
    """Nodes that reported an error; for some seconds they are not among `nodes`."""

    def having(self, runtime: str) -> ClusterView:
        """The same view, with only those nodes that have the runtime."""
        if all(runtime in node.runtimes for node in self.nodes):
            return self
        return replace(self, nodes=tuple(node for node in self.nodes if runtime in node.runtimes))

    @property
    def node_ids(self) -> set[str]:
        return {node.node_id for node in self.nodes}


def speeds(nodes: Sequence[NodeView], measured: Mapping[str, float]) -> dict[str, float]:
    """Items per second of each node; relative speeds when none was measured. Always positive."""
    rates = {node.node_id: max(node.gflops, 0.0) for node in nodes}
    known = [rate for rate in rates.values() if rate > 0]
    typical = sum(known) / len(known) if known else 1.0
    rates = {node_id: rate if rate > 0 else typical for node_id, rate in rates.items()}
    both = {node_id: None for node_id in rates if measured.get(node_id, 0.0) > 0}
    factor = sum(measured[node_id] for node_id in both) / sum(rates[node_id] for node_id in both) if both else 1.0
    return {node_id: measured[node_id] if node_id in both else rate * factor for node_id, rate in rates.items()}


def split(total: int, rates: Mapping[str, float]) -> dict[str, int]:
    """`total` items by speed, as whole numbers that add up to `total` (largest remainder); nodes that get none are not in it."""
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
    """Like `split`, but all end together where node i needs `delays[i]` seconds besides its items.

    Divisible load with costs to start (affine cost model; Beaumont et al., 2005): n_i = v_i (T - o_i), with T such that they
    add up to `total`; nodes that would not have started by then are not in it. `rates` in items per second.
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
    """(`total` items split so that all nodes end together, without nodes that cost more than they bring; the reason for each of these).

    `rates` in items/s, `delays` in seconds besides computing, `batch`: the fewest items that a node can do. At least one node stays.
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
                slow[node_id] = f"a batch takes {alone:.1f} s there, but the others do their parts in {end:.1f} s"
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
    """Data shards (by index, with their item counts) for each node, in proportion to speed, moving as few as possible.

    A node keeps what it had (`before`) up to its share. The rest, and the shards of lost nodes, go to the node that is
    furthest below its share. If there are fewer shards than nodes, nodes without one share the largest shards with others.
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
