"""What clients are told about the journal's events: a word that stays the same, and a line for people. No state, no clock.

Most events in the journal are only for the coordinator: clients are told nothing about leases, attempts and rounds.
"""

from __future__ import annotations

from msgspec import Struct

from coordinator.identities.members import MemberAdded, MemberTaken, TokenMade, TokenTaken
from coordinator.plans.events import (
    AttemptEnded,
    AttemptFinished,
    AttemptLeased,
    EpochEnded,
    JobFinished,
    JobStarted,
    JobSubmitted,
    StopAsked,
)
from coordinator.plans.job import Job
from coordinator.registry import (
    AliasRemoved,
    AliasSet,
    DatasetForgotten,
    DatasetRecorded,
    ModelAdded,
    ModelDeleted,
    TagsSet,
)
from coordinator.serving.records import Deployed, Parked, Retired, Routed, Scaled, Settled, TakenDown, Woken
from potluck.wire.questions import ClusterEvent, JobEnded
from potluck.wording import counted

TEXT_LIMIT = 300
"""Characters of a text, so that a hundred events fit into a message."""


def told(event: Struct, job: Job | None, at: float) -> ClusterEvent | None:
    """What clients are told about an event that is about to be appended to the journal, `at` Unix time; None: nothing.

    `job`: the job of the event, as it is before the event; None: there is none yet.
    """
    match event:
        case AttemptFinished() | AttemptEnded():  # most events are
            return None
        case AttemptLeased() | JobStarted():
            begins = job is not None and job.state == "queued"
            return made(at, "job", job.job_id, "started", job.kind) if begins and job is not None else None
        case JobSubmitted():
            return made(at, "job", event.job_id, "submitted", _asked(Job(event, None)))
        case EpochEnded() if job is not None:
            metrics = ", ".join(f"{name} {value:.4g}" for name, value in event.epoch.metrics.items())
            return made(at, "job", job.job_id, "epoch_ended", f"epoch {event.epoch.epoch}: {metrics}")
        case StopAsked() if job is not None:
            return made(at, "job", job.job_id, "stop_asked", "it ends after the epoch that is under way")
        case JobFinished(result=ended):
            return made(at, "job", ended.job_id, ended.state, _outcome(ended))
        case _:
            return _of_the_registry(event, at) or _of_deployments(event, at) or _of_members(event, at)


def made(at: float, subject: str, name: str, what: str, text: str = "") -> ClusterEvent:
    """An event, with its text cut if it is very long."""
    if len(text) > TEXT_LIMIT:
        text = f"{text[: TEXT_LIMIT - 3]}..."
    return ClusterEvent(at=at, subject=subject, name=name, what=what, text=text)


def _asked(job: Job) -> str:
    """`train cnn.keras with flowers as roses`."""
    subject = job.subject
    parts = [job.kind, subject.model]
    parts += ["with", subject.data] if subject.data else []
    parts += ["as", subject.name] if subject.name else []
    return " ".join(parts)


def _outcome(ended: JobEnded) -> str:
    if ended.error is not None:
        return ended.error.message
    made_of = ended.registered or ended.deployment
    return f"{ended.kind}: {made_of}" if made_of else ended.kind


def _of_the_registry(event: Struct, at: float) -> ClusterEvent | None:
    match event:
        case ModelAdded(model=info):
            return made(at, "model", f"{info.name}:{info.version}", "registered", info.source or info.format)
        case AliasSet():
            return made(at, "model", f"{event.name}:{event.version}", "alias_set", f"{event.name}:{event.alias}")
        case AliasRemoved():
            return made(at, "model", event.name, "alias_removed", f"{event.name}:{event.alias}")
        case TagsSet():
            tags = ", ".join(f"{key}={value}" for key, value in event.tags.items())
            return made(at, "model", f"{event.name}:{event.version}", "tagged", tags)
        case ModelDeleted():
            return made(at, "model", f"{event.name}:{event.version}", "deleted")
        case DatasetRecorded(dataset=data):
            text = f"{data.format.kind}, {counted(data.count, 'item')}" + (", packed for a job" if event.packed else "")
            return made(at, "dataset", data.name, "added", text)
        case DatasetForgotten():
            return made(at, "dataset", event.name, "removed")
        case _:
            return None


def _of_deployments(event: Struct, at: float) -> ClusterEvent | None:
    match event:
        case Deployed():
            wanted = f"on {counted(event.wanted, 'node')}" if event.wanted else "on every node"
            return made(at, "deployment", event.name, "deployed", wanted)
        case Settled():
            return made(at, "deployment", event.name, "ready", "a replica is ready for the first time")
        case Routed():
            others = [f"{event.canary} to {event.weight} %"] if event.canary else []
            others += [f"{event.shadow} as its shadow"] if event.shadow else []
            text = ", ".join([f"{event.stable} answers to {event.name}", *others])
            return made(at, "deployment", event.stable, "routed", text)
        case Scaled():
            return made(at, "deployment", event.name, "scaled", f"to {counted(event.wanted, 'replica')}")
        case Parked():
            return made(at, "deployment", event.name, event.why, event.reason)
        case Woken():
            return made(at, "deployment", event.name, "woken", "somebody asked for it")
        case Retired():
            return made(at, "deployment", event.name, "retired", "it answers what it has, and goes")
        case TakenDown():
            return made(at, "deployment", event.name, "undeployed")
        case _:
            return None


def _of_members(event: Struct, at: float) -> ClusterEvent | None:
    """Never a word of a token's secret: clients with little rights are told, too."""
    match event:
        case MemberAdded(member=member):
            how = (
                "with a join token"
                if event.token_id
                else "with a bearer token"
                if member.bearer_id
                else "by the coordinator itself"
            )
            return made(at, "member", member.identity, "joined", f"{member.role}, {how}")
        case MemberTaken():
            return made(at, "member", event.identity, "removed")
        case TokenMade(token=token):
            parts = [token.role, counted(token.uses_left, "use")]
            parts += [f"for {token.name}"] if token.name else []
            parts += [f"by {token.made_by}"] if token.made_by else []
            return made(at, "token", token.token_id, "created", ", ".join(parts))
        case TokenTaken():
            return made(at, "token", event.token_id, "removed")
        case _:
            return None
