"""Autoscaling: a deployment gets as many replicas as its load needs. It gets none while it has no requests."""

from __future__ import annotations

import logging
from collections.abc import Callable

from coordinator.serving.deployments import Deployment, Place
from coordinator.serving.inference import Inference
from coordinator.serving.records import AnyDeploymentEvent, Parked, Records, Scaled
from coordinator.serving.scaling import Scaler, Seen
from potluck.logs import fields
from potluck.wire.jobs import Deploy

log = logging.getLogger(__name__)
LEAST_TARGET_SECONDS = 0.01
"""With a target of 0, each request that waits for a moment would add a replica."""
REFUSED = 4.0
"""While too many requests are refused, the queue counts as this many times the target: an objective keeps it short."""


class Autoscaling:
    """Scales all deployments. `record` journals an event and applies it."""

    def __init__(self, records: Records, inference: Inference, *, record: Callable[[AnyDeploymentEvent], None]) -> None:
        self._records = records
        self._inference = inference
        self._record = record
        self._scalers: dict[str, Scaler] = {}
        self._refused: dict[str, int] = {}

    def tick(self, places: list[Place], now: float) -> None:
        """Let time pass."""
        self._scalers = {name: one for name, one in self._scalers.items() if name in self._records.deployments}
        for deployment in list(self._records.deployments.values()):
            asked = deployment.asked
            if asked is None or deployment.put_away:
                continue
            if asked.idle_seconds and not deployment.pinned and not self._records.part_of(deployment.name):
                self._rest(deployment, asked, now)
            if asked.max_replicas and not deployment.put_away:
                self._scale(deployment, asked, places, now)

    def _rest(self, deployment: Deployment, asked: Deploy, now: float) -> None:
        name = deployment.name
        quiet_seconds = now - self._inference.asked_at[name]
        if deployment.ready and quiet_seconds >= asked.idle_seconds and not self._inference.busy(name):
            reason = f"scaled to zero: no request for {asked.idle_seconds:.0f} s"
            log.info("deployment idle %s", fields(model=name, reason=reason))
            self._record(Parked(name=name, why="idle", reason=reason))

    def _scale(self, deployment: Deployment, asked: Deploy, places: list[Place], now: float) -> None:
        ready = len(deployment.ready)
        refused = self._inference.metrics.answers[deployment.name, "overloaded"]
        too_many = refused > self._refused.get(deployment.name, 0)
        if not ready or len(deployment.replicas) != ready or deployment.wanted != ready:
            return  # the last decision is not carried out yet
        self._refused[deployment.name] = refused
        router = self._inference.router_of(deployment.name)
        target_seconds = max(asked.queue_seconds, LEAST_TARGET_SECONDS)
        queue_seconds = max(router.queue_seconds, REFUSED * target_seconds if too_many else 0.0)
        seen = Seen(ready, queue_seconds, router.busy)
        most = min(asked.max_replicas, ready + len(deployment.room(places)))
        scaler = self._scalers.setdefault(deployment.name, Scaler())
        wanted = scaler.wanted(seen, deployment.least, max(most, deployment.least), target_seconds, now)
        if wanted != ready:
            log.info(
                "deployment scaled %s",
                fields(model=deployment.name, replicas=wanted, was=ready, queue_seconds=round(scaler.queue_seconds, 3)),
            )
            self._record(Scaled(name=deployment.name, wanted=wanted))
