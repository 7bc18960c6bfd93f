"""potluck: machines on a network train, deploy and serve Keras models together."""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potluck.client import AsyncClient, Client, Job

__version__ = _version("potluck")
__all__ = ["AsyncClient", "Client", "Job", "__version__"]


def __getattr__(name: str) -> Any:
    # The client is loaded when first asked for: a daemon needs none of it, and stays small.
    if name in {"AsyncClient", "Client", "Job"}:
        from potluck import client

        return getattr(client, name)
    raise AttributeError(f"module 'potluck' has no attribute {name!r}")
