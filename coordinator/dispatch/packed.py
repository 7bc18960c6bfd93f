"""Data sets that clients packed for their jobs: no user named them, so they are removed with the last job that uses them.

A client registers such a data set, and submits its job next. When no running job uses it, and none is expected, its name is removed
(in the journal, like every change of the registry). Its blobs stay for one more hour: a user who sends the same data again need not
send the bytes, and a model can be quantized with the data that it was trained on. A restart ends that hour.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable

from coordinator.dispatch.deletion import Deletion
from coordinator.plans.job import data_of
from coordinator.registry import Registry, dataset_blobs
from potluck.logs import fields
from potluck.wire.jobs import AnyJobSpec

log = logging.getLogger(__name__)

KEPT_SECONDS = 3600.0
"""How long the blobs stay, and how long after its data a job may be submitted."""


class Packed:
    """Gets data sets that are added for a job, and jobs that are submitted and end; call `tick` now and then."""

    def __init__(self, registry: Registry, deletion: Deletion, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._deletion = deletion
        self._clock = clock
        self._expected: Counter[str] = Counter()
        """For each data set: how many of the jobs that it was packed for are not submitted yet."""
        self._idle: dict[str, float] = dict.fromkeys(registry.packed(), clock())
        """Since when a data set waits for a job that uses it."""
        self._bytes: deque[tuple[float, list[str]]] = deque()
        """When to delete the blobs of each removed data set, soonest first."""
        deletion.free(registry.left_behind())

    def added(self, name: str) -> None:
        """A client packed this data set and submits its job next; it may be there already, from another job."""
        if name in self._registry.packed():
            self._expected[name] += 1
            self._idle[name] = self._clock()

    def asked(self, spec: AnyJobSpec) -> None:
        """A job was submitted."""
        for name in data_of(spec):
            self._expected[name] -= 1
        self._expected = +self._expected

    def refused(self, spec: AnyJobSpec) -> None:
        """A job was refused."""
        self.asked(spec)
        self.ended(spec)

    def ended(self, spec: AnyJobSpec) -> None:
        """A job has ended."""
        for name in dict.fromkeys(data_of(spec)):
            if not self._expected[name]:
                self._forget(name)

    def tick(self) -> None:
        """Remove data sets whose job was never submitted, and delete blobs whose time is over."""
        now = self._clock()
        for name, since in list(self._idle.items()):
            if now - since > KEPT_SECONDS:
                self._idle[name] = now
                self._expected.pop(name, None)
                self._forget(name)
        while self._bytes and self._bytes[0][0] <= now:
            # Blobs are left where a running job uses them, or a name refers to them again.
            if left := self._deletion.free(self._bytes.popleft()[1]):
                self._bytes.append((now + KEPT_SECONDS, left))

    def _forget(self, name: str) -> None:
        """Remove a data set that was packed for jobs, unless a running job uses it."""
        if name not in self._registry.packed():
            self._idle.pop(name, None)
        elif self._deletion.user_of(name) is None:
            blobs = [ref.sha256 for ref in dataset_blobs(self._registry.manifest(name), self._registry.dataset(name))]
            self._registry.remove_dataset(name)
            self._idle.pop(name, None)
            self._bytes.append((self._clock() + KEPT_SECONDS, blobs))
            log.info("data set forgotten with its job %s", fields(dataset=name))
