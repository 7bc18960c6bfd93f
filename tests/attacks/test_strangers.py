"""Whoever has no certificate of the cluster gets nothing at any of its doors, and keeps nobody else from them."""

from __future__ import annotations

import ssl
from pathlib import Path

import psutil
import pytest

from potluck.security import certificates
from support import attackers
from support.attacked import Attacked
from support.closed import Authority

GET = b"GET /models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
LIVE = "/v2/health/live"
HUNDREDS = 300


def doors(home: Attacked) -> dict[str, tuple[int, bytes, str]]:
    """For each server of the cluster: its port, the first bytes of a question, and a member that gets an answer."""
    return {
        "broker": (home.cluster.broker_port, attackers.CONNECT, "mallory"),
        "broker for clients": (home.cluster.client_port, attackers.CONNECT, "ann"),
        "coordinator": (home.http_port, GET, "ann"),
        "node": (home.node_port, GET, "mallory"),
    }


@pytest.fixture
def strangers(home: Attacked, tmp_path: Path) -> dict[str, ssl.SSLContext | None]:
    other = Authority(home.cluster.cluster)
    ours = home.authority
    for name, profile in (
        ("node", certificates.node_profile("node-1")),
        ("client", certificates.client_profile("ann", "operator")),
    ):
        other.member(tmp_path / f"other-{name}", name, profile)
        ours.member(tmp_path / f"ended-{name}", name, profile, days=7, ago_days=8)
        ours.member(tmp_path / f"early-{name}", name, profile, days=7, ago_days=-1)
    found: dict[str, ssl.SSLContext | None] = {
        f"{path.parent.name}": attackers.tls(path) for path in tmp_path.glob("*/*.pem")
    }
    old = {name: home.tls(name) for name in ("ann", "mallory")}
    for name, context in old.items():
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        found[f"TLS 1.2 as {name}"] = context
    return {"nobody": attackers.tls(), "plain text": None, **found}


def test_who_has_no_certificate_of_the_cluster_gets_no_answer(
    home: Attacked, strangers: dict[str, ssl.SSLContext | None]
) -> None:
    assert len(strangers) == 10
    for door, (port, question, member) in doors(home).items():
        assert attackers.says(port, question, home.tls(member)), (
            f"{door} does not answer its members: this test shows nothing"
        )
        for who, context in strangers.items():
            said = attackers.says(port, question, context)
            if (door, who) == ("coordinator", "nobody"):
                assert said.startswith(b"HTTP/1.1 401 ")
            else:
                assert said == b"", f"{who} at the door of the {door}"


def test_nothing_else_listens(home: Attacked) -> None:
    daemons = [psutil.Process(one.pid) for one in (home.cluster.coordinator, home.cluster.nodes[0])]
    everybody = [*daemons, *(child for one in daemons for child in one.children(recursive=True))]
    listening = {
        (one.laddr.ip, one.laddr.port)
        for process in everybody
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    }
    assert listening == {(attackers.HERE, port) for port, _, _ in doors(home).values()}
