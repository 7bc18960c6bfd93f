"""Ports: the gateway's own or the next free one; errors say who uses a port and which option chooses another."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from potluck import settings
from potluck.errors import CannotListen
from potluck.net import addresses as network
from potluck.net.addresses import bind, bind_gateway
from potluck.settings import CoordinatorSettings, GatewayListen, Listen
from potluck.settings_sources import load


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens; the next one is free."""
    with ExitStack() as stack:
        while True:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port: int = first.getsockname()[1]
            with socket.socket() as following:
                if following.connect_ex(("127.0.0.1", port + 1)):
                    yield port
                    return


def test_a_port_that_is_taken_names_its_user_and_the_option(taken: int) -> None:
    me = rf"pid {os.getpid()}\)"
    with pytest.raises(CannotListen, match=rf"port {taken} on 127.0.0.1 is taken by .*{me}.* --port \(listen.port\)"):
        bind(Listen(port=taken))
    with pytest.raises(CannotListen, match="choose another one with --gateway-port"):
        bind(Listen(port=taken), "--gateway-port")
    with pytest.raises(CannotListen, match="is taken"):
        bind_gateway(GatewayListen(port=taken))


def test_in_place_of_the_gateways_usual_port_the_next_free_one_is_taken(
    taken: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(network, "GATEWAY_PORT", taken)
    with bind_gateway(GatewayListen(port=taken)) as sock:
        found = sock.getsockname()[1]
    assert taken < found < taken + 20, "the next may be somebody else's, too"
    assert f"port={taken}" in caplog.text
    assert f"now={found}" in caplog.text


def test_a_file_that_says_only_where_to_listen_leaves_the_gateways_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POTLUCK_LISTEN__PORT", raising=False)
    found = load(CoordinatorSettings, None, {"listen.host": "0.0.0.0", "listen.insecure": True})
    assert found.listen.port == settings.GATEWAY_PORT
