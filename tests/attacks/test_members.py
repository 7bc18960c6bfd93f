"""Members who try what their role does not allow: viewers, users, and nodes; and bearer tokens that are shown in other ways."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest

from potluck.wire.members import BearerCreated, CreateBearer, MemberRemoved, RemoveMember
from support import attackers
from support.attacked import QUOTA_BYTES, Attacked
from support.eventually import eventually
from support.paho_peer import DENIED, DONE, Peer

TRAIN = {"kind": "train", "model": {"sha256": "0" * 64, "size": 1}, "dataset": "x"}
WRONGS: dict[str, tuple[str, dict[str, Any]]] = {
    # what only others may ask: the least role, and the question
    "remove a member": ("operator", {"type": "RemoveMember", "identity": "node:node-1"}),
    "remove the operator": ("operator", {"type": "RemoveMember", "identity": "client:operator"}),
    "make a token": ("operator", {"type": "CreateToken", "role": "operator"}),
    "list the tokens": ("operator", {"type": "ListTokens"}),
    "take a token": ("operator", {"type": "RemoveToken", "token_id": "0" * 10}),
    "make a bearer": ("operator", {"type": "CreateBearer", "name": "me", "role": "operator"}),
    "delete a model": ("operator", {"type": "DeleteModel", "model": "m:1"}),
    "undeploy": ("operator", {"type": "Undeploy", "model": "m"}),
    "promote": ("operator", {"type": "Promote", "model": "m:1"}),
    "roll back": ("operator", {"type": "RollBack", "model": "m"}),
    "rename": ("operator", {"type": "SetAlias", "model": "m:1", "alias": "prod"}),
    "remove data": ("operator", {"type": "RemoveDataset", "name": "x"}),
    "submit": ("user", {"type": "SubmitJob", "job": TRAIN}),
    "cancel": ("user", {"type": "CancelJob", "job_id": "x"}),
    "stop training": ("user", {"type": "StopTraining", "job_id": "x"}),
    "add data": ("user", {"type": "AddDataset", "name": "x", "manifest": {"sha256": "0" * 64, "size": 1}}),
    "infer": ("user", {"type": "Infer", "model": "m", "inputs": []}),
}
RANKS = {"eve": 1, "ann": 2}
NEEDED = {"user": 2, "operator": 3}


class Asking:
    """Somebody with an MQTT library who asks the coordinator, and all that is answered."""

    def __init__(self, home: Attacked, name: str, peer: Peer) -> None:
        self.name, self.peer = name, peer
        self.root = f"{home.topics.root}/clients/{name}"
        self.inbox = f"{self.root}/attack/inbox"

    @classmethod
    async def of(cls, home: Attacked, name: str, client_id: str = "") -> Asking:
        made = cls(home, name, await home.peer(name, client_id))
        await made.peer.subscribe(f"{made.root}/+/inbox")
        return made

    async def ask(self, question: dict[str, Any], leaf: str = "coordinator/inbox") -> dict[str, Any]:
        number = f"q{len(self.peer.got)}"
        asked = {"id": number, "reply_to": self.inbox} | question
        assert await self.peer.publish(f"{self.root}/to/{leaf}", json.dumps(asked).encode()) == DONE

        def answer() -> dict[str, Any] | None:
            said = (json.loads(payload) for topic, payload in self.peer.got if topic.endswith("/inbox"))
            return next((one for one in said if one.get("id") == number), None)

        found = await eventually(answer)
        assert found is not None
        return found


def code_of(answer: dict[str, Any]) -> str:
    return answer["error"]["code"] if answer["type"] == "RequestFailed" else ""


@pytest.mark.parametrize("who", ["eve", "ann"])
async def test_no_role_is_exceeded(home: Attacked, who: str) -> None:
    """On each way to ask: the bus, HTTP with a certificate, HTTP with a bearer token; and not at the broker's door either."""
    members = home.members
    made = home.cluster.ask(CreateBearer(name=f"bot-of-{who}", role="viewer" if who == "eve" else "user"))
    assert isinstance(made, BearerCreated)
    asking = await Asking.of(home, who)
    try:
        for what, (needed, question) in WRONGS.items():
            if RANKS[who] >= NEEDED[needed]:
                continue
            assert code_of(await asking.ask(question)) == "not_allowed", f"{who} could {what} on the bus"
            for bearer in ("", made.bearer):
                named = {"Authorization": f"Bearer {bearer}"} if bearer else {}
                status, answer = await asyncio.to_thread(
                    home.ask, "" if bearer else who, "/v1/control", question, **named
                )
                assert status == 403, f"{who} could {what} over HTTP: {answer}"
                assert f"needs the role {needed!r}" in answer["error"]
        for topic in (
            home.topics.jobs_submit, home.topics.coordinator_inbox, f"{home.topics.root}/clients/bob/to/coordinator/inbox",
            home.topics.node("node-1", "inbox"), home.topics.node("node-1", "status"), home.topics.coordinator_status,
            home.topics.coordinator_proof, f"{home.topics.root}/clients/bob/attack/inbox", "$SYS/broker/version",
        ):  # fmt: skip
            assert await asking.peer.publish(topic, b'{"type": "ListNodes"}') == DENIED, topic
        if who == "eve":
            for leaf, wrong in (("jobs/submit", "submit"), ("models/m/infer", "infer")):
                assert code_of(await asking.ask(WRONGS[wrong][1], leaf)) == "not_allowed"
            for path in ("/models/m/infer", "/models/m/classify", "/v1/models/m:predict", "/v2/models/m/infer"):
                assert home.ask(who, path, {})[0] == 403
            assert home.ask(who, f"/blobs/{hashlib.sha256(b'x').hexdigest()}", b"x", method="PUT")[0] == 403
    finally:
        asking.peer.close()
        home.cluster.ask(RemoveMember(identity=made.identity))
    assert home.members == members
    assert home.states["node-1"] == "online"


async def test_a_node_is_no_client(home: Attacked) -> None:
    for question in ({"type": "ListNodes"}, {"type": "ListMembers"}, *(question for _, question in WRONGS.values())):
        assert home.ask("mallory", "/v1/control", question)[0] == 403
    for path in ("/models", "/metrics", "/v1/events", "/openapi.json", "/"):
        assert home.ask("mallory", path)[0] == 403
    data = b"of a node"
    assert home.ask("mallory", f"/blobs/{hashlib.sha256(data).hexdigest()}", data, method="PUT")[0] == 403
    mallory = await home.peer("mallory")
    try:
        for topic in (
            f"{home.topics.root}/clients/mallory/to/coordinator/inbox", f"{home.topics.root}/clients/ann/to/jobs/submit",
            home.topics.coordinator_inbox, home.topics.node("node-1", "outbox"), home.topics.node("node-1", "inbox"),
            home.topics.node("mallory", "inbox"), home.topics.coordinator_proof,
        ):  # fmt: skip
            assert await mallory.publish(topic, b'{"type": "ListNodes"}') == DENIED, topic
    finally:
        mallory.close()


async def test_in_its_own_outbox_a_node_speaks_for_nobody_else(home: Attacked) -> None:
    """The names in messages are those of another node, and the topic is its own."""
    before = home.states
    mallory = await home.peer("mallory")
    others = {"node_id": "node-1", "session": "forged"}
    try:
        for leaf, said in (
            ("status", {"type": "NodeStatus", "state": "offline", "left": True}),
            ("status", {"type": "NodeStatus", "state": "online", "http": ["https://127.0.0.1:9"]}),
            ("telemetry", {"type": "NodeTelemetry", "cpu_percent": 1.0, "memory_used_bytes": 1, "memory_available_bytes": 1}),
        ):  # fmt: skip
            forged = json.dumps(said | others).encode()
            assert await mallory.publish(home.topics.node("mallory", leaf), forged) == DONE
        # what is asked after it is answered after it
        asking = await Asking.of(home, "ann")
        assert (await asking.ask({"type": "ListNodes"}))["type"] == "NodesListed"
        asking.peer.close()
        assert home.states == before
    finally:
        mallory.close()


async def test_no_answer_goes_where_the_caller_has_no_inbox(home: Attacked) -> None:
    root = home.topics.root
    ann, bob = await Asking.of(home, "ann"), await Asking.of(home, "bob")
    try:
        await bob.peer.subscribe("#", "$SYS/#")
        for number, reply_to in enumerate(
            (
                bob.inbox, f"{root}/clients/bob/+/inbox", home.topics.node("node-1", "inbox"), home.topics.coordinator_status,
                home.topics.coordinator_proof, f"{root}/clients/ann/to/inbox", f"{root}/clients/ann/to/coordinator/inbox",
                f"{root}/clients/ann/../bob/inbox", f"{root}/clients/ann", "$SYS/broker/version", "elsewhere", "#",
            )
        ):  # fmt: skip
            asked = {"type": "ListNodes", "id": f"strange-{number}", "reply_to": reply_to}
            assert await ann.peer.publish(f"{ann.root}/to/coordinator/inbox", json.dumps(asked).encode()) == DONE
        # also by the property of MQTT 5, which brokers know nothing of
        assert (
            await ann.peer.publish(f"{ann.root}/to/coordinator/inbox", b'{"type": "ListNodes"}', answer_to=bob.inbox)
            == DONE
        )
        assert (await bob.ask({"type": "ListNodes"}))["type"] == "NodesListed"
        assert (await ann.ask({"type": "ListNodes"}))["type"] == "NodesListed"
    finally:
        ann.peer.close()
        bob.peer.close()
    for asking in (ann, bob):
        answers = {json.loads(payload)["id"] for topic, payload in asking.peer.got if topic.endswith("/inbox")}
        assert len(answers) == 1, "only what it has asked itself"
        assert not any(b"strange-" in payload for _, payload in asking.peer.got)
    assert "answer withheld" in home.log()
    assert "message not taken" not in home.log("node-1")


async def test_blobs_of_others_and_too_many(home: Attacked) -> None:
    def put(who: str, data: bytes, name: bytes = b"") -> int:
        return int(home.ask(who, f"/blobs/{hashlib.sha256(name or data).hexdigest()}", data, method="PUT")[0])

    secret = b"of bob"
    assert put("bob", secret) == 201
    path = f"/blobs/{hashlib.sha256(secret).hexdigest()}"
    assert home.ask("bob", path) == (200, secret)
    nothing = home.ask("ann", f"/blobs/{'0' * 64}")
    there = home.ask("ann", path)
    assert (there[0], nothing[0]) == (404, 404)
    assert set(there[1]) == set(nothing[1]), "nobody learns what is there"
    assert put("ann", b"bad", b"good") == 409, "bytes that are not what they are called"
    assert home.ask("ann", f"/blobs/{hashlib.sha256(b'good').hexdigest()}")[0] == 404
    # a disk is filled by its owner only
    statuses = [put("ann", bytes([number]) * (QUOTA_BYTES // 4)) for number in range(8)]
    assert statuses == [201] * 4 + [507] * 4
    assert put("bob", b"room for others") == 201


async def announce(home: Attacked, mallory: Peer, data: str) -> None:
    """Let mallory say that it has these data, so that jobs with them are accepted: nobody ever works at them."""
    born = {"type": "NodeStatus", "node_id": "mallory", "session": "m1", "state": "online"}
    kept = {"name": data, "format": {"kind": "arrays", "arrays": []}, "count": 1}
    capacity = {"hostname": "x", "system": "x", "cores": 1, "memory_bytes": 2**30}
    has = {"type": "NodeCapacity", "node_id": "mallory", "capacity": capacity, "data": [kept]}
    for leaf, said in (("status", born), ("capacity", has)):
        assert await mallory.publish(home.topics.node("mallory", leaf), json.dumps(said).encode()) == DONE
    await eventually(lambda: home.states.get("mallory") == "online")


async def test_a_user_ends_no_job_of_another(home: Attacked) -> None:
    model = b"never looked at"
    sha256 = hashlib.sha256(model).hexdigest()
    ann, bob, mallory = await Asking.of(home, "ann"), await Asking.of(home, "bob"), await home.peer("mallory")
    try:
        home.ask("bob", f"/blobs/{sha256}", model, method="PUT")
        await announce(home, mallory, "rare")
        job = {"kind": "train", "model": {"sha256": sha256, "size": len(model)}, "dataset": "node:rare"}
        accepted = await bob.ask({"type": "SubmitJob", "job": job}, "jobs/submit")
        assert accepted["type"] == "JobAccepted", accepted
        for what in ("CancelJob", "StopTraining"):
            question = {"type": what, "job_id": accepted["job_id"]}
            assert code_of(await ann.ask(question)) == "not_allowed"
            assert home.ask("ann", "/v1/control", question)[0] == 403
        assert (await bob.ask({"type": "CancelJob", "job_id": accepted["job_id"]}))["state"] == "cancelled"
        assert await mallory.publish(home.topics.node("mallory", "status"), b"", retain=True) == DONE
    finally:
        mallory.close()
        ann.peer.close()
        bob.peer.close()


async def test_a_bearer_token_counts_in_its_header_only_and_in_its_time(home: Attacked) -> None:
    made = home.cluster.ask(CreateBearer(name="bot", role="operator"))
    short = home.cluster.ask(CreateBearer(name="short", role="operator", ttl_seconds=0.5))
    assert isinstance(made, BearerCreated)
    assert isinstance(short, BearerCreated)

    def metrics(**options: Any) -> int:
        return int(home.ask("", options.pop("path", "/metrics"), **options)[0])

    try:
        assert metrics(Authorization=f"Bearer {made.bearer}") == 200
        for path in (f"/metrics?{name}={made.bearer}" for name in ("access_token", "bearer", "token", "Authorization")):
            assert metrics(path=path) == 401
        for headers in (
            {"Cookie": f"Authorization=Bearer {made.bearer}"},
            {"Authorization": f"Basic {made.bearer}"},
            {"Proxy_Authorization": f"Bearer {made.bearer}"},
            {"Potluck_Caller": "client:ann"},
            {"Authorization": f"Bearer {made.bearer[:-1]}"},
            {"Authorization": f"Bearer {made.bearer}0"},
        ):
            assert metrics(**headers) == 401, headers
        # over plain connections it is not even read
        said = f"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {made.bearer}\r\n\r\n".encode()
        assert attackers.says(home.http_port, said, None) == b""
        # it makes no viewer an operator whose certificate is shown with it
        wrong = {"type": "CreateToken"}
        assert home.ask("eve", "/v1/control", wrong, Authorization=f"Bearer {made.bearer}")[0] == 403
        # and is no way to the nodes
        assert (
            attackers.says(
                home.node_port,
                f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {made.bearer}\r\n\r\n".encode(),
                attackers.tls(),
            )
            == b""
        )
        await eventually(lambda: metrics(Authorization=f"Bearer {short.bearer}") == 401)
    finally:
        assert home.cluster.ask(RemoveMember(identity=made.identity)) == MemberRemoved(identity=made.identity)
    assert metrics(Authorization=f"Bearer {made.bearer}") == 401
