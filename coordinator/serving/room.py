"""Room: `memory` applied to the present cluster: what each node has free, and what is evicted if that is too little."""

from __future__ import annotations

from coordinator.membership import Member
from coordinator.serving import memory
from coordinator.serving.deployments import Deployment
from coordinator.serving.inference import Inference
from coordinator.serving.memory import Tenant
from coordinator.serving.records import Records


class Room:
    """The memory of all nodes."""

    def __init__(self, records: Records, inference: Inference) -> None:
        self._records = records
        self._inference = inference

    def needed(self, deployment: Deployment) -> int:
        """Bytes that a replica needs: as measured, or else estimated from the file's size."""
        return memory.needed(self._records.resident.get(deployment.name, 0), deployment.model.size)

    def left(self, members: list[Member]) -> dict[str, int | None]:
        """Free bytes of each node; None: the node did not say."""
        assigned: dict[str, list[str]] = {}
        for deployment in self._records.deployments.values():
            for replica in deployment.replicas.values():
                assigned.setdefault(replica.node_id, []).append(replica.replica_id)
        found: dict[str, int | None] = {}
        for member in members:
            told = member.telemetry
            mine = assigned.get(member.node_id, [])
            needs = {
                replica_id: self._needed_by(replica_id) for replica_id in (*mine, *(told.replicas if told else ()))
            }
            starts = "tensorflow" in member.capacity.runtimes and told is not None and not told.serving
            engine_bytes = memory.ENGINE_BYTES if starts else 0
            found[member.node_id] = (
                memory.free(told.memory_available_bytes, told.replicas, mine, needs, engine_bytes)
                if told is not None
                else None
            )
        return found

    def victims(self, deployment: Deployment, now: float) -> tuple[str, ...]:
        """Deployments to evict so that this one, which fits nowhere, gets one replica; none if that does not help."""
        if len(deployment.replicas) >= max(1, deployment.least):
            return ()
        return memory.make_room(
            deployment.need_bytes,
            deployment.cramped,
            [self._tenant(one) for one in self._records.deployments.values() if one is not deployment],
            now,
        )

    def _tenant(self, deployment: Deployment) -> Tenant:
        return Tenant(
            deployment.name,
            self.needed(deployment),
            frozenset(replica.node_id for replica in deployment.replicas.values()),
            self._inference.asked_at[deployment.name],
            held=deployment.pinned
            or self._records.part_of(deployment.name) in ("canary", "shadow")
            or deployment.put_away
            or not deployment.settled
            or self._inference.busy(deployment.name),
        )

    def _needed_by(self, replica_id: str) -> int:
        name = replica_id.split("/", 1)[0]
        deployment = self._records.deployments.get(name)
        return self.needed(deployment) if deployment is not None else self._records.resident.get(name, 0)
