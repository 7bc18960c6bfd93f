"""`potluck service install|status|logs|uninstall`: potluck as a system service of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from potluck.cli import completion
from potluck.cli.session import Json, session
from potluck.cli.suggesting import Command, CommandGroup

if TYPE_CHECKING:
    from potluck.service.installing import Installed

service = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="Run potluck as a system service: it starts with this machine, and again after a crash.",
)

Role = Annotated[
    Literal["node", "coordinator"],
    typer.Option(
        help="node: this machine works for a cluster. coordinator: it also leads one.",
        autocompletion=completion.words("node", "coordinator"),
    ),
]


@service.command("install", cls=Command)
def install(
    context: typer.Context,
    role: Role = "node",
    no_node: Annotated[
        bool, typer.Option("--no-node", help="With --role coordinator: install no node beside it.")
    ] = False,
    seed: Annotated[
        str | None,
        typer.Option(metavar="HOST[:PORT]", help="The cluster's broker (default: found by mDNS, or started)."),
    ] = None,
    cluster: Annotated[str | None, typer.Option(metavar="NAME", help="The cluster's name (default: default).")] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Listen here (default: every interface for a coordinator, with --join and with --insecure; else 127.0.0.1).",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve the network, without encryption or identities.")
    ] = False,
    join: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN", help="The node joins a closed cluster with this token; -: read it from standard input."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Install or change the services of this machine, and (re)start them. Needs root.

    A coordinator founds a closed cluster on this machine's network, unless --listen 127.0.0.1 or --insecure is given. Options are written
    into /etc/potluck. What is not given stays as it is there.
    """
    from potluck.cli import output
    from potluck.cli.hidden import hide
    from potluck.client import operating
    from potluck.errors import InvalidRequest
    from potluck.service import installing, joining, systemd
    from potluck.wire import tokens

    given = session(context)
    systemd.needed()
    _needs_root()
    if no_node and role == "node":
        raise InvalidRequest("--no-node goes with --role coordinator: without it, nothing would be installed")
    if join is not None and (role == "coordinator" or insecure):
        raise InvalidRequest("--join is for the node of a machine that has no coordinator, and goes without --insecure")
    changes: dict[str, str | int | bool | list[str]] = {}
    if name := cluster or given.cluster:
        changes["cluster"] = name
    if broker := seed or given.seed:
        changes["seeds"] = [broker]
    if address := listen or ("0.0.0.0" if insecure else ""):  # noqa: S104 - asked for
        changes |= {"listen.host": address, "listen.insecure": insecure}
    elif join is not None or (role == "coordinator" and installing.founds("seeds" in changes)):
        changes |= {"listen.host": joining.ADDRESS, "listen.insecure": False}
    member = token = ""
    if join is not None:
        hide(join)
        done, known = joining.install(tokens.parse(sys.stdin.readline() if join == "-" else join), changes)
        member = f"{known.identity} of the closed cluster {known.cluster!r}"
    elif role == "coordinator":
        done, token = joining.lead(changes, node=not no_node)
    else:
        done = installing.install(("node",), changes)
    next_command = f'sudo "$(command -v potluck)" service install --join {token}' if token else _next(done)
    if as_json:
        output.emit(
            {
                "services": [f"potluck-{one.daemon}" for one in done],
                "settings": [str(one.file) for one in done],
                "next": next_command,
            }
        )
        return
    for one in done:
        output.show(f"potluck-{one.daemon} starts now, and with this machine; its settings are in {one.file}")
    output.show("How they are: potluck service status")
    if member:
        output.show(f"potluck-node is {member} now")
    elif token:
        output.show(
            f"This machine leads a closed cluster. The token below is good for an hour, for at most {operating.SHARED_USES} machines."
        )
    if next_command and not member:
        output.show(f"On the next machine, after installing potluck there: {next_command}")
    elif role == "coordinator":
        output.show(
            "It serves only this machine. On a network that you trust, serve all of it, without encryption: "
            f"{_sudo('service', 'install', '--role', 'coordinator', '--insecure')}"
        )


@service.command("status", cls=Command)
def status(as_json: Json = False) -> None:
    """Show the services of this machine. Exit code 0: all run; 1: one has failed or is stopped; 3: none is installed; 4: one starts."""
    from potluck.cli import output
    from potluck.errors import NotFound
    from potluck.service import installing, systemd

    systemd.needed()
    found = [state for state in systemd.states(map(installing.unit, installing.DAEMONS)) if state.installed]
    if not found:
        raise NotFound("no service of potluck is installed here: potluck service install")
    if as_json:
        output.emit([vars(state) for state in found])
    else:
        rows = [
            (state.name, output.colored(state.state), state.detail, str(state.pid or "-"), str(state.restarts))
            for state in found
        ]
        columns = ("service", "state", "detail", "pid", "restarts")
        said = [[state.said] if state.said else [] for state in found]
        output.show(output.table(columns, rows, right=("pid", "restarts"), below=said))
    states = {state.state for state in found}
    if states - {"active", "activating", "reloading"}:
        raise typer.Exit(1)
    if "activating" in states:
        raise typer.Exit(4)


@service.command("logs", cls=Command)
def logs(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Show new lines as they come, until Ctrl-C.")] = False,
    last: Annotated[int, typer.Option("-n", "--last", min=0, metavar="N", help="Show the newest N lines.")] = 100,
    as_json: Json = False,
) -> None:
    """Show what the services of this machine have logged, by journalctl. --json: one object a line."""
    import shutil

    from potluck.errors import Unavailable
    from potluck.service import installing, systemd

    systemd.needed()
    program = shutil.which("journalctl")
    if program is None:
        raise Unavailable("journalctl, which shows logs of services, is not installed: install systemd whole")
    units = [f"--unit={installing.unit(daemon)}" for daemon in installing.DAEMONS]
    options = ["--follow"] if follow else ["--no-pager"]
    arguments = [program, *units, f"--lines={last}", *options, f"--output={'json' if as_json else 'short'}"]
    # It becomes this process, and Ctrl-C is its own.
    os.execv(program, arguments)  # noqa: S606 - no shell is wanted


@service.command("uninstall", cls=Command)
def uninstall(
    purge: Annotated[
        bool, typer.Option("--purge", help="Also delete their data (journal, models, identity) and settings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Stop and remove the services of this machine. Their data and settings stay, unless --purge is given. Needs root."""
    from potluck.cli import output
    from potluck.service import installing, systemd

    systemd.needed()
    _needs_root()
    removed = installing.uninstall(purge=purge)
    if as_json:
        output.emit({"services": [f"potluck-{daemon}" for daemon in removed], "purged": purge})
        return
    for daemon in removed:
        output.show(f"potluck-{daemon} is removed")
    if not removed:
        output.note("no service of potluck was installed here")
    if not purge:
        output.note(
            f"data stay in {installing.STATE}/private/potluck-*, settings in {installing.SETTINGS}: --purge deletes them"
        )


def _next(done: Sequence[Installed]) -> str:
    """What to type on the next machine; "": this machine serves no other."""
    from potluck.net.addresses import reachable_addresses
    from potluck.settings import BROKER_PORT, CoordinatorSettings, is_loopback, typed

    for one in done:
        settings = one.settings
        if is_loopback(settings.listen.host) or not settings.listen.insecure:
            continue
        seed = ",".join(settings.seeds[:1])
        if isinstance(settings, CoordinatorSettings) and not seed:
            seed = reachable_addresses(settings.listen.host)[0]
            port = settings.broker.port
            seed += f":{port}" if port not in (0, BROKER_PORT) else ""
        command = f'sudo "$(command -v potluck)" service install{f" --seed {seed}" if seed else ""} --insecure'
        return typed(command, settings.cluster)
    return ""


def _needs_root() -> None:
    from potluck.errors import InvalidRequest

    if os.geteuid() != 0:
        raise InvalidRequest(f"this needs root: {_sudo(*sys.argv[1:])}")


def _sudo(*arguments: str) -> str:
    """The command with sudo as it must be typed: sudo does not look into the folders of pipx and uv."""
    import shlex

    beside = Path(sys.executable).with_name("potluck")
    return shlex.join(["sudo", str(beside if beside.exists() else Path(sys.argv[0]).absolute()), *arguments])
