"""`potluck token create|list|remove|bearer`: who may join a closed cluster, and who may ask it without a certificate."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import typer

from potluck.cli import completion
from potluck.cli.session import Json, session
from potluck.cli.suggesting import Command, CommandGroup

token = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="Let machines and people join a closed cluster: make tokens, list them and remove them.",
)

TokenRole = Literal["node", "client", "viewer", "user", "operator"]
BearerRole = Literal["viewer", "user", "operator"]
_TIME = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)([smhd])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float:
    """A time as people write it: `90s`, `30m`, `1h`, `7d`. Raises InvalidRequest."""
    found = _TIME.fullmatch(text.strip().lower())
    if found is None or not float(found[1]):
        from potluck.errors import InvalidRequest

        raise InvalidRequest(f"{text[:40]!r} is no time: write a number and s, m, h or d, as in 30m, 1h or 7d")
    return float(found[1]) * _SECONDS[found[2]]


@token.command("create", cls=Command)
def create(
    context: typer.Context,
    role: Annotated[
        TokenRole,
        typer.Option(
            help="node: a machine that works for the cluster. user: a person or program that asks it (client is the same), viewer: one that "
            "only looks, operator: one that may do everything.",
            autocompletion=completion.words("node", "client", "viewer", "user", "operator"),
        ),
    ] = "node",
    ttl: Annotated[str, typer.Option(metavar="TIME", help="How long it is good: 30m, 1h, 7d.")] = "1h",
    uses: Annotated[int, typer.Option(min=1, max=10_000, help="How many may join with it.")] = 1,
    name: Annotated[
        str | None,
        typer.Option(help="Only the member of this name may join, also again: its machine was set up anew."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a join token, and show the command for the other machine. The token is shown only now. Needs an operator."""
    from potluck.cli import output
    from potluck.wire.members import CreateToken, TokenCreated
    from potluck.wording import counted

    kind = "user" if role == "client" else role
    question = CreateToken(role=kind, ttl_seconds=seconds(ttl), uses=uses, name=name or "")
    made = session(context).ask(question, TokenCreated)
    if as_json:
        output.emit({"token": made.token, "token_id": made.token_id, "expires_at": made.expires_at, "role": kind})
        return
    who = "machine" if kind == "node" else kind
    output.show(f"The token lets {counted(uses, who)} join until {output.time_text(made.expires_at)}. Type there:")
    output.show(f"    potluck join {made.token}" + (f" --name {name}" if name else ""))


@token.command("list", cls=Command)
def list_tokens(context: typer.Context, as_json: Json = False) -> None:
    """List the join tokens that still let somebody in, without their secrets."""
    from potluck.cli import output
    from potluck.wire.members import ListTokens, TokensListed

    found = session(context).ask(ListTokens(), TokensListed).tokens
    if as_json:
        output.emit(found)
    elif found:
        rows = [
            (
                one.token_id,
                one.role,
                str(one.uses_left),
                output.time_text(one.expires_at),
                one.name or "-",
                one.made_by or "-",
            )
            for one in found
        ]
        output.show(output.table(("id", "role", "uses", "until", "only for", "made by"), rows, right=("uses",)))
    else:
        output.note("no join tokens: `potluck token create` makes one")


@token.command("remove", cls=Command)
def remove(
    context: typer.Context,
    token_id: Annotated[
        str, typer.Argument(metavar="ID", help="As `potluck token list` shows it.", autocompletion=completion.tokens)
    ],
    as_json: Json = False,
) -> None:
    """Remove a join token: nobody joins with it any more. Who has joined stays."""
    import msgspec

    from potluck.cli import output
    from potluck.errors import InvalidRequest
    from potluck.wire.members import RemoveToken, TokenId, TokenRemoved

    try:
        msgspec.convert(token_id, TokenId)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"{token_id[:40]!r} is no token's id, which has 10 hexadecimal digits: `potluck token list` shows them"
        ) from error
    removed = session(context).ask(RemoveToken(token_id=token_id), TokenRemoved)
    if as_json:
        output.emit({"removed": removed.token_id})
    else:
        output.show(f"removed {removed.token_id}")


@token.command("bearer", cls=Command)
def bearer(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The name of who will use it, for `potluck clients`.")],
    role: Annotated[
        BearerRole,
        typer.Option(help="What it may do over HTTP.", autocompletion=completion.words("viewer", "user", "operator")),
    ] = "user",
    ttl: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long it is good: 1h, 7d (default: until it is removed).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a bearer token for HTTP, for browsers and programs without a certificate. It is shown only now. Needs an operator."""
    from potluck.cli import output
    from potluck.enrolment import check_name
    from potluck.wire.members import BearerCreated, CreateBearer

    check_name(name)
    question = CreateBearer(name=name, role=role, ttl_seconds=seconds(ttl) if ttl else 0.0)
    made = session(context).ask(question, BearerCreated)
    if as_json:
        output.emit({"bearer": made.bearer, "identity": made.identity, "expires_at": made.expires_at, "role": role})
        return
    until = (
        f"until {output.time_text(made.expires_at)}" if made.expires_at else f"until `potluck clients remove {name}`"
    )
    output.show(f"{name} may ask over HTTPS as {role}, {until}, with this header:")
    output.show(f"    Authorization: Bearer {made.bearer}")
