"""The MQTT 5 properties that repeat a message's body, as another implementation reads them."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from potluck.bus.properties import Mirrored, mirror, pack
from potluck.wire.questions import JobAccepted, ListJobs

text = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=300)


@given(
    st.sampled_from(["application/json", "application/msgpack"]),
    text,
    st.none() | st.binary(max_size=300),
    st.none() | st.integers(1, 2**32 - 1),
)
def test_paho_reads_what_was_packed(
    kind: str, response_topic: str, correlation: bytes | None, expiry: int | None
) -> None:
    packed = pack(Mirrored(kind, response_topic, correlation, expiry)).pack()
    properties: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    _, used = properties.unpack(packed)
    assert used == len(packed)
    assert properties.ContentType == kind
    assert getattr(properties, "ResponseTopic", "") == response_topic
    assert getattr(properties, "CorrelationData", None) == correlation
    assert getattr(properties, "MessageExpiryInterval", None) == expiry


def test_what_is_too_long_for_a_property_stays_in_the_body() -> None:
    assert pack(Mirrored("a", "x" * 70_000, b"x" * 70_000)) == pack(Mirrored("a"))


def test_only_questions_and_answers_repeat_an_id() -> None:
    assert mirror(JobAccepted(id="1", job_id="j"), "json") == Mirrored("application/json")
    assert mirror(ListJobs(id="1", reply_to="a"), "json") == Mirrored("application/json", "a", b"1")
    assert mirror(JobAccepted(id="1", job_id="j"), "json", correlation=b"\xff").correlation == b"\xff"


def test_an_expiry_is_a_whole_number_of_seconds_and_at_least_one() -> None:
    assert mirror(ListJobs(), "json", 0.2).expiry_seconds == 1
    assert mirror(ListJobs(), "json", 1.5).expiry_seconds == 2
    assert mirror(ListJobs(expires=5.0), "json").expiry_seconds == 1
