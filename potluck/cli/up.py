"""`potluck up`: this machine joins the cluster it finds, or starts one, and keeps its daemons running until Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from potluck.cli import completion
from potluck.cli.session import Session, session

Data = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PATH", help="Data that stay on this machine: train on node:NAME. Repeat it for more."),
]
LogLevel = Annotated[
    str | None,
    typer.Option(
        metavar="LEVEL",
        help="Level of the daemons' logs (default: WARNING; with --debug DEBUG).",
        autocompletion=completion.words("DEBUG", "INFO", "WARNING", "ERROR"),
    ),
]
"""For commands that run this machine's daemons."""


def up(
    context: typer.Context,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve the network, without encryption or identities.")
    ] = False,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Listen here (default: on every interface in a closed cluster or with --insecure, else on 127.0.0.1).",
        ),
    ] = None,
    loopback: Annotated[
        bool, typer.Option("--loopback", help="Serve only this machine, as --listen 127.0.0.1 does.")
    ] = False,
    seed: Annotated[
        str | None, typer.Option(metavar="HOST[:PORT]", help="Join the cluster with this broker, and start none.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(metavar="NAME", help="The cluster's name (default: default).")] = None,
    state_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to keep the journal, blobs and the node's identity.")
    ] = None,
    broker_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Port of the broker, where one is started (default: 1883; 8883 in a closed cluster)."
        ),
    ] = None,
    gateway_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port of the gateway (HTTP), where one is started (default: 7814, or the next free one).",
        ),
    ] = None,
    data: Data = None,
    log_level: LogLevel = None,
) -> None:
    """Start potluck on this machine: in the cluster that it belongs to, or as the first machine of a new one.

    On a network it is a closed cluster: the first machine founds it and shows the command for the others. Where that is not possible, only
    this machine is served.
    """
    from potluck.errors import InvalidRequest

    if loopback and (insecure or listen):
        raise InvalidRequest("--loopback serves only this machine: leave out --listen and --insecure")
    run(
        session(context), insecure=insecure, listen="127.0.0.1" if loopback else listen, seed=seed, cluster=cluster,
        state_dir=state_dir, broker_port=broker_port, gateway_port=gateway_port, data=data, log_level=log_level,
    )  # fmt: skip


def run(
    given: Session,
    *,
    insecure: bool = False,
    listen: str | None = None,
    seed: str | None = None,
    cluster: str | None = None,
    state_dir: Path | None = None,
    broker_port: int | None = None,
    gateway_port: int | None = None,
    data: list[str] | None = None,
    log_level: str | None = None,
) -> None:
    """What `potluck up` does with these options."""
    import asyncio
    from importlib.util import find_spec

    from potluck import lifecycle, logs
    from potluck.cli import closing
    from potluck.cli.joining import Joining
    from potluck.cli.output import note
    from potluck.cli.plan import Plan
    from potluck.settings import Listen, NetworkSettings, check_listen
    from potluck.settings_sources import load

    seeds = [text] if (text := seed or given.seed) else None
    settings = load(NetworkSettings, None, {"cluster": cluster or given.cluster, "seeds": seeds})
    where = Listen(host=listen or ("0.0.0.0" if insecure else "127.0.0.1"), insecure=insecure)  # noqa: S104 - asked for
    log_level = log_level or ("DEBUG" if given.debug else "WARNING")
    asked = insecure or listen is not None
    plan = Plan(settings, where, state_dir, broker_port, log_level, tuple(data or ()), gateway_port, asked=asked)
    if closing.member(plan) is None and not closing.founded(plan):
        check_listen(where)
    logs.configure(log_level)
    if insecure:
        note(
            "WARNING: --insecure: everybody on the network can use this machine's computing power and read its "
            "models and data; nothing is encrypted. Use it on networks that you trust."
        )
    if not any(map(find_spec, ("tensorflow", "ai_edge_litert"))):
        note(
            "WARNING: neither TensorFlow nor LiteRT is installed with potluck: this machine's node will compute nothing "
            "(docs/install.md, Extras)"
        )

    async def until_stopped() -> None:
        await Joining(plan, say=note).run(lifecycle.stop_event(asyncio.get_running_loop()))

    asyncio.run(until_stopped())
