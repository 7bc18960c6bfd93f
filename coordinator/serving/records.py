"""What the journal holds about deployments (stream `deployments`): events, and the state that they lead to. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import Struct

from coordinator.serving.deployments import Deployment, Parking
from coordinator.serving.traffic import Role, Traffic
from potluck.crashes import Crashes
from potluck.wire.jobs import Deploy
from potluck.wire.values import BlobRef, ModelFormat

STREAM = "deployments"


class DeploymentEvent(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="event", tag=True):
    """Base of the events in the stream. `name` is a deployment's name, `model:version`, unless an event says otherwise."""

    name: str


class Deployed(DeploymentEvent, frozen=True):
    """`asked` is what the user asked for; events from before there was a choice have none."""

    model: BlobRef
    wanted: int
    asked: Deploy | None = None
    format: ModelFormat = "keras"


class Settled(DeploymentEvent, frozen=True):
    """A replica was ready for the first time."""


class Routed(DeploymentEvent, frozen=True):
    """From now on, these versions answer for the plain name of the model. `name` is that plain name."""

    stable: str
    canary: str = ""
    weight: int = 0
    shadow: str = ""
    previous: str = ""


class Scaled(DeploymentEvent, frozen=True):
    """Its load needs this many replicas."""

    wanted: int


class Measured(DeploymentEvent, frozen=True):
    """How much memory a replica took when it was loaded."""

    resident_bytes: int


class Parked(DeploymentEvent, frozen=True):
    """It holds no replicas until it gets a request."""

    why: Parking
    reason: str


class Woken(DeploymentEvent, frozen=True):
    """It got a request."""


class Retired(DeploymentEvent, frozen=True):
    """It takes no more requests, and is removed when those that it has are answered."""


class TakenDown(DeploymentEvent, frozen=True, tag="Undeployed"):
    pass


AnyDeploymentEvent = Deployed | Settled | Routed | Scaled | Measured | Parked | Woken | Retired | TakenDown


@dataclass
class Records:
    """Deployments by name, traffic by model name, and the memory of each version's replicas, kept after it is undeployed."""

    deployments: dict[str, Deployment] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)

    def apply(self, event: AnyDeploymentEvent) -> None:
        match event:
            case Deployed():
                self._deployed(event)
            case Settled():
                self.deployments[event.name].settled = True
            case Routed():
                self.traffic[event.name] = Traffic(
                    event.name, event.stable, event.canary, event.weight, event.shadow, event.previous, chosen=True
                )
            case Scaled():
                self.deployments[event.name].wanted = event.wanted
            case Measured():
                self.resident[event.name] = event.resident_bytes
            case Parked():
                deployment = self.deployments[event.name]
                deployment.parked, deployment.reason = event.why, event.reason
                if deployment.asked is not None and deployment.asked.max_replicas:
                    deployment.wanted = deployment.least
            case Woken():
                deployment = self.deployments[event.name]
                deployment.parked, deployment.reason = None, ""
            case Retired():
                self.deployments[event.name].retired = True
            case TakenDown():
                self.deployments.pop(event.name, None)
                self.traffic[model_of(event.name)].without(event.name)
        self._choose(model_of(event.name))

    def part_of(self, name: str) -> Role:
        """The role of a deployment beside the stable version of its model; "": it is the stable version, or has no role."""
        role = self.traffic[model_of(name)].role(name)
        return "" if role == "stable" else role

    def events(self) -> list[AnyDeploymentEvent]:
        """The fewest events that lead to this state."""
        found: list[AnyDeploymentEvent] = []
        for name, one in self.deployments.items():
            found.append(Deployed(name=name, model=one.model, wanted=one.wanted, asked=one.asked, format=one.format))
            if one.settled:
                found.append(Settled(name=name))
            if one.parked:
                found.append(Parked(name=name, why=one.parked, reason=one.reason))
            if one.retired:
                found.append(Retired(name=name))
        found += [Measured(name=name, resident_bytes=size) for name, size in self.resident.items()]
        found += [
            Routed(
                name=one.model,
                stable=one.stable,
                canary=one.canary,
                weight=one.weight,
                shadow=one.shadow,
                previous=one.previous,
            )
            for one in self.traffic.values()
            if one.chosen
        ]
        return found

    def _deployed(self, event: Deployed) -> None:
        known = self.deployments.get(event.name)
        if known is None:
            known = self.deployments[event.name] = Deployment(event.name, event.model, event.wanted, event.format)
        known.wanted, known.failures, known.error = event.wanted, 0, None
        known.crashes, known.crashing = Crashes(), False
        known.resting.clear()
        known.parked, known.reason, known.retired = None, "", False
        known.asked = event.asked or known.asked

    def _choose(self, model: str) -> None:
        """Until a user chooses, the newest version that was ready once is stable: it answers while a newer one loads."""
        versions = [one for name, one in self.deployments.items() if model_of(name) == model]
        if not versions:
            self.traffic.pop(model, None)
            return
        traffic = self.traffic.setdefault(model, Traffic(model))
        if not traffic.chosen:
            newest = max(
                versions,
                key=lambda one: (
                    one.settled,
                    one.parked != "withdrawn" and not one.retired,
                    int(one.name.partition(":")[2]),
                ),
            )
            traffic.stable = newest.name


def model_of(name: str) -> str:
    """The plain name of a deployment."""
    return name.partition(":")[0]
