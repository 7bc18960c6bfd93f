"""How a service gets its join token, and how a coordinator's service lets its own node in; with a systemd of the test's."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from potluck import enrolment
from potluck.client import operating
from potluck.credentials import FOLDER
from potluck.errors import InvalidRequest, InvalidSettings, Unavailable
from potluck.security import certificates, cluster_file
from potluck.security.cluster_file import ClusterFile
from potluck.service import dropin, gpus, installing, joining, systemd
from potluck.service.systemd import UnitState
from potluck.wire.members import CreateToken
from potluck.wire.tokens import JoinToken, parse
from support.closed import Authority

AUTHORITY = Authority()
TOKEN = JoinToken(certificates.read(AUTHORITY.ca).fingerprint[:16], ("h:7814",), bytes(5), bytes(16))


class Machine:
    """systemd: a node that starts takes the token, and does with it what the test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.tokens: list[str] = []
        self.state = "active"
        self.joins = True
        self.refusal = ""

    def systemctl(self, *arguments: str) -> str:
        if arguments[0] == "show-environment":
            return "LANG=C.UTF-8\nPATH=/usr/bin\n"
        if arguments[0] == "show":
            return ""
        self.asked.append(" ".join(arguments))
        if arguments == ("--no-block", "restart", "potluck-node.service"):
            self.start_node()
        return ""

    def start_node(self) -> None:
        file = self.folder / "settings" / joining.TOKEN
        if not file.exists():
            return
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        self.tokens.append(file.read_text().strip())
        if self.joins:
            where = self.folder / "state" / "private" / "potluck-node" / FOLDER
            AUTHORITY.member(where, "node", certificates.node_profile("n1"))
            known = ClusterFile("attic", "cluster-id", ("h:8883",), ("h:7814",), "node:n1")
            cluster_file.write(where, known)
            enrolment.note_tried(where, parse(self.tokens[-1]), self.refusal)

    def states(self, units: object) -> list[UnitState]:
        return [UnitState("potluck-node", True, self.state, "", "exit-code", 0, 0, "the token is used up", True)]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    (tmp_path / "units").mkdir()
    for name in ("UNITS", "SETTINGS", "STATE", "CACHE", "RUN"):
        monkeypatch.setattr(installing, name, tmp_path / name.lower())
    monkeypatch.setattr(dropin, "check_readable", lambda places: None)
    monkeypatch.setattr(dropin, "program", lambda name: Path("/opt/potluck/bin") / name)
    monkeypatch.setattr(installing, "choose", lambda mode: "mosquitto")
    for module in (installing, joining):
        monkeypatch.setattr(module, "find_mosquitto", lambda: "/usr/sbin/mosquitto")
    monkeypatch.setattr(gpus, "PRESENT", {})
    monkeypatch.setattr(systemd, "systemctl", made.systemctl)
    monkeypatch.setattr(systemd, "states", made.states)
    monkeypatch.setattr(joining, "JOIN_SECONDS", 0.5)
    return made


def test_the_token_is_there_when_the_node_starts_and_gone_when_it_has_joined(machine: Machine) -> None:
    done, known = joining.install(TOKEN, {"listen.host": joining.ADDRESS, "listen.insecure": False})
    assert known.identity == "node:n1"
    assert [parse(text) for text in machine.tokens] == [TOKEN]
    assert not (machine.folder / "settings" / joining.TOKEN).exists()
    assert [(one.daemon, one.settings.listen.host) for one in done] == [("node", "0.0.0.0")]


def test_an_installed_node_that_served_only_its_machine_listens_on_the_network_as_a_member(machine: Machine) -> None:
    installing.install(("node",), {"threads": 3})
    assert joining.join(TOKEN).cluster == "attic"
    settings = installing.present("node")
    assert (settings.listen.host, settings.listen.insecure) == (joining.ADDRESS, False)
    assert "threads = 3" in (machine.folder / "settings/node.toml").read_text()
    installing.install(("node",), {"listen.host": "192.0.2.7"})
    assert joining.join(TOKEN).cluster == "attic"
    assert installing.present("node").listen.host == "192.0.2.7", "where the user said"


def test_a_node_that_cannot_join_says_why_and_leaves_no_token(machine: Machine) -> None:
    machine.joins, machine.state = False, "failed"
    with pytest.raises(InvalidRequest, match="the token is used up"):
        joining.install(TOKEN, {})
    assert not (machine.folder / "settings" / joining.TOKEN).exists()


def test_a_member_that_is_not_let_in_again_says_why_and_goes_on(machine: Machine) -> None:
    joining.install(TOKEN, {})
    machine.refusal = "n1 is a member already"
    another = JoinToken(TOKEN.fingerprint, TOKEN.endpoints, bytes([1] * 5), bytes(16))
    with pytest.raises(InvalidRequest, match="a member as before: n1 is a member already"):
        joining.join(another)
    assert not (machine.folder / "settings" / joining.TOKEN).exists()


def test_a_node_that_has_not_joined_yet_keeps_its_token(machine: Machine) -> None:
    machine.joins, machine.state = False, "activating"
    with pytest.raises(Unavailable, match="goes on trying"):
        joining.install(TOKEN, {})
    assert (machine.folder / "settings" / joining.TOKEN).exists()


def test_wrong_settings_use_no_token_up(machine: Machine) -> None:
    (machine.folder / "settings").mkdir()
    (machine.folder / "settings/node.toml").write_text("thread = 3\n")
    with pytest.raises(InvalidSettings, match="did you mean threads"):
        joining.install(TOKEN, {})
    assert not machine.tokens
    assert not (machine.folder / "settings" / joining.TOKEN).exists()


def test_a_coordinator_founds_and_lets_its_own_node_in(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[CreateToken] = []

    async def new_token(where: Path, cluster: str, question: CreateToken, since: float) -> str:
        assert "--no-block restart potluck-coordinator.service" in machine.asked, "it runs before it is asked"
        if question.uses == 1:
            assert "--no-block restart potluck-node.service" not in machine.asked, "without a token it would end"
        questions.append(question)
        return TOKEN.text()

    monkeypatch.setattr(operating, "new_token", new_token)
    listen = {"listen.host": joining.ADDRESS, "listen.insecure": False}
    done, shown = joining.lead(listen, node=True)
    assert [one.daemon for one in done] == ["coordinator", "node"]
    assert (shown, len(machine.tokens)) == (TOKEN.text(), 1)
    assert [question.uses for question in questions] == [1, operating.SHARED_USES]
    # installed again, its node is a member already
    machine.tokens.clear()
    questions.clear()
    joining.lead({}, node=True)
    assert not machine.tokens
    assert [question.uses for question in questions] == [operating.SHARED_USES]


def test_without_mosquitto_nothing_is_installed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "find_mosquitto", lambda: None)
    with pytest.raises(Unavailable, match="apt install mosquitto"):
        joining.lead({"listen.host": joining.ADDRESS, "listen.insecure": False}, node=True)
    assert not machine.asked


@pytest.mark.parametrize("listen", [{}, {"listen.host": "192.0.2.1", "listen.insecure": True}])
def test_an_open_coordinator_needs_no_token(machine: Machine, listen: dict[str, str | bool]) -> None:
    done, shown = joining.lead(listen, node=True)
    assert ([one.daemon for one in done], shown, machine.tokens) == (["coordinator", "node"], "", [])


def test_who_founds(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "lan_addresses", lambda: ["192.0.2.1"])
    assert installing.founds(False)
    assert not installing.founds(True)
    installing.install(("coordinator",), {})
    assert not installing.founds(False), "what it was stays as it is"
