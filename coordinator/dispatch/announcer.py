"""What clients hear of jobs: states, retained and as they change, and results; and how a job is described when they ask."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from msgspec.structs import replace

from coordinator.dispatch.jobstore import JobStore
from coordinator.dispatch.leases import Leases
from coordinator.plans.job import Job
from coordinator.plans.placement import WORDS
from potluck.bus.outbox import Outbox
from potluck.wire.messages import JobChanged, JobEnded, JobProgress
from potluck.wire.refs import locate
from potluck.wire.topics import Topics

PROGRESS_SECONDS = 0.5
"""A job's state is told at most once in this time while it runs."""
RETAIN_SECONDS = 24 * 3600.0
NODES_TOLD = 50
"""Of a job's nodes, in what is told of it again and again."""


def bounded(progress: JobProgress) -> JobProgress:
    """The same, of very many nodes the fastest, and some of those that are left out: it is told twice a second."""
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
    """Tells of jobs. `urls`: where blobs of results are to be had from us."""

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
        """The job as it stands."""
        nodes, running = self._leases.view(now).nodes, self._leases.running(job)
        at_work = {attempt.node_id for attempt, _, _ in running.values()}
        waiting = ""
        if not any(node.runtimes.issuperset(job.runtimes) for node in nodes):
            waiting = f"waiting for a node that has {' and '.join(WORDS[runtime] for runtime in job.runtimes)}"
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
        """The result of a job that has ended, its blobs to be had from here."""
        if job.ended is None:
            return None
        return replace(locate(job.ended, lambda _: self._urls()), subject=job.subject)

    def doing(self, job_id: str, what: str) -> None:
        """What a job does now that has no attempts; "" where there is nothing to say."""
        if self._doing.get(job_id, "") != what:
            self._doing[job_id] = what
            self.changed(job_id)

    def changed(self, job_id: str) -> None:
        """There is something to tell of this job, when its time comes."""
        self._changed[job_id] = None

    def tell_due(self, now: float) -> None:
        """Tell of the jobs that changed, each at most every PROGRESS_SECONDS."""
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
        """Tell of this job, at once."""
        changed, topics = self.described(job, now), self._topics
        self._outbox.publish(topics.job(job.job_id, "events"), changed, qos=0)
        self._outbox.publish(topics.job(job.job_id, "status"), changed, retain=True, expiry_seconds=RETAIN_SECONDS)
        if (ended := self.ended(job)) is not None:
            self._outbox.publish(topics.job(job.job_id, "result"), ended, retain=True, expiry_seconds=RETAIN_SECONDS)

    def tell_all(self, now: float) -> None:
        """Say again what is retained: after a reconnect, perhaps to a broker that forgot."""
        for job in self._jobs.recent():
            self.tell(job, now)

    def forget(self, job_id: str) -> None:
        """Take back what is retained of a job that nobody remembers."""
        for leaf in ("status", "result"):
            self._outbox.clear(self._topics.job(job_id, leaf))
