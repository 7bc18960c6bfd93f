"""SIGHUP: a daemon reads its settings again, takes over what may change while it runs, and says what needs a restart."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import Generic, TypeVar

from msgspec.structs import replace

from potluck import logs
from potluck.errors import PotluckError
from potluck.logs import fields
from potluck.settings import CoordinatorSettings, NodeSettings
from potluck.surviving import surviving

log = logging.getLogger(__name__)

S = TypeVar("S", bound=NodeSettings | CoordinatorSettings)

ALL = frozenset({"log_level", "blob_limit_bytes"})
"""The settings that any daemon can take over while it runs."""


class Reloading(Generic[S]):
    """`read` reads the settings as at the start; `take` gets all settings, when one of `changeable` has changed."""

    def __init__(
        self, settings: S, read: Callable[[], S], take: Callable[[S], None], changeable: frozenset[str] = ALL
    ) -> None:
        self._settings = settings
        self._read = read
        self._take = take
        self._changeable = changeable

    def on_hangup(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do it at each SIGHUP from now on."""
        loop.add_signal_handler(signal.SIGHUP, self.reload)

    def reload(self) -> None:
        """Take over what has changed. If the new settings are wrong, the old ones stay, and the log says why."""
        with surviving("reload of the settings"):
            try:
                new = self._read()
            except PotluckError as error:
                log.error("settings not reloaded, the old ones stay %s", fields(reason=error.message))
                return
            changed = [name for name in new.__struct_fields__ if getattr(new, name) != getattr(self._settings, name)]
            taken = {name: getattr(new, name) for name in changed if name in self._changeable}
            if taken:
                self._settings = replace(self._settings, **taken)
                logs.configure(self._settings.log_level)
                self._take(self._settings)
            log.info("settings reloaded %s", fields(changed=",".join(taken) or "nothing"))
            if waiting := [name for name in changed if name not in taken]:
                log.warning("settings that need a restart have changed too %s", fields(changed=",".join(waiting)))


def wait_for_start() -> None:
    """From now on, SIGHUP does not end this process: before the daemon runs, it has read its settings only now.

    A handler, because children would inherit that the signal is ignored, and because whoever started us may ignore it (nohup(1)).
    """
    signal.signal(signal.SIGHUP, lambda number, frame: None)
