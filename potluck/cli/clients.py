"""`potluck clients list|remove`: the people and programs that may ask a closed cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from potluck.cli import completion
from potluck.cli.session import Json, Session, session
from potluck.cli.suggesting import Command, CommandGroup

if TYPE_CHECKING:
    from potluck.cli.listing import Listing
    from potluck.wire.members import MemberInfo

clients = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="List the people and programs that may ask a closed cluster, and remove them.",
)


@clients.command("list", cls=Command)
def list_clients(context: typer.Context, as_json: Json = False) -> None:
    """List them: role, when they joined, and until when their certificate or bearer token is valid."""
    from potluck.cli import output

    found = [one for one in _members(session(context)) if one.identity.startswith("client:")]
    if as_json:
        output.emit([output.plain(one) for one in found])
    elif found:
        output.show(_table(found))
    else:
        output.note("no clients: `potluck token create --role user` lets somebody join")


@clients.command("remove", cls=Command)
def remove(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help="A client, as `potluck clients list` shows it.", autocompletion=completion.clients)
    ],
    as_json: Json = False,
) -> None:
    """Take all rights from a client, and end its connections. The tokens that it made go too. Needs an operator."""
    from potluck.cli import output
    from potluck.wire.members import MemberRemoved, RemoveMember

    removed = session(context).ask(RemoveMember(identity=f"client:{name}"), MemberRemoved)
    if as_json:
        output.emit({"removed": removed.identity})
    else:
        output.show(f"removed {name}: it has no rights any more, and its connections are ended")


def _members(given: Session) -> tuple[MemberInfo, ...]:
    import asyncio

    from potluck.client.connection import Connection
    from potluck.client.listings import members
    from potluck.client.membership import membership

    async def asked() -> tuple[MemberInfo, ...]:
        async with Connection.of(membership(given.settings())) as connection:
            return await members(connection)

    return asyncio.run(asked())


def _table(found: list[MemberInfo]) -> Listing:
    from potluck.cli import output

    rows = [
        (
            one.identity.removeprefix("client:"),
            one.role,
            "certificate" if one.certificate_until else "bearer token",
            output.time_text(one.joined_at),
            _until(one),
        )
        for one in found
    ]
    return output.table(("name", "role", "by", "joined", "until"), rows)


def _until(one: MemberInfo) -> str:
    from potluck.cli import output

    if one.removed_at:
        return f"removed {output.time_text(one.removed_at)}"
    until = one.certificate_until or one.expires_at
    return output.time_text(until) if until else "it is removed"
