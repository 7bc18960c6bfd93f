"""A place for an engine: started when work needs it, restarted when it died, stopped after being idle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from node.engine.process import Engine, EngineInfo
from potluck.errors import EngineFailed, PotluckError
from potluck.logs import fields

log = logging.getLogger(__name__)

T = TypeVar("T")


class EngineSlot:
    """`make` gets whether the engine may use the network: only one that was renewed for a group may.

    `on_start` is called with the info of a started engine, `on_death` with an engine that died by itself.

    A start that has begun is finished, even if nobody waits for the engine any more: the next caller will need it.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[bool], Engine],
        *,
        idle_seconds: float,
        on_start: Callable[[EngineInfo], None] = lambda info: None,
        on_death: Callable[[Engine], None] = lambda engine: None,
    ) -> None:
        self._name = name
        self._make = make
        self._idle_seconds = idle_seconds
        self._on_start = on_start
        self._on_death = on_death
        self._engine: Engine | None = None
        self._starting: asyncio.Task[Engine] | None = None
        self._fresh = False
        """Whether nothing has run on the engine."""
        self._connected = False
        """Whether the engine that runs, or starts, may use the network."""
        self._connect_next = False
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
        if self._starting is None or (self._starting.done() and self.engine is None):
            self._starting = asyncio.create_task(self._start(), name=f"{self._name} engine start")
            # The start has logged its error: asked for here, it is not logged again.
            self._starting.add_done_callback(lambda start: start.cancelled() or start.exception())
        starting = self._starting
        await asyncio.wait([starting])  # cancelling us does not cancel the start
        if starting.cancelled():
            raise EngineFailed("the engine was stopped")
        self.touch()
        return starting.result()

    async def _start(self) -> Engine:
        async with self._lock:
            await self._discard()
            self._connected, self._connect_next = self._connect_next, False
            engine = self._make(self._connected)
            try:
                info = await engine.start()
            except PotluckError as error:  # perhaps nobody waits for this error any more
                log.warning("engine did not start %s", fields(engine=self._name, reason=error.message))
                raise
            gpus = {"gpus": ", ".join(info.gpus)} if info.gpus else {}
            sandbox = {"sandbox": ", ".join(info.sandbox)} if info.sandbox else {}
            log.info("engine started %s", fields(engine=self._name, pid=engine.pid, **info.runtimes, **gpus, **sandbox))
            self._on_start(info)
            self._engine, self._fresh = engine, True
            self.touch()
            self._watch = asyncio.create_task(self._watch_death(engine), name=f"{self._name} engine death")
            return engine

    async def use(self, work: Callable[[Engine], Awaitable[T]]) -> T:
        """Run `work` with the engine; meanwhile the engine is not idle."""
        if self._stale and not self._in_use:
            await self.stop()
        self._in_use += 1
        try:
            engine = await self.get()
            self._fresh = False
            return await work(engine)
        finally:
            self._in_use -= 1
            self._used_at = asyncio.get_running_loop().time()

    def touch(self) -> None:
        """The engine was in use until now: its idle time begins here."""
        self._used_at = asyncio.get_running_loop().time()

    async def stop_idle(self, *, needed: bool) -> None:
        """Stop the engine if it has been idle for long and is not `needed`."""
        idle = asyncio.get_running_loop().time() - self._used_at
        if self._engine is None or needed or self._in_use or idle < self._idle_seconds:
            return
        async with self._lock:
            if not self._in_use:
                log.info("engine stopped %s", fields(engine=self._name, idle_seconds=round(idle)))
                await self._discard()

    async def retire(self) -> None:
        """Stop the engine, unless nothing has run on it and it has no network. If it is in use, the next caller gets a fresh one."""
        async with self._lock:
            if self._in_use:
                self._stale = True
            elif not self._fresh or self._connected:
                await self._discard()

    async def renew(self, *, connected: bool = False) -> None:
        """Make sure that the next caller gets an engine on which nothing has run. Only if it is `connected`, it may use the network."""
        starting = self._starting is not None and not self._starting.done()
        fresh = self._fresh and self.engine is not None
        if connected != self._connected or not (fresh or starting):
            await self.stop()
            self._connect_next = connected

    async def stop(self) -> None:
        self._connect_next = False
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        async with self._lock:
            await self._discard()

    async def _discard(self) -> None:
        engine, self._engine, self._stale, self._fresh = self._engine, None, False, False
        watch, self._watch = self._watch, None
        if watch is not None:
            if engine is not None and engine.alive:
                watch.cancel()  # we stop it ourselves: do not report its death
            await asyncio.wait([watch])
        if engine is not None:
            await engine.stop()

    async def _watch_death(self, engine: Engine) -> None:
        failure = await engine.wait_dead()
        log.warning("engine died %s", fields(engine=self._name, reason=failure.message))
        self._on_death(engine)
