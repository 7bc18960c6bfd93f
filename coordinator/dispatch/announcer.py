"""What clients hear of jobs: their states (retained, and as they change), their results, and descriptions when they ask."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from msgspec.structs import replace

from coordinator.dispatch.jobstore import JobStore
from coordinator.dispatch.leases import Leases
from coordinator.plans.job import Job
from coordinator.plans.placement import WORDS
from potluck.bus.outbox import Outbox
from potluck.wire.jobs import JobProgress
from potluck.wire.questions import JobChanged, JobEnded
from potluck.wire.refs import locate
from potluck.wire.topics import Topics

PROGRESS_SECONDS = 0.5
"""While a job runs, its state is published at most once in this time."""
RETAIN_SECONDS = 24 * 3600.0
NODES_TOLD = 50
"""How many nodes of a job are named in states that are published again and again."""


def bounded(progress: JobProgress) -> JobProgress:
    """The same progress; of very many nodes only the fastest, and some of those left out. It is published twice a second."""
    if max(len(progress.nodes), len(progress.quarantined), len(progress.waiting)) <= NODES_TOLD:
        return progress
    fastest = sorted(progress.nodes, key=lambda node_id: (-progress.nodes[node_id], node_id))[:NODES_TOLD]
    return replace(
        progress,
        nodes={node_id: progress.nodes[node_id] for node_id in sorted(fastest)},
        nodes_more=len(progress.nodes) - len(fastest),
        quarantined=dict(islice(progress.quarantined.items(), NODES_TOLD)),
        waiting=dict(islice(progress.waiting.items(), NODES_TOLD)),
    )


class Announcer:
    """Publishes news of jobs. `urls`: our addresses for blobs of results."""

    def __init__(
        self, topics: Topics, outbox: Outbox, jobs: JobStore, leases: Leases, urls: Callable[[], tuple[str, ...]]
    ) -> None:
        self._topics = topics
        self._outbox = outbox
        self._jobs = jobs
        self._leases = leases
        self._urls = urls
        self._changed: dict[str, None] = {}
        self._told_at: dict[str, float] = {}
        self._doing: dict[str, str] = {}

    def described(self, job: Job, now: float) -> JobChanged:
        """A job's present state."""
        nodes, running = self._leases.view(now).nodes, self._leases.running(job)
        at_work = {attempt.node_id for attempt, _, _ in running.values()}
        waiting = ""
        if not any(node.runtimes.issuperset(job.runtimes) for node in nodes):
            waiting = f"waiting for a node with {' and '.join(WORDS[runtime] for runtime in job.runtimes)}"
        elif giving_way := sorted(node.node_id for node in nodes if node.gives_way and node.node_id in at_work):
            waiting = f"gives way to inference on {', '.join(giving_way)}"
        else:
            waiting = self._doing.get(job.job_id, "") or self._leases.stage(job)
        described = self._jobs.described(job, running, nodes, waiting=waiting)
        progress = described.progress
        if job.active and (left_out := self._leases.quarantined()):
            progress = replace(progress, quarantined=left_out | progress.quarantined)
        return replace(described, progress=bounded(progress))

    def ended(self, job: Job) -> JobEnded | None:
        """The result of a job that has ended, with us as a holder of its blobs."""
        if job.ended is None:
            return None
        return replace(locate(job.ended, lambda _: self._urls()), subject=job.subject)

    def doing(self, job_id: str, what: str) -> None:
        """Set what a job does while it has no attempts; "" for nothing to say."""
        if self._doing.get(job_id, "") != what:
            self._doing[job_id] = what
            self.changed(job_id)

    def changed(self, job_id: str) -> None:
        """This job has news; it is published when its time comes."""
        self._changed[job_id] = None

    def tell_due(self, now: float) -> None:
        """Publish the jobs that changed, each at most every PROGRESS_SECONDS."""
        for job_id in list(self._changed):
            job = self._jobs.jobs.get(job_id)
            if job is None or not job.active:
                del self._changed[job_id]
                self._told_at.pop(job_id, None)
                self._doing.pop(job_id, None)
            elif now - self._told_at.get(job_id, 0.0) >= PROGRESS_SECONDS:
                del self._changed[job_id]
                self._told_at[job_id] = now
                self.tell(job, now)

    def tell(self, job: Job, now: float) -> None:
        """Publish this job now."""
        changed, topics = self.described(job, now), self._topics
        self._outbox.publish(topics.job(job.job_id, "events"), changed, qos=0)
        self._outbox.publish(topics.job(job.job_id, "status"), changed, retain=True, expiry_seconds=RETAIN_SECONDS)
        if (ended := self.ended(job)) is not None:
            self._outbox.publish(topics.job(job.job_id, "result"), ended, retain=True, expiry_seconds=RETAIN_SECONDS)

    def tell_all(self, now: float) -> None:
        """Publish all retained states again: after a reconnect, the broker may have lost them."""
        for job in self._jobs.recent():
            self.tell(job, now)

    def forget(self, job_id: str) -> None:
        """Remove the retained state of a job that is no longer remembered."""
        for leaf in ("status", "result"):
            self._outbox.clear(self._topics.job(job_id, leaf))
