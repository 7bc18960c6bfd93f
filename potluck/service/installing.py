"""Installs potluck's services on this machine, and removes them. Needs root and systemd."""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from potluck import whole_files
from potluck.credentials import FOLDER
from potluck.errors import InvalidSettings
from potluck.net.addresses import lan_addresses
from potluck.net.broker import choose, find_mosquitto
from potluck.service import checking, dropin, gpus, settings_file, shipped, systemd
from potluck.service.checking import KINDS, Daemon
from potluck.settings import CoordinatorSettings, NodeSettings, check_listen
from potluck.settings_sources import toml

DAEMONS: tuple[Daemon, ...] = ("coordinator", "node")
"""In the order in which they start."""
UNITS = Path("/etc/systemd/system")
SETTINGS = Path("/etc/potluck")
STATE = Path("/var/lib")
CACHE = Path("/var/cache")
RUN = Path("/run")
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


def founds(seeds: bool) -> bool:
    """Whether a coordinator that is installed here for the first time, without a word on where it listens, founds a closed cluster.

    `seeds`: it is to use the broker of others.
    """
    return (
        not seeds
        and not (SETTINGS / "coordinator.toml").exists()
        and bool(lan_addresses())
        and find_mosquitto() is not None
    )


def credentials() -> Path | None:
    """The folder with the credentials of the node's service; None: it is no member of a closed cluster."""
    folders = (state / "potluck-node" / FOLDER for state in (STATE / "private", STATE))
    return next((folder for folder in folders if (folder / "node.pem").exists()), None)


def install(
    daemons: tuple[Daemon, ...],
    changes: Mapping[str, settings_file.Value],
    *,
    joins: bool = False,
    waits: tuple[Daemon, ...] = (),
) -> list[Installed]:
    """Write settings, units and drop-ins of these daemons, and (re)start them.

    `changes` are settings (dotted keys) that differ from the file or the example. Everything is checked before anything is written.
    `joins`: the node has a join token, or gets one; `waits`: daemons that are not started yet.
    Raises InvalidSettings for wrong settings and a place of installation that a service cannot read, Unavailable where no broker is.
    """
    places = dropin.roots()
    dropin.check_readable(places)
    programs = {daemon: dropin.program(f"potluck-{daemon}") for daemon in daemons}
    source = shipped.folder()
    written: dict[Path, str] = {}
    removed = [_dropins(daemon) / _BEFORE for daemon in daemons]
    done: list[Installed] = []
    for daemon in daemons:
        file = SETTINGS / f"{daemon}.toml"
        known = {
            key: value for key, value in changes.items() if key.partition(".")[0] in KINDS[daemon].__struct_fields__
        }
        before = _read(file) if file.exists() else (source / "configs" / file.name).read_text("utf-8")
        text = _changed(before, known, file)
        settings, code = _checked(daemon, text, known, file)
        code = [place for place in code if place in dropin.outermost([*places, *code])]
        dropin.check_readable(code)
        if isinstance(settings, NodeSettings) and not joins and credentials() is None:
            check_listen(settings.listen)
        if isinstance(settings, CoordinatorSettings) and not settings.seeds:
            choose(settings.broker.mode)
        command = [str(programs[daemon]), "--config", str(file)]
        done.append(Installed(daemon, file, settings))
        written[_place(file)] = text
        written[_place(UNITS / unit(daemon))] = (source / shipped.UNITS / unit(daemon)).read_text("utf-8")
        written[_place(_dropins(daemon) / DROPIN)] = dropin.text(
            f"potluck-{daemon}", command, [*places, *code], settings.service
        )
        if daemon == "node":
            for name, text_of_gpu in gpus.dropins().items():
                place = _place(_dropins(daemon) / name)
                if text_of_gpu is None:
                    removed.append(place)
                else:
                    written[place] = text_of_gpu
    for path, text in written.items():
        if not path.parent.exists():
            path.parent.mkdir()
            path.parent.chmod(0o755)
        _replace(path, text)
    for path in removed:
        path.unlink(missing_ok=True)
    systemd.systemctl("daemon-reload")
    for daemon in daemons:
        systemd.systemctl("--quiet", "enable", unit(daemon))
        if daemon not in waits:
            start(daemon)
    return done


def start(daemon: Daemon) -> None:
    """(Re)start a service. A node waits for its coordinator: we do not wait for the node."""
    systemd.systemctl("--no-block", "restart", unit(daemon))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidSettings(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidSettings(f"{file} is not text in UTF-8: write it again") from error


def _changed(text: str, changes: Mapping[str, settings_file.Value], file: Path) -> str:
    """The text of `file` with these changes. Raises InvalidSettings where it is written in a way that is not understood."""
    changed = settings_file.changed(text, changes) if changes else text
    if _is_toml(text) and not _is_toml(changed):
        raise _by_hand(changes, file)
    return changed


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _by_hand(settings: Iterable[str], file: Path) -> InvalidSettings:
    return InvalidSettings(f"{', '.join(settings)} could not be changed in {file}: write it there by hand")


def present(daemon: Daemon) -> CoordinatorSettings | NodeSettings:
    """The settings that the daemon's service has now, or those of the example. Raises InvalidSettings."""
    file = SETTINGS / f"{daemon}.toml"
    if not file.exists():
        file = shipped.folder() / "configs" / file.name
    return checking.settings(daemon, file, systemd.environment(unit(daemon)))[0]


def _checked(
    daemon: Daemon, text: str, changes: Mapping[str, settings_file.Value], file: Path
) -> tuple[CoordinatorSettings | NodeSettings, list[Path]]:
    """The settings in this text, which will be in `file`, as the unit will read them; and where the code is that they allow.

    Raises InvalidSettings, also where a change did not get into it.
    """
    with TemporaryDirectory() as folder:
        trial = Path(folder) / file.name
        trial.write_text(text, encoding="utf-8")
        try:
            settings, code = checking.settings(daemon, trial, systemd.environment(unit(daemon)))
        except InvalidSettings as error:
            raise InvalidSettings(error.message.replace(str(trial), str(file))) from error
    values = msgspec.to_builtins(settings)
    if unchanged := [key for key, value in changes.items() if toml(_at(values, key)) != toml(value)]:
        raise _by_hand(unchanged, file)
    return settings, code


def _at(values: Mapping[str, Any], dotted: str) -> Any:
    found: Any = values
    for key in dotted.split("."):
        found = found[key]
    return found


def _place(path: Path) -> Path:
    """Where a file is to be written: settings that are a link stay one, and what it leads to is written.

    Raises InvalidSettings for a unit or drop-in that is a link: it is masked, or another program or person keeps it.
    """
    if not path.is_symlink():
        return path
    target = path.resolve()
    if path.parent != SETTINGS:
        if target == Path(os.devnull):
            raise InvalidSettings(f"{path.name} is masked: type systemctl unmask {path.name}, and then this again")
        raise InvalidSettings(
            f"{path} is a link to {target}, which is kept by others: remove it (rm {path}), and try again"
        )
    if not target.is_file():
        raise InvalidSettings(f"{path} is a link to {target}, which is no file: remove it (rm {path}), and try again")
    dropin.check_seen(target)
    return target


def _replace(path: Path, text: str) -> None:
    """Write a file that all may read, at once. It stays its owner's. Raises InvalidSettings."""
    try:
        whole_files.write(path, text.encode(), 0o644, owner=path.stat().st_uid if path.exists() else -1)
    except OSError as error:
        raise InvalidSettings(f"{path} cannot be written: {error.strerror}") from error


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
        # systemd 252 removes the folder in /run, but not the link to it.
        own = [*_folders(RUN, daemon), *_folders(CACHE, daemon), UNITS / unit(daemon)]
        own += [_dropins(daemon) / name for name in (DROPIN, *gpus.NAMES.values())]
        for path in (*own, *(kept(daemon) if purge else ())):
            _remove(path)
        _remove_if_empty(_dropins(daemon))
    _remove_if_empty(SETTINGS)
    systemd.systemctl("daemon-reload")
    for daemon in found:
        # What has failed stays known to systemd until somebody says that it may be forgotten.
        systemd.forget(unit(daemon))
    return found


def kept(daemon: Daemon) -> list[Path]:
    """What `uninstall` leaves, and deletes with `purge`: settings, data, and drop-ins that people wrote."""
    return [SETTINGS / f"{daemon}.toml", SETTINGS / "join-token", *_folders(STATE, daemon), _dropins(daemon)]


def _folders(above: Path, daemon: Daemon) -> list[Path]:
    """With DynamicUser, a folder of a service is in `private`, and beside that is a link to it."""
    return [above / f"potluck-{daemon}", above / "private" / f"potluck-{daemon}"]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_if_empty(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
