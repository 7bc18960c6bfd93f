"""A private, real broker for tests, on a free port: mosquitto or amqtt."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Literal

import pytest

from potluck.net.broker import Broker, find_mosquitto, start_broker
from potluck.settings import BrokerSettings, Listen

BrokerKind = Literal["mosquitto", "embedded"]


def some_kind() -> BrokerKind:
    """A broker for tests that work with any real one."""
    return "mosquitto" if find_mosquitto() else "embedded"


def mosquitto_or_skip() -> None:
    """For tests that need mosquitto itself. `make test` installs it where possible, and else says which tests are skipped."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed (apt install mosquitto): tests that need it were not run")


class TestBroker:
    """Starts a broker with `start()`, which can be killed, frozen and started again on the same port."""

    __test__ = False

    def __init__(self, kind: BrokerKind, folder: Path) -> None:
        self.kind = kind
        self.port = 0
        self._folder = folder
        self._broker: Broker | None = None

    async def start(self) -> None:
        if self.kind == "mosquitto":
            mosquitto_or_skip()
        self._broker = await start_broker(BrokerSettings(mode=self.kind, port=self.port), Listen(), self._folder)
        self.port = self._broker.port

    async def stop(self) -> None:
        if self._broker is not None:
            self._signal(signal.SIGCONT)
            await self._broker.stop()
            self._broker = None

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        assert self._broker is not None
        self._signal(signal.SIGKILL)
        await self._broker.stop()
        self._broker = None

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    async def address(self) -> tuple[str, int]:
        """The address function for `MqttBus(broker.address, ...)`."""
        return "127.0.0.1", self.port

    def _signal(self, number: signal.Signals) -> None:
        assert self._broker is not None
        try:
            os.kill(self._broker.pid, number)
        except ProcessLookupError:
            assert number is not signal.SIGSTOP
