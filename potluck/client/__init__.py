"""Ask a cluster from Python: `Client`, and `AsyncClient` for asyncio, as httpx has them."""

from potluck.client.async_client import AsyncClient
from potluck.client.jobs import AsyncJob
from potluck.client.sync import Client, Job

__all__ = ["AsyncClient", "AsyncJob", "Client", "Job"]
