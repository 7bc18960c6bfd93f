"""`potluck nodes [remove]`: the nodes, and what each has and does."""

from __future__ import annotations

from typing import Annotated

import typer

from potluck.cli import completion
from potluck.cli.session import Json, session
from potluck.cli.suggesting import Command, CommandGroup

nodes = typer.Typer(
    cls=CommandGroup,
    invoke_without_command=True,
    help="Show the nodes: state, cores, memory, measured speed, load, what each does, GPUs, runtimes; and the gateway's address. Remove "
    "one from a closed cluster.",
)


@nodes.callback()
def list_nodes(context: typer.Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is not None:
        return
    from potluck.cli import output
    from potluck.client.health import clocks

    with session(context).client() as client:
        found = client.nodes()
        gateway = client.gateway()
    if as_json:
        output.emit(found)
        return
    if found:
        output.show(output.nodes_table(found))
    else:
        output.note("no nodes yet: run `potluck up` on each machine")
    output.show(f"gateway  {'  '.join(gateway)}")
    for text in clocks(found):
        output.show(f"clock    {text}")


@nodes.command("remove", cls=Command)
def remove(
    context: typer.Context,
    node: Annotated[
        str, typer.Argument(metavar="ID", help="A node, as `potluck nodes` shows it.", autocompletion=completion.nodes)
    ],
    as_json: Json = False,
) -> None:
    """Take all rights from a node of a closed cluster, and end its connections. Its work goes to others. Needs an operator."""
    from potluck.cli import output
    from potluck.wire.members import MemberRemoved, RemoveMember

    removed = session(context).ask(RemoveMember(identity=f"node:{node}"), MemberRemoved)
    if as_json:
        output.emit({"removed": removed.identity})
    else:
        output.show(f"removed {node}: it has no rights any more, and its connections are ended")
