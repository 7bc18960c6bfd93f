"""Wait for something to become true, without sleeping for a guessed time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(check: Callable[[], T | Awaitable[T]], timeout_seconds: float = 10, every: float = 0.02) -> T:
    """The first truthy value of `check()`, which may be async, and may raise AssertionError while the condition does not hold yet.

    After `timeout_seconds`, raises the last AssertionError again, or one that tells what it waited for.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        failure: AssertionError | None = None
        value: T | None = None
        try:
            found = check()
            value = await found if inspect.isawaitable(found) else found
        except AssertionError as error:
            failure = error
        if failure is None and value:
            return value
        if time.monotonic() >= deadline:
            if failure is not None:
                raise failure
            raise AssertionError(f"after {timeout_seconds} s still {value!r}: {_described(check)}")
        await asyncio.sleep(every)


def _described(check: Callable[[], object]) -> str:
    try:
        return " ".join(inspect.getsource(check).split())
    except (OSError, TypeError):
        return repr(check)


def eventually_now(check: Callable[[], T], timeout_seconds: float = 10, every: float = 0.05) -> T:
    """`eventually` for tests without their own loop."""
    return asyncio.run(eventually(check, timeout_seconds, every))
