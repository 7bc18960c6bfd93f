"""Installs potluck's services on this machine, and removes them. Needs root and systemd."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from potluck.errors import InvalidSettings
from potluck.net.broker import choose
from potluck.service import dropin, settings_file, shipped, systemd
from potluck.settings import CoordinatorSettings, NodeSettings, check_listen
from potluck.settings_sources import load

Daemon = Literal["node", "coordinator"]
DAEMONS: tuple[Daemon, ...] = ("coordinator", "node")
"""In the order in which they start."""
KINDS: Mapping[Daemon, type[CoordinatorSettings] | type[NodeSettings]] = {
    "coordinator": CoordinatorSettings,
    "node": NodeSettings,
}
UNITS = Path("/etc/systemd/system")
SETTINGS = Path("/etc/potluck")
STATE = Path("/var/lib")
CACHE = Path("/var/cache")
DROPIN = "10-installed.conf"
_BEFORE = "restart-backoff.conf"
"""A drop-in of earlier versions: the daemons themselves wait after crashes now."""


def unit(daemon: Daemon) -> str:
    return f"potluck-{daemon}.service"


@dataclass(frozen=True)
class Installed:
    """A service that was installed: its settings, and the file that they are in."""

    daemon: Daemon
    file: Path
    settings: CoordinatorSettings | NodeSettings


def install(daemons: tuple[Daemon, ...], changes: Mapping[str, settings_file.Value]) -> list[Installed]:
    """Write settings, units and drop-ins of these daemons, and (re)start them.

    `changes` are settings (dotted keys) that differ from the file or the example. Everything is checked before anything is written.
    Raises InvalidSettings for wrong settings and a place of installation that a service cannot read, Unavailable where no broker is.
    """
    places = dropin.roots()
    dropin.check_readable(places)
    programs = {daemon: dropin.program(f"potluck-{daemon}") for daemon in daemons}
    source = shipped.folder()
    written: dict[Path, str] = {}
    done: list[Installed] = []
    for daemon in daemons:
        file = SETTINGS / f"{daemon}.toml"
        known = {
            key: value for key, value in changes.items() if key.partition(".")[0] in KINDS[daemon].__struct_fields__
        }
        given = file if file.exists() else source / "configs" / file.name
        text = settings_file.changed(given.read_text(encoding="utf-8"), known) if known else given.read_text("utf-8")
        settings = _checked(KINDS[daemon], text, known, file)
        if isinstance(settings, CoordinatorSettings) and not settings.seeds:
            choose(settings.broker.mode)
        command = [str(programs[daemon]), "--config", str(file)]
        done.append(Installed(daemon, file, settings))
        written[file] = text
        written[UNITS / unit(daemon)] = (source / shipped.UNITS / unit(daemon)).read_text("utf-8")
        written[_dropins(daemon) / DROPIN] = dropin.text(f"potluck-{daemon}", command, places, settings.service)
    for path, text in written.items():
        if not path.parent.exists():
            path.parent.mkdir()
            path.parent.chmod(0o755)
        _replace(path, text)
    for daemon in daemons:
        (_dropins(daemon) / _BEFORE).unlink(missing_ok=True)
    systemd.systemctl("daemon-reload")
    for daemon in daemons:
        systemd.systemctl("--quiet", "enable", unit(daemon))
        # A node waits for its coordinator: we do not wait for the node.
        systemd.systemctl("--no-block", "restart", unit(daemon))
    return done


def _checked(
    kind: type[CoordinatorSettings] | type[NodeSettings],
    text: str,
    changes: Mapping[str, settings_file.Value],
    file: Path,
) -> CoordinatorSettings | NodeSettings:
    """The settings in this text, which will be in `file`. Raises InvalidSettings, also where a change did not get into it."""
    with TemporaryDirectory() as folder:
        trial = Path(folder) / file.name
        trial.write_text(text, encoding="utf-8")
        try:
            settings = load(kind, trial)
            unchanged = [key for key, value in changes.items() if load(kind, trial, {key: value}) != settings]
        except InvalidSettings as error:
            raise InvalidSettings(error.message.replace(str(trial), str(file))) from error
    if unchanged:
        raise InvalidSettings(f"{', '.join(unchanged)} could not be changed in {file}: write it there by hand")
    check_listen(settings.listen)
    return settings


def _replace(path: Path, text: str) -> None:
    """Write a file that all may read, at once: nobody finds half of it, also after a power cut."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.chmod(0o644)
    new.replace(path)


def _dropins(daemon: Daemon) -> Path:
    return UNITS / f"{unit(daemon)}.d"


def installed() -> tuple[Daemon, ...]:
    """The daemons whose units are installed here."""
    return tuple(daemon for daemon in DAEMONS if (UNITS / unit(daemon)).exists())


def uninstall(*, purge: bool) -> tuple[Daemon, ...]:
    """Stop and remove the services; with `purge` also their data and settings. Gives the daemons that were installed."""
    found = installed()
    # Nodes first: they can still say goodbye to their coordinator.
    for daemon in reversed(found):
        systemd.systemctl("--quiet", "disable", "--now", unit(daemon))
    for daemon in DAEMONS:
        for kept in (CACHE, *((STATE,) if purge else ())):
            _remove_folder(kept / f"potluck-{daemon}")
            _remove_folder(kept / "private" / f"potluck-{daemon}")
        (UNITS / unit(daemon)).unlink(missing_ok=True)
        (_dropins(daemon) / DROPIN).unlink(missing_ok=True)
        if purge:
            (SETTINGS / f"{daemon}.toml").unlink(missing_ok=True)
            _remove_folder(_dropins(daemon))
        _remove_if_empty(_dropins(daemon))
    _remove_if_empty(SETTINGS)
    systemd.systemctl("daemon-reload")
    for daemon in found:
        # What has failed stays known to systemd until somebody says that it may be forgotten.
        systemd.forget(unit(daemon))
    return found


def _remove_folder(path: Path) -> None:
    # With DynamicUser, the folder is in `private`, and here is a link to it.
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _remove_if_empty(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
