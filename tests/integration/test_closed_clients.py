"""Clients of a closed cluster of real daemons: a user's whole way from data to answers, renewals, and a coordinator that moved."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from potluck.client import AsyncClient, Client
from potluck.errors import NotAllowed, NotAuthenticated, Unavailable
from potluck.local_cluster import LocalCluster
from potluck.security import certificates, cluster_file, folder
from potluck.wire.members import RemoveMember
from support.brokers import mosquitto_or_skip

NAME = "closed-clients"
DAY = 86400.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    mosquitto_or_skip()
    with LocalCluster(tmp_path_factory.mktemp("cluster"), cluster=NAME, nodes=2, closed=True) as running:
        yield running


def joined(cluster: LocalCluster, where: Path, name: str, role: str = "user") -> Path:
    cluster.join(name, where, role)  # type: ignore[arg-type]
    return where


@pytest.mark.tensorflow
@pytest.mark.timeout(180)
def test_a_user_trains_deploys_and_asks(cluster: LocalCluster, tmp_path: Path) -> None:
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    with Client(credentials=joined(cluster, tmp_path / "ann", "ann")) as client:
        assert all(one.startswith("https://") for one in client.gateway())
        client.train(model, (x, np.argmax(x[:, :3], axis=1)), epochs=1, batch_size=16, name="small").wait()
        client.deploy("small").wait()
        assert np.asarray(client.infer("small", x[:2])).shape == (2, 3)
        with pytest.raises(NotAllowed, match="operator"):
            client.undeploy("small")
    with Client(credentials=joined(cluster, tmp_path / "eve", "eve", "viewer")) as viewer:
        assert [one.name for one in viewer.models()] == ["small"]
        with pytest.raises(NotAllowed, match="'user'"):
            viewer.infer("small", x[:1])


def test_a_client_with_a_certificate_of_two_thirds_of_its_life_renews_it_when_it_is_used(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    where = joined(cluster, tmp_path / "ann", "renewing")
    ca_folder = cluster.folder / "coordinator" / "identity"
    key = certificates.new_key()
    old = certificates.issue(
        (ca_folder / folder.CA_KEY).read_bytes(), folder.public(ca_folder / folder.CA_CERTIFICATE),
        certificates.public_key_of(key), certificates.client_profile("renewing", "user"), time.time() - 5 * DAY, bytes(16),
    )  # fmt: skip
    folder.write_pair(where, "client", key, old)
    with Client(credentials=where) as client:
        assert client.nodes()
    new = certificates.read(folder.certificate_of(folder.secret(where / "client.pem")))
    assert new.not_after > time.time() + 6 * DAY
    assert new.public_key != certificates.public_key_of(key)


async def test_a_coordinator_that_moved_is_found_and_a_plain_one_is_not_tried(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTLUCK_BUS__CONNECT_TIMEOUT_SECONDS", "1")
    where = joined(cluster, tmp_path / "ann", "moving")
    with socket.create_server(("127.0.0.1", 0)) as plain:  # a server that is none of ours has the address now
        plain.settimeout(0)
        gone = f"127.0.0.1:{plain.getsockname()[1]}"
        known = cluster_file.read(where)
        cluster_file.write(where, replace(known, brokers=(gone,), http=(gone,)))
        async with AsyncClient(credentials=where, timeout=20) as client:
            assert await client.nodes()
        connection, _ = plain.accept()
        with connection:
            connection.settimeout(1)
            assert connection.recv(3)[:2] == b"\x16\x03", "a TLS handshake, and nothing in plain"


async def test_nobody_in_particular_hears_how_to_get_in(cluster: LocalCluster) -> None:
    with pytest.raises(NotAuthenticated, match=f"is closed, .*potluck token create .*--cluster {NAME}"):
        await AsyncClient(cluster=NAME, credentials="none").nodes()
    with pytest.raises(Unavailable):
        await AsyncClient(f"127.0.0.1:{cluster.client_port}", cluster=NAME, credentials="none", timeout=2).nodes()


async def test_on_the_coordinators_machine_its_operator_needs_no_options(cluster: LocalCluster) -> None:
    async with AsyncClient(cluster=NAME) as client:
        assert client.credentials.identity.startswith("client:operator-")


async def test_a_client_that_was_removed_is_told(cluster: LocalCluster, tmp_path: Path) -> None:
    where = joined(cluster, tmp_path / "bob", "bob")
    cluster.ask(RemoveMember(identity="client:bob"))
    with pytest.raises(Unavailable, match="client:bob was removed"):
        await AsyncClient(credentials=where, timeout=3).nodes()
