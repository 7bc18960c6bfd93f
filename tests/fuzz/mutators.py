"""Mutators that keep the outside of a format valid and change the inside, so that inputs get past checksums and lengths.

Each takes (data, most bytes, seed), as atheris wants it. An input that is not of the format is changed as bytes.
"""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import msgpack

Mutate = Callable[[bytes, int, int], bytes]

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**53 + 1),
    *(2**63 - 1, -(2**63), 2**64 - 1, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *("", "a", "\0", "\n", "\ud800", "\x1b[31m", "..", "/", "../../etc/passwd", "{}", "%s", "\U0001f4a9", "NaN", "-1"),
    *(
        "9" * 400,
        "a" * 3000,
        "#",
        "+",
        "$SYS",
        "é",
        "\u202e",
        " ",
        "user x\ntopic readwrite #",
        "FP32",
        "BYTES",
        "BOOL",
    ),
)


def mutated(data: bytes, most: int) -> bytes:
    """`data`, changed as bytes by libFuzzer."""
    import atheris

    return bytes(atheris.Mutate(data, most))


def plain(data: bytes, most: int, seed: int) -> bytes:
    """Bytes; now and then a piece is repeated many times, to find what takes more time than the size accounts for."""
    rng = random.Random(seed)
    if data and rng.random() < 0.02:
        return _repeated(data, most, rng)
    return mutated(data, most)


def _repeated(data: bytes, most: int, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 2, 3, 5, 8, 13, 30)))
    piece = data[start:stop]
    times = max(1, (most - len(data)) // len(piece))
    return (data[:start] + piece * rng.randint(1, times) + data[stop:])[:most]


def of_json(data: bytes, most: int, seed: int) -> bytes:
    """A JSON document; half of the time as a tree."""
    return _of_tree(data, most, seed, json.loads, lambda tree: json.dumps(tree, ensure_ascii=True).encode())


def of_msgpack(data: bytes, most: int, seed: int) -> bytes:
    """A msgpack document; half of the time as a tree."""
    return _of_tree(
        data,
        most,
        seed,
        lambda packed: msgpack.unpackb(packed, strict_map_key=False),
        lambda tree: msgpack.packb(tree, unicode_errors="surrogatepass"),
    )


def of_message(data: bytes, most: int, seed: int) -> bytes:
    """A message in either encoding; now and then it changes the encoding."""
    rng = random.Random(seed)
    if data[:1] in b"{ \t\r\n":
        if rng.random() < 0.05:
            try:
                return bytes(msgpack.packb(json.loads(data), unicode_errors="surrogatepass"))[:most]
            except (ValueError, TypeError, OverflowError, RecursionError):
                return mutated(data, most)
        return of_json(data, most, seed)
    return of_msgpack(data, most, seed)


def _of_tree(data: bytes, most: int, seed: int, read: Callable[[bytes], Any], write: Callable[[Any], bytes]) -> bytes:
    rng = random.Random(seed)
    if rng.random() < 0.4:
        return plain(data, most, seed)
    try:
        tree = read(data)
        for _ in range(rng.randint(1, 3)):
            tree = _changed(tree, rng)
        found = write(tree)
    except (ValueError, TypeError, OverflowError, RecursionError, UnicodeError, msgpack.exceptions.UnpackException):
        return mutated(data, most)
    return found if len(found) <= most else mutated(data, most)


def _changed(tree: Any, rng: random.Random) -> Any:
    """The tree with one node changed."""
    inner = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    if not inner or rng.random() < 0.15:
        return _other(tree, rng)
    place = rng.choice(inner)
    if isinstance(tree, dict):
        match rng.randrange(12):
            case 0:
                return {key: value for key, value in tree.items() if key != place}
            case 1:
                return {**tree, rng.choice(TEXTS): tree[place]}
            case 2:
                return {**tree, place: tree[rng.choice(inner)]}
        return {**tree, place: _changed(tree[place], rng)}
    match rng.randrange(12):
        case 0:
            return tree[:place] + tree[place + 1 :]
        case 1:
            return tree[:place] + [tree[place]] * rng.choice((2, 3, 9, 100, 1000)) + tree[place + 1 :]
        case 2:
            return [*tree[:place], tree[rng.choice(inner)], *tree[place + 1 :]]
    return [*tree[:place], _changed(tree[place], rng), *tree[place + 1 :]]


def _other(value: Any, rng: random.Random) -> Any:
    match rng.randrange(9):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.choice(TEXTS)
        case 2:
            return [value] * rng.choice((0, 1, 2, 70))
        case 3:
            for _ in range(rng.choice((1, 2, 30, 40, 400))):
                value = [value]
            return value
        case 4:
            return {rng.choice(TEXTS): value}
        case 5:
            return rng.choice((None, True, False, [], {}))
        case 6 if isinstance(value, int):
            return value + rng.choice((-1, 1, 2**31, 2**53))
        case 7 if isinstance(value, str):
            return value + rng.choice(TEXTS)
        case 8 if isinstance(value, bytes):
            return value * rng.choice((0, 1, 2, 9)) + bytes(rng.randrange(5))
    return rng.choice(NUMBERS)


def in_parts(*inner: Mutate) -> Mutate:
    """An input whose first lines are arguments, and the rest is the body: one of the parts is changed."""

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        parts = data.split(b"\n", len(inner) - 1)
        if len(parts) < len(inner):
            return mutated(data, most)
        at = random.Random(seed).randrange(len(inner))
        left = most - len(data) + len(parts[at])
        parts[at] = inner[at](parts[at], max(1, left), seed)
        if at < len(inner) - 1:
            parts[at] = parts[at].replace(b"\n", b"\r")
        return b"\n".join(parts)[:most]

    return mutate


def of_zip(inner: dict[str, Mutate]) -> Mutate:
    """A zip file: one member is changed, by the mutator for the end of its name; at times the file itself."""

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                members = [(info, archive.read(info)) for info in archive.infolist() if info.file_size < 2**20]
        except Exception:  # noqa: BLE001 - whatever is wrong with it
            members = []
        if not members or rng.random() < 0.2:
            return mutated(data, most)
        at = rng.randrange(len(members))
        name = members[at][0].filename
        change = next((one for end, one in inner.items() if name.endswith(end)), plain)
        buffer = io.BytesIO()
        try:
            with zipfile.ZipFile(buffer, "w") as archive:
                for place, (info, content) in enumerate(members):
                    if place == at:
                        match rng.randrange(10):
                            case 0:
                                continue
                            case 1:
                                info.filename = rng.choice(TEXTS)
                            case 2:
                                content = bytes(rng.choice((10, 2**16, 2**22)))
                                info.compress_type = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
                            case _:
                                content = change(content, most, seed)
                    archive.writestr(info, content)
        except Exception:  # noqa: BLE001 - names that zip files cannot have
            return mutated(data, most)
        found = buffer.getvalue()
        return found if len(found) <= most else mutated(data, most)

    return mutate


def of_tar(data: bytes, most: int, seed: int) -> bytes:
    """A tar: a field of a header is changed, and its checksum made right again."""
    rng = random.Random(seed)
    if len(data) < 1024 or rng.random() < 0.2:
        return mutated(data, most)
    found = bytearray(data)
    at = 512 * rng.randrange(len(found) // 512)
    start, stop = rng.choice(((0, 100), (100, 108), (124, 136), (156, 157), (157, 257), (345, 500), (0, 512)))
    if rng.random() < 0.3 and start == 124:
        field = struct.pack(">B3xq", rng.choice((0x80, 0xFF)), rng.choice((-1, -512, -1024, 2**40, 2**62, 0)))
    elif start == 156:
        field = bytes([rng.choice(b"0123457xgSLK\0Ag")])
    else:
        field = mutated(bytes(found[at + start : at + stop]), stop - start)
    found[at + start : at + stop] = field.ljust(stop - start, b"\0")[: stop - start]
    if rng.random() < 0.2:
        found = found[:at] + found[at : at + 512] * rng.choice((2, 3, 50, 500)) + found[at + 512 :]
    for head in range(0, len(found) - 511, 512):
        block = found[head : head + 512]
        if block[257:262] == b"ustar":
            found[head + 148 : head + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(found)[:most]


def of_png(data: bytes, most: int, seed: int) -> bytes:
    """A PNG: a chunk is changed, and its checksum made right again. Other images are changed as bytes."""
    rng = random.Random(seed)
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or rng.random() < 0.2:
        return plain(data, most, seed)
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return mutated(data, most)
    at = rng.randrange(len(chunks))
    kind, body = chunks[at]
    match rng.randrange(6):
        case 0:
            chunks[at : at + 1] = [chunks[at]] * rng.choice((0, 2, 30))
        case 1:
            kind = rng.choice(
                (b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"gAMA")
            )
            chunks.insert(at, (kind, mutated(body, 200)))
        case _:
            if kind == b"IDAT" and rng.random() < 0.8:
                try:
                    body = zlib.compress(mutated(zlib.decompressobj().decompress(body, 2**16), 2**12))
                except zlib.error:
                    body = mutated(body, 2**12)
            else:
                body = mutated(body, 2**12)
            chunks[at] = kind, body
    found = data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return found if len(found) <= most else mutated(data, most)


def of_records(data: bytes, most: int, seed: int) -> bytes:
    """A TFRecord file: one record is changed, and the checksums made right again."""
    from fuzz.records import split, written

    rng = random.Random(seed)
    records = split(data)
    if not records or rng.random() < 0.2:
        return mutated(data, most)
    at = rng.randrange(len(records))
    match rng.randrange(6):
        case 0:
            records[at : at + 1] = [records[at]] * rng.choice((0, 2, 40))
        case _:
            records[at] = mutated(records[at], 2**12)
    found = written(records)
    return found if len(found) <= most else mutated(data, most)
