"""What a node of a closed cluster believes: whose commands it carries out, in which epoch, and who is a member no more.

A coordinator proves itself on `coordinator/proof`: with a certificate of the cluster's CA for the key that signs commands. What comes to
this node's inbox is opened only if that key has sealed it for this node, in its present session. The highest epoch is kept on the disk,
so a coordinator that was replaced commands this node never again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from potluck.errors import BadMessage, InvalidSettings, PotluckError, TooLarge
from potluck.logs import Seldom, fields
from potluck.security import certificates, folder
from potluck.security.cluster_file import ClusterFile
from potluck.security.signing import Verifier
from potluck.wire import codec, commands, seals
from potluck.wire.births import CoordinatorProof, Standing
from potluck.wire.seals import SealRefused

log = logging.getLogger(__name__)

EPOCHS = "epochs.json"
CLUSTERS_KNOWN = 16
EPOCHS_LIMIT_BYTES = 16 * 1024
REVOKED_LIMIT = 10_000
LOG_SECONDS = 60.0


class Epochs:
    """The highest epoch that was seen of each cluster, in a file. Raises InvalidSettings for a file that cannot be used."""

    def __init__(self, where: Path) -> None:
        self._path = where / EPOCHS
        self._known = _read(self._path)

    def of(self, cluster_id: str) -> int:
        return self._known.get(cluster_id, 0)

    def rise(self, cluster_id: str, epoch: int) -> None:
        """Keep an epoch that is higher than the one before; returns when the disk has it. Raises InvalidSettings."""
        if epoch <= self.of(cluster_id):
            return
        others = {known: value for known, value in self._known.items() if known != cluster_id}
        while len(others) >= CLUSTERS_KNOWN:
            del others[next(iter(others))]
        self._known = others | {cluster_id: epoch}
        folder.write(self._path, json.dumps(self._known).encode())


def _read(path: Path) -> dict[str, int]:
    try:
        with path.open("rb") as file:
            data = file.read(EPOCHS_LIMIT_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InvalidSettings(f"{path} cannot be read: {error.strerror}") from error
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or any(type(epoch) is not int or epoch < 0 for epoch in found.values()):
        raise InvalidSettings(
            f"{path} is damaged: it kept coordinators out that were replaced. If none of them still runs, delete the file"
        )
    return found


class Trust:
    """`opened` is what the bus asks of each message in the inbox; `take` gets each proof. Times are arguments only in tests."""

    def __init__(
        self,
        where: Path,
        known: ClusterFile,
        session: str,
        proof_topic: str,
        *,
        now: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        """`where`: the folder of the node's credentials. Raises InvalidSettings."""
        self.cluster_id = known.cluster_id
        self._ca = folder.public(where / folder.CA_CERTIFICATE)
        self._proof_topic = proof_topic
        self._now, self._elapsed = now, elapsed
        self._epochs = Epochs(where)
        self._opener = seals.Opener(
            known.identity, session, known.cluster_id, _nobody, self._epochs.of(known.cluster_id)
        )
        self._key_until = 0.0
        """When the certificate of the key that signs commands ends."""
        self._proved = (0, 0)
        """(term, number) of the newest proof."""
        self._revoked: dict[str, float] = {}
        """Until when, by identity."""
        self._seldom = Seldom(LOG_SECONDS)

    @property
    def epoch(self) -> int:
        """The highest epoch of a coordinator that has proved itself, or commanded us."""
        return self._opener.term

    @property
    def proved(self) -> bool:
        """Whether a coordinator has proved itself since this process began: before that, nobody knows here who was removed."""
        return self._proved > (0, 0)

    def is_revoked(self, identity: str) -> bool:
        return self._revoked.get(identity, 0.0) > self._now()

    def opened(self, topic: str, sealed: commands.Sealed) -> bytes:
        """The command's bytes. Raises SealRefused."""
        if self._now() > self._key_until + seals.CLOCK_SECONDS:
            raise SealRefused(
                "no coordinator has proved itself here yet"
                if not self._key_until
                else "the certificate of the coordinator's key for commands has ended"
            )
        plain = seals.Sealed(sealed.seal, sealed.body, sealed.signature)
        before = self._opener.term
        body = self._opener.open(plain, topic, self._now(), self._elapsed())
        if self._opener.term > before:
            self._keep_epoch()
        return body

    def take(self, proof: CoordinatorProof) -> bool:
        """Believe a coordinator from now on, if its proof holds; returns whether it is new. Raises PotluckError, and changes nothing then.

        A proof is retained, so old ones come too: they change nothing.
        """
        now = self._now()
        certificate = certificates.check(proof.certificate, self._ca, now)
        if certificate.unit != certificates.COMMANDS or not certificate.identity.startswith("coordinator:"):
            raise SealRefused(f"the certificate of {certificate.identity[:80]!r} is not for signing commands")
        verify = Verifier(certificate.public_key).verify
        sealed = seals.Sealed(proof.seal, proof.body, proof.signature)
        seal = seals.open_proof(sealed, self._proof_topic, self.cluster_id, verify)
        standing = _standing(proof.body)
        if (standing.session, standing.epoch, standing.cluster_id) != (seal.sender, seal.term, seal.cluster_id):
            raise SealRefused("a proof says something else than its seal")
        before = self.epoch
        self._opener.prove(seal.term, seal.sender)
        if (seal.term, seal.number) <= self._proved:
            return False
        self._proved = seal.term, seal.number
        self._opener.change_key(verify)
        self._key_until = certificate.not_after
        self._revoked = {one.identity: one.until for one in standing.revoked[:REVOKED_LIMIT] if one.until > now}
        if seal.term > before:
            self._keep_epoch()
        return True

    def _keep_epoch(self) -> None:
        try:
            self._epochs.rise(self.cluster_id, self._opener.term)
        except PotluckError as error:
            # This process knows it anyway, and a command that was sealed for it is worthless after it.
            if self._seldom.due("epochs") is not None:
                log.error("the epoch is not kept on the disk %s", fields(epoch=self._opener.term, reason=error.message))


def _nobody(signature: bytes, data: bytes) -> bool:
    return False


def _standing(body: bytes) -> Standing:
    try:
        standing, _ = codec.decode(body)
    except (BadMessage, TooLarge) as error:
        raise SealRefused(f"what a proof covers cannot be read: {error.message}") from error
    if not isinstance(standing, Standing):
        raise SealRefused(f"a proof covers a {type(standing).__name__}, not a Standing")
    return standing
