"""One closed cluster of real daemons, which all attacks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.attacked import Attacked, attacked
from support.brokers import mosquitto_or_skip


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    mosquitto_or_skip()
    with attacked(tmp_path_factory.mktemp("home")) as running:
        yield running
