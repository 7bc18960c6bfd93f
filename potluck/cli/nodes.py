"""`potluck nodes`: who is there, and what each has."""

from __future__ import annotations

import typer

from potluck.cli.session import Json, session


def nodes(context: typer.Context, as_json: Json = False) -> None:
    """Show the nodes: cores, memory, GPUs, measured speed, runtimes, state."""
    from potluck.cli import output

    with session(context).client() as client:
        found = client.nodes()
    if as_json:
        output.emit(found)
    elif found:
        output.show(output.nodes_table(found))
    else:
        output.note("no nodes yet: run `potluck up` on each machine")
