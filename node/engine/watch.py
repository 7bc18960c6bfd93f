"""When to kill an engine: it makes no progress, one batch or load takes too long, or it takes too much memory. Pure.

A slow machine is no reason: what counts is progress, and how long the same machine took before. Replicas that were at work are told
apart from those that were only loaded in the same engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from node.engine import frames
from node.engine.progress import LONGEST_STEP_SECONDS, Progress, Reading
from potluck.errors import EngineFailed, OutOfMemory, PotluckError
from potluck.wire.tasks import SyncTask

PATIENCE_SECONDS = 1800.0
"""How long an engine that makes progress may take to start, or may be silent."""
LOADS = 2
"""A batch may take at most this many times the time of loading, which ran batches of all sizes."""
BATCHES = 10
"""A batch may also take at most this many times the time of the slowest batch that came back."""
STARTS = 20
"""Loading a model may take at most this many times the engine's starting time."""
EXPIRY = 10
"""If a client waits longer than the limit for a batch, the batch may take longer: at most this many times the limit."""
QUIET = 4
"""An engine that was silent for this fraction (1 / QUIET) of the allowed time is looked at."""
READS = 40
"""Its use of the processor is read this many times within the time that may pass without progress."""


@dataclass(frozen=True)
class Limits:
    """What an engine may take. All but `memory_bytes` (resident; 0: any) are times.

    start: the time without progress, at its start and during a task or load. silence: the time without a frame and without
    progress. batch, load: the whole time of one, unless this machine or model is known to take longer.
    """

    start_seconds: float
    silence_seconds: float
    batch_seconds: float = 60.0
    load_seconds: float = 600.0
    memory_bytes: int = 0

    @property
    def look_seconds(self) -> float:
        """How often to look."""
        return min(0.5, self.start_seconds / 4, self.silence_seconds / 4, self.batch_seconds / 4)


Kind = Literal["task", "group", "load", "batch", "other"]


@dataclass
class _Work:
    """Work that was asked for; `seconds` since its turn came, `until` the time when its caller gives up."""

    kind: Kind
    replica_id: str = ""
    until: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """Why to kill the engine, and the replicas that caused it."""

    error: PotluckError
    suspects: frozenset[str]


@dataclass
class Watch:
    """Tell it what the engine is asked and what it answers, and call `look` often."""

    limits: Limits
    starting: bool = True
    start_seconds: float = 0.0
    """How long the engine took to start."""
    paused: bool = False
    """Whether tasks were told to stand still."""
    _batches: dict[int, _Work] = field(default_factory=dict)
    """Batches of inference, by frame number. Each runtime runs its own one by one, in the order of the frames."""
    _others: dict[int, _Work] = field(default_factory=dict)
    """All other work, by frame number. It is done one by one too, beside the batches."""
    _runtimes: dict[str, str] = field(default_factory=dict)
    """The runtime of each replica."""
    _load_took: dict[str, float] = field(default_factory=dict)
    _slowest: dict[str, float] = field(default_factory=dict)
    _heard: bool = False
    _further: bool = False
    _silent_seconds: float = 0.0
    _looked_at: float | None = None
    _read_at: float | None = None

    def __post_init__(self) -> None:
        self._silence = Progress(self.limits.silence_seconds * (1 - 1 / QUIET))
        self._getting_on = Progress(self.limits.start_seconds)

    # --- what happens

    def asked(self, frame: frames.Frame) -> None:
        match frame:
            case frames.RunBatch():
                self._batches[frame.number] = _Work("batch", frame.replica_id, frame.expires)
            case frames.LoadReplica():
                self._others[frame.number] = _Work("load", frame.replica_id)
            case frames.RunTask():
                # A member of a group waits for others, and may do nothing meanwhile.
                self._others[frame.number] = _Work("group" if isinstance(frame.task, SyncTask) else "task")
            case _:
                self._others[frame.number] = _Work("other")

    def heard(self, frame: frames.FromEngine | None) -> None:
        """The engine sent a whole frame, or a piece of one (None)."""
        self._heard = True
        match frame:
            case None | frames.Heartbeat():
                return
            case frames.Started():
                self.starting = False
            case frames.TaskProgressed():
                pass
            case _:
                self._answered(frame)
        self._further = True

    def _answered(self, frame: frames.FromEngine) -> None:
        other = self._others.pop(frame.number, None)
        if other is not None and isinstance(frame, frames.ReplicaLoaded):
            self._load_took[other.replica_id] = other.seconds
            self._runtimes[other.replica_id] = frame.runtime
        batch = self._batches.pop(frame.number, None)
        if batch is not None and isinstance(frame, frames.BatchRun):
            self._slowest[batch.replica_id] = max(frame.seconds, self._slowest.get(batch.replica_id, 0.0))

    # --- what that means

    def look(self, now: float, wall: float, read: Callable[[], Reading], resident_bytes: int) -> Verdict | None:
        """Whether to kill it. `now` is a clock that never jumps, `wall` is the clock of the times until which callers wait."""
        step = 0.0 if self._looked_at is None else min(now - self._looked_at, LONGEST_STEP_SECONDS)
        self._looked_at = now
        heads = self._heads()
        for work in heads:
            work.seconds += step
        self._silent_seconds = 0.0 if self._heard else self._silent_seconds + step
        if self.starting:
            self.start_seconds += step
        verdict = self._too_much(resident_bytes) or self._too_long(heads, wall) or self._stuck(now, heads, read)
        self._heard = False
        return verdict

    def suspects(self) -> frozenset[str]:
        """The replicas that were at work."""
        return frozenset(work.replica_id for work in self._heads() if work.replica_id)

    def _heads(self) -> list[_Work]:
        """The work that is done now: the first batch of each runtime, and the first of all other work."""
        batches: dict[str, _Work] = {}
        for work in self._batches.values():
            batches.setdefault(self._runtimes.get(work.replica_id, ""), work)
        return [*batches.values(), *list(self._others.values())[:1]]

    def _too_much(self, resident_bytes: int) -> Verdict | None:
        limit = self.limits.memory_bytes
        if not limit or resident_bytes <= limit:
            return None
        return Verdict(out_of_memory(limit), self.suspects())

    def _too_long(self, heads: list[_Work], wall: float) -> Verdict | None:
        for work in heads:
            if work.kind == "load":
                limit, what = max(self.limits.load_seconds, STARTS * self.start_seconds), "loading the model"
            elif work.kind == "batch":
                limit, what = self._batch_limit(work.replica_id), "a batch"
                if work.until > wall and work.seconds <= EXPIRY * limit:
                    continue
            else:
                continue
            if work.seconds > limit:
                error = EngineFailed(
                    f"the engine was killed: {what} of replica {work.replica_id} took more than {limit:.0f} s, and was not done"
                )
                return Verdict(error, frozenset({work.replica_id}))
        return None

    def _batch_limit(self, replica_id: str) -> float:
        known = LOADS * self._load_took.get(replica_id, 0.0), BATCHES * self._slowest.get(replica_id, 0.0)
        return max(self.limits.batch_seconds, *known)

    def _stuck(self, now: float, heads: list[_Work], read: Callable[[], Reading]) -> Verdict | None:
        watched = self.starting or (not self.paused and any(work.kind in ("task", "load", "other") for work in heads))
        self._further = self._further or not watched
        quiet = self._silent_seconds > self.limits.silence_seconds / QUIET
        every = (self.limits.silence_seconds if quiet else self.limits.start_seconds) / READS
        if self._read_at is not None and now - self._read_at < every:
            return None
        self._read_at = now
        reading = read() if quiet or not self._further else None
        self._silence.look(now, reading, further=not quiet)
        self._getting_on.look(now, reading, further=self._further)
        self._further = False
        if self._silence.stuck and not self.starting:
            limit, how = self.limits.silence_seconds, "was silent"
        elif self._getting_on.stuck:
            limit, how = self.limits.start_seconds, "got no further"
        elif max(self._silent_seconds, self.start_seconds if self.starting else 0.0) > PATIENCE_SECONDS:
            limit, how = PATIENCE_SECONDS, "was not ready" if self.starting else "was silent"
        else:
            return None
        return Verdict(EngineFailed(f"the engine {how} for {limit:g} s and was killed"), self.suspects())


def out_of_memory(limit_bytes: int) -> OutOfMemory:
    return OutOfMemory(
        f"the engine needed more than {limit_bytes / 2**30:.1f} GiB of memory, which is what this node lets it have: take a smaller "
        "model or batch_size, or let it have more (engine_memory_bytes in the node's settings)"
    )
