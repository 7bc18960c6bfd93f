"""The proof of who commands the cluster: retained on the bus, and made again when somebody is removed."""

from __future__ import annotations

from collections.abc import Callable

from potluck.wire import codec, seals
from potluck.wire.births import CoordinatorProof, Revoked, Standing
from potluck.wire.seals import Seal


class Prover:
    """Makes the proofs of one session of a coordinator. Of two proofs, the one with the higher (term, number) counts."""

    def __init__(self, topic: str, session: str, epoch: int, cluster_id: str, sign: Callable[[bytes], bytes]) -> None:
        self._topic = topic
        self._session = session
        self._epoch = epoch
        self._cluster_id = cluster_id
        self._sign = sign
        self._number = 0

    def prove(self, certificate: bytes, revoked: tuple[Revoked, ...], now: float) -> CoordinatorProof:
        """`certificate`: that of the key that signs (DER)."""
        self._number += 1
        standing = Standing(session=self._session, epoch=self._epoch, cluster_id=self._cluster_id, revoked=revoked)
        seal = Seal(
            topic=self._topic,
            audience="",
            session="",
            sender=self._session,
            term=self._epoch,
            cluster_id=self._cluster_id,
            number=self._number,
            sent_at=now,
            valid_until=now + seals.VALID_SECONDS,
            purpose=seals.PROOF_PURPOSE,
        )
        sealed = seals.close(seal, codec.encode(standing), self._sign)
        return CoordinatorProof(certificate=certificate, seal=sealed.seal, body=sealed.body, signature=sealed.signature)
