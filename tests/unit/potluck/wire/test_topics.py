"""Topics and topic filters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.bus.filters import FilterTable, check_filter, matches
from potluck.errors import InvalidRequest, InvalidSettings
from potluck.wire.topics import Topics

TOPICS = Topics("lab-1")
levels = st.text(st.characters(codec="utf-8", exclude_characters="/+#\0$"), max_size=4)
topics = st.lists(levels, min_size=1, max_size=5).map("/".join).filter(bool)


def test_every_topic_is_below_the_root_of_its_cluster() -> None:
    for topic in (
        TOPICS.coordinator_status,
        TOPICS.coordinator_inbox,
        TOPICS.jobs_submit,
        TOPICS.node("n1", "status"),
        TOPICS.job("j1", "result"),
        TOPICS.infer("digits:1"),
        TOPICS.client_inbox("c1"),
    ):
        assert topic.startswith("potluck/v1/lab-1/")
    assert TOPICS.segment(TOPICS.node("n1", "inbox"), 1) == "n1"
    assert TOPICS.segment(TOPICS.infer("digits:1"), 1) == "digits:1"


@pytest.mark.parametrize("cluster", ["", "a/b", "+", "#", "a b", "-x", "x" * 200, "a\n"])
def test_a_cluster_name_must_fit_in_a_topic(cluster: str) -> None:
    with pytest.raises(InvalidSettings, match="cluster name"):
        Topics(cluster)


@pytest.mark.parametrize("topic", ["answers", "a/b/c", "potluck/v1/lab-1/clients/c1/inbox", "other/potluck/v1/x"])
def test_answers_may_go_to_clients_and_outside(topic: str) -> None:
    assert TOPICS.check_reply_to(topic) == topic


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "a/+",
        "#",
        "a\0",
        "a\x01b",
        "a\x85b",
        "a\ufffe",
        "a\ud800",
        "$SYS/x",
        "$share/g/x",
        "x" * 1025,
        "é" * 600,
        "/" * 150,
        "potluck/v1/lab-1/nodes/n1/inbox",
        "potluck/v1/lab-1/jobs/submit",
        "potluck/v1/other/clients/c1/inbox",
        "potluck/v1/lab-1/clientsx/inbox",
    ],
)
def test_answers_may_go_nowhere_else(topic: str) -> None:
    with pytest.raises(InvalidRequest, match="reply_to"):
        TOPICS.check_reply_to(topic)


@given(st.text())
def test_any_text_as_reply_to_is_accepted_or_refused(topic: str) -> None:
    try:
        accepted = TOPICS.check_reply_to(topic)
    except InvalidRequest:
        return
    assert accepted.encode()
    assert not set(accepted) & set("+#\0")


@given(
    st.one_of(
        st.text(),
        st.lists(st.sampled_from(["potluck", "v1", "lab-1", "clients", "ann", "bob", "to", "inbox", "s", "", "+"])).map(
            "/".join
        ),
    )
)
def test_with_a_caller_only_its_own_inboxes_are_accepted(rest: str) -> None:
    own = "potluck/v1/lab-1/clients/ann/"
    for topic in (rest, own + rest, f"{own}{rest}/inbox"):
        try:
            accepted = TOPICS.check_reply_to(topic, "client:ann")
        except InvalidRequest:
            continue
        session = accepted.removeprefix(own).removesuffix("/inbox")
        assert accepted == f"{own}{session}/inbox"
        assert session not in ("", "to")
        assert not set(session) & set("/+#")
        assert TOPICS.asked_by(accepted) == ("", accepted), "an answer can never be taken for a question"


def test_what_a_client_reads_is_accepted() -> None:
    inbox = Topics("lab-1", "ann").client_inbox("client-9c3e61b02d47")
    assert TOPICS.check_reply_to(inbox, "client:ann") == inbox
    with pytest.raises(InvalidRequest, match="client:bob may use only potluck/v1/lab-1/clients/bob/"):
        TOPICS.check_reply_to(inbox, "client:bob")


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("+/+", "/x", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
    ],
)
def test_filters_match_as_mqtt_says(topic_filter: str, topic: str, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected


@given(topics, st.data())
def test_a_filter_made_of_a_topic_matches_it(topic: str, data: st.DataObject) -> None:
    parts = topic.split("/")
    hidden = [data.draw(st.sampled_from([part, "+"])) for part in parts]
    cut = data.draw(st.integers(0, len(parts)))
    assert matches("/".join(hidden), topic)
    assert matches("/".join([*hidden[:cut], "#"]), topic)
    assert not matches("/".join([*hidden, "more"]), topic)


@given(st.lists(topics), st.lists(topics))
def test_the_table_finds_what_matching_one_by_one_finds(keys: list[str], asked: list[str]) -> None:
    table: FilterTable[str] = FilterTable()
    filters = [*keys, "a/+", "#", *("/".join(["+", *key.split("/")[1:]]) for key in keys)]
    for topic_filter in filters:
        table[topic_filter] = topic_filter
    for _ in range(2):  # the second time from the cache
        for topic in (*keys, *asked):
            assert set(table.find(topic)) == {key for key in filters if matches(key, topic)}
    table.pop("#")
    assert all("#" not in table.find(topic) for topic in keys)


@pytest.mark.parametrize("bad", ["", "a/#/b", "a#", "+a", "a\0", "x" * 70000])
def test_bad_filters_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="topic filter"):
        check_filter(bad)
