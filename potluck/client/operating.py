"""What the operator of a coordinator's machine asks it just after it was started: for join tokens."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from potluck.client.connection import Connection
from potluck.client.membership import PAIR, membership
from potluck.errors import PotluckError, Unavailable
from potluck.settings import ClientSettings
from potluck.wire.members import CreateToken, TokenCreated

FOUND_SECONDS = 60.0
"""How long a coordinator may take until it serves: it makes keys, and a slow machine takes its time."""
LOOK_SECONDS = 0.1
OWN_SECONDS = 600.0
"""How long the token is good with which the coordinator's machine lets its own node in."""
SHARED_SECONDS = 3600.0
SHARED_USES = 10
"""The token that is shown when a cluster is founded: for so long, for so many machines."""


def own_node(name: str = "") -> CreateToken:
    """Asks for a token for the node beside the coordinator."""
    return CreateToken(role="node", ttl_seconds=OWN_SECONDS, name=name)


def shared() -> CreateToken:
    """Asks for a token to show."""
    return CreateToken(role="node", ttl_seconds=SHARED_SECONDS, uses=SHARED_USES)


async def new_token(where: Path, cluster: str, question: CreateToken, since: float = 0.0) -> str:
    """A join token, asked for with the operator's credentials in the folder `where`, once the coordinator serves that was started at
    `since` (Unix time). Raises PotluckError.
    """
    deadline = time.monotonic() + FOUND_SECONDS
    await _written(where, since, deadline)
    settings = ClientSettings(cluster=cluster, credentials=str(where))
    while True:
        try:
            async with Connection.of(membership(settings)) as connection:
                return (await connection.ask(question, TokenCreated)).token
        except PotluckError as error:
            # It writes where it is before it answers there.
            if not error.retryable or time.monotonic() > deadline:
                raise
            await asyncio.sleep(LOOK_SECONDS)


async def _written(where: Path, since: float, deadline: float) -> None:
    """Return once the coordinator has written where it is, which it does at each start."""
    file = where / "cluster.toml"
    while time.monotonic() < deadline:
        if (where / PAIR).exists() and file.exists() and file.stat().st_mtime >= since:
            return
        await asyncio.sleep(LOOK_SECONDS)
    raise Unavailable(f"the coordinator does not serve within {FOUND_SECONDS:g} s: its log says why")
