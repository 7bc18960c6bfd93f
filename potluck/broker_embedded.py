"""The embedded broker's process: `python -m potluck.broker_embedded HOST PORT`. The only import of amqtt."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys


async def _serve(host: str, port: int) -> None:
    from amqtt.broker import Broker

    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"{host}:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await broker.start()
    print("amqtt running", file=sys.stderr, flush=True)  # noqa: T201 - what the parent waits for
    await stop.wait()
    await broker.shutdown()


def main() -> None:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s %(message)s")
    host, port = sys.argv[1:]
    asyncio.run(_serve(host, int(port)))


if __name__ == "__main__":
    main()
