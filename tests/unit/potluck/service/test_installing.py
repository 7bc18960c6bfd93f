"""Installing and removing services in folders of a test, with a systemctl that only notes what it is asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from potluck.errors import InvalidSettings, Unavailable
from potluck.service import dropin, gpus, installing, systemd
from potluck.settings_sources import load


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "units").mkdir()
    for name in ("UNITS", "SETTINGS", "STATE", "CACHE", "RUN"):
        monkeypatch.setattr(installing, name, tmp_path / name.lower())
    monkeypatch.setattr(dropin, "check_readable", lambda places: None)
    monkeypatch.setattr(dropin, "OWN", ())
    monkeypatch.setattr(dropin, "program", lambda name: Path("/opt/potluck/bin") / name)
    monkeypatch.setattr(installing, "choose", lambda mode: "mosquitto")
    monkeypatch.setattr(gpus, "PRESENT", {"nvidia": tmp_path / "nvidia", "amd": tmp_path / "kfd"})
    lines: list[str] = []

    def systemctl(*arguments: str) -> str:
        if "show" not in arguments[0]:
            lines.append(" ".join(arguments))
        return "" if arguments[0] == "show" else "LANG=C.UTF-8\nPATH=/usr/bin\n"

    monkeypatch.setattr(systemd, "systemctl", systemctl)
    monkeypatch.setattr(systemd, "forget", lambda unit: lines.append(f"forget {unit}"))
    return lines


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


BOTH = {
    "units/potluck-node.service", "units/potluck-node.service.d/10-installed.conf", "settings/node.toml",
    "units/potluck-coordinator.service", "units/potluck-coordinator.service.d/10-installed.conf",
    "settings/coordinator.toml",
}  # fmt: skip


def test_both_are_installed_and_started_without_waiting(asked: list[str], tmp_path: Path) -> None:
    os.umask(0o077)
    done = installing.install(("coordinator", "node"), {"cluster": "attic", "listen.host": "::1"})
    os.umask(0o022)
    assert files(tmp_path) == BOTH
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o644 for name in BOTH), "a service must read them"
    assert (tmp_path / "settings").stat().st_mode & 0o777 == 0o755
    assert asked == [
        "daemon-reload",
        "--quiet enable potluck-coordinator.service", "--no-block restart potluck-coordinator.service",
        "--quiet enable potluck-node.service", "--no-block restart potluck-node.service",
    ]  # fmt: skip
    assert [(one.daemon, one.settings.cluster, one.settings.listen.host) for one in done] == [
        ("coordinator", "attic", "::1"), ("node", "attic", "::1"),
    ]  # fmt: skip
    text = (tmp_path / "units/potluck-node.service.d/10-installed.conf").read_text()
    assert f"ExecStart=/opt/potluck/bin/potluck-node --config {tmp_path}/settings/node.toml" in text


def test_installed_again_it_keeps_the_settings_and_takes_their_limits(asked: list[str], tmp_path: Path) -> None:
    installing.install(("node",), {})
    file = tmp_path / "settings/node.toml"
    file.write_text("threads = 3\n[service]\nmemory_bytes = 12345678\n")
    old = tmp_path / "units/potluck-node.service.d/restart-backoff.conf"
    old.write_text("[Service]\nRestartSteps=6\n")
    (one,) = installing.install(("node",), {"seeds": ["h"]})
    assert one.settings == load(installing.NodeSettings, file)
    assert file.read_text() == 'seeds = ["h"]\nthreads = 3\n[service]\nmemory_bytes = 12345678\n'
    assert "MemoryMax=12345678" in (tmp_path / "units/potluck-node.service.d/10-installed.conf").read_text()
    assert not old.exists()


def test_a_node_sees_the_gpus_that_are_there(asked: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "units/potluck-node.service.d"
    for maker in gpus.PRESENT.values():
        maker.touch()
    if os.geteuid() == 0:
        os.chown(gpus.PRESENT["amd"], -1, 54321)  # no group has this number
    installing.install(("coordinator", "node"), {})
    assert "DeviceAllow=char-nvidia* rw\n" in (folder / "20-nvidia.conf").read_text()
    group = 54321 if os.geteuid() == 0 else gpus.PRESENT["amd"].group()
    assert f"DeviceAllow=char-drm rw\nSupplementaryGroups={group}" in (folder / "20-amd.conf").read_text()
    assert not list((tmp_path / "units/potluck-coordinator.service.d").glob("20*"))
    gpus.PRESENT["nvidia"].unlink()
    installing.install(("node",), {})
    assert {path.name for path in folder.iterdir()} == {"10-installed.conf", "20-amd.conf"}
    installing.uninstall(purge=False)
    assert not folder.exists()


def test_settings_are_checked_in_the_units_environment(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in that of whoever installs: what is on their PYTHONPATH, the service would not find."""
    (tmp_path / "settings").mkdir()
    file = tmp_path / "settings/node.toml"
    file.write_text('cluster = "attic"\nallow_code = ["our_layers"]\n')
    code = tmp_path / "code of ours"
    code.mkdir()
    (code / "our_layers.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(code))
    monkeypatch.setenv("POTLUCK_CLUSTER", "somebodys")
    with pytest.raises(InvalidSettings, match=rf"{file}:2: allow_code names the module 'our_layers', which Python"):
        installing.install(("node",), {})
    assert asked == []
    # `systemctl edit potluck-node`: Environment=
    monkeypatch.delenv("PYTHONPATH")
    before = systemd.systemctl
    shown = f'XDG_CACHE_HOME=/var/cache/x "PYTHONPATH={code}"\n'
    monkeypatch.setattr(systemd, "systemctl", lambda *said: shown if said[0] == "show" else before(*said))
    (one,) = installing.install(("node",), {"threads": 2})
    assert (one.settings.cluster, one.settings.allow_code) == ("attic", ("our_layers",))
    written = tmp_path / "units/potluck-node.service.d/10-installed.conf"
    assert "our_layers" not in written.read_text()
    monkeypatch.setattr(dropin, "HIDDEN", (code,))  # a home
    installing.install(("node",), {})
    assert f'BindReadOnlyPaths="{code}/our_layers.py"\n' in written.read_text(), "and nothing beside it"


def test_settings_that_are_a_link_stay_one(asked: list[str], tmp_path: Path) -> None:
    kept = tmp_path / "kept/potluck.toml"
    kept.parent.mkdir()
    kept.write_text("threads = 2\n")
    os.chown(kept, 1234, -1) if os.geteuid() == 0 else None
    owner = kept.stat().st_uid
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings/node.toml").symlink_to(kept)
    installing.install(("node",), {"cluster": "attic"})
    assert (tmp_path / "settings/node.toml").is_symlink()
    assert kept.read_text() == 'cluster = "attic"\nthreads = 2\n'
    assert kept.stat().st_uid == owner
    assert [path.name for path in kept.parent.iterdir()] == ["potluck.toml"]


def test_settings_that_no_service_sees_are_refused(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/node.toml").touch()
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings/node.toml").symlink_to(tmp_path / "home/node.toml")
    monkeypatch.setattr(dropin, "HIDDEN", (tmp_path / "home",))
    with pytest.raises(InvalidSettings, match=f"move it out of {tmp_path}/home"):
        installing.install(("node",), {})


def test_settings_that_are_no_text_are_refused(asked: list[str], tmp_path: Path) -> None:
    file = tmp_path / "settings/node.toml"
    file.parent.mkdir()
    file.write_bytes(b'cluster = "caf\xe9"\n')
    with pytest.raises(InvalidSettings, match="UTF-8"):
        installing.install(("node",), {})
    file.unlink()
    file.mkdir()
    with pytest.raises(InvalidSettings, match="directory"):
        installing.install(("node",), {})
    assert asked == []


@pytest.mark.parametrize("shown", ['A="b c" "D=e f"', "A='b c' D=e\\ f", "A=b D=don't"])
def test_the_environment_of_a_unit_is_read_as_systemd_tells_it(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "systemctl", lambda *said: shown if said[0] == "show" else "PATH=/usr/bin\n")
    found = systemd.environment("u.service")
    assert found.pop("PATH") == "/usr/bin"
    assert found == ({"A": "b", "D": "don't"} if "don't" in shown else {"A": "b c", "D": "e f"})


@pytest.mark.parametrize(
    ("link", "target", "words"),
    [
        ("units/potluck-node.service", "/dev/null", "systemctl unmask potluck-node.service"),
        ("units/potluck-node.service", "/srv/checkout/potluck-node.service", "rm .*/units/potluck-node.service"),
        ("units/potluck-node.service.d/10-installed.conf", "/srv/x.conf", "kept by others"),
        ("settings/node.toml", "/nowhere/node.toml", "no file: remove it"),
        ("settings/node.toml", "/dev/null", "no file: remove it"),
    ],
)
def test_what_others_keep_is_not_replaced(asked: list[str], tmp_path: Path, link: str, target: str, words: str) -> None:
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(target)
    with pytest.raises(InvalidSettings, match=words):
        installing.install(("node",), {})
    assert files(tmp_path) == {link}
    assert asked == []


def test_a_file_is_on_the_disk_before_it_has_its_name(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino))
    installing.install(("node",), {})
    written = [tmp_path / name for name in BOTH if "node" in name]
    assert {path.stat().st_ino for path in written} | {path.parent.stat().st_ino for path in written} <= synced


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("thread = 3\n", "settings/node.toml:2: there is no setting thread: did you mean threads?"),
        ('seeds = [\n"a",\n]\n', "seeds could not be changed in"),
        ('"seeds" = ["a"]\n', "seeds could not be changed in"),
        ("threads = [\n", "this is not valid TOML"),
        ('[listen]\nhost = "192.0.2.1"\n', "--insecure"),
        ("[service]\nmemory_bytes = 5\nmemory_high_bytes = 6\n", "node.toml:4: service.memory_high_bytes is 6, more"),
    ],
)
def test_where_something_is_wrong_nothing_is_changed(asked: list[str], tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings/node.toml").write_text(text)
    with pytest.raises(InvalidSettings) as refused:
        installing.install(("coordinator", "node"), {"seeds": ["h"]})
    assert words in refused.value.message
    assert files(tmp_path) == {"settings/node.toml"}
    assert (tmp_path / "settings/node.toml").read_text() == text
    assert asked == []


def test_a_coordinator_without_a_broker_is_not_installed(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(mode: str) -> str:
        raise Unavailable("apt install mosquitto")

    monkeypatch.setattr(installing, "choose", none)
    with pytest.raises(Unavailable):
        installing.install(("coordinator",), {})
    assert files(tmp_path) == set()
    installing.install(("coordinator",), {"seeds": ["h"]})  # it needs none of its own


def test_removed_it_leaves_data_settings_and_what_others_wrote(asked: list[str], tmp_path: Path) -> None:
    installing.install(("coordinator", "node"), {})
    (tmp_path / "units/potluck-node.service.d/override.conf").write_text("[Service]\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/potluck-node").symlink_to("private/potluck-node")
    (tmp_path / "settings/join-token").touch()
    for kind in ("state", "cache"):
        folder = tmp_path / kind / "private/potluck-node"
        folder.mkdir(parents=True)
        (folder / "file").touch()
        (tmp_path / kind / "potluck-node").symlink_to(folder)
    asked.clear()
    assert installing.uninstall(purge=False) == ("coordinator", "node")
    assert asked == [
        "--quiet disable --now potluck-node.service", "--quiet disable --now potluck-coordinator.service",
        "daemon-reload", "forget potluck-coordinator.service", "forget potluck-node.service",
    ]  # fmt: skip
    left = {
        "settings/node.toml",
        "settings/coordinator.toml",
        "settings/join-token",
        "units/potluck-node.service.d/override.conf",
    }
    assert files(tmp_path) == left | {"state/private/potluck-node/file", "state/potluck-node"}
    assert installing.uninstall(purge=True) == ()
    assert files(tmp_path) == set()
    assert not (tmp_path / "settings").exists()
