"""What a unit's drop-in says, and where a service can read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from potluck.errors import InvalidSettings, NotFound
from potluck.service import dropin
from potluck.settings import ServiceSettings

NONE = ServiceSettings()


def lines(*arguments: object) -> list[str]:
    return dropin.text(*arguments).splitlines()[1:]  # type: ignore[arg-type]


def test_an_installation_outside_of_homes_needs_only_its_command() -> None:
    command = ["/opt/potluck/bin/potluck-node", "--config", "/etc/potluck/node.toml"]
    assert lines("potluck-node", command, [Path("/opt/potluck"), Path("/usr")], NONE) == [
        "[Service]", "ExecStart=", "ExecStart=/opt/potluck/bin/potluck-node --config /etc/potluck/node.toml",
    ]  # fmt: skip


def test_of_a_home_a_service_sees_its_program_and_nothing_else() -> None:
    places = [Path("/home/u/.local/share/uv/python/cpython-3.12"), Path("/root/my venv"), Path("/usr")]
    told = lines("potluck-node", ["/root/my venv/bin/potluck-node"], places, NONE)
    assert told[2:] == [
        'ExecStart="/root/my venv/bin/potluck-node"',
        "ProtectHome=tmpfs",
        'BindReadOnlyPaths=/home/u/.local/share/uv/python/cpython-3.12 "/root/my venv"',
    ]


def test_what_systemd_would_expand_is_escaped() -> None:
    assert lines("u", ["/srv/50%$x/a"], [], NONE)[2] == "ExecStart=/srv/50%%$$x/a"


def test_limits_are_settings() -> None:
    limits = ServiceSettings(memory_bytes=4 * 2**30, memory_high_bytes=3 * 2**30, cpu_percent=250)
    told = lines("potluck-node", ["/x"], [], limits)[3:]
    assert told == ["MemoryMax=4294967296", "MemoryHigh=3221225472", "CPUQuota=250%"]


def test_the_roots_hold_this_environment_and_do_not_lie_in_each_other() -> None:
    roots = dropin.roots()
    for needed in (sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve()), dropin.__file__):
        assert any(Path(needed).is_relative_to(root) for root in roots), needed
    assert not any(one != other and one.is_relative_to(other) for one in roots for other in roots)


def test_an_interpreter_behind_links_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("venv/bin", ".local/bin", ".local/share/secret", "python-3.12.9/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to("../../.local/bin/python3")
    (tmp_path / ".local/bin/python3").symlink_to(tmp_path / "python-3.12.9/bin/python3.12")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/bin/python"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "python-3.12.9"))
    found = dropin.roots()
    assert {tmp_path / ".local/bin", tmp_path / "python-3.12.9"} <= set(found)
    assert not any((tmp_path / ".local/share").is_relative_to(root) for root in found), "it is nobody's business"


def test_what_a_service_could_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettings, match="temporary"):
        dropin.check_readable([Path("/tmp/venv")])
    monkeypatch.setattr(dropin, "OWN", ())
    above, place = tmp_path / "above", tmp_path / "above/venv"
    place.mkdir(parents=True)
    for folder in (*tmp_path.parents, tmp_path, above):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o711)
    place.chmod(0o755)
    dropin.check_readable([place])
    above.chmod(0o700)
    with pytest.raises(InvalidSettings, match=rf"chmod o\+x {above}"):
        dropin.check_readable([place])
    # Below a hidden folder, the ones above are made anew for the service.
    monkeypatch.setattr(dropin, "HIDDEN", (above,))
    dropin.check_readable([place])
    place.chmod(0o750)
    with pytest.raises(InvalidSettings, match=rf"chmod -R go\+rX {place}"):
        dropin.check_readable([place])


def test_an_interpreter_without_our_programs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(NotFound, match="pipx"):
        dropin.program("potluck-node")
