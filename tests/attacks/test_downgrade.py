"""Whoever names other servers to a member gets no word of it in plain text, and no secret under TLS either."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from potluck.blobs.download import Downloader
from potluck.blobs.store import BlobStore
from potluck.blobs.transfer import Timings
from potluck.credentials import Credentials
from potluck.enrolment import renew
from potluck.errors import Unavailable
from potluck.local_cluster import Daemon
from potluck.net.discovery import Discovery, Service
from potluck.security import certificates, cluster_file
from support.attacked import Attacked
from support.closed import Authority
from support.eventually import eventually
from support.impostor import impostor

QUICK = Timings(failures_limit=1)
HELLO = b"\x16"
"""How a TLS connection begins (RFC 8446, 5.1); MQTT begins with 0x10, HTTP with a letter."""


def pretends(home: Attacked, port: int, ca: str, name: str) -> Service:
    return Service(
        id=name, cluster=home.cluster.cluster, role="coordinator", host="127.0.0.1", port=port, broker_port=port, ca=ca,
        client_port=port,
    )  # fmt: skip


async def test_mdns_leads_no_node_into_plain_text(home: Attacked, tmp_path: Path) -> None:
    """Its own broker is gone, and two others are announced in the cluster's name: a plain one, and one that says that it is ours."""
    identity = tmp_path / "state" / "identity"
    home.cluster.join("seeker", identity)
    cluster_file.write(identity, replace(cluster_file.read(identity), brokers=("127.0.0.1:1",)))
    seeker = Daemon(
        "seeker", [sys.executable, "-P", "-m", "node", "--state-dir", str(tmp_path / "state")], tmp_path / "seeker.log",
        home.cluster.nodes[0].environment,
    )  # fmt: skip
    hint = certificates.read((identity / "ca.crt").read_bytes()).fingerprint.hex()[:16]
    with impostor() as plain, impostor() as liar, impostor(home.pair("mallory")) as node:
        async with (
            Discovery(home.cluster.cluster) as one,
            Discovery(home.cluster.cluster) as other,
            Discovery(home.cluster.cluster) as third,
        ):
            await one.advertise(pretends(home, plain.port, "", "plain"))
            await other.advertise(pretends(home, liar.port, hint, "liar"))
            await third.advertise(pretends(home, node.port, hint, "node"))
            seeker.start()
            try:
                await eventually(lambda: liar.heard and node.refused, 30)
            finally:
                seeker.terminate()
                assert seeker.wait(15) == 0
    assert not plain.heard, "what is announced as open is not even tried"
    assert all(first.startswith(HELLO) for first in liar.heard)
    assert not node.heard, "nothing is said to a node that poses as the broker"


@pytest.mark.parametrize("poses", ["mallory", "ann", "broker", "another CA's", "plain"])
async def test_nobody_poses_as_the_coordinator_to_those_who_renew(home: Attacked, tmp_path: Path, poses: str) -> None:
    """Certificates of our own CA for other uses: a node's, a client's, the broker's; and one that says all that it should, by another CA."""
    coordinator = home.cluster.folder / "coordinator"
    foreign = (
        Authority(home.cluster.cluster).member(tmp_path / "x", "x", certificates.coordinator_profile("vm")) / "x.pem"
    )
    pairs = {"broker": coordinator / "broker" / "broker.pem", "another CA's": foreign, "plain": None}
    where = tmp_path / "identity"
    shutil.copytree(home.pair("nora").parent, where)
    before = (where / "node.pem").read_bytes()
    with impostor(pairs[poses] if poses in pairs else home.pair(poses)) as false:
        cluster_file.write(where, replace(cluster_file.read(where), http=(f"127.0.0.1:{false.port}",)))
        with pytest.raises(Unavailable):
            await renew(where, "node", Credentials.load(where, "node"), (f"127.0.0.1:{false.port}",))
    assert (where / "node.pem").read_bytes() == before
    if poses == "plain":
        assert all(first.startswith(HELLO) for first in false.heard)
    else:
        assert false.refused
        assert not false.heard


async def test_no_node_gets_what_is_sent_to_the_coordinator(home: Attacked, tmp_path: Path) -> None:
    """A node that has taken the coordinator's address shows its own certificate, by the same CA."""
    credentials = Credentials.load(home.pair("ann").parent, "client")
    with impostor(home.pair("mallory")) as node:
        async with Downloader(BlobStore(tmp_path / "blobs", 2**20), credentials, QUICK) as downloader:
            with pytest.raises(Unavailable, match=r"certificate|CERTIFICATE"):
                await downloader.push(b"of ann", (f"https://127.0.0.1:{node.port}",))
    assert node.refused
    assert not node.heard
