"""A place for an engine: started when work needs it, started anew when it died, stopped when it has been idle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from node.engine.process import Engine, EngineInfo
from potluck.errors import EngineFailed
from potluck.logs import fields

log = logging.getLogger(__name__)

T = TypeVar("T")


class EngineSlot:
    """`on_start` is told what an engine found here, and `on_death` when one ended that nobody stopped."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Engine],
        *,
        idle_seconds: float,
        on_start: Callable[[EngineInfo], None] = lambda info: None,
        on_death: Callable[[EngineFailed], None] = lambda failure: None,
    ) -> None:
        self._name = name
        self._make = make
        self._idle_seconds = idle_seconds
        self._on_start = on_start
        self._on_death = on_death
        self._engine: Engine | None = None
        self._lock = asyncio.Lock()
        self._in_use = 0
        self._stale = False
        self._used_at = 0.0
        self._watch: asyncio.Task[None] | None = None

    @property
    def engine(self) -> Engine | None:
        """The engine that runs now."""
        return self._engine if self._engine is not None and self._engine.alive else None

    async def get(self) -> Engine:
        """A running engine. Raises EngineFailed when it does not start."""
        async with self._lock:
            self._used_at = asyncio.get_running_loop().time()
            if self.engine is not None:
                return self.engine
            await self._discard()
            engine = self._make()
            info = await engine.start()
            gpus = {"gpus": ", ".join(info.gpus)} if info.gpus else {}
            log.info("engine started %s", fields(engine=self._name, pid=engine.pid, **info.runtimes, **gpus))
            self._on_start(info)
            self._engine = engine
            self._watch = asyncio.create_task(self._watch_death(engine), name=f"{self._name} engine death")
            return engine

    async def use(self, work: Callable[[Engine], Awaitable[T]]) -> T:
        """Run `work` with the engine; it is not idle meanwhile."""
        if self._stale and not self._in_use:
            await self.stop()
        self._in_use += 1
        try:
            return await work(await self.get())
        finally:
            self._in_use -= 1
            self._used_at = asyncio.get_running_loop().time()

    def touch(self) -> None:
        """What was held until now counts as use: only from here on it is idle."""
        self._used_at = asyncio.get_running_loop().time()

    async def stop_idle(self, *, needed: bool) -> None:
        """Stop the engine when it has been idle for long and is not `needed` for anything."""
        idle = asyncio.get_running_loop().time() - self._used_at
        if self._engine is None or needed or self._in_use or idle < self._idle_seconds:
            return
        async with self._lock:
            if not self._in_use:
                log.info("engine stopped %s", fields(engine=self._name, idle_seconds=round(idle)))
                await self._discard()

    async def retire(self) -> None:
        """Stop the engine, or where it is in use, give the next who wants one a fresh one."""
        async with self._lock:
            if self._in_use:
                self._stale = True
            else:
                await self._discard()

    async def stop(self) -> None:
        async with self._lock:
            await self._discard()

    async def _discard(self) -> None:
        engine, self._engine, self._stale = self._engine, None, False
        watch, self._watch = self._watch, None
        if watch is not None:
            if engine is not None and engine.alive:
                watch.cancel()  # it ends because we say so: nobody need hear of it
            await asyncio.wait([watch])
        if engine is not None:
            await engine.stop()

    async def _watch_death(self, engine: Engine) -> None:
        failure = await engine.wait_dead()
        log.warning("engine died %s", fields(engine=self._name, reason=failure.message))
        self._on_death(failure)
