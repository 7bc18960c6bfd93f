"""Whose credentials a client uses, and that one with credentials never asks in plain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from potluck.client import membership as module
from potluck.client.connection import client_settings
from potluck.client.membership import NONE, membership
from potluck.errors import InvalidRequest, InvalidSettings
from potluck.net.side import OPEN
from potluck.security import certificates, cluster_file, folder
from potluck.security.cluster_file import ClusterFile
from potluck.settings import ClientSettings
from support.closed import Authority


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("POTLUCK_CREDENTIALS", raising=False)
    monkeypatch.setattr(module, "SERVICE_STATES", (tmp_path / "service",))
    monkeypatch.setattr(module, "users_here", list)
    return tmp_path


def member(where: Path, cluster: str = "attic", name: str = "ann", days: float = 7.0, ago_days: float = 0.0) -> Path:
    Authority(cluster).member(where, "client", certificates.client_profile(name, "user"), days=days, ago_days=ago_days)
    known = ClusterFile(
        cluster=cluster, cluster_id="cluster-id", brokers=("h:8884",), http=("h:7814",), identity=f"client:{name}"
    )
    cluster_file.write(where, known)
    return where


def test_without_credentials_a_client_is_nobody_in_an_open_cluster() -> None:
    found = membership(ClientSettings(cluster="attic"))
    assert (found.known, found.name, found.side) == (None, "", OPEN)
    assert found.credentials.client_tls is None


def test_what_join_stored_is_found_for_its_cluster_only(home: Path) -> None:
    where = member(home / "config" / "potluck" / "attic")
    found = membership(ClientSettings(cluster="attic"))
    assert (found.where, found.name, found.ours) == (where, "ann", True)
    assert found.credentials.identity == "client:ann"
    assert found.credentials.broker_tls is not None
    assert found.side.client
    assert found.side.ca == certificates.read(folder.public(where / "ca.crt")).fingerprint.hex()[:16]
    assert membership(ClientSettings(cluster="cellar")).known is None
    assert membership(ClientSettings(cluster="attic", credentials=NONE)).known is None


def test_a_folder_that_is_named_wins_and_names_its_cluster(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member(home / "config" / "potluck" / "attic")
    where = member(home / "else", "cellar", "bob")
    assert membership(client_settings(None, None, None, where)).settings.cluster == "cellar"
    monkeypatch.setenv("POTLUCK_CREDENTIALS", str(where))
    assert membership(client_settings(None, None, None)).name == "bob"
    with pytest.raises(InvalidSettings, match="for cluster 'cellar', and 'attic' was asked for"):
        membership(client_settings(None, "attic", None))
    with pytest.raises(InvalidSettings, match="cannot be read"):
        membership(client_settings(None, None, None, home / "nowhere"))


@pytest.mark.parametrize("place", ["state/potluck/coordinator", "service", "elsewhere"])
def test_on_the_coordinators_machine_its_operator_is_found(
    home: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potluck.sole_use import User

    state = home / place
    where = member(state / "operator", name="operator-attic")
    folder.write(state / "identity" / "ca.key", b"key")
    member(
        home / "state" / "potluck" / "coordinator" / "operator", "cellar"
    ) if place != "state/potluck/coordinator" else None
    if place == "service" and os.geteuid() != 0:
        pytest.skip("only root looks into the service's state folder")
    if place == "elsewhere":
        running = User("coordinator", "attic", 17, folder=str(state))
        monkeypatch.setattr(module, "users_here", lambda: [running])
    found = membership(ClientSettings(cluster="attic"))
    assert (found.where, found.name, found.ours) == (where, "operator-attic", False)
    assert membership(ClientSettings(cluster="attic", seeds=("h",))).known is None, "who names a broker means that one"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who may give files away")
def test_root_uses_the_credentials_of_the_service_and_follows_no_link(home: Path) -> None:
    where = member(home / "service" / "operator", name="operator-attic")
    for path in (where, *where.iterdir()):
        os.chown(path, 65534, 65534)
    assert membership(ClientSettings(cluster="attic")).name == "operator-attic"
    (where / "client.pem").rename(home / "moved.pem")
    (where / "client.pem").symlink_to(home / "moved.pem")
    with pytest.raises(InvalidSettings, match=r"client.pem cannot be read"):
        membership(ClientSettings(cluster="attic"))


def test_credentials_that_cannot_be_used_do_not_make_an_open_client(home: Path) -> None:
    where = member(home / "config" / "potluck" / "attic", days=1, ago_days=2)
    with pytest.raises(InvalidRequest, match="join the cluster again"):
        membership(ClientSettings(cluster="attic"))
    member(where)
    (where / "client.pem").chmod(0o644)
    with pytest.raises(InvalidSettings, match="chmod 600"):
        membership(ClientSettings(cluster="attic"))
    member(where, name="bob")
    cluster_file.write(where, ClusterFile("attic", "cluster-id", ("h:1",), ("h:2",), "client:ann"))
    with pytest.raises(InvalidSettings, match="says that it is client:ann"):
        membership(ClientSettings(cluster="attic"))


def test_a_client_of_an_open_cluster_imports_no_cryptography() -> None:
    code = (
        "import sys; from potluck.client import membership as m; from potluck.settings import ClientSettings as S; "
        "m.membership(S(cluster='nobody-is-there')); print([name for name in ('cryptography', 'zeroconf') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
