"""Ask a cluster from Python: `Client`, and `AsyncClient` for asyncio (named as in httpx)."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from potluck.client.async_client import AsyncClient
    from potluck.client.jobs import AsyncJob
    from potluck.client.sync import Client, Job

__all__ = ["AsyncClient", "AsyncJob", "Client", "Job"]
_WHERE = {"AsyncClient": "async_client", "AsyncJob": "jobs", "Client": "sync", "Job": "sync"}


def __getattr__(name: str) -> _Any:
    # Loaded when first used: shell completion needs only a part of this package.
    if name not in _WHERE:
        raise AttributeError(f"module 'potluck.client' has no attribute {name!r}")
    return getattr(_import_module(f"potluck.client.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if not name.startswith("_"))})
