"""Memory: what a replica needs, what nodes have free, and which deployments make room if that is too little. Pure.

A replica needs what the last replica of its model took when it was loaded (measured, resident). Before there was one, it is a
multiple of the file's size. A node has free what its last telemetry said, less what was loaded since, plus what was unloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FILE_FACTOR = 3
"""The weights, a second copy while they are read, and the memory around them."""
ENGINE_BYTES = 700 * 2**20
"""Memory of an engine with TensorFlow before it has a model. A node without a replica has to start an engine."""
RECENT_SECONDS = 60.0
"""A deployment that got a request within this time is not idle."""


@dataclass(frozen=True)
class Tenant:
    """A deployment and its memory. `nodes` hold a replica each. If `held`, it may not be evicted (a set minimum, requests)."""

    name: str
    need_bytes: int
    nodes: frozenset[str]
    asked_at: float
    held: bool = False


def needed(measured_bytes: int, file_bytes: int) -> int:
    """Bytes that a replica is expected to take."""
    return measured_bytes or FILE_FACTOR * file_bytes


def free(
    available_bytes: int,
    reported: Sequence[str],
    assigned: Sequence[str],
    needs: Mapping[str, int],
    engine_bytes: int = 0,
) -> int | None:
    """The free memory of a node; None: the node did not say. `available_bytes` and the replicas `reported` are from its last
    telemetry. `assigned` are the replicas that it should hold now, and `needs` what they need. A new engine takes `engine_bytes`.
    """
    if not available_bytes:
        return None
    available_bytes -= 0 if reported else engine_bytes
    given = sum(needs.get(replica_id, 0) for replica_id in set(assigned) - set(reported))
    taken = sum(needs.get(replica_id, 0) for replica_id in set(reported) - set(assigned))
    return max(0, available_bytes - given + taken)


def make_room(need_bytes: int, free_bytes: Mapping[str, int], tenants: Sequence[Tenant], now: float) -> tuple[str, ...]:
    """The fewest deployments to evict so that a node has room, the longest idle first; () if that cannot be.

    `free_bytes`: free memory of the nodes that lack nothing but memory.
    """
    idle = sorted(
        (one for one in tenants if not one.held and one.nodes and now - one.asked_at >= RECENT_SECONDS),
        key=lambda one: (one.asked_at, one.name),
    )
    best: tuple[str, ...] = ()
    for node_id, left in sorted(free_bytes.items()):
        chosen: list[str] = []
        for one in idle:
            if left >= need_bytes:
                break
            if node_id in one.nodes:
                chosen.append(one.name)
                left += one.need_bytes
        if left >= need_bytes and (not best or len(chosen) < len(best)):
            best = tuple(chosen)
    return best


def bytes_text(count: int) -> str:
    """A size as people read it."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def nowhere(need_bytes: int, free_bytes: Mapping[str, int]) -> str:
    """Why the replica fits on no node."""
    left = ", ".join(f"{node_id} {bytes_text(size)}" for node_id, size in sorted(free_bytes.items())[:12])
    return f"a replica needs {bytes_text(need_bytes)}, and no node has as much free: {left}"
