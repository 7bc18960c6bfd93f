"""The text that mosquitto gets: a block for each member, and no way to write into another's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.errors import InvalidSettings
from potluck.net import broker_rules
from potluck.net.broker_rules import Member
from potluck.wire.topics import Topics

TOPICS = Topics("home")
ROOT = "potluck/v1/home"


def blocks(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "user":
            assert rest not in found
            found[rest] = rights = []
        else:
            assert word == "topic"
            rights.append(rest)
    return found


def test_the_rights_of_a_node() -> None:
    found = blocks(broker_rules.node_rules(TOPICS, [Member("node:n1"), Member("client:ann", "operator")]))
    assert set(found) == {"nobody", "node:n1"}
    own = f"{ROOT}/nodes/n1"
    assert {right for right in found["node:n1"] if right.startswith("write")} == {
        f"write {own}/{leaf}" for leaf in ("status", "capacity", "telemetry", "outbox")
    }
    assert f"read {own}/inbox" in found["node:n1"]
    assert f"read {ROOT}/coordinator/proof" in found["node:n1"]
    assert not any("+" in right or "#" in right for right in found["node:n1"])


def test_the_rights_of_clients() -> None:
    members = [
        Member("client:ann", "user"),
        Member("client:eve", "viewer"),
        Member("client:odd", "later"),
        Member("node:n1"),
    ]
    found = blocks(broker_rules.client_rules(TOPICS, members))
    assert set(found) == {"nobody", "client:ann", "client:eve", "client:odd"}
    written = {name: [right for right in rights if right.startswith("write")] for name, rights in found.items()}
    for name in (
        "ann",
        "eve",
        "odd",
    ):  # whatever the role: the coordinator answers what it does not allow, the broker would not
        assert written[f"client:{name}"] == [
            f"write {ROOT}/clients/{name}/to/coordinator/inbox",
            f"write {ROOT}/clients/{name}/to/jobs/submit",
            f"write {ROOT}/clients/{name}/to/models/+/infer",
        ]


def test_a_coordinator_reads_and_writes_its_cluster_only() -> None:
    found = blocks(broker_rules.node_rules(TOPICS, [Member("coordinator:attic"), Member("guest:x")]))
    assert found["coordinator:attic"] == [f"readwrite {ROOT}/#"]
    assert found["guest:x"] == []


def test_without_members_there_is_still_a_rule() -> None:
    for text in (broker_rules.node_rules(TOPICS, []), broker_rules.client_rules(TOPICS, [])):
        assert blocks(text) == {"nobody": ["read nothing"]}


@given(st.text())
def test_no_name_adds_a_line(name: str) -> None:
    try:
        member = Member(f"node:{name}")
    except InvalidSettings:
        return
    assert set(blocks(broker_rules.node_rules(TOPICS, [member]))) == {"nobody", f"node:{name}"}


@pytest.mark.parametrize("identity", ["nobody", "node:a\nuser node:b", "node:+", "node:a b", "node:"])
def test_names_that_have_no_rights(identity: str) -> None:
    with pytest.raises(InvalidSettings, match="is no identity"):
        Member(identity)


def test_both_listeners_ask_for_certificates() -> None:
    text = broker_rules.configuration("192.0.2.1", 8883, 8884, "persistence false\n")
    _, nodes, clients = text.split("listener ")
    for port, listener, rules in ((8883, nodes, "acl.nodes"), (8884, clients, "acl.clients")):
        lines = listener.splitlines()
        assert lines[0] == f"{port} 192.0.2.1"
        assert {"allow_anonymous false", "require_certificate true", "tls_version tlsv1.3", f"acl_file {rules}"} <= set(
            lines
        )
    assert "use_username_as_clientid true" in nodes
    assert "use_username_as_clientid" not in clients
    assert text.startswith("per_listener_settings true\n")
    assert text.endswith("persistence false\n")
