"""Data sets that clients packed for their jobs: nobody named them, so they are forgotten with the last job that uses them.

A client registers such a data set, and asks for its job next. Once no job under way uses it, and none is expected, its name goes
(in the journal, as every change of the registry); its bytes stay for an hour more, so that who sends the same data again
need not send them, and a model can be quantized with what it has just learnt from. A restart ends that hour.
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
from potluck.wire.messages import AnyJobSpec

log = logging.getLogger(__name__)

KEPT_SECONDS = 3600.0
"""So long the bytes stay, and so long a job may take to be asked for after its data."""


class Packed:
    """Tell it of data sets that are added for a job, and of jobs that are asked for and end; `tick` now and then."""

    def __init__(self, registry: Registry, deletion: Deletion, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._deletion = deletion
        self._clock = clock
        self._expected: Counter[str] = Counter()
        """How many jobs each was packed for that have not been asked for."""
        self._idle: dict[str, float] = dict.fromkeys(registry.packed(), clock())
        """Since when a data set waits for a job that uses it."""
        self._bytes: deque[tuple[float, list[str]]] = deque()
        """When the blobs of each that is forgotten go, soonest first."""
        deletion.free(registry.left_behind())

    def added(self, name: str) -> None:
        """A client packed it, and asks for its job next; or for one more job, where it is there already."""
        if name in self._registry.packed():
            self._expected[name] += 1
            self._idle[name] = self._clock()

    def asked(self, spec: AnyJobSpec) -> None:
        """A job is there."""
        for name in data_of(spec):
            self._expected[name] -= 1
        self._expected = +self._expected

    def refused(self, spec: AnyJobSpec) -> None:
        """A job was asked for, and there is none."""
        self.asked(spec)
        self.ended(spec)

    def ended(self, spec: AnyJobSpec) -> None:
        """A job has ended."""
        for name in dict.fromkeys(data_of(spec)):
            if not self._expected[name]:
                self._forget(name)

    def tick(self) -> None:
        """Forget what was packed for a job that nobody asked for, and throw bytes away whose time has come."""
        now = self._clock()
        for name, since in list(self._idle.items()):
            if now - since > KEPT_SECONDS:
                self._idle[name] = now
                self._expected.pop(name, None)
                self._forget(name)
        while self._bytes and self._bytes[0][0] <= now:
            if left := self._deletion.free(
                self._bytes.popleft()[1]
            ):  # a job under way uses them, or a name leads to them again
                self._bytes.append((now + KEPT_SECONDS, left))

    def _forget(self, name: str) -> None:
        """Forget a data set that was packed for jobs, unless one under way uses it."""
        if name not in self._registry.packed():
            self._idle.pop(name, None)
        elif self._deletion.user_of(name) is None:
            blobs = [ref.sha256 for ref in dataset_blobs(self._registry.manifest(name), self._registry.dataset(name))]
            self._registry.remove_dataset(name)
            self._idle.pop(name, None)
            self._bytes.append((self._clock() + KEPT_SECONDS, blobs))
            log.info("data set forgotten with its job %s", fields(dataset=name))
