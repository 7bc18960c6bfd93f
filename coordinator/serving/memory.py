"""Memory: what a replica needs, what nodes have left for it, and who makes room when that is too little. Pure.

A replica needs what the last one of its model took when it was loaded (measured, resident); before there was one, a multiple of
the file's size. A node has what its last telemetry said, less what was given to it since, plus what was taken away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FILE_FACTOR = 3
"""Weights, once more while they are read, and what goes around them."""
ENGINE_BYTES = 700 * 2**20
"""What an engine with TensorFlow takes before it has a model; a node that holds no replica has to start one."""
RECENT_SECONDS = 60.0
"""A deployment that was asked since is not idle."""


@dataclass(frozen=True)
class Tenant:
    """A deployment as memory sees it. `nodes` hold a replica each; `held` ones may not be evicted (a set minimum, requests)."""

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
    """What a node has left. `available_bytes` and the replicas `reported` are of its last telemetry, `assigned` are those it is to
    hold now, and `needs` are theirs; its engine takes `engine_bytes` when it is started. None where the node did not say.
    """
    if not available_bytes:
        return None
    available_bytes -= 0 if reported else engine_bytes
    given = sum(needs.get(replica_id, 0) for replica_id in set(assigned) - set(reported))
    taken = sum(needs.get(replica_id, 0) for replica_id in set(reported) - set(assigned))
    return max(0, available_bytes - given + taken)


def make_room(need_bytes: int, free_bytes: Mapping[str, int], tenants: Sequence[Tenant], now: float) -> tuple[str, ...]:
    """The fewest deployments, those first that were not asked for longest, that leave room on a node; () where that cannot be.

    `free_bytes`: of the nodes that could hold it but for their memory.
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
    """As people read it."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def nowhere(need_bytes: int, free_bytes: Mapping[str, int]) -> str:
    """Why it fits on no node."""
    left = ", ".join(f"{node_id} {bytes_text(size)}" for node_id, size in sorted(free_bytes.items())[:12])
    return f"a replica needs {bytes_text(need_bytes)}, and no node has as much free: {left}"
