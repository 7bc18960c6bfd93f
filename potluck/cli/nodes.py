"""`potluck nodes`: the nodes, and what each has and does."""

from __future__ import annotations

import typer

from potluck.cli.session import Json, session


def nodes(context: typer.Context, as_json: Json = False) -> None:
    """Show the nodes: state, cores, memory, measured speed, load, what each does, GPUs, runtimes; and the gateway's address."""
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
