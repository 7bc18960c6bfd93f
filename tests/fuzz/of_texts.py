"""What people and other programs write: settings, and certificates."""

from __future__ import annotations

import base64
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fuzz import mutators
from fuzz.judging import Target, hold
from fuzz.of_files import file_of
from potluck import settings_sources
from potluck.errors import InvalidRequest, InvalidSettings
from potluck.security import certificates
from potluck.settings import CoordinatorSettings, NodeSettings
from potluck.toml_lines import lines_of_keys

CONFIGS = Path(__file__).parents[2] / "configs"


def settings(data: bytes) -> None:
    """A file of settings: what is wrong is named with its line."""
    path = file_of(data, "s.toml")
    for kind in (NodeSettings, CoordinatorSettings):
        found = settings_sources.find(kind, path)
        for one in found.each():
            str(one.origin), settings_sources.toml(one.value)


def toml_lines(data: bytes) -> None:
    """Each key of a document has a line of it."""
    try:
        text = data.decode()
        table = tomllib.loads(text)
    except (ValueError, RecursionError):
        return
    lines = lines_of_keys(text)
    last = text.count("\n") + 1
    hold(all(1 <= line <= last for line in lines.values()), "a line is a line of the file")
    hold({keys[0] for keys in lines} == set(table), "each key at the top has a line")


def certificate(data: bytes) -> None:
    """A certificate or a signing request from somebody who wants to join."""
    taken = []
    for read in (certificates.read, certificates.requested_key, _checked):
        try:
            taken.append(read(data))
        except InvalidRequest as error:
            refused = error
    if not taken:
        raise refused


def _checked(data: bytes) -> certificates.Certificate:
    found = certificates.check(data, _ca(), NOW)
    hold(found.public_key and found.fingerprint, "a certificate has a key")
    return found


NOW = 1_800_000_000.0


@cache
def _key() -> bytes:
    return certificates.new_key()


@cache
def _ca() -> bytes:
    return certificates.make_ca(_key(), "home", "1" * 16, NOW, b"\1" * 16)


def certificates_made() -> Iterator[bytes]:
    yield _ca()
    yield certificates.signing_request(certificates.new_key())
    yield base64.b64decode("".join(_ca().decode().splitlines()[1:-1]))


def documents() -> Iterator[bytes]:
    for path in sorted(CONFIGS.rglob("*.toml")):
        yield path.read_bytes()
    yield b'cluster = "x"\nseeds = ["a:1", "b"]\n[listen]\nport = 1\nhost = "127.0.0.1"\n'
    yield b"a.b.c = 1\n[x.\"y z\"]\nq = '''a\nb'''\n[[t]]\nz = {k = [1, 2, {m = 1}]}\n[[t]]\n"
    yield b'k = """a\\\n b""" # c\n"#" = 1979-05-27T07:32:00Z\n[a]\n[a.b]\n'


OURS = (InvalidSettings,)
TARGETS = (
    Target("settings", settings, OURS, documents, mutators.plain),
    Target("certificate", certificate, (InvalidRequest,), certificates_made, mutators.plain, needs=("cryptography",)),
    Target("toml_lines", toml_lines, OURS, documents, mutators.plain),
)
