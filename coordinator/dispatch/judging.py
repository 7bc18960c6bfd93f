"""Whether a node's result is taken, what happens to a node whose results are not what was asked for, and whose word counts."""

from __future__ import annotations

import logging
from collections.abc import Callable

from msgspec.structs import replace

from coordinator.dispatch.announcer import Announcer
from coordinator.dispatch.collecting import Collector
from coordinator.dispatch.leases import Held, Leases
from coordinator.plans.checking import Doubts, is_no_number, violation
from coordinator.plans.job import CHECK
from potluck.errors import DiskFull, Diverged, EngineFailed
from potluck.logs import fields
from potluck.wire.failures import error_info
from potluck.wire.tasks import AnyTaskResult
from potluck.wire.values import ErrorInfo

log = logging.getLogger(__name__)


class Judge:
    """Judges the results of all jobs. Doubts are only in memory: after a restart, a loss that is not a number is doubted again."""

    def __init__(self, leases: Leases, collector: Collector, announcer: Announcer, clock: Callable[[], float]) -> None:
        self._leases = leases
        self._collector = collector
        self._announcer = announcer
        self._clock = clock
        self._doubts: dict[str, Doubts] = {}
        """By job."""

    def refusal(self, held: Held, result: AnyTaskResult) -> ErrorInfo | None:
        """Why a result is not taken: it is not what was asked for, or another node must check it; None if it is taken."""
        lease, node_id = held.body, held.node_id
        if reason := violation(lease.task, result, self._leases.own_items(node_id, lease.task)):
            self._violated(held, node_id, reason)
            return error_info(EngineFailed(f"its result is not what was asked for: {reason}"))
        if size := self._collector.too_large(result):
            full = DiskFull(
                f"a result has {size} bytes, more than the coordinator may keep: raise its blob_limit_bytes"
            )
            # Trying again cannot help.
            return replace(error_info(full), retryable=False)
        doubts = self._doubts.setdefault(held.job_id, Doubts())
        if not is_no_number(result):
            if liar := doubts.disproved(lease.shard_id, node_id):
                self._violated(
                    held, liar, f"it reported that the loss of {lease.shard_id} is not a number, but it is one"
                )
            return None
        if lease.shard_id == CHECK or getattr(lease.task, "node_data", None):
            # Nothing depends on it; or no other node has the data.
            return None
        alone = not any(node.node_id != node_id for node in self._leases.view(self._clock()).nodes)
        if not doubts.doubted(lease.shard_id, node_id, alone=alone):
            return None
        return error_info(
            Diverged(f"node {node_id} reports that the loss is not a number: another node must check that")
        )

    def forget(self, job_id: str) -> None:
        """The job has ended."""
        self._doubts.pop(job_id, None)

    def _violated(self, held: Held, node_id: str, reason: str) -> None:
        where = fields(job=held.job_id, shard=held.body.shard_id, node=node_id, reason=reason)
        log.warning("result of a node is not what was asked for %s", where)
        if self._leases.violated(node_id, reason):
            log.error("node gets no jobs for a while %s", fields(node=node_id, reason=reason))
            self._announcer.changed(held.job_id)
