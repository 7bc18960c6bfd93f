"""What a runtime is: TensorFlow, LiteRT, or whatever else runs models in an engine. `docs/runtimes.md` says how to add one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from node.engine import frames
from potluck import extras
from potluck.errors import NotFound, Unavailable
from potluck.wire.messages import ModelFormat, Signature

Work = Callable[[], None]
"""What is to be computed. It raises nothing that the engine could outlive."""
Send = Callable[[frames.Frame], None]
"""Send a frame to the parent, from any thread."""


@dataclass(frozen=True)
class Started:
    """What a runtime found when it was imported. `versions`: as nodes tell of them (`capacity.runtimes`)."""

    versions: dict[str, str]
    gpus: tuple[str, ...] = ()


class Runtime(Protocol):
    """Runs models of its formats, and schedules by itself what it is asked. Before `start`, nothing of it is imported.

    name: as nodes tell of it. title: as people write it. extra: of ours, which installs it.
    """

    name: str
    title: str
    extra: str
    formats: tuple[ModelFormat, ...]

    def installed(self) -> bool:
        """Whether it can be started here, without importing it."""
        ...

    def start(self) -> Started:
        """Import it and set it up: once, before all else, where it is installed."""
        ...

    def load(self, asked: frames.LoadReplica) -> tuple[Signature, int, int]:
        """Make a replica ready: its signature, what memory it took, and up to how many rows it is warm.

        May run beside all else. Raises InvalidModel, CodeNotAllowed, OutOfMemory.
        """
        ...

    def unload(self, replica_id: str) -> None:
        """Forget a replica, if it is there. May run beside all else."""
        ...

    def take(self, batch: frames.RunBatch, send: Send) -> Work | None:
        """Take a batch on. Its answer, `BatchRun` or `Failed` with its number, is sent when it is there: in any order, from any thread.

        The thread that calls reads frames, so this returns at once: with what that thread is to compute, while another one reads
        on; or with None, where there is nothing, or the runtime has threads of its own. Raises Overloaded.
        """
        ...

    def cancel(self, number: int) -> bool:
        """Leave out the batch of this number, if that is possible; where it was, nothing more is sent of it. Returns at once."""
        ...


AnyRuntime = TypeVar("AnyRuntime", bound=Runtime)


def serving(runtimes: Sequence[AnyRuntime], model_format: ModelFormat) -> AnyRuntime:
    """The one of them that runs models of a format. Raises Unavailable where it is not installed."""
    for runtime in runtimes:
        if model_format in runtime.formats:
            if not runtime.installed():
                raise missing(runtime.title, runtime.extra)
            return runtime
    raise Unavailable(f"no runtime of this node runs models of the format {model_format}")


def missing(title: str, extra: str) -> Unavailable:
    """What is said where something needs a runtime that is not here."""
    return Unavailable(f"this node has no {title}: {extras.install(extra)} there, or leave it to other nodes")


def not_loaded(replica_id: str) -> NotFound:
    """What is said of a replica that no runtime here holds."""
    return NotFound(f"replica {replica_id} is not loaded here")
