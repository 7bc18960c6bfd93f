"""Who may ask the coordinator what, and whose answers, jobs and waiting questions are whose."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.callers import Callers
from coordinator.control import Control, Later
from coordinator.requests import LATER_EACH, Requests
from potluck.blobs.store import BlobStore
from potluck.bus.exchange import Envelope
from potluck.errors import InvalidData, InvalidRequest, NotAllowed, NotFound, Overloaded, PotluckError
from potluck.wire import codec
from potluck.wire.jobs import Evaluate
from potluck.wire.members import BearerCreated, CreateBearer
from potluck.wire.messages import AnyMessage
from potluck.wire.questions import (
    AddDataset,
    CancelJob,
    FindReplicas,
    FollowEvents,
    Infer,
    ListEvents,
    RegisterModel,
    RemoveAlias,
    StopTraining,
    SubmitJob,
)
from potluck.wire.roles import NEEDS, RANKS, Caller
from potluck.wire.values import DataFormat, Dataset, DataShard, Message
from support.eventually import eventually

GOLDEN = Path(__file__).parents[2] / "contract" / "golden"
KINDS: list[type[Message]] = list(AnyMessage.__args__)
INBOX = "potluck/v1/home/clients/ann/1/inbox"
ANN, BOB = Caller("client:ann", "user", "k"), Caller("client:bob", "user", "k")
CHIEF = Caller("client:chief", "operator", "k")


class Reached(InvalidRequest):
    code = "reached"


class Work:
    """Stands for all that Control has: whatever is asked of it is noted, and fails."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.reached.append(name)
        raise Reached(name)

    async def answer(self, message: Message, caller: Caller) -> Message:
        self.reached.append("members")
        raise Reached("members")


def control(work: Any, **parts: Any) -> Control:
    given = dict.fromkeys(
        ("dispatcher", "registry", "serving", "membership", "deletion", "packed", "holders", "store", "urls", "sync",
         "events", "members"), work,
    )  # fmt: skip
    return Control(**{**given, **parts}, clock=lambda: 0.0)


class Replies:
    def __init__(self) -> None:
        self.codes: list[str] = []
        self.answers: list[Message] = []

    def reply(self, question: Envelope, answer: Message) -> None:
        self.answers.append(answer)

    def refuse(self, question: Envelope, error: PotluckError) -> None:
        self.codes.append(error.code)


def requests(work: Any, replies: Any, role: str | None = "operator", **parts: Any) -> Requests:
    async def send(question: Envelope, answer: Message) -> None:
        replies.reply(question, answer)

    return Requests(replies, control(work, **parts), send, Callers(lambda identity: role))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_every_message_for_every_role(kind: type[Message]) -> None:
    message, _ = codec.decode(next(GOLDEN.glob(f"{kind.__name__}[-.]*msgpack")).read_bytes())
    assert type(message) is kind
    for role in (None, "node", "coordinator", "nonsense", *RANKS):
        work, replies = Work(), Replies()
        asked = requests(work, replies, role)
        asked.on_request(Envelope("t", message, reply_to=INBOX, caller="client:ann"))
        if role is None:
            assert replies.codes == ["not_authenticated"]
        elif RANKS.get(role, 0) < RANKS[NEEDS.get(kind, "operator")]:
            assert replies.codes == ["not_allowed"]
        else:
            assert not {"not_allowed", "not_authenticated"} & set(replies.codes)
            continue
        assert work.reached == []


async def test_who_changes_something_stands_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    asking = control(Work())
    for question in (RemoveAlias(model="m:prod"), FindReplicas(model="m"), ListEvents()):
        for caller in (CHIEF, Caller(key="k")):
            with contextlib.suppress(Reached):
                asking.answer(question, caller)
    said = [record.getMessage() for record in caplog.records if record.name == "coordinator.control"]
    assert said == ["asked caller=client:chief role=operator type=RemoveAlias"]


async def test_refused_questions_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    asked = requests(Work(), Replies(), "viewer")
    for name in ("ann", "ann", "bob"):
        asked.on_request(Envelope("t", RemoveAlias(model="m:prod"), reply_to=INBOX, caller=f"client:{name}"))
    asked.on_request(Envelope("t", ListEvents(), reply_to=INBOX, caller="client:cat"))
    said = [record.getMessage() for record in caplog.records if record.name == "coordinator.callers"]
    assert said == [f"refused who=client:{name} what=RemoveAlias code=not_allowed" for name in ("ann", "bob")]


async def test_who_is_not_proved_is_nobody() -> None:
    work, replies = Work(), Replies()
    requests(work, replies).on_request(Envelope("t", ListEvents(id="q"), reply_to=INBOX))
    assert (replies.codes, work.reached) == (["not_authenticated"], [])


# --- jobs ---------------------------------------------------------------------------------------------------------------------


class Jobs:
    """A dispatcher with a job of ann, and one of nobody who is known."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.submitted: list[tuple[str, str]] = []

    def job(self, job_id: str) -> Any:
        owner = {"of-ann": "client:ann", "of-nobody": ""}.get(job_id)
        if owner is None:
            raise NotFound(job_id)
        return SimpleNamespace(job_id=job_id, submitted=SimpleNamespace(owner=owner))

    def cancel(self, job_id: str) -> str:
        self.ended.append(job_id)
        return job_id

    stop = cancel

    def described(self, job: str) -> Message:
        return Message(id=job)

    def submit(self, spec: Any, request_id: str, owner: str) -> Any:
        self.submitted.append((request_id, owner))
        return SimpleNamespace(job_id="j", submitted=SimpleNamespace(spec=spec))


@pytest.mark.parametrize("kind", [CancelJob, StopTraining])
@pytest.mark.parametrize(
    ("caller", "job_id", "may"),
    [
        (ANN, "of-ann", True),
        (BOB, "of-ann", False),
        (CHIEF, "of-ann", True),
        (ANN, "of-nobody", False),
        (CHIEF, "of-nobody", True),
        (Caller(key="k"), "of-ann", True),
        (Caller(key="k"), "of-nobody", True),
    ],
)
def test_a_user_ends_its_own_jobs_only(kind: type[Any], caller: Caller, job_id: str, may: bool) -> None:
    jobs = Jobs()
    asking = control(Work(), dispatcher=jobs)
    if may:
        assert asking.answer(kind(job_id=job_id), caller) == Message(id=job_id)
    else:
        with pytest.raises(NotAllowed, match="operators may end it"):
            asking.answer(kind(job_id=job_id), caller)
    assert jobs.ended == [job_id] * may


def test_whoever_submits_a_job_owns_it_and_nobody_gets_anothers_by_its_id() -> None:
    jobs = Jobs()
    asking = control(Work(), dispatcher=jobs)
    question = SubmitJob(id="q", job=Evaluate(model="m", dataset="d"))
    for caller in (ANN, BOB, Caller(key="k"), Caller()):
        asking.answer(question, caller)
    assert jobs.submitted == [
        ("client:ann k q", "client:ann"),
        ("client:bob k q", "client:bob"),
        ("k q", ""),
        ("", ""),
    ], "in an open cluster as before: journals hold these"


# --- answers that are kept ------------------------------------------------------------------------------------------------------


def test_kept_answers_are_a_members_own() -> None:
    asking = control(Work())
    made: list[str] = []

    def once(message: Message, caller: Caller) -> Message:
        made.append(caller.identity)
        return Message(id=f"{caller.identity} {len(made)}")

    asking._answer_once = once  # type: ignore[method-assign]
    question = RemoveAlias(id="q", model="m:prod")
    chiefs = [Caller(f"client:{name}", "operator", "k") for name in ("a", "b")]
    for _ in range(2):
        assert [asking.answer(question, one) for one in chiefs] == [Message(id="client:a 1"), Message(id="client:b 2")]
    with pytest.raises(NotAllowed):
        asking.answer(question, Caller("client:a", "user", "k"))


class Bearers:
    """Makes a bearer token at each question, and at first fails once."""

    def __init__(self) -> None:
        self.made = 0
        self.let = asyncio.Event()

    async def answer(self, message: Message, caller: Caller) -> Message:
        number = self.made = self.made + 1
        if number == 1:
            raise Overloaded("not now")
        await self.let.wait()
        return BearerCreated(identity="client:x", bearer=f"b{number}")


async def test_a_token_is_made_once_however_often_it_is_asked_for() -> None:
    members = Bearers()
    asking = control(Work(), members=members)
    question = CreateBearer(id="q", name="x")

    def asked(caller: Caller) -> asyncio.Task[Message]:
        later = asking.answer(question, caller)
        assert isinstance(later, Later)
        return asyncio.ensure_future(later.answer())  # type: ignore[arg-type]

    with pytest.raises(Overloaded):
        await asked(CHIEF)
    first, given_up, again, other = (asked(one) for one in (CHIEF, CHIEF, CHIEF, Caller("client:b", "operator", "k")))
    await asyncio.sleep(0)
    given_up.cancel()
    members.let.set()
    answers = [await one for one in (first, again, other)]
    assert [one.bearer for one in answers if isinstance(one, BearerCreated)] == ["b2", "b2", "b3"]
    assert await asked(CHIEF) == answers[0]


async def test_an_open_cluster_has_no_members() -> None:
    with pytest.raises(InvalidRequest, match="this cluster is open"):
        control(Work(), members=None).answer(CreateBearer(name="x"))


# --- limits of each -------------------------------------------------------------------------------------------------------------


async def test_questions_that_wait_are_counted_for_each_member() -> None:
    let = asyncio.Event()

    async def listed(after: int, last: int) -> Message:
        await let.wait()
        return Message(id="listed")

    replies = Replies()
    asked = requests(Work(), replies, events=SimpleNamespace(listed=listed))
    running = asyncio.create_task(asked.run())

    def ask(name: str, count: int) -> None:
        for number in range(count):
            question = ListEvents(id=str(number), after=0)
            asked.on_request(Envelope("t", question, reply_to=INBOX, caller=f"client:{name}"))

    ask("ann", LATER_EACH + 2)
    assert replies.codes == ["overloaded"] * 2
    ask("bob", 1)
    assert len(replies.codes) == 2
    let.set()
    await eventually(lambda: len(replies.answers) == LATER_EACH + 1)
    ask("ann", LATER_EACH)
    await eventually(lambda: len(replies.answers) == 2 * LATER_EACH + 1)
    assert len(replies.codes) == 2
    assert not asked._pending
    running.cancel()
    await asyncio.wait([running])


def test_events_are_followed_as_a_member_whatever_its_processes_are_called() -> None:
    keys: list[tuple[str, str]] = []
    events = SimpleNamespace(follow=lambda after, seconds, key: keys.append(key))
    asking = control(Work(), events=events)
    for key in ("one", "two"):
        asking.answer(FollowEvents(id="q", seconds=1.0), Caller("client:ann", "viewer", key))
    asking.answer(FollowEvents(id="q", seconds=1.0), Caller(key="three"))
    assert keys == [("client:ann", "one q"), ("client:ann", "two q"), ("three", "q")]
    with pytest.raises(InvalidRequest):
        asking.answer(FollowEvents(id="q", seconds=1.0), Caller("client:ann", "viewer"))


def test_to_check_who_asks_takes_no_time() -> None:
    """An inference takes 1.8 ms: this is a thousandth of it, or there is a fault. The least of several runs, in CPU time."""
    callers = Callers({"client:ann": "user"}.get)
    spent = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(1000):
            callers.check("client:ann", Infer)
        spent.append((time.process_time() - began) / 1000)
    assert min(spent) < 20e-6


def test_nobody_names_what_another_has_sent(tmp_path: Path) -> None:
    """Whatever has a name, every user may get: and it would tell which blobs are here."""
    store = BlobStore(tmp_path, 2**20)
    model, part = store.put_bytes(b"model"), store.put_bytes(b"part")
    dataset = Dataset(name="d", format=DataFormat(kind="arrays"), count=1, shards=(DataShard(blob=part, count=1),))
    manifest = store.put_bytes(codec.pack(dataset))
    mine = {"client:ann": {model.sha256, manifest.sha256, part.sha256}, "client:bob": {manifest.sha256}}
    asking = control(
        Work(), store=store, urls=lambda: ("https://c",), may_get=lambda identity, sha256: sha256 in mine[identity]
    )
    for question, why in (
        (RegisterModel(name="m", model=model), "model blob"),
        (AddDataset(name="d", manifest=manifest), "1 of 1 blob"),
    ):
        with pytest.raises(Reached):
            asking.answer(question, ANN)
        with pytest.raises((NotFound, InvalidData), match=why):
            asking.answer(question, BOB)
        with pytest.raises(Reached):
            asking.answer(question)  # an open cluster
