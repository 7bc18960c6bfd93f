"""What the coordinator of a closed cluster has on its disk: the CA, its own credentials, its broker's, and those of the machine's operator.

| folder      | what                                                                                            |
|-------------|-------------------------------------------------------------------------------------------------|
| `identity/` | `ca.key`, `ca.crt`; `coordinator.pem`; `commands.pem`: the key that seals commands              |
| `broker/`   | `broker.pem`, `ca.crt`, and what `potluck.net.broker` writes                                    |
| `operator/` | `client.pem`, `ca.crt`, `cluster.toml`: whoever may read this folder may command the cluster    |

`identity/` is made once, as a whole, at the first start. Certificates are made again before they end.
"""

from __future__ import annotations

import logging
import os
import shutil
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordinator.identities.authority import Authority, KeyOnDisk, new_pair
from potluck.errors import InvalidRequest, InvalidSettings, PotluckError
from potluck.logs import fields
from potluck.security import certificates, cluster_file, folder, signing
from potluck.security.certificates import EARLY_SECONDS, Certificate, Profile
from potluck.security.cluster_file import ClusterFile

log = logging.getLogger(__name__)

IDENTITY = "identity"
BROKER = "broker"
OPERATOR = "operator"
COORDINATOR = "coordinator"
COMMANDS = "commands"
CLIENT = "client"
LIFE_USED = 2 / 3
"""A certificate is made again when this part of its life is over."""

_NEW = ".identity.new"


@dataclass(frozen=True)
class _Own:
    """A certificate of ours: the file `<name>.pem` in a folder, and what stands in it."""

    where: Path
    name: str
    profile: Profile


class Founded:
    """The CA, and the certificates that the coordinator gives itself. `name` is the coordinator's for life.

    `hosts` are names and addresses of this machine that stand in its certificate, for programs that are not ours.
    """

    def __init__(
        self, state: Path, authority: Authority, name: str, seconds: float, hosts: tuple[str, ...] = ()
    ) -> None:
        self.state = state
        self.authority = authority
        self.name = name
        self.operator = f"operator-{name}"
        self.seconds = seconds
        self._commands = _Own(self.identity, COMMANDS, certificates.commands_profile(name))
        self._all = (
            _Own(self.identity, COORDINATOR, certificates.coordinator_profile(name, hosts)),
            self._commands,
            _Own(state / BROKER, BROKER, certificates.broker_profile(name)),
            _Own(state / OPERATOR, CLIENT, certificates.client_profile(self.operator, "operator")),
        )
        self._have: dict[str, Certificate] = {}
        """What was read or made. The broker's folder belongs to the user that it runs as: nothing is read there."""
        for one in self._all:
            if one.where != state / BROKER and (known := self._usable(one)) is not None:
                self._have[one.name] = known
        for where in (state / BROKER, state / OPERATOR):
            folder.write(where / folder.CA_CERTIFICATE, authority.ca, folder.PUBLIC)

    @property
    def identity(self) -> Path:
        return self.state / IDENTITY

    def renew(self, *, at_start: bool = False) -> tuple[str, ...]:
        """Make those certificates again whose time has come; returns the names of their files. Raises InvalidSettings.

        `at_start`: and the coordinator's in any case, because the machine may have other addresses than before.
        """
        now = time.time()
        due = [one for one in self._all if self._is_due(one.name, now) or (at_start and one.name == COORDINATOR)]
        for one in due:
            if one == self._commands:  # The key stays: commands that are under way need no second one.
                key = _key_of(folder.secret(folder.pair(one.where, one.name)))
                certificate = self.authority.sign(self._signer().public_key, one.profile, self.seconds)
            else:
                key, certificate = new_pair(self.authority, one.profile, self.seconds)
            folder.write_pair(one.where, one.name, key, certificate)
            self._have[one.name] = certificates.read(certificate)
        return tuple(one.name for one in due)

    def due_at(self) -> float:
        """When the next of them has to be made again (Unix time)."""
        return min(_due(one) for one in self._have.values())

    def ends(self) -> dict[str, tuple[str, float]]:
        """For each of our identities its role, and when its certificate ends."""
        return {
            f"coordinator:{self.name}": ("coordinator", self._have[COORDINATOR].not_after),
            f"client:{self.operator}": ("operator", self._have[CLIENT].not_after),
        }

    def signer(self) -> Callable[[bytes], bytes]:
        """Signs with the key for commands."""
        return self._signer().sign

    def _signer(self) -> signing.Signer:
        path = folder.pair(self.identity, COMMANDS)
        try:
            return signing.Signer(_key_of(folder.secret(path)))
        except InvalidRequest as error:
            raise InvalidSettings(f"{path} cannot be read: {error.message}: put it back from a backup") from error

    def command_certificate(self) -> bytes:
        """The certificate of that key, as DER."""
        both = folder.secret(folder.pair(self.identity, COMMANDS))
        return ssl.PEM_cert_to_DER_cert(folder.certificate_of(both).decode("ascii"))

    def tell_operator(self, cluster: str, cluster_id: str, brokers: tuple[str, ...], http: tuple[str, ...]) -> None:
        """Write where the machine's operator finds the cluster."""
        known = ClusterFile(cluster, cluster_id, brokers, http, f"client:{self.operator}")
        cluster_file.write(self.state / OPERATOR, known)

    def _is_due(self, name: str, now: float) -> bool:
        return name not in self._have or _due(self._have[name]) <= now

    def _usable(self, one: _Own) -> Certificate | None:
        """What is on the disk, if it is what we would make, and valid still."""
        try:
            both = folder.secret(folder.pair(one.where, one.name))
            found = certificates.check(folder.certificate_of(both), self.authority.ca, time.time())
        except PotluckError:
            return None
        return found if found.identity == one.profile.identity else None


def found(
    state: Path,
    cluster: str,
    cluster_id: str,
    name: str,
    seconds: float,
    *,
    has_members: bool,
    hosts: tuple[str, ...] = (),
) -> Founded:
    """What is in the folder `state`, or was made there now, in the coordinator's name `name`.

    `seconds`: how long certificates last. `has_members`: whether the journal knows members, so that a new CA would lock them out.
    Raises InvalidSettings for a folder that lacks something, or is another cluster's.
    """
    where = state / IDENTITY
    shutil.rmtree(state / _NEW, ignore_errors=True)  # left by a start that was cut off
    if not where.exists() or not any(where.iterdir()):
        if has_members:
            raise InvalidSettings(
                f"the cluster has members, and the folder {where} with its CA is gone: put it back from a backup. To found a new cluster "
                f"instead, which every machine joins again, move {state} away"
            )
        _make(state, cluster, cluster_id, name, seconds)
    lacks = [file for file in _files() if not (where / file).is_file()]
    if lacks:
        raise InvalidSettings(
            f"{where} lacks {' and '.join(lacks)}: put it back from a backup. To found a new cluster instead, which every machine joins "
            f"again, move {state} away"
        )
    authority = KeyOnDisk(folder.secret(where / folder.CA_KEY), ca := folder.public(where / folder.CA_CERTIFICATE))
    issuer = certificates.read(ca)
    if issuer.organization != cluster_id or issuer.identity != certificates.ca_name(cluster):
        raise InvalidSettings(
            f"{where} holds the CA of another cluster ({issuer.identity}, {issuer.organization}), and the journal is that of "
            f"{cluster}, {cluster_id}: journal and CA belong together, and so does the cluster's name: put back what was there before"
        )
    own = _read(where, COORDINATOR).identity
    if not own.startswith("coordinator:"):
        raise InvalidSettings(f"{folder.pair(where, COORDINATOR)} is the certificate of {own}, not of a coordinator")
    return Founded(state, authority, own.partition(":")[2], seconds, hosts)


def _make(state: Path, cluster: str, cluster_id: str, name: str, seconds: float) -> None:
    """Make `identity/` all at once: whoever finds it finds all of it."""
    new, key = state / _NEW, certificates.new_key()
    ca = certificates.make_ca(key, cluster, cluster_id, time.time(), os.urandom(16))
    authority = KeyOnDisk(key, ca)
    folder.write(new / folder.CA_KEY, key)
    folder.write(new / folder.CA_CERTIFICATE, ca, folder.PUBLIC)
    folder.write_pair(new, COORDINATOR, *new_pair(authority, certificates.coordinator_profile(name), seconds))
    commands = signing.new_key()
    public = signing.Signer(commands).public_key
    folder.write_pair(new, COMMANDS, commands, authority.sign(public, certificates.commands_profile(name), seconds))
    try:
        new.rename(state / IDENTITY)
        handle = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise InvalidSettings(f"the cluster cannot be founded in {state}: {error.strerror}") from error
    fingerprint = certificates.read(ca).fingerprint[:16].hex()
    log.info("closed cluster founded %s", fields(cluster=cluster, coordinator=name, ca=fingerprint))


def _files() -> tuple[str, ...]:
    return folder.CA_KEY, folder.CA_CERTIFICATE, f"{COORDINATOR}.pem", f"{COMMANDS}.pem"


def _read(where: Path, name: str) -> Certificate:
    try:
        return certificates.read(folder.certificate_of(folder.secret(folder.pair(where, name))))
    except InvalidSettings:
        raise
    except PotluckError as error:
        raise InvalidSettings(f"{folder.pair(where, name)} cannot be read: {error.message}") from error


def _key_of(both: bytes) -> bytes:
    return both[: both.find(b"-----BEGIN CERTIFICATE-----")]


def _due(found: Certificate) -> float:
    began = found.not_before + EARLY_SECONDS
    return began + (found.not_after - began) * LIFE_USED
