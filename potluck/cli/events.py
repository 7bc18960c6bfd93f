"""`potluck events`: what has happened in the cluster, and what happens."""

from __future__ import annotations

from typing import Annotated

import typer

from potluck.cli.session import Json, session

SHOWN = 20
"""How many past events are shown, the newest ones, unless more are asked for."""


def events(
    context: typer.Context,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Also show new events as they happen, one on each line, until Ctrl-C."),
    ] = False,
    last: Annotated[
        int | None,
        typer.Option(
            "--last", "-n", min=0, metavar="N", help=f"Show the newest N of the past events (default: {SHOWN})."
        ),
    ] = None,
    after: Annotated[
        int | None, typer.Option(min=0, metavar="NUMBER", help="Show all events after the one with this number.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what has happened to jobs, nodes, models, data sets and deployments."""
    from potluck.cli import output

    if last is None and after is None:
        last = SHOWN
    with session(context).client() as client:
        if follow:
            # As in `tail -n 0 -f`: none of those before.
            for event in client.events(None if last == 0 else after, last=last or None, follow=True):
                if as_json:
                    output.emit_line(event)
                else:
                    output.show(output.event_line(event))
            return
        found = list(client.events(after, last=last)) if last != 0 else []
    if as_json:
        output.emit(found)
    elif found:
        output.show(output.events_table(found))
    elif last != 0:
        output.note("nothing has happened")
