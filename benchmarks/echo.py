"""A raw MQTT echo, to show what the bus itself costs: answers each message on `bench/ask` on `bench/answer`.

Run it as its own process: `echo.py HOST PORT QOS`.
"""

from __future__ import annotations

import asyncio
import socket
import sys

import aiomqtt

NODELAY = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]


async def main(host: str, port: int, qos: int) -> None:
    async with aiomqtt.Client(host, port, socket_options=NODELAY) as client:
        await client.subscribe("bench/ask", qos=qos)
        await client.publish("bench/ready", b"", qos=1, retain=True)
        async for message in client.messages:
            await client.publish("bench/answer", message.payload, qos=qos)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
