"""Questions about who belongs to a closed cluster, and their answers. They go to `coordinator/inbox`, as the other questions do."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from potluck.wire.values import Count, Message, Part, Seconds, UnixTime

MemberRole = Literal["node", "viewer", "user", "operator"]
"""What a member may do. All but a node are clients; `wire/roles.py` says which questions each may ask."""
MemberName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,49}\Z")]
"""The part of an identity after its colon, short enough for a certificate."""
TokenId = Annotated[str, Meta(pattern=r"^[0-9a-f]{10}\Z")]
IdentityText = Annotated[str, Meta(max_length=96)]


class CreateToken(Message, frozen=True):
    """A join token, which lets `uses` machines or people join in the next `ttl_seconds`. Answered by `TokenCreated`.

    With a `name`, only the member of this name may join with it, also one that is a member already: its machine was set up anew.
    """

    role: MemberRole = "node"
    ttl_seconds: Annotated[float, Meta(gt=0, le=30 * 86400)] = 3600.0
    uses: Annotated[int, Meta(ge=1, le=10_000)] = 1
    name: Annotated[str, Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,49})?\Z")] = ""


class TokenCreated(Message, frozen=True):
    """The only time that the token is told: the coordinator keeps a hash of it."""

    token: str
    token_id: TokenId
    expires_at: UnixTime


class TokenInfo(Part, frozen=True):
    token_id: TokenId
    role: MemberRole
    expires_at: UnixTime
    uses_left: Count
    name: str = ""
    made_by: str = ""
    """The identity of who asked for it; "": the coordinator's machine."""


class ListTokens(Message, frozen=True):
    """The join tokens that still let somebody in. Answered by `TokensListed`."""


class TokensListed(Message, frozen=True):
    tokens: tuple[TokenInfo, ...]


class RemoveToken(Message, frozen=True):
    """Answered by `TokenRemoved`."""

    token_id: TokenId


class TokenRemoved(Message, frozen=True):
    token_id: TokenId


class MemberInfo(Part, frozen=True):
    identity: IdentityText
    role: str
    """A `MemberRole`, or `coordinator`."""
    joined_at: UnixTime
    certificate_until: UnixTime = 0.0
    """When its newest certificate ends; 0: it has a bearer token and no certificate."""
    removed_at: UnixTime = 0.0
    """0: it was not removed."""
    expires_at: UnixTime = 0.0
    """When its bearer token ends; 0: it has none."""


class ListMembers(Message, frozen=True):
    """Who belongs to the cluster, and who was removed in the last days. Answered by `MembersListed`."""

    after: str = ""
    """Only identities after this one."""


class MembersListed(Message, frozen=True):
    """As many as fit into a message, by identity. With `more`, ask again `after` the last of them."""

    members: tuple[MemberInfo, ...]
    more: bool = False


class RemoveMember(Message, frozen=True):
    """Take all rights from a member, and end its connections. Answered by `MemberRemoved` once its rights are gone."""

    identity: IdentityText


class MemberRemoved(Message, frozen=True):
    identity: IdentityText


class CreateBearer(Message, frozen=True):
    """A bearer token (RFC 6750) for HTTP, for programs that have no certificate. Answered by `BearerCreated`."""

    name: MemberName
    role: Literal["viewer", "user", "operator"] = "user"
    ttl_seconds: Seconds = 0.0
    """0: until it is removed, with `RemoveMember` of `client:<name>`."""


class BearerCreated(Message, frozen=True):
    """The only time that the bearer token is told: the coordinator keeps a hash of it."""

    identity: IdentityText
    bearer: str
    expires_at: UnixTime = 0.0
    """0: never."""


AnyMemberQuestion = (
    CreateToken | TokenCreated | ListTokens | TokensListed | RemoveToken | TokenRemoved | ListMembers | MembersListed
    | RemoveMember | MemberRemoved | CreateBearer | BearerCreated
)  # fmt: skip
"""Every question about members, and every answer."""
