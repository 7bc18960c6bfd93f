"""Sealed commands: a signature over bytes, topic, audience, session, term, number and expiry. Pure: clocks and keys are arguments.

What is signed is bytes, and they are checked before they are decoded. So no canonical form is needed, and fields that the reader does
not know are covered too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from potluck.errors import PotluckError
from potluck.wire.values import Epoch, Part, UnixTime

PURPOSE = "potluck command 1"
"""No signature for another purpose can be taken for a command's."""
PROOF_PURPOSE = "potluck proof 1"
"""The purpose of the seal in a CoordinatorProof. Its `audience` and `session` are "": it is for all, and kept."""
KIND = "ed25519"
VALID_SECONDS = 30.0
"""How long a command is valid after it was sent."""
CLOCK_SECONDS = 300.0
"""How much a reader's clock may be ahead of the sender's. It may be behind by any time."""
DRIFT = 1e-3
"""A reader's clock may gain as much on the sender's: it then learns the sender's time again with each command."""
WINDOW = 1024
"""How many numbers behind the highest may still come (RFC 4303, section 3.4.3)."""
SEAL_LIMIT_BYTES = 4096
_DOMAIN = b"potluck seal 1\0"
_Text = Annotated[str, Meta(max_length=1024)]


class SealRefused(PotluckError):
    """A command that is not to be carried out: it is not sealed, or not by our coordinator, or not for us, or not now."""

    code = "seal_refused"


class Seal(Part, frozen=True):
    """What a command is bound to. `number` grows by one with each command from one session of a coordinator to one audience."""

    topic: _Text
    audience: _Text
    session: _Text
    """The audience's session: a command from before its restart is worthless."""
    sender: _Text
    """The coordinator's session: a new one counts from 1 again."""
    term: Epoch
    cluster_id: _Text
    number: Annotated[int, Meta(ge=1, le=2**53)]
    sent_at: UnixTime
    valid_until: UnixTime
    purpose: str = PURPOSE
    kind: str = KIND
    """The kind of the signature."""


@dataclass(frozen=True)
class Sealed:
    """A command as it travels: the packed Seal, the command's own bytes, and the signature over both."""

    seal: bytes
    body: bytes
    signature: bytes


def signed_bytes(seal: bytes, body: bytes) -> bytes:
    """What is signed. The length keeps apart where the seal ends and the body begins."""
    return _DOMAIN + len(seal).to_bytes(4) + seal + body


def close(seal: Seal, body: bytes, sign: Callable[[bytes], bytes]) -> Sealed:
    """Seal a command's bytes."""
    # `purpose` and `kind` are always written, though they have defaults
    packed = _ENCODER.encode(msgspec.structs.asdict(seal))
    return Sealed(packed, body, sign(signed_bytes(packed, body)))


def open_proof(proof: Sealed, topic: str, cluster_id: str, verify: Callable[[bytes, bytes], bool]) -> Seal:
    """The seal of a proof, whose body may then be read. It may be an old one: the reader keeps the one with the highest (term, number).

    Raises SealRefused.
    """
    seal = _read(proof, verify)
    if (seal.purpose, seal.kind) != (PROOF_PURPOSE, KIND):
        raise SealRefused(f"a seal is for {seal.purpose[:40]!r}, not for proofs")
    if seal.topic != topic:
        raise SealRefused(f"a proof was sealed for the topic {seal.topic[:80]!r}, and came on another")
    if seal.cluster_id != cluster_id:
        raise SealRefused("a proof is of another cluster")
    return seal


class Sealer:
    """Seals what one session of a coordinator sends, which is called `sender`. Each number is used once for each audience.

    `sign` may sign with another key from some time on, when ours was renewed.
    """

    def __init__(self, sender: str, term: int, cluster_id: str, sign: Callable[[bytes], bytes]) -> None:
        self._sender = sender
        self._term = term
        self._cluster_id = cluster_id
        self._sign = sign
        self._numbers: dict[str, int] = {}
        """The last number for each audience, whatever session of it the command was for."""
        self._sent_at = 0.0

    def seal(self, topic: str, audience: str, session: str, body: bytes, now: float) -> Sealed:
        """A command (its bytes) for one session of an audience. `now`: our clock, seconds since the epoch; if it goes back, we do not."""
        number = self._numbers[audience] = self._numbers.get(audience, 0) + 1
        sent_at = self._sent_at = max(now, self._sent_at)
        seal = Seal(
            topic=topic,
            audience=audience,
            session=session,
            sender=self._sender,
            term=self._term,
            cluster_id=self._cluster_id,
            number=number,
            sent_at=sent_at,
            valid_until=sent_at + VALID_SECONDS,
        )
        return close(seal, body, self._sign)


def _read(sealed: Sealed, verify: Callable[[bytes, bytes], bool]) -> Seal:
    if len(sealed.seal) > SEAL_LIMIT_BYTES:
        raise SealRefused("the seal of a command is too large")
    if not verify(sealed.signature, signed_bytes(sealed.seal, sealed.body)):
        raise SealRefused("a command is not signed by this cluster's coordinator")
    try:
        return _DECODER.decode(sealed.seal)
    except msgspec.MsgspecError as error:
        raise SealRefused(f"the seal of a command cannot be read: {error}") from error


class Window:
    """Which numbers came already, in constant memory. Not older than WINDOW, and none twice."""

    def __init__(self) -> None:
        self._highest = 0
        self._seen = 0
        """Bit i: `_highest - i` came."""

    def is_new(self, number: int) -> bool:
        """Whether the number never came, and is not too old to tell."""
        behind = self._highest - number
        return number > 0 and (behind < 0 or (behind < WINDOW and not self._seen >> behind & 1))

    def take(self, number: int) -> None:
        """Remember a number that `is_new`."""
        ahead = number - self._highest
        if ahead <= 0:
            self._seen |= 1 << -ahead
            return
        self._seen = (self._seen << ahead | 1) & ((1 << WINDOW) - 1) if ahead < WINDOW else 1
        self._highest = number


class Opener:
    """Opens what is sealed for one audience in one of its sessions. `term`: the highest that it has seen; a lower one is refused for ever.

    One signature is checked for each message, also for one that is refused.
    """

    def __init__(
        self,
        audience: str,
        session: str,
        cluster_id: str,
        verify: Callable[[bytes, bytes], bool],
        term: int = 0,
    ) -> None:
        self._mine = (audience, session, cluster_id)
        self._verify = verify
        self.term = term
        self._sender = ""
        self._window = Window()
        self._sent_at = 0.0
        self._heard_at = 0.0

    def change_key(self, verify: Callable[[bytes, bytes], bool]) -> None:
        """Check signatures with another key from now on: a coordinator's key was renewed."""
        self._verify = verify

    def prove(self, term: int, sender: str) -> None:
        """The coordinator of this session has proved itself in this term: from now on, lower terms and others of this term are refused.

        Raises SealRefused; then nothing has changed.
        """
        if term < self.term or (term == self.term and self._sender not in ("", sender)):
            raise SealRefused(
                f"a coordinator proves itself in term {term}, and another one of term {self.term} has spoken"
            )
        if (term, sender) != (self.term, self._sender):
            self.term, self._sender, self._window = term, sender, Window()
            self._sent_at = self._heard_at = 0.0

    def open(self, sealed: Sealed, topic: str, now: float, elapsed: float) -> bytes:
        """The command's bytes. `now`: our clock, seconds since the epoch; `elapsed`: a clock that only goes forward, also while the
        machine sleeps (CLOCK_BOOTTIME).

        Raises SealRefused; then nothing has changed.
        """
        seal = _read(sealed, self._verify)
        if (seal.purpose, seal.kind) != (PURPOSE, KIND):
            raise SealRefused(f"a seal is for {seal.purpose[:40]!r}, not for commands")
        if seal.topic != topic:
            raise SealRefused(f"a command was sealed for the topic {seal.topic[:80]!r}, and came on another")
        if (seal.audience, seal.session, seal.cluster_id) != self._mine:
            raise SealRefused(f"a command is for {seal.audience[:80]!r} in another session or cluster")
        if seal.term < self.term:
            raise SealRefused(f"a command is of term {seal.term}, and a coordinator of term {self.term} has spoken")
        if seal.term == self.term and self._sender and seal.sender != self._sender:
            raise SealRefused(f"two coordinators speak in term {seal.term}")
        new = seal.sender != self._sender
        known = 0.0 if new else self._known(elapsed)
        floor = max(known, now - CLOCK_SECONDS)
        if seal.valid_until < floor:
            raise SealRefused(f"a command is {floor - seal.valid_until:.0f} s too late")
        window = Window() if new else self._window
        if not window.is_new(seal.number):
            raise SealRefused(f"the command {seal.number} came before")
        window.take(seal.number)
        self.term, self._sender, self._window = seal.term, seal.sender, window
        if seal.sent_at > known:
            self._sent_at, self._heard_at = seal.sent_at, elapsed
        return sealed.body

    def _known(self, elapsed: float) -> float:
        """What the coordinator's clock shows at least, by what was opened from its present session."""
        return self._sent_at + (elapsed - self._heard_at) * (1 - DRIFT)


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Seal)
