"""What every command shares: the options before the command, and the client made from them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from potluck.client import Client
    from potluck.settings import ClientSettings
    from potluck.wire.values import ImageOptions, Message

M = TypeVar("M", bound="Message")

Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else.")]
ImageSize = Annotated[
    str | None,
    typer.Option(
        "--image",
        metavar="HxW",
        help="Resize images to this size (default: the model's input). HxWxC sets the channels too. HxW:1 keeps pixels at 0 to 255 "
        "(default: as the model's first layers expect them, else times 1/255).",
    ),
]

_IMAGE = re.compile(
    r"(?P<height>0*[1-9]\d*)x(?P<width>0*[1-9]\d*)(x(?P<channels>0*[1-9]\d*))?(:(?P<scale>\d+(\.\d+)?))?", re.ASCII
)
_WITH_VALUE = ("--seed", "--cluster", "--timeout", "--credentials")
_FLAGS = ("--debug", "--verbose", "-v")


@dataclass(frozen=True)
class Session:
    """The options before the command. None: not given."""

    seed: str | None = None
    cluster: str | None = None
    timeout: float | None = None
    verbose: bool = False
    debug: bool = False
    credentials: str | None = None

    def client(self) -> Client:
        """A client for a `with` statement. Imported here, because its import is heavy."""
        from potluck.client import Client

        return Client(self.seed, cluster=self.cluster, timeout=self.timeout, credentials=self.credentials)

    def settings(self) -> ClientSettings:
        """The settings of such a client. Raises InvalidSettings."""
        from potluck.client.connection import client_settings

        return client_settings(self.seed, self.cluster, self.timeout, self.credentials)

    def ask(self, question: Message, answer: type[M]) -> M:
        """The coordinator's answer to one question. Raises a PotluckError."""
        import asyncio

        from potluck.client.connection import Connection
        from potluck.client.membership import membership

        async def asked() -> M:
            async with Connection.of(membership(self.settings())) as connection:
                return await connection.ask(question, answer)

        return asyncio.run(asked())


_present: ContextVar[Session] = ContextVar("session", default=Session())  # noqa: B039 - frozen


def begin(context: typer.Context, given: Session) -> None:
    """Keep the options before the command: for the command, and for the commands that it suggests next."""
    context.obj = given
    _present.set(given)


def same_cluster(command: str) -> str:
    """A command as the user must type it to reach the present cluster: with --seed, --cluster and --credentials where they were given."""
    given = _present.get()
    options = [
        f" {option} {value}"
        for option, value in (
            ("--seed", given.seed),
            ("--cluster", given.cluster),
            ("--credentials", given.credentials),
        )
        if value
    ]
    return command + "".join(options)


def session(context: typer.Context) -> Session:
    found = context.find_object(Session)
    assert found is not None
    return found


def global_options_first(arguments: Sequence[str]) -> list[str]:
    """The same command line, with the options of every command moved before the command.

    Leaves everything after `--` as it is.
    """
    ours: list[str] = []
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, has_value, _ = argument.partition("=")
        if argument == "--":
            rest += [argument, *waiting]
            break
        if argument in _FLAGS or (name in _WITH_VALUE and has_value):
            ours.append(argument)
        elif name in _WITH_VALUE:
            ours += [argument, *waiting[:1]]
            del waiting[:1]
        else:
            rest.append(argument)
    return ours + rest


def image_size(text: str | None) -> tuple[int, ...] | ImageOptions | None:
    """The value of `--image`: `HxW` or `HxWxC`, and a factor for pixels: `HxW:SCALE`. Raises InvalidRequest."""
    if text is None:
        return None
    found = _IMAGE.fullmatch(text.lower())
    if found is None:
        from potluck.errors import InvalidRequest

        raise InvalidRequest(
            f"--image {text!r}: write height x width, as in 128x128 (128x128x1 for grey images; 128x128:1 for pixels of 0 to 255)"
        )
    size = tuple(int(part) for part in found.group("height", "width", "channels") if part)
    if found["scale"] is None:
        return size
    from msgspec.structs import replace

    from potluck.client.models import image_options

    options = image_options(size, None)
    assert options is not None
    return replace(options, scale=float(found["scale"]))


def check_output(path: Path) -> None:
    """Check `--output` before the work begins. Raises InvalidRequest where the file cannot be written."""
    from potluck.errors import InvalidRequest

    folder = path.resolve().parent
    if not folder.is_dir():
        raise InvalidRequest(f"--output {path}: there is no folder {folder}")
    if path.is_dir():
        raise InvalidRequest(f"--output {path}: this is a folder: name a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InvalidRequest(
            f"--output {path}: {path if path.exists() else folder} cannot be written: you have no permission"
        )
