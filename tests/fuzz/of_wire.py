"""What comes over the bus, from an engine and from the network: messages, tensors, packets, frames, tokens, seals, topics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from zeroconf import ServiceInfo

from coordinator.identities.members import AnyIdentityEvent
from coordinator.plans.events import AnyEvent
from coordinator.registry import AnyRegistryEvent
from coordinator.serving.inputs import as_sent, batched, rows_of
from coordinator.serving.records import AnyDeploymentEvent
from fuzz import mutators
from fuzz.judging import Target, hold
from fuzz.samples import sample
from node.engine import frames
from potluck.bus import packets
from potluck.bus.properties import mirror
from potluck.errors import BadMessage, InvalidRequest, InvalidSettings, TooLarge
from potluck.net import broker_rules, discovery
from potluck.wire import addresses, codec, joining, seals, tokens
from potluck.wire.deadlines import deadline
from potluck.wire.questions import ClusterEvent, Infer
from potluck.wire.refs import blob_refs
from potluck.wire.seals import Opener, Sealed, SealRefused
from potluck.wire.tensors import as_lists, packed, plain, to_numpy, unpacked
from potluck.wire.topics import Topics
from potluck.wire.values import BlobRef, Dataset, Signature, TensorSpec

GOLDEN = Path(__file__).parents[1] / "contract" / "golden"
NOW = 1_800_000_000.0
TOPICS = Topics("home")


def golden(*suffixes: str) -> Iterator[bytes]:
    for path in sorted(GOLDEN.iterdir()):
        if path.suffix in suffixes:
            yield path.read_bytes()


def message(data: bytes) -> None:
    """A message that was read can be written and read again, and answered."""
    codec.salvage(data)
    found, _ = codec.decode(data)
    again = codec.pack(found)
    hold(codec.pack(codec.decode(again, limit=1 << 30)[0]) == again, "a message survives msgpack")
    codec.pack(found, "json")
    for ref in blob_refs(found):
        hold(len(ref.sha256) == 64, "a blob has a hash")
    deadline(found, NOW)
    if found.reply_to:
        mirror(found, "msgpack")
        TOPICS.check_reply_to(found.reply_to)


def tensors(data: bytes) -> None:
    """Tensors of a question are checked, and then have the bytes that their shape says."""
    found, _ = codec.decode(data)
    if not isinstance(found, Infer):
        return
    spec = TensorSpec(name="x", datatype="FP32", shape=(-1, 4))
    for tensor in found.inputs:
        rows_of(tensor)
        batched((tensor,), Signature(inputs=(spec,), outputs=()))
    as_sent(found.inputs)
    for tensor in found.inputs:
        if isinstance(tensor.data, BlobRef):
            continue
        array = to_numpy(tensor)
        hold(array.shape == tensor.shape, "an array has the shape of its tensor")
        whole = plain(tensor)
        raw = packed(whole)
        if tensor.datatype != "BYTES":
            hold(len(raw) == array.nbytes, "packed numbers have the size of the array")
        else:
            hold(len(unpacked("x", "BYTES", raw)) == array.size, "packed texts can be told apart")
        codec.pack(as_lists(whole), "json")


def manifest(data: bytes) -> None:
    """The manifest of a data set, which a client writes."""
    found = codec.unpack(data, Dataset)
    hold(codec.pack(codec.unpack(codec.pack(found), Dataset)) == codec.pack(found), "a manifest survives msgpack")


def manifests() -> Iterator[bytes]:
    for full in (False, True):
        yield codec.pack(sample(Dataset, full=full))
        yield codec.pack(sample(Dataset, full=full), "json")


_ROWS: tuple[Any, ...] = (AnyEvent, AnyRegistryEvent, AnyDeploymentEvent, ClusterEvent, AnyIdentityEvent)


def journal_row(data: bytes) -> None:
    """A row of the journal: first the kind, then the bytes. One that cannot be read ends in our error."""
    kind = _ROWS[data[0] % len(_ROWS)] if data else AnyEvent
    found: Any = codec.unpack(data[1:], kind)
    again = codec.pack(found)
    hold(codec.pack(codec.unpack(again, kind)) == again, "a row survives")


def rows() -> Iterator[bytes]:
    for number, kind in enumerate(_ROWS):
        for one in getattr(kind, "__args__", (kind,)):
            for full in (False, True):
                yield bytes([number]) + codec.pack(sample(one, full=full))


def packet(data: bytes) -> None:
    """MQTT's stream gives the same packets however it is cut."""
    cut = data[0] if data else 0
    stream = data[1:]
    whole = packets.Splitter(packets.PACKET_LIMIT_BYTES).feed(stream)
    splitter = packets.Splitter(packets.PACKET_LIMIT_BYTES)
    pieces = [one for place in range(0, len(stream), cut + 1) for one in splitter.feed(stream[place : place + cut + 1])]
    hold(whole == pieces, "packets do not depend on how they arrive")
    for first, body in whole:
        if first & 0xF0 == packets.PUBACK:
            packets.read_puback(body)
        for v5 in (False, True):
            found = packets.read_publish(first, body, v5=v5)
            if found.properties:
                packets.answer_to(found.properties)


def packets_made() -> Iterator[bytes]:
    properties = (
        b"\x03\x00\x10application/json\x08\x00\x03a/b\x09\x00\x02id\x26\x00\x01k\x00\x01v\x0b\x81\x01\x02\0\0\0\x09"
    )
    for at in (b"", b"\0\x07"):
        for tail in (b"", bytes([len(properties)]) + properties):
            yield b"\x03" + packets.publish("potluck/v1/home/jobs/submit", b'{"type":"x"}' * 20, False, tail, at)
    yield b"\0" + packets.puback(b"\0\1") * 3


def frame(data: bytes) -> None:
    """Frames between a node and its engine, whatever the engine is. The first byte says how the stream is cut."""
    cut = data[0] if data else 0
    stream = data[1:]
    whole = frames.FrameSplitter().feed(stream)
    splitter = frames.FrameSplitter()
    pieces = [one for place in range(0, len(stream), cut + 1) for one in splitter.feed(stream[place : place + cut + 1])]
    hold(whole == pieces, "frames do not depend on how they arrive")
    for body in whole:
        frames.number_of(body)
        found: Any
        try:
            found, read = frames.from_engine(body), frames.from_engine
        except BadMessage:
            found, read = frames.to_engine(body), frames.to_engine  # type: ignore[assignment]
        again = frames.encode(found)
        hold(frames.encode(read(again[4:])) == again, "a frame survives")


def frames_made() -> Iterator[bytes]:
    for kind in (*frames.ToEngine.__args__, *frames.FromEngine.__args__):
        for full in (False, True):
            yield b"\x06" + frames.encode(sample(kind, full=full))


def frame_mutated(data: bytes, most: int, seed: int) -> bytes:
    """The body of the first frame as msgpack, and its length made right again."""
    if len(data) < 6 or seed % 5 == 0:
        return mutators.mutated(data, most)
    body = mutators.of_msgpack(data[5:], max(1, most - 5), seed)
    return (data[:1] + frames.LENGTH.pack(len(body)) + body)[:most]


_JOINING: tuple[Any, ...] = (joining.JoinRequest, joining.RenewRequest, joining.Joined)


def join(data: bytes) -> None:
    """What a machine and the coordinator say when it joins: first the kind, then the body."""
    kind = _JOINING[data[0] % len(_JOINING)] if data else joining.JoinRequest
    found = joining.decode(data[1:], kind)
    hold(joining.decode(joining.encode(found), kind) == found, "a body survives")


def joins() -> Iterator[bytes]:
    for number, kind in enumerate(_JOINING):
        yield bytes([number]) + joining.encode(sample(kind, full=True))


def token(data: bytes) -> None:
    """A token that was read is written as it was meant."""
    found = tokens.parse(data.decode(errors="replace"))
    hold(tokens.parse(found.text()) == found, "a token survives")


def tokens_made() -> Iterator[bytes]:
    for places in ((), ("192.168.1.7:7814",), ("a.example:1", "[fe80::1]:65535")):
        yield tokens.JoinToken(bytes(range(16)), places, b"\1" * 5, b"\2" * 16).text().encode()


def token_mutated(data: bytes, most: int, seed: int) -> bytes:
    """A token with the right checksum over whatever it has."""
    found = mutators.mutated(data, most)
    head, sign, fields = found.partition(tokens.PREFIX.encode())
    parts = fields.rsplit(b"-", 1)[0].decode(errors="replace").upper()
    letters = parts.replace("-", "")
    if head or not sign or seed % 4 == 0 or not set(letters) <= set(tokens._VALUES):
        return found
    return f"{tokens.PREFIX}{parts}-{tokens._checksum(tokens._normal(letters))}".encode()[:most]


def sealed(data: bytes) -> None:
    """A sealed command whose signature is right: what it says is checked all the same."""
    opener = Opener("node:n1", "s1", "home-1", lambda signature, signed: True)
    found = msgspec.convert({"seal": data, "body": b"b", "signature": b"s"}, Sealed)
    hold(opener.open(found, "t", now=NOW, elapsed=1.0) == b"b", "the body comes out as it went in")


def seals_made() -> Iterator[bytes]:
    base: dict[str, Any] = {
        "topic": "t",
        "audience": "node:n1",
        "session": "s1",
        "sender": "c1",
        "term": 3,
        "cluster_id": "home-1",
        "number": 1,
        "sent_at": NOW,
        "valid_until": NOW + 30,
        "purpose": seals.PURPOSE,
        "kind": seals.KIND,
    }
    for change in ({}, {"number": 2**53}, {"topic": "other"}, {"term": 0}, {"valid_until": 0.0}, {"kind": "none"}):
        yield msgspec.msgpack.encode({**base, **change})


def topic(data: bytes) -> None:
    """Names in topics, addresses and identities: what is taken has one line, and stays below where it belongs."""
    text = data.decode(errors="surrogateescape")
    TOPICS.is_question(text)
    if addresses.is_address(text):
        hold(text.isascii() and text.isprintable() and "@" not in text and len(text) <= 300, "an address is plain")
    if addresses.is_place(text):
        hold(0 <= int(text.rpartition(":")[2]) < 65536, "a port is a port")
    hold(TOPICS.check_reply_to(text).isprintable(), "a topic for answers is one line")


def topics_made() -> Iterator[bytes]:
    yield from (
        b"potluck/v1/home/clients/c1/inbox",
        b"answers/me",
        b"http://10.0.0.1:80",
        b"[::1]:9",
        b"a.b:1",
        b"$SYS/x",
    )
    yield from (b"potluck/v1/home/models/m/infer", b"https://[fe80::1]:443/", b"potluck/v1/home/jobs/submit", b"node:k")


def rules(data: bytes) -> None:
    """Each member adds its block, and nobody's name adds a line of another kind."""
    identity, _, role = data.decode(errors="surrogateescape").partition("\n")
    member = broker_rules.Member(identity, role)
    for made in (broker_rules.node_rules, broker_rules.client_rules):
        lines = made(TOPICS, [member]).splitlines()[2:]
        hold(all(line == f"user {identity}" or line.startswith("topic ") for line in lines), "a rule is a line")
        hold(sum(line.startswith("user ") for line in lines) <= 1, "a member has one block")
        rights = [line.split(" ", 2)[2] for line in lines if line.startswith("topic ")]
        hold(all(" " not in one and one.startswith(TOPICS.root) for one in rights), "a right is below the cluster")
        if member.kind != "coordinator":
            hold(not any("#" in one for one in rights), "only a coordinator may read all")


def members() -> Iterator[bytes]:
    yield from (
        b"node:kitchen",
        b"client:ann\nuser",
        b"client:bob\nviewer",
        b"coordinator:attic-1f",
        b"x:y",
        b"client:a.b-c_d",
    )


def advertised(data: bytes) -> None:
    """The TXT record of a service. Taken or not, it never raises."""
    info = ServiceInfo(
        discovery.SERVICE_TYPE,
        f"n.{discovery.SERVICE_TYPE}",
        addresses=[b"\x7f\0\0\1"],
        port=1,
        server="n.local.",
        properties=data,  # as it comes from the network
    )
    found = discovery._service(info)  # type: ignore[arg-type]
    if found is None:
        return
    discovery.precedence(found)
    hold(0 <= found.port < 65536 and 0 <= found.broker_port < 65536, "ports are ports")
    hold(found.id.isprintable() and found.broker_host.isprintable(), "names are one line")
    hold(
        0 <= found.memory_bytes < 2**63 and 0 <= found.cores < 2**63 and 0 <= found.founded < 2**63,
        "numbers can be sent",
    )


def records() -> Iterator[bytes]:
    facts = ("id=n1", "cluster=home", "role=coordinator", "port=7814", "broker=1883", "broker_host=h", "cores=4", "v=1")
    more = ("memory=8000000000", "gpus=0", "founded=1790000000", "empty=0")
    for some in (facts, (*facts, *more), ("id=n", "role=node"), ("id=", "role=node"), ("role", "id=x", "port=-1")):
        yield b"".join(bytes([len(one)]) + one.encode() for one in some)


def messages() -> Iterator[bytes]:
    yield from golden(".json", ".msgpack")


def questions() -> Iterator[bytes]:
    for path in (GOLDEN / "Infer.json", GOLDEN / "Infer.msgpack", GOLDEN / "Infer-valid.json"):
        yield path.read_bytes()
    for datatype, shape, data in (
        ("BYTES", [2, 1], ["a", "b"]),
        ("INT8", [2, 2], [[1, 2], [3, 4]]),
        ("BOOL", [2], [True, False]),
        ("FP16", [1, 2], [[0.5, 1]]),
        ("UINT64", [1], [2**63]),
        ("FP64", [0, 3], []),
        ("INT32", [1], b"\0\0\0\1"),
    ):
        inputs = [{"name": "x", "datatype": datatype, "shape": shape, "data": data}]
        yield msgspec.msgpack.encode({"type": "Infer", "id": "1", "reply_to": "a/b", "inputs": inputs})


OURS = (BadMessage, TooLarge, InvalidRequest)

TARGETS = (
    Target("message", message, OURS, messages, mutators.of_message),
    Target("tensors", tensors, OURS, questions, mutators.of_message),
    Target("manifest", manifest, (BadMessage,), manifests, mutators.of_message),
    Target("journal_row", journal_row, (BadMessage,), rows, mutators.plain),
    Target("packet", packet, (BadMessage,), packets_made, mutators.plain),
    Target("frame", frame, (BadMessage, TooLarge), frames_made, frame_mutated),
    Target("join", join, (InvalidRequest,), joins, mutators.plain),
    Target("token", token, (InvalidRequest,), tokens_made, token_mutated),
    Target("sealed", sealed, (SealRefused,), seals_made, mutators.of_msgpack),
    Target("topic", topic, (InvalidRequest,), topics_made, mutators.plain),
    Target("rules", rules, (InvalidSettings,), members, mutators.plain),
    Target("advertised", advertised, (), records, mutators.plain),
)
