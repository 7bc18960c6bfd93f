"""`potluck-coordinator`: the coordinator daemon on the command line."""

from __future__ import annotations

import argparse
import asyncio
import sys

from coordinator.daemon import Coordinator
from potluck import __version__, lifecycle, logs
from potluck.errors import PotluckError
from potluck.settings import CoordinatorSettings, load


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="potluck-coordinator",
        description="Plans jobs, keeps the journal, and routes inference for one cluster. Starts a broker where none is given.",
    )
    parser.add_argument("--config", metavar="FILE", help="settings in TOML (see configs/coordinator.toml)")
    parser.add_argument("--cluster", metavar="NAME", help="the cluster's name (default: default)")
    parser.add_argument(
        "--seed", metavar="HOST[:PORT]", action="append", help="use this broker instead of starting one"
    )
    parser.add_argument("--listen", metavar="ADDRESS", help="address for HTTP and the broker (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="HTTP port (default: any free one)")
    parser.add_argument(
        "--broker", choices=["auto", "external", "mosquitto", "embedded"], help="which broker (default: auto)"
    )
    parser.add_argument(
        "--broker-port", type=int, metavar="PORT", help="port of the broker (default: 1883; 0: any free one)"
    )
    parser.add_argument(
        "--insecure", action="store_true", default=None, help="allow --listen beyond loopback, unencrypted"
    )
    parser.add_argument("--state-dir", metavar="FOLDER", help="where the journal and the blobs are kept")
    parser.add_argument("--no-discovery", dest="discovery", action="store_false", default=None, help="do not use mDNS")
    parser.add_argument("--log-level", metavar="LEVEL", help="DEBUG, INFO, WARNING or ERROR (default: INFO)")
    parser.add_argument("--version", action="version", version=f"potluck {__version__}")
    return parser


def settings_from(arguments: argparse.Namespace) -> CoordinatorSettings:
    """Settings from file, environment and flags. Raises InvalidSettings."""
    return load(
        CoordinatorSettings,
        arguments.config,
        {
            "cluster": arguments.cluster,
            "seeds": arguments.seed,
            "listen.host": arguments.listen,
            "listen.port": arguments.port,
            "listen.insecure": arguments.insecure,
            "broker.mode": arguments.broker,
            "broker.port": arguments.broker_port,
            "state_dir": arguments.state_dir,
            "discovery.enabled": arguments.discovery,
            "log_level": arguments.log_level,
        },
    )


async def serve(settings: CoordinatorSettings) -> None:
    stop = lifecycle.stop_event(asyncio.get_running_loop())
    await Coordinator(settings).run(stop)


def main() -> None:
    """Run until SIGTERM or SIGINT. Exit codes are those of `potluck.errors`."""
    arguments = parser().parse_args()
    try:
        settings = settings_from(arguments)
        logs.configure(settings.log_level)
        asyncio.run(serve(settings))
    except* PotluckError as group:
        error = _first(group)
        sys.stderr.write(f"potluck-coordinator: {error.message}\n")
        sys.exit(error.exit_code)


def _first(group: BaseExceptionGroup[PotluckError]) -> PotluckError:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, PotluckError)
    return found


if __name__ == "__main__":
    main()
