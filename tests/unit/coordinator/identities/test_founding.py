"""The CA and the coordinator's own certificates: made once and as a whole, renewed in time, and never those of another cluster."""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.identities import founding
from coordinator.identities.founding import BROKER, COMMANDS, COORDINATOR, IDENTITY, OPERATOR, Founded, found
from potluck.credentials import Credentials
from potluck.errors import InvalidSettings
from potluck.security import certificates, cluster_file, folder, signing

DAY = 86400.0


def begin(state: Path, cluster: str = "home", cluster_id: str = "c-1", **changes: bool) -> Founded:
    given = {"has_members": False, **changes}
    made = found(state, cluster, cluster_id, "attic", 7 * DAY, hosts=("localhost", "127.0.0.1"), **given)
    made.renew(at_start=True)
    return made


def files(where: Path) -> dict[str, bytes]:
    return {str(path.relative_to(where)): path.read_bytes() for path in sorted(where.rglob("*")) if path.is_file()}


def test_a_cluster_is_founded_once(tmp_path: Path) -> None:
    made = begin(tmp_path)
    first = files(tmp_path)
    assert set(first) == {
        "identity/ca.key", "identity/ca.crt", "identity/coordinator.pem", "identity/commands.pem",
        "broker/broker.pem", "broker/ca.crt", "operator/client.pem", "operator/ca.crt",
    }  # fmt: skip
    for name in first:
        mode = stat.S_IMODE((tmp_path / name).stat().st_mode)
        assert mode == (0o644 if name.endswith("ca.crt") else 0o600), name
        assert stat.S_IMODE((tmp_path / name).parent.stat().st_mode) == 0o700
    assert Credentials.load(tmp_path / IDENTITY, "coordinator").identity == "coordinator:attic"
    assert Credentials.load(tmp_path / OPERATOR, "client").identity == "client:operator-attic"
    ca = (tmp_path / IDENTITY / "ca.crt").read_bytes()
    shown = certificates.check(made.command_certificate(), ca, time.time())
    assert (shown.identity, shown.unit) == ("coordinator:attic", certificates.COMMANDS)
    assert signing.Verifier(shown.public_key).verify(made.signer()(b"do it"), b"do it")

    again = begin(tmp_path)
    # at each start, the coordinator says where it is now, and the broker's folder is not read
    changed = {name for name, data in files(tmp_path).items() if data != first[name]}
    assert changed == {"identity/coordinator.pem", "broker/broker.pem"}
    assert again.authority.ca == made.authority.ca


def test_the_coordinators_name_is_for_life(tmp_path: Path) -> None:
    begin(tmp_path)
    renamed = found(tmp_path, "home", "c-1", "cellar", 7 * DAY, has_members=True)
    assert (renamed.name, renamed.operator) == ("attic", "operator-attic")


def test_a_start_that_was_cut_off_leaves_nothing_by_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = folder.write_pair

    def cut_off(where: Path, name: str, key: bytes, certificate: bytes) -> None:
        if name == COMMANDS:
            raise KeyboardInterrupt
        whole(where, name, key, certificate)

    monkeypatch.setattr(folder, "write_pair", cut_off)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path)
    assert not (tmp_path / IDENTITY).exists()
    monkeypatch.setattr(folder, "write_pair", whole)
    begin(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {IDENTITY, BROKER, OPERATOR}


@pytest.mark.parametrize("name", ["ca.key", "ca.crt", "coordinator.pem", "commands.pem"])
def test_a_folder_by_halves_is_refused(tmp_path: Path, name: str) -> None:
    begin(tmp_path)
    (tmp_path / IDENTITY / name).unlink()
    before = files(tmp_path)
    with pytest.raises(InvalidSettings, match=rf"lacks {name}: put it back from a backup"):
        begin(tmp_path)
    assert files(tmp_path) == before


def broken(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda where: (where / name).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (broken("ca.key", b"no key"), "the CA cannot be read"),
        (broken("ca.key", certificates.new_key()), "not that of its certificate"),
        (broken("ca.crt", b"no certificate"), "the CA cannot be read"),
        (broken("coordinator.pem", b"-----BEGIN CERTIFICATE-----"), "cannot be read"),
        (broken("commands.pem", b"-----BEGIN CERTIFICATE-----"), "no private key"),
        (lambda where: (where / "ca.key").chmod(0o644), "can be read by other users"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Callable[[Path], object], why: str) -> None:
    begin(tmp_path)
    damage(tmp_path / IDENTITY)
    with pytest.raises(InvalidSettings, match=why):
        begin(tmp_path)


@pytest.mark.parametrize("other", [{"cluster": "garden"}, {"cluster_id": "c-2"}])
def test_the_folder_of_another_cluster_is_refused(tmp_path: Path, other: dict[str, str]) -> None:
    begin(tmp_path)
    with pytest.raises(InvalidSettings, match="CA of another cluster"):
        begin(tmp_path, **other)  # type: ignore[arg-type]


def test_a_lost_ca_locks_nobody_out_by_itself(tmp_path: Path) -> None:
    begin(tmp_path)
    shutil.rmtree(tmp_path / IDENTITY)
    with pytest.raises(InvalidSettings, match=r"the cluster has members, and the folder .* with its CA is gone"):
        begin(tmp_path, has_members=True)
    assert not (tmp_path / IDENTITY).exists()
    (tmp_path / IDENTITY).mkdir(mode=0o700)
    with pytest.raises(InvalidSettings, match="is gone"):
        begin(tmp_path, has_members=True)


def test_certificates_are_renewed_at_two_thirds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = begin(tmp_path)
    began = time.time()
    assert abs(made.due_at() - (began + 7 * DAY * 2 / 3)) < 60
    assert made.renew() == ()
    before, ends = files(tmp_path), made.ends()
    monkeypatch.setattr(founding.time, "time", lambda: began + 5 * DAY)
    assert set(made.renew()) == {COORDINATOR, COMMANDS, "broker", "client"}
    changed = {name for name, data in files(tmp_path).items() if data != before[name]}
    assert changed == {name for name in before if name.endswith(".pem")}
    assert made.due_at() > began + 9 * DAY
    assert all(until > ends[identity][1] + 4 * DAY for identity, (_, until) in made.ends().items())
    key = b"-----BEGIN CERTIFICATE-----"
    assert before["identity/commands.pem"].split(key)[0] == files(tmp_path)["identity/commands.pem"].split(key)[0]


def test_what_ended_while_the_machine_was_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.time()
    monkeypatch.setattr(founding.time, "time", lambda: began - 30 * DAY)
    begin(tmp_path)
    monkeypatch.setattr(founding.time, "time", lambda: began)
    made = begin(tmp_path, has_members=True)
    assert all(until > began for _, until in made.ends().values())
    certificates.check(made.command_certificate(), made.authority.ca, began)


def test_the_operator_is_told_where_the_cluster_is(tmp_path: Path) -> None:
    begin(tmp_path).tell_operator("home", "c-1", ("127.0.0.1:8884",), ("127.0.0.1:7814",))
    known = cluster_file.read(tmp_path / OPERATOR)
    assert (known.identity, known.brokers) == ("client:operator-attic", ("127.0.0.1:8884",))
