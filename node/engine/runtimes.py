"""What a runtime is: TensorFlow, LiteRT, or whatever else runs models in an engine. `docs/runtimes.md` says how to add one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from node.engine import frames
from potluck import extras
from potluck.errors import NotFound, Unavailable
from potluck.wire.values import ModelFormat, Signature

Work = Callable[[], None]
"""What is to be computed. If it raises an error, the engine ends."""
Send = Callable[[frames.Frame], None]
"""Send a frame to the parent, from any thread."""


@dataclass(frozen=True)
class RuntimeInfo:
    """What a runtime found when it was imported. `versions`: as nodes report them (`capacity.runtimes`)."""

    versions: dict[str, str]
    gpus: tuple[str, ...] = ()


class Runtime(Protocol):
    """Runs models of its formats, and schedules its own work. Before `start`, nothing of it is imported.

    name: as nodes report it. title: as people write it. extra: the extra of this package that installs it.
    """

    name: str
    title: str
    extra: str
    formats: tuple[ModelFormat, ...]

    def installed(self) -> bool:
        """Whether it can be started here, without importing it."""
        ...

    def start(self) -> RuntimeInfo:
        """Import it and set it up. Called once, before all else, if it is installed."""
        ...

    def load(self, asked: frames.LoadReplica) -> tuple[Signature, int, int]:
        """Make a replica ready. Returns its signature, the memory that it took, and up to how many rows it is warm.

        May run beside all else. Raises InvalidModel, CodeNotAllowed, OutOfMemory.
        """
        ...

    def unload(self, replica_id: str) -> None:
        """Forget a replica, if it is there. May run beside all else."""
        ...

    def take(self, batch: frames.RunBatch, send: Send) -> Work | None:
        """Accept a batch. The answer, `BatchRun` or `Failed` with its number, is sent later: in any order, from any thread.

        The calling thread reads frames, so this returns at once. It returns the work that the calling thread computes, while
        another thread reads on. None: there is no work, or the runtime has its own threads. Raises Overloaded.
        """
        ...

    def cancel(self, number: int) -> bool:
        """Skip the batch of this number, if possible. Returns at once whether it was; if so, no answer is sent for it."""
        ...


AnyRuntime = TypeVar("AnyRuntime", bound=Runtime)


def serving(runtimes: Sequence[AnyRuntime], model_format: ModelFormat) -> AnyRuntime:
    """The runtime that runs models of a format. Raises Unavailable if it is not installed."""
    for runtime in runtimes:
        if model_format in runtime.formats:
            if not runtime.installed():
                raise missing(runtime.title, runtime.extra)
            return runtime
    raise Unavailable(f"no runtime of this node runs models of the format {model_format}")


def missing(title: str, extra: str) -> Unavailable:
    """The error for work that needs a runtime that is not installed here."""
    return Unavailable(f"this node has no {title}: {extras.install(extra)} there, or leave it to other nodes")


def not_loaded(replica_id: str) -> NotFound:
    """The error for a replica that no runtime here holds."""
    return NotFound(f"replica {replica_id} is not loaded here")
