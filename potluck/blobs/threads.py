"""Work on files in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def unbroken(call: Callable[..., T], *args: Any) -> T:
    """Run `call` in a thread, and wait for its end even if cancelled, so that no thread goes on writing unnoticed."""
    task = asyncio.ensure_future(asyncio.to_thread(call, *args))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        raise
