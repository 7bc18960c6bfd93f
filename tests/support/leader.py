"""A coordinator that proves itself and seals commands, for tests of who opens them."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from potluck.security import certificates, signing
from potluck.wire import codec, commands, seals
from potluck.wire.births import CoordinatorProof, Revoked, Standing
from potluck.wire.seals import PROOF_PURPOSE, Seal
from potluck.wire.topics import Topics
from support.closed import Authority

TOPICS = Topics("test")
INBOX = TOPICS.node("n1", "inbox")
COMMAND = codec.encode(commands.Rebirth())


class Leader:
    """A coordinator of this authority: proves itself, and seals commands."""

    def __init__(
        self, authority: Authority, now: float, *, session: str = "c1", epoch: int = 3, **profile: Any
    ) -> None:
        self.now, self.session, self.epoch = now, session, epoch
        self.signer = signing.Signer(signing.new_key())
        shown = profile.get("profile", certificates.commands_profile("attic"))
        pem = authority.issue(
            self.signer.public_key, shown, days=profile.get("days", 7.0), ago_days=profile.get("ago", 0.0)
        )
        self.certificate = pem
        self.number = 0

    def seal(self, **changes: Any) -> Seal:
        self.number += 1
        good = Seal(
            topic=INBOX, audience="node:n1", session="s1", sender=self.session, term=self.epoch, cluster_id="cluster-id",
            number=self.number, sent_at=self.now, valid_until=self.now + seals.VALID_SECONDS,
        )  # fmt: skip
        return replace(good, **changes)

    def command(self, body: bytes = COMMAND, **changes: Any) -> commands.Sealed:
        closed = seals.close(self.seal(**changes), body, self.signer.sign)
        return commands.Sealed(seal=closed.seal, body=closed.body, signature=closed.signature)

    def proof(self, *revoked: Revoked, standing: dict[str, Any] | None = None, **changes: Any) -> CoordinatorProof:
        said = Standing(session=self.session, epoch=self.epoch, cluster_id="cluster-id", revoked=revoked)
        body = codec.encode(replace(said, **standing or {}))
        given = {"topic": TOPICS.coordinator_proof, "audience": "", "session": "", "purpose": PROOF_PURPOSE} | changes
        closed = seals.close(self.seal(**given), body, self.signer.sign)
        return CoordinatorProof(
            certificate=self.certificate, seal=closed.seal, body=closed.body, signature=closed.signature
        )
