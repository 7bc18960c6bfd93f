"""`potluck-coordinator`: the coordinator daemon on the command line."""

from __future__ import annotations

import argparse
import asyncio

from coordinator.daemon import CHANGEABLE, Coordinator
from potluck import __version__, daemons, lifecycle
from potluck.reloading import Reloading
from potluck.settings import GATEWAY_PORT, CoordinatorSettings
from potluck.settings_sources import load


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="potluck-coordinator",
        description="Plans jobs, keeps the journal, and routes inference for one cluster. Starts a broker if none is given.",
    )
    lifecycle.add_daemon_arguments(parser, port_default=f"{GATEWAY_PORT}, or the next free one; 0: any free one")
    parser.add_argument(
        "--seed", metavar="HOST[:PORT]", action="append", help="use this broker instead of starting one"
    )
    parser.add_argument(
        "--broker", choices=["auto", "external", "mosquitto", "embedded"], help="which broker (default: auto)"
    )
    parser.add_argument(
        "--broker-port", type=int, metavar="PORT", help="port of the broker (default: 1883; 0: any free one)"
    )
    parser.add_argument("--version", action="version", version=f"potluck {__version__}")
    return parser


def settings_from(arguments: argparse.Namespace) -> CoordinatorSettings:
    """Settings from file, environment and flags. Raises InvalidSettings."""
    flags = lifecycle.daemon_flags(arguments) | {
        "seeds": arguments.seed,
        "broker.mode": arguments.broker,
        "broker.port": arguments.broker_port,
    }
    return load(CoordinatorSettings, arguments.config, flags)


def read() -> CoordinatorSettings:
    return settings_from(parser().parse_args())


async def serve(settings: CoordinatorSettings) -> None:
    loop = asyncio.get_running_loop()
    stop = lifecycle.stop_event(loop)
    coordinator = Coordinator(settings)
    Reloading(settings, read, coordinator.take, CHANGEABLE).on_hangup(loop)
    await coordinator.run(stop)


def main() -> None:
    """Run until SIGTERM or SIGINT. Exit codes are those of `potluck.errors`."""
    lifecycle.run_daemon("potluck-coordinator", read, serve)


if __name__ == "__main__":
    daemons.start("coordinator")
