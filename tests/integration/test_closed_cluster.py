"""A closed cluster of real daemons: nodes that joined with tokens, who may ask what, and a node that is removed while it works."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest

from potluck.enrolment import enrol
from potluck.errors import NotAllowed, Unavailable
from potluck.local_cluster import LocalCluster
from potluck.net.discovery import Discovery
from potluck.security import certificates, contexts
from potluck.wire import tokens
from potluck.wire.members import (
    BearerCreated,
    CreateBearer,
    ListMembers,
    MemberRemoved,
    MembersListed,
    RemoveMember,
)
from potluck.wire.questions import ListNodes, NodesListed
from support.brokers import mosquitto_or_skip
from support.eventually import eventually, eventually_now

NAME = "closed-daemons"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    mosquitto_or_skip()
    folder = tmp_path_factory.mktemp("cluster")
    with LocalCluster(folder, cluster=NAME, nodes=2, closed=True) as running:
        yield running


def states(cluster: LocalCluster) -> dict[str, str]:
    answer = cluster.ask(ListNodes())
    assert isinstance(answer, NodesListed)
    return {one.node_id: one.state for one in answer.nodes}


def get(cluster: LocalCluster, path: str, context: ssl.SSLContext, bearer: str = "") -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
    request = urllib.request.Request(cluster.http_url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def trusting(cluster: LocalCluster) -> ssl.SSLContext:
    return contexts.trusting((cluster.credentials / "ca.crt").read_bytes(), certificates.COORDINATOR)


def test_nodes_join_and_are_there(cluster: LocalCluster) -> None:
    eventually_now(lambda: states(cluster) == {"node-1": "online", "node-2": "online"})
    answer = cluster.ask(ListMembers())
    assert isinstance(answer, MembersListed)
    assert sorted(one.role for one in answer.members) == ["coordinator", "node", "node", "operator"]


async def test_it_is_announced_with_its_ca(cluster: LocalCluster) -> None:
    async with Discovery(NAME) as discovery:
        await discovery.wait_for(lambda one: one.role == "coordinator", 10)
        (found,) = discovery.services("coordinator")
    ca = certificates.read((cluster.credentials / "ca.crt").read_bytes())
    assert found.ca == ca.fingerprint.hex()[:16]
    assert (found.broker_port, found.client_port) == (cluster.broker_port, cluster.client_port)
    assert found.port == int(cluster.http_url.rpartition(":")[2])


def test_without_credentials_there_is_no_answer(cluster: LocalCluster) -> None:
    anybody = trusting(cluster)
    for path in ("/metrics", "/v1/events", "/models", "/nothing"):
        assert get(cluster, path, anybody)[0] == 401, path
    assert get(cluster, "/v1/ca", anybody)[1] == (cluster.credentials / "ca.crt").read_text()
    assert get(cluster, "/v2/health/live", anybody)[0] == 200
    assert get(cluster, "/metrics", anybody, "potluck-bearer-0123456789-" + "0" * 32)[0] == 401
    # as curl and browsers do, by the machine's address instead of the pinned name
    usual = ssl.create_default_context(cafile=str(cluster.credentials / "ca.crt"))
    assert get(cluster, "/v2/health/live", usual)[0] == 200


def test_a_bearer_token_is_enough_for_http(cluster: LocalCluster) -> None:
    made = cluster.ask(CreateBearer(name="prometheus", role="viewer"))
    assert isinstance(made, BearerCreated)
    status, page = get(cluster, "/metrics", trusting(cluster), made.bearer)
    assert status == 200
    assert 'potluck_members{role="node"} 2' in page
    assert cluster.ask(RemoveMember(identity=made.identity)) == MemberRemoved(identity=made.identity)
    assert get(cluster, "/metrics", trusting(cluster), made.bearer)[0] == 401


async def test_a_node_that_is_removed_is_cut_off_and_the_others_stay(cluster: LocalCluster) -> None:
    node = cluster.add_node()
    await eventually(lambda: states(cluster).get(node.name) == "online", 30)
    began = time.monotonic()
    assert cluster.ask(RemoveMember(identity=f"node:{node.name}")) == MemberRemoved(identity=f"node:{node.name}")
    await eventually(lambda: states(cluster)[node.name] == "offline")
    assert time.monotonic() - began < 10
    # it is there still, and connected, with a certificate that is valid, but nobody hears it
    await eventually(lambda: "potluck_removed_connections 1" in _metrics(cluster))
    assert states(cluster) == {"node-1": "online", "node-2": "online", node.name: "offline"}
    with pytest.raises(NotAllowed, match="was removed"):
        await enrol(tokens.parse(cluster.token()), node.name, limit_seconds=5)
    node.terminate()
    node.wait(10)

    cluster.coordinator.terminate()
    cluster.coordinator.wait(10)
    cluster.restart_coordinator()
    await eventually(lambda: states(cluster) == {"node-1": "online", "node-2": "online"}, 30)


def _metrics(cluster: LocalCluster) -> str:
    operator = contexts.client_context(cluster.credentials, "client", certificates.COORDINATOR)
    return get(cluster, "/metrics", operator)[1]


def test_the_broker_dies_and_so_does_the_coordinator(tmp_path: Path) -> None:
    """Its rules have gone with it; a supervisor starts both again."""
    mosquitto_or_skip()
    with LocalCluster(tmp_path, cluster=f"{NAME}-dies", nodes=0, discovery=False, closed=True) as cluster:
        (tmp_path / "coordinator" / "broker" / "acl.nodes").write_text("nonsense\n")
        broker = int(_said(cluster, "closed broker started")["pid"])
        os.kill(broker, signal.SIGHUP)
        assert cluster.coordinator.wait(10) not in (0, None)
        with pytest.raises(Unavailable):
            cluster.ask(ListNodes())
        cluster.restart_coordinator()
        assert states(cluster) == {}


def _said(cluster: LocalCluster, words: str) -> dict[str, str]:
    lines = cluster.coordinator.log_path.read_text().splitlines()
    found = next(line for line in lines if words in line)
    return dict(part.split("=", 1) for part in found.split() if "=" in part)


def test_without_mosquitto_the_command_to_install_it_is_told(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-P",
        "-c",
        _WITHOUT_MOSQUITTO,
        "coordinator",
        "--state-dir",
        str(tmp_path),
        "--port",
        "0",
    ]
    environment = {"PATH": "/usr/bin:/bin", "POTLUCK_CLOSED": "true"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert found.returncode == Unavailable.exit_code, found.stderr
    assert "apt install mosquitto" in found.stderr


_WITHOUT_MOSQUITTO = """
import sys
from potluck.net import broker
broker.find_mosquitto = lambda: None
from potluck import daemons
daemons.start(sys.argv.pop(1))
"""
