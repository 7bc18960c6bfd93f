"""Rollouts: a ready version takes over, the version before it is removed once it has answered, and a worse one is withdrawn."""

from __future__ import annotations

import logging
from collections.abc import Callable

from coordinator.serving.inference import Inference
from coordinator.serving.records import AnyDeploymentEvent, Parked, Records, Retired, Routed, model_of
from coordinator.serving.traffic import Traffic, worse
from coordinator.serving.windows import Summary
from potluck.errors import Conflict, InvalidRequest, NotFound
from potluck.logs import fields
from potluck.wire.jobs import Deploy

log = logging.getLogger(__name__)


class Rollout:
    """For all models. `record` journals an event and applies it, `remove` undeploys."""

    def __init__(
        self,
        records: Records,
        inference: Inference,
        *,
        record: Callable[[AnyDeploymentEvent], None],
        remove: Callable[[str], None],
    ) -> None:
        self._records = records
        self._inference = inference
        self._record = record
        self._remove = remove
        self._watched_until: dict[str, float] = {}
        self._baselines: dict[str, Summary] = {}
        """How well a model's previous version did when it was replaced."""

    def check(self, name: str, asked: Deploy) -> None:
        """Raises InvalidRequest for traffic that this deployment cannot have."""
        if asked.canary and asked.shadow:
            raise InvalidRequest("a version is a canary or a shadow: leave one of the two out")
        traffic = self._records.traffic.get(model_of(name))
        stable = self._records.deployments.get(traffic.stable) if traffic is not None else None
        if (asked.canary or asked.shadow) and (stable is None or stable.name == name or not stable.settled):
            kind = "canary" if asked.canary else "shadow"
            raise InvalidRequest(
                f"{name} cannot be a {kind}: no other version of {model_of(name)} is deployed that answers meanwhile. "
                f"Deploy it without --{kind}, or another version"
            )

    def hold(self, model: str) -> None:
        """Called before a new version is loaded: the version that answers now goes on until the new one is ready."""
        traffic = self._records.traffic.get(model)
        if traffic is not None and not traffic.chosen and self._records.deployments[traffic.stable].settled:
            self._route(traffic, stable=traffic.stable)

    def ready(self, name: str, asked: Deploy, now: float) -> None:
        """The deployment has its replicas: it gets the traffic that was asked for."""
        traffic = self._records.traffic[model_of(name)]
        alone = traffic.stable == name  # the stable version may be gone by now
        if not traffic.role(name):
            # Count it from the beginning: answers may have come after it was withdrawn.
            self._inference.metrics.windows.pop(name, None)
        if asked.canary and not alone:
            self._route(
                traffic,
                canary=name,
                weight=asked.canary,
                shadow=_other(traffic.shadow, name),
                previous=_other(traffic.previous, name),
            )
        elif asked.shadow and not alone:
            canary = _other(traffic.canary, name)
            self._route(
                traffic,
                canary=canary,
                weight=traffic.weight if canary else 0,
                shadow=name,
                previous=_other(traffic.previous, name),
            )
        elif not alone or not traffic.chosen:
            self._take_over(traffic, name, asked, now)

    def promote(self, model: str, now: float) -> None:
        """Make the canary, or else the shadow, the stable version. Raises NotFound, Conflict."""
        traffic = self._traffic(model)
        name = traffic.canary or traffic.shadow
        if not name:
            raise Conflict(
                f"{model} has no canary and no shadow to promote: `potluck deploy {model} --canary 10` makes one"
            )
        self._take_over(traffic, name, self._asked(name), now)

    def roll_back(self, model: str) -> None:
        """Withdraw the canary, else the shadow, else go back to the version before. Raises NotFound, Conflict."""
        traffic = self._traffic(model)
        if not (traffic.canary or traffic.shadow or traffic.previous):
            raise Conflict(
                f"{model} has no canary, no shadow and no version before that is still loaded: "
                f"`potluck deploy {model}:VERSION` loads another one"
            )
        self._withdraw(traffic, "rolled back by hand")

    def tick(self, now: float) -> None:
        """Let time pass: bad versions are withdrawn, replaced versions are removed."""
        for traffic in list(self._records.traffic.values()):
            if traffic.canary:
                windows = self._inference.metrics.window
                seen, baseline = windows(traffic.canary).slots(now), windows(traffic.stable).summary(now)
                if reason := worse(seen, baseline, self._asked(traffic.canary).rollback_factor):
                    self._withdraw(traffic, f"rolled back: {reason}")
            elif traffic.previous:
                self._watch(traffic, now)
        for name, deployment in list(self._records.deployments.items()):
            if deployment.retired and not self._inference.busy(name):
                self._remove(name)

    def _watch(self, traffic: Traffic, now: float) -> None:
        """Withdraw a version that does worse. The version before is kept for a while, to go back to."""
        asked = self._asked(traffic.stable)
        watched = asked.watch_seconds if asked.rollback_factor else 0.0
        baseline = self._baselines.get(traffic.model, Summary())
        seen = self._inference.metrics.window(traffic.stable).slots(now)
        if reason := worse(seen, baseline, asked.rollback_factor):
            self._withdraw(traffic, f"rolled back: {reason}")
        elif now >= self._watched_until.setdefault(traffic.model, now + watched):
            self._route(traffic, previous="")

    def _take_over(self, traffic: Traffic, name: str, asked: Deploy, now: float) -> None:
        before = _other(traffic.stable, name)
        if before:
            self._baselines[traffic.model] = self._inference.metrics.window(before).summary(now)
        self._watched_until.pop(traffic.model, None)
        canary = _other(traffic.canary, name)
        self._route(
            traffic,
            stable=name,
            canary=canary,
            weight=traffic.weight if canary else 0,
            shadow=_other(traffic.shadow, name),
            previous=before if before and not asked.keep and not self._records.deployments[before].parked else "",
            kept=before if asked.keep else "",
        )

    def _withdraw(self, traffic: Traffic, reason: str) -> None:
        if traffic.canary:
            name = traffic.canary
            self._route(traffic, canary="", weight=0, kept=name)
        elif traffic.shadow:
            name = traffic.shadow
            self._route(traffic, shadow="", kept=name)
        else:
            name = traffic.stable
            self._route(traffic, stable=traffic.previous, previous="", kept=name)
        self._record(Parked(name=name, why="withdrawn", reason=reason))
        log.warning("version withdrawn %s", fields(model=name, reason=reason))

    def _route(
        self,
        traffic: Traffic,
        *,
        stable: str | None = None,
        canary: str | None = None,
        weight: int | None = None,
        shadow: str | None = None,
        previous: str | None = None,
        kept: str = "",
    ) -> None:
        """Change the given parts of the traffic. Versions without a role are removed, except the one that is `kept`."""
        now = Routed(
            name=traffic.model,
            stable=traffic.stable if stable is None else stable,
            canary=traffic.canary if canary is None else canary,
            weight=traffic.weight if weight is None else weight,
            shadow=traffic.shadow if shadow is None else shadow,
            previous=traffic.previous if previous is None else previous,
        )
        before = {traffic.stable, traffic.canary, traffic.shadow, traffic.previous}
        self._record(now)
        for name in sorted(before - {now.stable, now.canary, now.shadow, now.previous, kept, ""}):
            if name in self._records.deployments:
                self._record(Retired(name=name))
                self._inference.retired.add(name)
        log.info(
            "traffic changed %s",
            fields(model=now.name, stable=now.stable, canary=now.canary, weight=now.weight, shadow=now.shadow),
        )

    def _traffic(self, model: str) -> Traffic:
        traffic = self._records.traffic.get(model_of(model))
        if traffic is None:
            raise NotFound(f"{model} is not deployed: `potluck deployments` lists what is")
        return traffic

    def _asked(self, name: str) -> Deploy:
        return self._records.deployments[name].asked or Deploy(model=name)


def _other(name: str, than: str) -> str:
    return "" if name == than else name
