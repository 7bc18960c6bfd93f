"""What each member of a closed cluster may ask. Pure: one table.

A `viewer` looks, a `user` also computes, and an `operator` may do everything. In an open cluster everybody may do everything.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from potluck.errors import NotAllowed
from potluck.wire import members, questions
from potluck.wire.values import Message

RANKS: Final = {"viewer": 1, "user": 2, "operator": 3}


class Caller(Struct, frozen=True):
    """Who asks. `identity` is "" in an open cluster, where nobody knows."""

    identity: str = ""
    """As in `potluck.wire.identities`."""
    role: str = "operator"
    """`viewer`, `user` or `operator`."""
    key: str = ""
    """Tells apart the questions of one caller that are repeated: the topic of its answers, or its session."""

    @property
    def known(self) -> bool:
        return bool(self.identity)

    @property
    def asks_as(self) -> str:
        """Whose questions with the same id are the same question; "": nobody knows."""
        return f"{self.identity} {self.key}" if self.identity else self.key

    def owns(self, owner: str) -> bool:
        """Whether what this identity made may be changed: by itself, by operators, and by everybody in an open cluster."""
        return self.may("operator") or (self.known and self.identity == owner)

    def may(self, role: str) -> bool:
        """Whether what needs this role may be done. Raises KeyError for a role that there is not."""
        return RANKS.get(self.role, 0) >= RANKS[role]


ANYBODY = Caller()
"""Stands for each caller of an open cluster."""

NEEDS: Final[dict[type[Message], str]] = {
    questions.ListJobs: "viewer",
    questions.GetJob: "viewer",
    questions.GetHistory: "viewer",
    questions.ListNodes: "viewer",
    questions.ListDatasets: "viewer",
    questions.ListModels: "viewer",
    questions.GetModel: "viewer",
    questions.ListDeployments: "viewer",
    questions.ListEvents: "viewer",
    questions.FollowEvents: "viewer",
    questions.SubmitJob: "user",
    questions.CancelJob: "user",
    questions.StopTraining: "user",
    questions.AddDataset: "user",
    questions.RegisterModel: "user",
    questions.FindReplicas: "user",
    questions.Infer: "user",
    questions.CancelInfer: "user",
    questions.RemoveDataset: "operator",
    questions.SetAlias: "operator",
    questions.RemoveAlias: "operator",
    questions.TagModel: "operator",
    questions.DeleteModel: "operator",
    questions.Undeploy: "operator",
    questions.Promote: "operator",
    questions.RollBack: "operator",
    members.CreateToken: "operator",
    members.ListTokens: "operator",
    members.RemoveToken: "operator",
    members.ListMembers: "viewer",
    members.RemoveMember: "operator",
    members.CreateBearer: "operator",
}
"""The least role for each question. What is no question of this table needs an operator: a new one cannot be forgotten by mistake.

A user may cancel and stop its own jobs only; `Control` looks at whose they are.
"""


def changes(question: type[Message]) -> bool:
    """Whether a question may change something for others: who asks it stands in the log."""
    return NEEDS.get(question, "operator") != "viewer" and question is not questions.FindReplicas


def check(caller: Caller, question: type[Message]) -> None:
    """Raises NotAllowed, which names the role that is needed."""
    needed = NEEDS.get(question, "operator")
    if not caller.may(needed):
        raise NotAllowed(lacking(caller, question.__name__, needed))


def lacking(caller: Caller, what: str, needed: str) -> str:
    """What to tell a caller whose role is too low, and how an operator gives it another one."""
    name = caller.identity.partition(":")[2]
    member = f" --name {name}" if name else ""
    return (
        f"{what} needs the role {needed!r}, and {caller.identity or 'this caller'} is a {caller.role}: an operator gives it the role with "
        f"`potluck token create --role {needed}{member}` and the `potluck join` that this shows"
    )
