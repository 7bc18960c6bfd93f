"""potluck: machines on a network train, deploy and serve Keras models together.

    with potluck.Client() as client:
        job = client.train(model, "pictures/train", validation="pictures/test", epochs=10, name="pictures")
        print(job.history)

`Client` (`AsyncClient` for asyncio) asks a cluster, `Job` and `AsyncJob` are its answers, `errors` has the errors that it raises;
`ImageOptions` say how pictures become a model's input.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from potluck import errors
    from potluck.client import AsyncClient, AsyncJob, Client, Job
    from potluck.wire.values import ImageOptions

    __version__: str

__all__ = ["AsyncClient", "AsyncJob", "Client", "ImageOptions", "Job", "__version__", "errors"]


def __getattr__(name: str) -> _Any:
    # Loaded on first use: a daemon needs no client and stays small, and metadata are slow to import for shell completion.
    if name == "__version__":
        return _import_module("importlib.metadata").version("potluck")
    if name in {"AsyncClient", "AsyncJob", "Client", "Job"}:
        return getattr(_import_module("potluck.client"), name)
    if name == "ImageOptions":
        return _import_module("potluck.wire.values").ImageOptions
    if name == "errors":
        return _import_module("potluck.errors")
    raise AttributeError(f"module 'potluck' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
