"""`potluck-node`: the node daemon on the command line."""

from __future__ import annotations

import argparse
import asyncio

from node import member
from node.daemon import CHANGEABLE, Node
from potluck import __version__, daemons, lifecycle
from potluck.reloading import Reloading
from potluck.settings import NodeSettings
from potluck.settings_sources import load


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="potluck-node",
        description="Brings this machine to the cluster: advertises its capacity, computes shards, serves models.",
    )
    lifecycle.add_daemon_arguments(parser)
    parser.add_argument("--node-id", metavar="ID", help="this node's id (default: made once, kept in the state folder)")
    parser.add_argument(
        "--seed", metavar="HOST[:PORT]", action="append", help="address of the broker (default: found by mDNS)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads TensorFlow may use (default: one per core)")
    parser.add_argument(
        "--data",
        metavar="NAME=PATH",
        action="append",
        type=data_set,
        help="a data set that lives on this node and never leaves it: train on it as node:NAME; repeat it for more",
    )
    parser.add_argument("--version", action="version", version=f"potluck {__version__}")
    return parser


def data_set(text: str) -> tuple[str, str]:
    """(name, path) from `NAME=PATH`. Raises ArgumentTypeError, which argparse shows."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=PATH, as in photos=/srv/photos")
    return name, path


def settings_from(arguments: argparse.Namespace) -> NodeSettings:
    """Settings from file, environment and flags. Raises InvalidSettings."""
    flags = lifecycle.daemon_flags(arguments) | {
        "node_id": arguments.node_id,
        "seeds": arguments.seed,
        "threads": arguments.threads,
        "data": dict(arguments.data) if arguments.data else None,
    }
    return load(NodeSettings, arguments.config, flags)


def read() -> NodeSettings:
    return settings_from(parser().parse_args())


async def serve(settings: NodeSettings) -> None:
    loop = asyncio.get_running_loop()
    stop = lifecycle.stop_event(loop)
    if token := member.given_token():
        await member.join(settings, token, stop)
        if stop.is_set():
            return
    node = Node(settings)
    Reloading(settings, read, node.take, CHANGEABLE).on_hangup(loop)
    await node.run(stop)


def main() -> None:
    """Run until SIGTERM or SIGINT. Exit codes are those of `potluck.errors`."""
    lifecycle.run_daemon("potluck-node", read, serve)


if __name__ == "__main__":
    daemons.start("node")
