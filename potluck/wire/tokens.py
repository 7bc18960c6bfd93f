"""Join tokens: one word that a person copies to another machine. Pure: random bytes are arguments.

    POTLUCK-1-<CA, 26>-<endpoints>-<id, 8>-<secret, 26>-<checksum, 2>

The fields are in Crockford's base32 (https://www.crockford.com/base32.html), so that nobody mistakes one letter for another.
The checksum finds each wrong letter and each pair that changed places; it tells a typing error from a wrong token, and protects nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from potluck.errors import InvalidRequest

PREFIX = "POTLUCK-1-"
FINGERPRINT_BYTES = 16
ID_BYTES = 5
SECRET_BYTES = 16
LIMIT = 1024
"""How many letters a token may have."""

_LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_VALUES = {letter: value for value, letter in enumerate(_LETTERS)} | {"O": 0, "I": 1, "L": 1}
_PRIME = 1021  # the largest below 32 * 32: each wrong letter, and each pair that changed places, changes the remainder
_TYPED = "this is no join token: copy it again, whole"


@dataclass(frozen=True)
class JoinToken:
    """`fingerprint`: the first 16 bytes of the SHA-256 of the CA's public key. `endpoints`: `host:port` of the coordinator's HTTP server.

    Raises InvalidRequest for fields that a token cannot hold.
    """

    fingerprint: bytes
    endpoints: tuple[str, ...]
    token_id: bytes
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        sizes = (len(self.fingerprint), len(self.token_id), len(self.secret))
        if sizes != (FINGERPRINT_BYTES, ID_BYTES, SECRET_BYTES):
            raise InvalidRequest(f"a join token cannot have fields of {sizes} bytes")
        for endpoint in self.endpoints:
            host, _, port = endpoint.rpartition(":")
            good = host and port.isdecimal() and port.isascii() and endpoint.isprintable()
            if not good or any(sign in endpoint for sign in ", /"):
                raise InvalidRequest(f"{endpoint[:80]!r} is not host:port")
        if len(self.text()) > LIMIT:
            raise InvalidRequest("a join token cannot have so many endpoints")

    def text(self) -> str:
        """What a person copies. It holds the secret."""
        places = ",".join(self.endpoints).encode()
        fields = [_letters(part) for part in (self.fingerprint, places, self.token_id, self.secret)]
        return PREFIX + "-".join([*fields, _checksum("".join(fields))])


def parse(text: str) -> JoinToken:
    """The token in what a person typed. Small letters, and O, I and L instead of digits, are read as meant. Raises InvalidRequest."""
    word = text.strip()
    if len(word) > LIMIT or not word.upper().startswith(PREFIX):
        raise InvalidRequest(_TYPED if word.upper().startswith("POTLUCK-1") else "a join token begins with POTLUCK-1-")
    fields = [_normal(part) for part in word[len(PREFIX) :].split("-")]
    if len(fields) != 5 or _checksum("".join(fields[:-1])) != fields[-1]:
        raise InvalidRequest(_TYPED)
    fingerprint, places, token_id, secret = (_bytes(part) for part in fields[:-1])
    try:
        endpoints = tuple(places.decode().split(",")) if places else ()
        return JoinToken(fingerprint, endpoints, token_id, secret)
    except UnicodeDecodeError as error:
        raise InvalidRequest(_TYPED) from error


def hashed(secret: bytes) -> bytes:
    """What is stored instead of a secret. It is random and of 128 bits, so one SHA-256 is enough."""
    return hashlib.sha256(b"potluck secret 1\0" + secret).digest()


def _letters(data: bytes) -> str:
    count = -(-len(data) * 8 // 5)
    number = int.from_bytes(data) << (count * 5 - len(data) * 8)
    return "".join(_LETTERS[number >> shift & 31] for shift in range(5 * (count - 1), -1, -5))


def _bytes(letters: str) -> bytes:
    size = len(letters) * 5 // 8
    data = (_number(letters) >> (len(letters) * 5 - size * 8)).to_bytes(size)
    if _letters(data) != letters:
        raise InvalidRequest(_TYPED)
    return data


def _normal(letters: str) -> str:
    """The letters as `_letters` writes them."""
    try:
        return "".join(_LETTERS[_VALUES[letter]] for letter in letters.upper())
    except KeyError as error:
        raise InvalidRequest(_TYPED) from error


def _number(letters: str) -> int:
    number = 0
    for letter in letters:
        number = number << 5 | _VALUES[letter]
    return number


def _checksum(letters: str) -> str:
    rest = _number(letters) % _PRIME
    return _LETTERS[rest >> 5] + _LETTERS[rest & 31]
