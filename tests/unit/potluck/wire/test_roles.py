"""What each role may ask."""

from __future__ import annotations

import typing

import pytest

from potluck.errors import NotAllowed
from potluck.wire import members, questions
from potluck.wire.members import AnyMemberQuestion, ListMembers, RemoveMember
from potluck.wire.questions import AnyQuestion, CancelJob, Infer, ListJobs, SubmitJob, Undeploy
from potluck.wire.roles import ANYBODY, NEEDS, Caller, check
from potluck.wire.topics import Topics
from potluck.wire.values import Message

ANSWERS = {
    questions.JobAccepted, questions.HistoryListed, questions.JobChanged, questions.JobEnded, questions.JobsListed,
    questions.NodesListed, questions.DatasetAdded, questions.DatasetRemoved, questions.DatasetsListed, questions.ModelRegistered,
    questions.ModelsListed, questions.ModelChanged, questions.ModelsDeleted, questions.DeploymentsListed, questions.Undeployed,
    questions.Inferred, questions.RequestFailed, questions.ReplicasFound, questions.EventsListed,
    members.TokenCreated, members.TokensListed, members.TokenRemoved, members.MembersListed, members.MemberRemoved,
    members.BearerCreated,
}  # fmt: skip


def test_every_question_is_in_the_table() -> None:
    asked = {*typing.get_args(AnyQuestion), *typing.get_args(AnyMemberQuestion)} - ANSWERS
    assert asked == set(NEEDS)


@pytest.mark.parametrize(
    ("role", "kinds"),
    [
        ("viewer", {ListJobs, ListMembers}),
        ("user", {ListJobs, ListMembers, SubmitJob, CancelJob, Infer}),
        ("operator", {ListJobs, ListMembers, SubmitJob, CancelJob, Infer, Undeploy, RemoveMember}),
        ("nothing", set()),
    ],
)
def test_what_a_role_may_ask(role: str, kinds: set[type[Message]]) -> None:
    caller = Caller("client:ann", role)
    allowed = {
        kind
        for kind in (ListJobs, ListMembers, SubmitJob, CancelJob, Infer, Undeploy, RemoveMember)
        if may(caller, kind)
    }
    assert allowed == kinds


def test_whoever_may_not_is_told_what_is_needed() -> None:
    said = "Undeploy needs the role 'operator', and client:ann is a user.*`potluck token create --role operator --name ann`"
    with pytest.raises(NotAllowed, match=said):
        check(Caller("client:ann", "user"), Undeploy)


def test_what_is_no_question_needs_an_operator_and_anybody_of_an_open_cluster_is_one() -> None:
    assert may(ANYBODY, questions.JobAccepted)
    assert not may(Caller("client:ann", "user"), questions.JobAccepted)
    assert not ANYBODY.known


def test_topics_of_a_member_prove_its_name() -> None:
    everybody, ann = Topics("home"), Topics("home", "ann")
    for asked, inner in (
        (ann.coordinator_inbox, everybody.coordinator_inbox),
        (ann.jobs_submit, everybody.jobs_submit),
        (ann.infer("soup"), everybody.infer("soup")),
    ):
        assert asked == f"potluck/v1/home/clients/ann/to/{inner.removeprefix('potluck/v1/home/')}"
        assert everybody.asked_by(asked) == ("ann", inner)
    assert ann.client_inbox("9c3e") == "potluck/v1/home/clients/ann/9c3e/inbox"
    for other in (
        ann.client_inbox("9c3e"),
        everybody.jobs_submit,
        "potluck/v1/home/clients/ann/to",
        "potluck/v1/x/clients/ann/to/a",
    ):
        assert everybody.asked_by(other) == ("", other)
    with pytest.raises(ValueError, match="'to'"):
        ann.client_inbox("to")


def may(caller: Caller, kind: type[Message]) -> bool:
    try:
        check(caller, kind)
    except NotAllowed:
        return False
    return True
