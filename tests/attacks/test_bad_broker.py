"""The broker has turned bad: it sees, keeps and alters whatever passes through it, and has rights to all. It cannot command a node."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from potluck.security import certificates, folder, signing
from potluck.wire import codec, commands, seals
from potluck.wire.births import CoordinatorProof, CoordinatorStatus, Revoked, Standing
from potluck.wire.reports import HoldFailed, InferenceFinished, LeaseTaken, ModelLoadFailed
from potluck.wire.seals import PROOF_PURPOSE, Seal
from potluck.wire.tasks import ExportTask
from potluck.wire.values import BlobRef, Message
from support.attacked import Attacked
from support.bad_broker import BadBroker, Held, bad_broker, seal_of, sealed
from support.closed import Authority
from support.eventually import eventually

BLOB = BlobRef(sha256="0" * 64, size=1)
QUESTION = commands.RunInference(id="q", replica_id="nobody", requests=((),))
"""A node answers it at once, whatever it has loaded."""
LEASE = commands.LeaseShard(
    epoch=1, job_id="j", shard_id="s", attempt_id="a", lease_seconds=10, task=ExportTask(model=BLOB, weights=BLOB)
)
ALL: tuple[Message, ...] = (
    LEASE, QUESTION, commands.Rebirth(), commands.WithdrawLease(epoch=1, attempt_id="a", reason="x"),
    commands.AcknowledgeResult(attempt_id="a", epoch=1), commands.ForgetJob(job_id="j", epoch=1),
    commands.LoadModel(epoch=1, replica_id="r", name="m", model=BLOB), commands.UnloadModel(epoch=1, replica_id="r"),
    commands.CancelInference(replica_id="r"), commands.HoldBlob(epoch=1, blob=BLOB), commands.ReleaseBlob(epoch=1, sha256="0" * 64),
)  # fmt: skip


@pytest.fixture(scope="module")
def bad(home: Attacked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BadBroker]:
    with bad_broker(home, tmp_path_factory.mktemp("bad")) as broker:
        yield broker


@dataclass
class Keys:
    """What the test can sign with: as the real coordinator would, which no attacker can; and with keys of its own."""

    held: Held
    like: Seal
    """Of a command that the coordinator has sent."""
    real: signing.Signer
    own: signing.Signer
    number: int

    def sealed(self, message: Message = QUESTION, *, own: bool = False, **changes: Any) -> commands.Sealed:
        self.number += 1
        now = time.time()
        fresh = replace(
            self.like, number=self.number, sent_at=now, valid_until=now + seals.VALID_SECONDS, session=self.held.session
        )
        closed = seals.close(replace(fresh, **changes), codec.encode(message), (self.own if own else self.real).sign)
        return commands.Sealed(seal=closed.seal, body=closed.body, signature=closed.signature)


async def keys(held: Held) -> Keys:
    both = folder.secret(held.broker.home.cluster.folder / "coordinator" / "identity" / "commands.pem")
    real = signing.Signer(both[: both.index(b"-----BEGIN CERTIFICATE-----")])
    like = seal_of(sealed((held.commands() or [await held.provoked()])[0]))
    # ahead of the coordinator's numbers, but so that its own still count
    KEPT_NUMBERS.setdefault(held.session, like.number + seals.WINDOW // 4)
    return Keys(held, like, real, signing.Signer(signing.new_key()), KEPT_NUMBERS[held.session])


KEPT_NUMBERS: dict[str, int] = {}
"""The highest number that this test has used, by the node's session."""


@asynccontextmanager
async def nothing_done(held: Held, count: int, *reasons: str) -> AsyncIterator[Keys]:
    """Within the block, the node gets `count` messages and takes none; afterwards it takes what its coordinator has sealed."""
    with_keys = await keys(held)
    await asyncio.sleep(0)
    said, births, refused = len(held.heard("outbox")), len(held.heard("status")), len(held.refused())
    yield with_keys
    await eventually(lambda: len(held.refused()) >= refused + count)
    # what was sent first is done first: this would come after it
    await held.tell(with_keys.sealed(replace(QUESTION, id=f"goes on {said}")))
    await eventually(lambda: len(held.heard("outbox")) > said)
    KEPT_NUMBERS[held.session] = with_keys.number
    answers = held.heard("outbox")[said:]
    assert [one.id for one in answers if isinstance(one, InferenceFinished)] == [f"goes on {said}"], answers
    assert len(answers) == 1
    assert len(held.heard("status")) == births
    why = held.refused()[refused:]
    assert len(why) == count
    for reason in reasons:
        assert any(reason in one for one in why), (reason, why)


async def test_commands_without_a_seal_do_nothing(bad: BadBroker) -> None:
    async with bad.held() as held, nothing_done(held, 2 * len(ALL) + 1, "not sealed"):
        for message in ALL:
            await held.tell(message)
            await held.tell(codec.encode(message, "json"))
        await held.tell(codec.encode(LEASE), retain=True)
        await held.tell(b"", retain=True)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


async def test_altered_and_foreign_seals_do_nothing(bad: BadBroker) -> None:
    async with bad.held() as held:
        with_keys = await keys(held)
        real = sealed(await held.provoked())  # a Rebirth, which the node has followed
        await eventually(lambda: len(held.heard("status")) >= 2)
        KEPT_NUMBERS[held.session] = with_keys.number
        lease = codec.encode(LEASE)
        made: list[commands.Sealed] = [
            replace(real, body=lease),
            replace(real, body=b""),
            replace(real, signature=b""),
            replace(real, signature=bytes(64)),
            replace(real, seal=b""),
            replace(real, seal=msgspec.msgpack.encode({**msgspec.structs.asdict(seal_of(real)), "number": 9999})),
            *(replace(real, signature=flipped(real.signature, at)) for at in range(0, 64, 7)),
            *(replace(real, seal=flipped(real.seal, at)) for at in range(0, len(real.seal), 17)),
            *(replace(real, body=flipped(real.body, at)) for at in range(0, len(real.body), 5)),
        ]
        async with nothing_done(held, len(made) + 2, "is not signed by this cluster"):
            for message in made:
                await held.tell(message)
            await held.tell(with_keys.sealed(own=True))
            await held.tell(with_keys.sealed(own=True, term=99, number=1))


async def test_what_was_sealed_for_something_else_does_nothing(bad: BadBroker) -> None:
    """All of these are signed by the coordinator's own key: recorded, or meant for another."""
    async with bad.held() as held:
        with_keys, now = await keys(held), time.time()
        others: dict[str, dict[str, Any]] = {
            "came on another": {"topic": held.topics.node("node-1", "inbox")},
            "in another session or cluster": {"audience": "node:node-1"},
            "another session or cluster": {"session": "one before"},
            "or cluster": {"cluster_id": "another"},
            "of term 0": {"term": with_keys.like.term - 1},
            "two coordinators speak": {"sender": "another"},
            "too late": {"sent_at": now - 400.0, "valid_until": now - 370.0},
            "not for commands": {"purpose": PROOF_PURPOSE},
        }
        async with nothing_done(held, len(others) + 1, *others) as again:
            for changes in others.values():
                await held.tell(again.sealed(**changes))
            await held.tell(again.sealed(kind="none"))


async def test_a_command_counts_once(bad: BadBroker) -> None:
    async with bad.held() as held:
        recorded = await held.provoked()
        await eventually(lambda: len(held.heard("status")) >= 2)
        await asyncio.sleep(1.1)  # a node is born again once a second at most, whoever asks
        async with nothing_done(held, 5, "came before") as with_keys:
            for _ in range(4):
                await held.tell(recorded)
            await held.tell(json.dumps({"type": "Sealed"}).encode())
            await held.tell(with_keys.sealed(sealed(recorded)))  # a seal around a seal is opened once
            await held.tell(recorded)


async def test_nobody_else_proves_that_he_is_the_coordinator(bad: BadBroker) -> None:
    home = bad.home
    async with bad.held() as held:
        with_keys = await keys(held)
        (shown,) = [payload for topic, payload in held.peer.got if topic == held.topics.coordinator_proof][:1]
        real, _ = codec.decode(shown)
        assert isinstance(real, CoordinatorProof)
        foreign = Authority(home.cluster.cluster)
        pem = foreign.issue(with_keys.own.public_key, certificates.commands_profile("vm"))
        ours = home.authority
        key = with_keys.own.public_key
        theirs = {
            "another CA's": pem,
            # of our own CA, for the very key that signs the proof: only what the certificate is for is wrong
            "a node's for this key": ours.issue(key, certificates.node_profile("mallory")),
            "a client's for this key": ours.issue(key, certificates.client_profile("ann", "operator")),
            "a coordinator's for this key": ours.issue(key, certificates.coordinator_profile("vm")),
            "one for commands that has ended": ours.issue(key, certificates.commands_profile("vm"), days=1, ago_days=2),
            "a node's": home.pair("mallory").read_bytes(),
            "an operator's": home.pair("operator").read_bytes(),
            "the coordinator's for TLS": (
                home.cluster.folder / "coordinator" / "identity" / "coordinator.pem"
            ).read_bytes(),
            "the broker's": (home.cluster.folder / "coordinator" / "broker" / "broker.pem").read_bytes(),
            "the CA's": (home.cluster.folder / "coordinator" / "identity" / "ca.crt").read_bytes(),
            "none": b"none",
        }

        def proof(certificate: bytes, term: int, *revoked: Revoked) -> CoordinatorProof:
            body = codec.encode(
                Standing(session="evil", epoch=term, cluster_id=with_keys.like.cluster_id, revoked=revoked)
            )
            seal = replace(
                with_keys.like, topic=held.topics.coordinator_proof, audience="", session="", sender="evil", term=term,
                number=1, purpose=PROOF_PURPOSE,
            )  # fmt: skip
            closed = seals.close(seal, body, with_keys.own.sign)
            return CoordinatorProof(
                certificate=certificate, seal=closed.seal, body=closed.body, signature=closed.signature
            )

        gone = Revoked("node:mallory", time.time() + 3600)
        forged = [proof(folder.certificate_of(one) if b"CERT" in one else one, 99) for one in theirs.values()]
        forged += [proof(real.certificate, 99, gone), proof(real.certificate, with_keys.like.term, gone)]
        forged += [
            replace(real, body=codec.encode(Standing(session="evil", epoch=99, cluster_id=with_keys.like.cluster_id))),
            replace(real, signature=flipped(real.signature, 3)),
            replace(real, seal=flipped(real.seal, 20)),
        ]
        async with nothing_done(held, 1):
            for one in forged:
                await held.tell(one, held.topics.coordinator_proof, retain=True)
            await held.tell(with_keys.sealed(own=True, sender="evil", term=99, number=1))
        assert "proof of a coordinator refused" in bad.captive.log_path.read_text()
        await held.tell(shown, held.topics.coordinator_proof, retain=True)


async def test_a_forged_coordinator_is_not_obeyed_and_no_plain_word_is_spoken(bad: BadBroker) -> None:
    """Its status says that the cluster is open, and its addresses are plain; so are those in a lease that is sealed."""
    async with bad.held() as held, trap() as caught:
        plain = f"http://127.0.0.1:{caught.port}"
        secured = f"https://127.0.0.1:{caught.port}"
        told = held.heard_on(held.topics.coordinator_status)[-1]
        assert isinstance(told, CoordinatorStatus)
        for changes in (
            {"closed": False, "http": (plain,)},
            {"closed": False, "http": (plain,), "epoch": 999, "session": "evil"},
            {"closed": False, "http": (plain,), "cluster_id": "evil", "epoch": 999, "session": "evil"},
            {"closed": False, "http": (), "cluster_id": ""},
            {"state": "offline"},
            {"version": 99, "newest_version": 99},
        ):
            await held.tell(replace(told, **changes), held.topics.coordinator_status, retain=True)
            async with nothing_done(held, 1) as with_keys:
                await held.tell(LEASE)
        await held.tell(told, held.topics.coordinator_status, retain=True)

        term, said = with_keys.like.term, len(held.heard("outbox"))
        for number, place in enumerate((plain, secured)):
            blob = replace(BLOB, sha256=f"{number}" * 64, holders=(place,))
            lease = replace(
                LEASE, epoch=term, attempt_id=f"a{number}", task=ExportTask(model=blob, weights=blob),
                hints=commands.LeaseHints(http=(place,)),
            )  # fmt: skip
            await held.tell(with_keys.sealed(lease))
            await held.tell(
                with_keys.sealed(commands.LoadModel(epoch=term, replica_id=f"r{number}", name="m", model=blob))
            )
            await held.tell(
                with_keys.sealed(commands.HoldBlob(epoch=term, blob=replace(blob, sha256=f"{number}a" * 32)))
            )

            ended = {LeaseTaken, ModelLoadFailed, HoldFailed}
            await eventually(
                lambda said=said, ended=ended: {type(one) for one in held.heard("outbox")[said:]} >= ended, 30
            )
            said = len(held.heard("outbox"))
            if place == plain:
                assert not caught.heard, "it has spoken without TLS"
        KEPT_NUMBERS[held.session] = with_keys.number
        # with TLS it says hello, and then sees that this is nobody
        assert caught.heard
        assert all(first[:1] == b"\x16" for first in caught.heard)


async def test_what_was_recorded_is_worthless_after_a_restart(bad: BadBroker) -> None:
    async with bad.held() as held:
        recorded = list(held.commands()) or [await held.provoked()]
        with_keys = await keys(held)
        kept = with_keys.sealed()  # never delivered, and valid still
        before, old = len(held.refused()), held.session
        bad.captive.terminate()
        assert bad.captive.wait(15) == 0
        bad.captive.start()
        await eventually(lambda: held.status is not None and held.session != old, 20)
        KEPT_NUMBERS[held.session] = with_keys.number
        await eventually(lambda: len(held.heard("telemetry")) > 0)
        assert len(held.refused()) == before, "the log goes on"
        async with nothing_done(held, len(recorded) + 1, "another session"):
            for payload in recorded:
                await held.tell(payload)
            await held.tell(kept)


class Trap:
    """A server that says nothing, and keeps the first bytes of each connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.heard: list[bytes] = []


@asynccontextmanager
async def trap() -> AsyncIterator[Trap]:
    async def come(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            if data := await reader.read(4096):
                made.heard.append(data)
        writer.close()

    server = await asyncio.start_server(come, "127.0.0.1", 0)
    made = Trap(server.sockets[0].getsockname()[1])
    async with server:
        yield made
