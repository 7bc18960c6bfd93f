"""MQTT's packets: what is written can be read, however it is cut, and other bytes are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from potluck.bus import packets
from potluck.bus.properties import Mirrored, pack
from potluck.errors import BadMessage

TOPICS = st.text(st.characters(exclude_characters="+#\0", exclude_categories=("Cs",)), min_size=1, max_size=40)
PAYLOADS = st.binary(max_size=20) | st.integers(0, 70_000).map(bytes)


@given(TOPICS, PAYLOADS, st.booleans(), st.booleans())
def test_what_is_written_is_read(topic: str, payload: bytes, retain: bool, v5: bool) -> None:
    properties = pack(Mirrored("application/msgpack", "answers/me", b"\x00\xff", 7)).payload if v5 else b""
    written = packets.publish(topic, payload, retain, properties)
    ((first, body),) = packets.Splitter().feed(written)
    found = packets.read_publish(first, body, v5=v5)
    assert found == packets.Publish(topic, payload, 0, retain, b"", properties)


def test_as_the_standard_has_it() -> None:
    assert packets.publish("a/b", b"hi", False, b"") == b"\x30\x07\x00\x03a/bhi"
    assert packets.publish("a/b", b"hi", True, b"\0") == b"\x31\x08\x00\x03a/b\x00hi"
    assert packets.puback(b"\x00\x0a") == b"\x40\x02\x00\x0a"
    assert [packets.length(size) for size in (0, 127, 128, 16_383, 16_384)] == [
        b"\x00", b"\x7f", b"\x80\x01", b"\xff\x7f", b"\x80\x80\x01",
    ]  # fmt: skip
    at_one = packets.read_publish(0x3A, b"\x00\x03a/b\x00\x0ahi", v5=False)
    assert at_one == packets.Publish("a/b", b"hi", 1, False, b"\x00\x0a", b"")


@given(st.lists(st.tuples(st.sampled_from([0x30, 0x40, 0x90, 0xD0]), PAYLOADS), max_size=6), st.data())
def test_a_stream_is_cut_the_same_however_it_arrives(sent: list[tuple[int, bytes]], data: st.DataObject) -> None:
    stream = b"".join(bytes((first,)) + packets.length(len(body)) + body for first, body in sent)
    splitter, found = packets.Splitter(), []
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 100, 70_000]), max_size=40))
    at = 0
    for size in (*sizes, len(stream)):
        found += splitter.feed(stream[at : at + size]) if at < len(stream) else []
        at += size
    assert found == sent


@pytest.mark.parametrize("stream", [b"\x30\xff\xff\xff\xff\x01", b"\x30\x80\x80\x80\x80\x01abc"])
def test_a_length_of_more_than_four_bytes_is_no_packet(stream: bytes) -> None:
    with pytest.raises(BadMessage):
        packets.Splitter().feed(stream)


def test_a_packet_above_the_limit_is_refused_by_its_length_alone() -> None:
    splitter = packets.Splitter(1000)
    assert len(splitter.feed(b"\x30" + packets.length(1000) + bytes(1000))) == 1
    with pytest.raises(BadMessage, match="1001 bytes"):
        splitter.feed(b"\x30" + packets.length(1001))


@pytest.mark.parametrize(
    ("first", "body", "v5"),
    [(0x34, b"\x00\x01a\x00\x01", False), (0x30, b"\x00\x09a", False), (0x32, b"\x00\x01a", False),
     (0x30, b"\x00\x01a\x05\x01", True), (0x30, b"\x00\x01a", True), (0x30, b"", False)],
)  # fmt: skip
def test_a_publish_that_is_cut_off_is_refused(first: int, body: bytes, v5: bool) -> None:
    with pytest.raises(BadMessage):
        packets.read_publish(first, body, v5=v5)


def test_a_topic_that_is_no_text_belongs_to_nobody() -> None:
    assert packets.read_publish(0x30, b"\x00\x02\xff\xfehello", v5=False).topic == ""


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=200)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "PayloadFormatIndicator": st.integers(0, 1),
            "MessageExpiryInterval": st.integers(0, 2**32 - 1),
            "TopicAlias": st.integers(1, 65_535),
            "ContentType": TEXTS,
            "ResponseTopic": TEXTS,
            "CorrelationData": st.binary(max_size=200),
            "SubscriptionIdentifier": st.integers(1, 2**28 - 1),
            "UserProperty": st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3),
        },
    ),
)
def test_where_to_answer_is_read_among_whatever_else_stands_there(values: dict[str, Any]) -> None:
    properties: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(properties, name, value)
    written: bytes = properties.pack()
    assert packets.answer_to(written) == (values.get("ResponseTopic", ""), values.get("CorrelationData"))
    with pytest.raises(BadMessage):
        packets.answer_to(written + b"\x02\0\0\0")


@pytest.mark.parametrize(
    "properties", [b"\x02\x08\x00", b"\x04\x09\x00\x05a", b"\x02\x26\x00", b"\x01\x02", b"\x02\x11\x00"]
)
def test_a_property_that_is_cut_off_or_belongs_elsewhere_is_refused(properties: bytes) -> None:
    with pytest.raises(BadMessage):
        packets.answer_to(properties)


def test_a_response_topic_that_is_no_text_asks_for_no_answer() -> None:
    assert packets.answer_to(b"\x05\x08\x00\x02\xff\xfe") == ("", None)


@pytest.mark.parametrize("topic", ["", "a/+", "#", "x" * 65_536])
def test_no_topic(topic: str) -> None:
    with pytest.raises(ValueError, match="is not a topic"):
        packets.publish(topic, b"", False, b"")
