"""How a daemon starts."""

from __future__ import annotations

import gc

import pytest

from potluck import lifecycle, logs
from potluck.settings import CoordinatorSettings


def test_what_a_daemon_has_imported_is_not_looked_at_by_each_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "configure", lambda level: None)
    frozen: list[int] = []

    async def serve(settings: CoordinatorSettings) -> None:
        frozen.append(gc.get_freeze_count())

    try:
        lifecycle.run_daemon("test", CoordinatorSettings, serve)
    finally:
        gc.unfreeze()
    assert frozen[0] > 1000
