"""A raw MQTT echo, to show what the bus itself costs: answers each message on `bench/ask` on `bench/answer`.

Run it as its own process: `echo.py HOST PORT QOS [CREDENTIALS]`; with a folder of credentials, over TLS with a certificate.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import aiomqtt

from potluck.credentials import Credentials

NODELAY = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]


def client(host: str, port: int, credentials: Path | None) -> aiomqtt.Client:
    """A plain client, or one with the credentials of a member of a closed cluster."""
    if credentials is None:
        return aiomqtt.Client(host, port, socket_options=NODELAY)
    member = Credentials.load(credentials, "client")
    name = f"potluck-{credentials.name}"
    return aiomqtt.Client(host, port, socket_options=NODELAY, tls_context=member.broker_tls, identifier=name)


async def main(host: str, port: int, qos: int, credentials: Path | None) -> None:
    async with client(host, port, credentials) as echo:
        await echo.subscribe("bench/ask", qos=qos)
        await echo.publish("bench/ready", b"", qos=1, retain=True)
        async for message in echo.messages:
            await echo.publish("bench/answer", message.payload, qos=qos)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]) if sys.argv[4:] else None))
