"""Bytes <-> messages, in both encodings, and what is refused."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import BadMessage, TooLarge
from potluck.wire import codec
from potluck.wire.commands import RunInference
from potluck.wire.jobs import JobSpec, Train
from potluck.wire.questions import CancelJob, Infer, Inferred, ListJobs, SubmitJob
from potluck.wire.values import INLINE_LIMIT_BYTES, BlobRef, Tensor

text = st.text(st.characters(codec="utf-8"), max_size=50)
tensors = st.builds(
    Tensor,
    name=text,
    datatype=text,
    shape=st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
    data=st.binary(max_size=64),
)


@given(text, text, st.lists(tensors, max_size=4).map(tuple))
def test_msgpack_keeps_everything(request_id: str, reply_to: str, inputs: tuple[Tensor, ...]) -> None:
    message = Infer(id=request_id, reply_to=reply_to, inputs=inputs)
    assert codec.decode(codec.encode(message)) == (message, "msgpack")


@given(text, st.floats(0, 1e11), text)
def test_json_keeps_everything(request_id: str, expires: float, job_id: str) -> None:
    message = CancelJob(id=request_id, expires=expires, job_id=job_id)
    assert codec.decode(codec.encode(message, "json")) == (message, "json")


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda tail: b"{" + tail)))
def test_any_bytes_are_a_message_or_a_bad_message(payload: bytes) -> None:
    with contextlib.suppress(BadMessage):
        codec.decode(payload)
    codec.salvage(payload)


@given(st.binary(max_size=60), st.sampled_from([0x81, 0x83, 0x8F, 0xDE, 0xDF]))
def test_any_msgpack_map_is_a_message_or_a_bad_message(tail: bytes, first: int) -> None:
    payload = bytes([first]) + tail
    with contextlib.suppress(BadMessage):
        codec.decode(payload)
    codec.salvage(payload)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(codec._kinds())), st.dictionaries(st.text(max_size=8), plain, max_size=4))
def test_any_map_is_a_message_or_a_bad_message(name: str, fields: dict[str, Any]) -> None:
    for payload in (json.dumps({**fields, "type": name}).encode(), json.dumps({"type": fields}).encode()):
        try:
            message, _ = codec.decode(payload)
        except BadMessage:
            continue
        assert type(message).__name__ == name


def test_a_union_field_is_told_by_its_kind() -> None:
    payload = b'{"type":"SubmitJob","job":{"kind":"train","model":{"sha256":"%s","size":1},"dataset":"d"}}' % (
        b"a" * 64
    )
    message, _ = codec.decode(payload)
    assert isinstance(message, SubmitJob)
    assert isinstance(message.job, JobSpec)
    assert message.job == Train(model=BlobRef(sha256="a" * 64, size=1), dataset="d")


def test_unknown_fields_are_ignored_and_defaults_filled_in() -> None:
    assert codec.decode(b'{"type": "ListJobs", "new": {"x": 1}}')[0] == ListJobs()


def test_spaces_and_a_byte_order_mark_before_json() -> None:
    assert codec.decode(b'\xef\xbb\xbf\n {"type": "ListJobs"}') == (ListJobs(), "json")


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (b"", "empty"),
        (b"\xff", "0xff"),
        (b"hello", "0x68"),
        (b"[]", "0x5b"),
        (b"{", "not valid json"),
        (b"\x82", "not valid msgpack"),
        (b"\x80rest", "not valid msgpack"),
        (b"{" * 100_000, "not valid json"),
        (b"\x81\xa1a" * 50_000, "not valid msgpack"),
        (b'{"type": "Nope"}', "unknown message type 'Nope'"),
        (b"{}", "unknown message type 'None'"),
        (b'{"type": 5}', "unknown message type '5'"),
        (b'{"type": ["ListJobs"]}', "unknown message type"),
        (b'{"type": "CancelJob"}', "job_id"),
        (b'{"type": "CancelJob", "job_id": 5}', r"CancelJob: Expected `str`, got `int` - at `\$.job_id`"),
        (b'{"type": "ListJobs", "id": "\\ud800"}', "surrogates"),
        (b'{"type": "AddDataset", "name": "a\\n", "manifest": {}}', r"\$.name"),
        (b'{"type": "AddDataset", "name": "a b", "manifest": {"sha256": "x", "size": 1}}', r"\$.name"),
        (b"\x81\x90\x01", "not valid msgpack: unhashable"),  # a list as a key
        (b"\x81\xa1a\x81\x80\x01", "not valid msgpack: unhashable"),
        (msgpack.packb({"type": "ListJobs", "id": msgpack.ExtType(1, b"x")}), "ListJobs"),
    ],
)
def test_what_is_refused_is_named(payload: bytes, told: str) -> None:
    with pytest.raises(BadMessage, match=told) as refused:
        codec.decode(payload)
    assert len(str(refused.value)) < 400


def test_the_limit_holds_in_both_directions() -> None:
    message = CancelJob(job_id="x" * INLINE_LIMIT_BYTES)
    with pytest.raises(TooLarge, match="CancelJob is 2621"):
        codec.encode(message)
    with pytest.raises(TooLarge, match="limit of 262144"):
        codec.decode(codec.pack(message))
    assert codec.decode(codec.encode(message, limit=2**20), limit=2**20)[0] == message


def test_salvage_finds_where_to_answer() -> None:
    assert codec.salvage(b'{"id": "1", "reply_to": "a", "type": 5}') == ("1", "a", "json")
    assert codec.salvage(msgpack.packb({"id": 1, "reply_to": "a"})) == ("", "a", "msgpack")
    assert codec.salvage(b"rubbish") == ("", "", None)
    assert codec.salvage(b"") == ("", "", None)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"id": "q", "reply_to": "a/b", "type": "Infer",}',
        b'{"type": "Infer", "inputs": [{"data": [1, 2, "id": "q" , "reply_to" : "a/b"}',
        b'{"type": "Infer", "name": "\xff\xfe", "id": "q", "reply_to": "a/b"}',
        b'{"type": "Infer", "name": "\\ud800", "id": "q", "reply_to": "a\\/b"}',
        b'{"type": "GetJob", "job_id": "a \\"id\\": \\"x\\"", "id": "q", "reply_to": "a/b",,}',
        b'{"id": "q", "reply_to": "a/b", "n": ' + b"9" * 5000 + b"}",
        b'{"n": ' + b"[" * 100_000 + b', "id": "q", "reply_to": "a/b"}',
        b'\xef\xbb\xbf {"id": "q", "reply_to": "a/b"',
        msgpack.packb({"id": "q", "reply_to": "a/b", "type": "Infer"})[:-3],
        msgpack.packb({"type": b"\xff", "name": b"\xff\xfe", "id": "q", "reply_to": "a/b"}, use_bin_type=False),
        b"\x83\x90\x01" + msgpack.packb({"id": "q", "reply_to": "a/b"})[1:],
        b"\x83\x01\x81\x90\x01" + msgpack.packb({"id": "q", "reply_to": "a/b"})[1:],
        msgpack.packb({b"id": b"q", b"reply_to": b"a/b", b"type": b"ListNodes"}),
        msgpack.packb({"id": "q", "reply_to": "a/b", "type": msgpack.ExtType(5, b"x")}) + b"more",
        b"\x83" + msgpack.packb({"id": "q", "reply_to": "a/b"})[1:] + b"\xc1",
    ],
)
def test_salvage_finds_them_beside_what_cannot_be_read(payload: bytes) -> None:
    with pytest.raises(BadMessage):
        codec.decode(payload)
    encoding = "msgpack" if payload[0] >= 0x80 and payload[0] != 0xEF else "json"
    assert codec.salvage(payload) == ("q", "a/b", encoding)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"id": "\\ud800", "reply_to": "\\udfff",}',
        b'{"id": 5, "reply_to": ["a"],}',
        b'{"id": "q',
        msgpack.packb({"id": b"\xff", "reply_to": 7, "type": "x"}, use_bin_type=False),
        b"\xdf\xff\xff\xff\xff",
    ],
)
def test_salvage_takes_only_texts_that_can_be_sent_back(payload: bytes) -> None:
    assert codec.salvage(payload)[:2] == ("", "")


def test_a_number_stands_for_a_float_but_a_float_for_no_int() -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}
    message, _ = codec.decode(json.dumps({"type": "Infer", "inputs": [tensor]}).encode())
    assert isinstance(message, Infer)
    assert message.inputs[0].data == [1, 2]
    with pytest.raises(BadMessage, match="shape"):
        codec.decode(json.dumps({"type": "Infer", "inputs": [{**tensor, "shape": [2.5]}]}).encode())


def test_whole_numbers_that_msgpack_cannot_carry_are_floats() -> None:
    """Otherwise, a client could end a daemon that had to send them on."""
    numbers = [2**64, -(2**63) - 1, 10**30, 2**64 - 1, -(2**63)]
    tensor = {"name": "x", "datatype": "FP32", "shape": [5], "data": numbers}
    message, _ = codec.decode(json.dumps({"type": "Infer", "id": "1", "inputs": [tensor]}).encode())
    again, _ = codec.decode(codec.encode(message))
    assert isinstance(again, Infer)
    assert again.inputs[0].data == [2.0**64, -(2.0**63), 1e30, 2**64 - 1, -(2**63)]
    payload = json.dumps({"type": "CancelJob", "id": "1", "reply_to": "a", "job_id": 2**64}).encode()
    with pytest.raises(BadMessage, match="job_id"):
        codec.decode(payload)
    assert codec.salvage(payload) == ("1", "a", "json")


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
def test_what_cannot_be_encoded_is_an_error_of_ours(encoding: Any) -> None:
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    tensor = Tensor(name="x", datatype="FP32", shape=(1,), data=deep)
    with pytest.raises(BadMessage, match="Infer cannot be sent"):
        codec.encode(Infer(inputs=(tensor,)), encoding)
    if encoding == "msgpack":
        with pytest.raises(BadMessage, match="CancelJob cannot be sent"):
            codec.encode(CancelJob(job_id=2**64))  # type: ignore[arg-type]


def test_tensors_nest_in_requests() -> None:
    tensor = Tensor(name="x", datatype="UINT8", shape=(2,), data=b"ab")
    message = RunInference(id="b", replica_id="r", requests=((tensor,), (tensor, tensor)))
    assert codec.decode(codec.encode(message))[0] == message


def test_files_have_no_limit_and_may_be_any_struct() -> None:
    ref = BlobRef(sha256="a" * 64, size=5, holders=("http://h",))
    assert codec.unpack(codec.pack(ref), BlobRef) == ref
    assert codec.unpack(codec.pack(ref, "json"), BlobRef) == ref
    large = Inferred(model="m", outputs=(Tensor(name="x", datatype="UINT8", shape=(1,), data=bytes(2**20)),))
    assert codec.unpack(codec.pack(large), Inferred) == large
    with pytest.raises(BadMessage, match="BlobRef"):
        codec.unpack(codec.pack({"sha256": "short", "size": 1}), BlobRef)


def test_json_has_null_for_numbers_that_are_not_finite() -> None:
    assert codec.pack({"a": [float("nan"), 1.5], "b": float("-inf")}, "json") == b'{"a":[null,1.5],"b":null}'


def test_lists_that_claim_more_than_there_is_take_no_room() -> None:
    """Each of 900 lists in each other says that it has 250,000 items. msgpack would take 2 MB for each."""
    payload = b"\x82\xa1x" + b"\xdd\x00\x03\xd0\x00" * 900 + b"\xc0" * 250_000 + b"\xa2id\xa1a"
    tracemalloc.start()
    try:
        with pytest.raises(BadMessage):
            codec.decode(payload)
        codec.salvage(payload)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10 * len(payload)
