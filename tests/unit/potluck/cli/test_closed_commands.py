"""The commands of closed clusters: what `potluck up` makes of this machine, and what is refused before anything is asked."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from potluck import enrolment
from potluck.cli import closing, join
from potluck.cli.joining import Joining
from potluck.cli.plan import Plan
from potluck.cli.session import Session
from potluck.cli.tokens import seconds
from potluck.credentials import FOLDER
from potluck.errors import Conflict, InvalidRequest, InvalidSettings, NotAllowed, NotAuthenticated, PotluckError
from potluck.net.discovery import Service
from potluck.security import certificates, cluster_file, folder
from potluck.security.cluster_file import ClusterFile
from potluck.settings import Listen, NetworkSettings
from potluck.wire.tokens import JoinToken
from support.closed import Authority


def plan(state: Path, **given: Any) -> Plan:
    cluster = given.pop("cluster", "default")
    listen = given.pop("listen", Listen())
    return Plan(
        NetworkSettings(cluster=cluster), listen, state, None, "WARNING", asked=given.pop("asked", False), **given
    )


def member(state: Path) -> Path:
    """The credentials of node n1 of the closed cluster `attic`."""
    where = Authority("attic").member(state / "node" / FOLDER, "node", certificates.node_profile("n1"))
    known = ClusterFile("attic", "cluster-id", ("h:8883",), ("h:7814",), "node:n1")
    cluster_file.write(where, known)
    return where


def coordinator(ca: str, host: str = "192.0.2.7") -> Service:
    return Service("c", "default", "coordinator", host, 7814, 8883, ca=ca, client_port=8884)


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what is on the network, and what is on this machine."""

    def set_to(
        found: Service | None = None, *, addresses: tuple[str, ...] = ("192.0.2.1",), broker: bool = True
    ) -> None:
        async def look(plan: Plan) -> Service | None:
            return found

        monkeypatch.setattr(closing, "look", look)
        monkeypatch.setattr(closing, "lan_addresses", lambda: list(addresses))
        monkeypatch.setattr(closing, "find_mosquitto", lambda: "/usr/sbin/mosquitto" if broker else None)

    set_to()
    return set_to


def chosen(what: Plan) -> tuple[Plan, list[str]]:
    """What `potluck up` does then, and what it says."""
    said: list[str] = []
    joining = Joining(what, said.append)
    asyncio.run(joining._choose())
    return joining._plan, said


def test_who_has_credentials_is_on_the_network_in_its_closed_cluster(
    tmp_path: Path, around: Callable[..., None]
) -> None:
    around(coordinator("00" * 8))
    member(tmp_path)
    found, _ = chosen(plan(tmp_path))
    assert (found.closed, found.listen, found.network.cluster) == (True, Listen(host="0.0.0.0"), "attic")
    assert "--insecure" not in found.flags("node")
    found, _ = chosen(plan(tmp_path, asked=True))
    assert (found.closed, found.listen) == (True, Listen()), "where the user said, but closed all the same"
    for wrong in ({"cluster": "cellar"}, {"asked": True, "listen": Listen(host="0.0.0.0", insecure=True)}):
        with pytest.raises(InvalidSettings, match="belongs to the closed cluster 'attic'"):
            chosen(plan(tmp_path, **wrong))


def test_who_finds_a_closed_cluster_says_how_to_get_in_and_starts_nothing(
    tmp_path: Path, around: Callable[..., None]
) -> None:
    around(coordinator("00" * 8))
    with pytest.raises(NotAuthenticated, match=r"is closed\. .*`potluck token create` on the .*`potluck join` that"):
        chosen(plan(tmp_path))
    for asked in ({"asked": True}, {"asked": True, "listen": Listen(host="0.0.0.0", insecure=True)}):
        found, said = chosen(plan(tmp_path, **asked))
        assert (found.closed, said) == (False, [])


def test_a_machine_with_a_network_and_mosquitto_founds(tmp_path: Path, around: Callable[..., None]) -> None:
    found, said = chosen(plan(tmp_path))
    assert (found.closed, found.listen.host, said) == (True, "0.0.0.0", [])
    assert found.environment("coordinator") == {"POTLUCK_CLOSED": "true"}
    assert found.environment("node") == {}
    assert replace(found, broker_port=9).environment("coordinator")["POTLUCK_BROKER__CLOSED_PORT"] == "9"
    assert "--broker-port" not in replace(found, broker_port=9).flags("coordinator")


@pytest.mark.parametrize(
    ("facts", "words"),
    [({"addresses": ()}, "is on no network"), ({"broker": False}, "install mosquitto")],
)
def test_where_a_closed_cluster_cannot_be_founded_one_line_says_why(
    tmp_path: Path, around: Callable[..., None], facts: dict[str, Any], words: str
) -> None:
    around(**facts)
    found, (line,) = chosen(plan(tmp_path))
    assert (found.closed, found.listen) == (False, Listen())
    assert words in line


def test_beside_an_open_cluster_of_the_name_none_is_founded(tmp_path: Path, around: Callable[..., None]) -> None:
    around(coordinator(""))
    assert not chosen(plan(tmp_path))[0].closed


def test_the_founder_stays_the_founder(tmp_path: Path, around: Callable[..., None]) -> None:
    around(coordinator("00" * 8))
    folder.write(tmp_path / "coordinator" / FOLDER / "ca.key", b"key")
    assert chosen(plan(tmp_path))[0].closed
    with pytest.raises(InvalidSettings, match="--insecure was given"):
        chosen(plan(tmp_path, asked=True, listen=Listen(host="0.0.0.0", insecure=True)))


@pytest.mark.parametrize(("text", "wanted"), [("90s", 90), ("30m", 1800), ("1h", 3600), ("7d", 604800), ("0.5H", 1800)])
def test_times_are_read_as_people_write_them(text: str, wanted: float) -> None:
    assert seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "1", "h", "-1h", "1w", "0s", "1h30m", "1e9d"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no time"):
        seconds(text)


def potluck(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("POTLUCK_")}
    environment |= {"XDG_CONFIG_HOME": str(home / "config"), "XDG_STATE_HOME": str(home / "state")}
    command = [sys.executable, "-m", "potluck.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_a_mistyped_token_is_refused_before_anything_is_asked_or_written(tmp_path: Path) -> None:
    refused = potluck(tmp_path, "join", "POTLUCK-1-ABC")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "potluck: this is no join token: copy it again, whole\n"
    assert not list(tmp_path.iterdir())


def test_a_machine_joins_again_by_its_own_name(tmp_path: Path) -> None:
    first = closing.own_name(tmp_path)
    assert closing.known_name(tmp_path) == "" != first
    member(tmp_path)
    assert closing.own_name(tmp_path) == closing.known_name(tmp_path) == "n1"


@pytest.mark.parametrize(
    ("removed", "error", "said"),
    [
        (
            False,
            Conflict("n1 is a member already"),
            "^this machine is node:n1 of that cluster already: `potluck up --cl.* is enough$",
        ),
        (
            False,
            NotAllowed("the join token is used up"),
            r"^the join token is used up\. This machine is node:n1 of that cluster already",
        ),
        (True, NotAllowed("node:n1 was removed"), ""),
    ],
)
def test_who_joins_again_is_told_and_a_removed_node_gets_a_new_name(
    removed: bool, error: PotluckError, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = member(tmp_path)
    ca = certificates.read((where / "ca.crt").read_bytes()).fingerprint
    token = JoinToken(ca[:16], ("h:7814",), bytes(5), bytes(16))
    asked: list[str] = []

    async def enrol(token: JoinToken, name: str) -> str:
        asked.append(name)
        if removed and len(asked) > 1:
            return "joined"
        raise error

    monkeypatch.setattr(enrolment, "enrol", enrol)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    if removed:
        assert join._enrolled(token, None, False, Session(), tmp_path) == "joined"
        assert asked[0] == "n1" != asked[1]
        return
    with pytest.raises(type(error), match=said):
        join._enrolled(token, None, False, Session(), tmp_path)
    other = JoinToken(bytes(16), ("h:7814",), bytes(5), bytes(16))
    with pytest.raises(type(error), match=f"^{error.message}$"):
        join._enrolled(other, None, False, Session(), tmp_path)


def test_a_node_alone_is_told_where_its_cluster_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    name = f"look-{uuid.uuid4().hex[:6]}"
    said = Joining(plan(tmp_path, cluster=name, closed=True), print)._how_to_look()
    assert f"`potluck token create --role user --cluster {name}`" in said
    assert Joining(plan(tmp_path), print)._how_to_look() == "`potluck status` shows the cluster"
    (tmp_path / "config" / "potluck" / name).mkdir(parents=True)
    (tmp_path / "config" / "potluck" / name / "client.pem").touch()
    assert Joining(plan(tmp_path, cluster=name, closed=True), print)._how_to_look().endswith("shows the cluster")


async def test_an_open_cluster_is_none_of_a_closed_one(tmp_path: Path) -> None:
    """Before, `up --insecure` took a closed cluster's coordinator for its own, and its node waited for ever."""

    class Around:
        def __init__(self, *services: Service) -> None:
            self._services = services

        async def wait_for(self, wanted: Callable[[Service], bool], seconds: float) -> Service | None:
            return next(filter(wanted, self._services), None)

        def services(self, role: str) -> tuple[Service, ...]:
            return self._services

    closed, open_one = coordinator("00" * 8), coordinator("")
    joining = Joining(plan(tmp_path, asked=True), lambda text: None)
    with pytest.raises(
        NotAuthenticated, match=r"on the coordinator's machine \(192\.0\.2\.7\).* another name with --cluster"
    ):
        await joining._found(Around(closed), 0)  # type: ignore[arg-type]
    assert await joining._found(Around(closed, open_one), 0)  # type: ignore[arg-type]
    assert not await joining._found(Around(), 0)  # type: ignore[arg-type]
    ours = Joining(plan(tmp_path, closed=True), lambda text: None)
    assert await ours._found(Around(closed), 0)  # type: ignore[arg-type]
