"""Makes connections to a broker: those of the bus, and those that only test whether a broker answers."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from typing import Any

import aiomqtt
from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY

from potluck.bus.exchange import Will
from potluck.credentials import Credentials
from potluck.errors import Unavailable
from potluck.settings import BusTimings
from potluck.wire import codec
from potluck.wire.identities import CLIENT_ID_PREFIX

log = logging.getLogger(__name__)

_VERDICT_SECONDS = 0.3
"""A broker that does not refuse our certificate says nothing, so this long is waited for its refusal."""


async def reach(
    address: tuple[str, int], credentials: Credentials
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A new connection, on which nothing was sent yet. Raises OSError, and ValueError for a bad host name."""
    return await asyncio.open_connection(*address, ssl=credentials.broker_tls)


async def refusal(host: str, port: int, credentials: Credentials, limit_seconds: float) -> str:
    """Why our connection is refused there, in words; "": it is accepted."""
    try:
        async with asyncio.timeout(limit_seconds):
            reader, writer = await reach((host, port), credentials)
    except TimeoutError:
        return f"no answer within {limit_seconds:g} s"
    except ssl.SSLError as error:  # an OSError with numbers of its own, and some are ValueErrors
        return str(error)
    except ValueError:  # and UnicodeError, which is one
        return "not the name of a host"
    except OSError as error:
        # asyncio's text repeats the address. The error for several addresses of one host has no number.
        known = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        return known or "no connection"
    try:
        return "" if credentials.broker_tls is None else await _late_refusal(reader)
    finally:
        writer.close()


async def _late_refusal(reader: asyncio.StreamReader) -> str:
    """Why our certificate is refused; "": it is not. In TLS 1.3 a server says so after our side of the handshake is done (RFC 8446, 4.4)."""
    try:
        async with asyncio.timeout(_VERDICT_SECONDS):
            return "" if await reader.read(1) else "the connection was closed"
    except TimeoutError:
        return ""
    except OSError as error:
        return str(error)


def client_options(
    address: tuple[str, int],
    version: aiomqtt.ProtocolVersion,
    credentials: Credentials,
    *,
    client_id: str,
    will: Will | None,
    timings: BusTimings,
) -> dict[str, Any]:
    """The options of aiomqtt's client, which makes its own connection."""
    v5 = version is aiomqtt.ProtocolVersion.V5
    return {
        "hostname": address[0],
        "port": address[1],
        "identifier": client_id if credentials.broker_tls is None else _prefixed(client_id),
        "protocol": version,
        "clean_session": None if v5 else True,
        "clean_start": True if v5 else MQTT_CLEAN_START_FIRST_ONLY,
        # paho asks after one interval and gives up after the second: together they are the keepalive that was set
        "keepalive": max(1, timings.keepalive_seconds // 2),
        "timeout": timings.connect_timeout_seconds,
        "will": None if will is None else aiomqtt.Will(will.topic, codec.encode(will.message), 1, True),
        "tls_context": credentials.broker_tls,
        "socket_options": [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        "logger": log.getChild("paho"),
    }


def _prefixed(client_id: str) -> str:
    """The id as a closed cluster's broker takes it. Of a daemon, the broker then replaces it by the name in its certificate."""
    return CLIENT_ID_PREFIX + client_id.removeprefix(CLIENT_ID_PREFIX)


async def take_over(address: tuple[str, int], credentials: Credentials, client_id: str, limit_seconds: float) -> None:
    """Connect with this client id and leave again, so that the broker ends the connection that has it. Raises Unavailable.

    In a closed cluster, a daemon's id is the identity in the certificate of `credentials`, whatever `client_id` says.
    """
    timings = BusTimings(connect_timeout_seconds=limit_seconds)
    options = client_options(
        address, aiomqtt.ProtocolVersion.V311, credentials, client_id=client_id, will=None, timings=timings
    )
    try:
        async with aiomqtt.Client(**options):
            pass
    except (aiomqtt.MqttError, OSError) as error:
        raise Unavailable(f"the connection of {client_id} could not be taken over: {error}") from error
