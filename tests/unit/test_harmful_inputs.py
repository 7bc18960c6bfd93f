"""Inputs that somebody would make by hand to stop a process or to fill its memory: each costs little, and ends in our error or well.

They go through the targets of fuzzing, which know what each decoder promises. What fuzzing itself found is in `tests/fuzz/found`.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from aiohttp.test_utils import make_mocked_request
from PIL import Image

from fuzz.judging import Target, judge
from fuzz.of_files import tar_of
from fuzz.records import example, written
from fuzz.targets import TARGETS
from potluck.bus import filters
from potluck.data import arrays, images
from potluck.data.folders import Unusable
from potluck.errors import WORDS_LIMIT, InvalidData, InvalidRequest
from potluck.net.http import media_type
from potluck.wire.values import ImageOptions
from support.pictures import chunk, pictures

HUGE = 2**53


def nested(depth: int, value: Any) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def infer(**tensor: Any) -> bytes:
    return msgspec.msgpack.encode({"type": "Infer", "id": "1", "inputs": [{"name": "x", "datatype": "FP32", **tensor}]})


def v2(**tensor: Any) -> bytes:
    return b"\n" + json.dumps({"inputs": [{"name": "x", "datatype": "FP32", **tensor}]}).encode()


def form(head: bytes, content_type: bytes = b"multipart/form-data; boundary=b") -> bytes:
    return content_type + b"\n--b\r\n" + head + b"\r\n\r\nabc\r\n--b--"


def zipped(name: str, content: bytes, kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def texts(sign: bytes) -> bytes:
    """An archive of numbers, and of labels with this sign (4 bytes)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", npy(np.zeros(2)))
        archive.writestr("y.npy", npy(np.array(["a", "b"])).replace(b"a\0\0\0", sign))
    return buffer.getvalue()


def keras(**layer: Any) -> bytes:
    return zipped("config.json", json.dumps({"module": "keras.layers", "config": {}, **layer}).encode())


def safetensors(header: Any, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def header(**fields: Any) -> bytes:
    """A tar's header as GNU writes it; `size` may be negative."""
    entry = tarfile.TarInfo("1.png")
    size = fields.pop("size", 0)
    for name, value in fields.items():
        setattr(entry, name, value)
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = struct.pack(">iq", -1 if size < 0 else -(2**31), size)
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


def pax(record: bytes) -> bytes:
    """A tar of an empty file with this record about it."""
    line = b"%d %s\n" % (len(record) + 4, record)
    return header(type=b"x", size=len(line)) + line.ljust(512, b"\0") + header() + bytes(1024)


HARMFUL: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a list deep inside a long one": (
        "tensors",
        lambda: infer(datatype="BYTES", shape=[1], data=["a"] * 120_000 + [nested(900, "b")]),
    ),
    "a shape of 25,000 axes": ("tensors", lambda: infer(shape=[HUGE] * 25_000, data=b"abcd")),
    "a shape that no number holds": ("tensors", lambda: infer(shape=[HUGE] * 60, data=b"abcd")),
    "the same in a list": ("tensors", lambda: infer(shape=[HUGE] * 60, data=[1])),
    "a long name": ("tensors", lambda: infer(name="n" * 200_000, shape=[2], data=[1])),
    "a word that is none, 200 KB long": (
        "message",
        lambda: json.dumps({"type": "SubmitJob", "id": "1", "job": {"kind": "k" * 200_000}}).encode(),
    ),
    "lists that claim more than there is": ("message", lambda: b"\x81\xa1x" + b"\xdd\x00\x03\xd0\x00" * 900 + b"\xc0" * 250_000),
    "maps inside maps": ("message", lambda: b'{"a":' * 50_000),
    "a number of 250,000 digits": ("message", lambda: b'{"type":"Infer","x":' + b"9" * 250_000 + b"}"),
    "a shape of 200,000 axes": ("open_inference", lambda: v2(shape=[HUGE] * 200_000, data=[1])),
    "texts in a list deep inside a long one": (
        "open_inference",
        lambda: v2(datatype="BYTES", shape=[1], data=["a"] * 300_000 + [nested(900, "b")]),
    ),
    "a timeout of 4,000 digits": (
        "open_inference",
        lambda: b'\n{"inputs":[],"parameters":{"timeout":%s}}' % (b"9" * 4000),
    ),
    "a long key": ("tensorflow", lambda: b'6\n{"instances":[{"%s":1}]}' % (b"k" * 10**6)),
    "100,000 keys": ("plain_arrays", lambda: b"0\n" + json.dumps(dict.fromkeys(map(str, range(100_000)), 1)).encode()),
    "parentheses in a boundary": ("form", lambda: form(b"", b"multipart/form-data; boundary=" + b"(" * 8000)),
    "quotes in the type of a form": ("form", lambda: form(b"", b"multipart/form-data; " + b'"a' * 3900 + b"; boundary=b")),
    "quotes in a head": ("form", lambda: form(b'Content-Disposition: form-data; filename="a"\r\nContent-Type: ' + b'"a' * 3900)),
    "a name of 128 KB in a table": ("csv", lambda: b"a,y\n" + b'"%s",2\n' % (b"a" * 131_000)),
    "100,000 columns, two of one name": (
        "csv",
        lambda: (",".join(f"c{i}" for i in range(99_998)) + ",z,z\n" + ",".join(["1"] * 100_000)).encode(),
    ),
    "a label of 10 MB": (
        "tfrecord",
        lambda: written([example(x=[1.0], label=[b"a" * 10**7]), *[example(x=[1.0], label=[b"b"])] * 2000]),
    ),
    "a kind of compression that numpy never writes": (
        "npz",
        lambda: zipped("x.npy", npy(np.zeros(2**22, np.uint8)), zipfile.ZIP_BZIP2),
    ),
    "a text of numbers that are no signs": (
        "npz",
        lambda: texts(b"\xff" * 4),
    ),
    "half of a surrogate pair for a class": ("npz", lambda: texts("\ud800".encode("utf-32-le", "surrogatepass"))),
    "an array of 80 GB": (
        "npz",
        lambda: zipped("x.npy", npy(np.zeros(1))[:10] + b"{'descr':'<f8','fortran_order':False,'shape':(10000000000,)}\n"),
    ),
    "a weight of 200,000 axes": (
        "weights",
        lambda: safetensors({"a": {"dtype": "F32", "shape": [2**52] * 200_000, "data_offsets": [0, 0]}}),
    ),
    "weights over each other": (
        "weights",
        lambda: safetensors(
            {f"a{i}": {"dtype": "U8", "shape": [1000], "data_offsets": [0, 1000]} for i in range(1000)}, bytes(1000)
        ),
    ),
    "places that are no whole numbers": (
        "weights",
        lambda: safetensors({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0.0, 0.0]}}),
    ),
    "scales of another type": (
        "update",
        lambda: safetensors(
            {
                "w00000.int8": {"dtype": "I8", "shape": [5120], "data_offsets": [0, 5120]},
                "w00000.scale": {"dtype": "F64", "shape": [20], "data_offsets": [5120, 5280]},
            },
            bytes(5280),
        ),
    ),
    "an entry that leads back": ("savedmodel_tar", lambda: header(size=-512) + bytes(1024)),
    "a shard that leads back": ("shard_files", lambda: header() + header(size=-1024) * 3 + bytes(1024)),
    "an entry of 4 TB": ("shard_files", lambda: header(type=b"L", size=2**42) + bytes(1024)),
    "20,000 headers about headers": ("savedmodel_tar", lambda: header(type=b"x") * 20_000),
    "the same in a shard": ("shard_files", lambda: header(type=b"x") * 20_000),
    "a size that goes back": ("shard_files", lambda: pax(b"size=-512")),
    "a map that is none": ("savedmodel_tar", lambda: pax(b"GNU.sparse.map=a,b")),
    "a name with a zero": ("savedmodel_tar", lambda: pax(b"path=a\0b")),
    "1,000 folders in each other": (
        "savedmodel_tar",
        lambda: tar_of(("a/" * 1000 + "b", b"x"), format=tarfile.PAX_FORMAT),
    ),
    "a file that is a folder too": ("savedmodel_tar", lambda: tar_of(("a", b""), ("a/b", b""))),
    "a name that is too long": ("savedmodel_tar", lambda: tar_of(("a" * 300, b""), format=tarfile.PAX_FORMAT)),
    "weights that no number counts": (
        "keras_file",
        lambda: keras(class_name="Conv2D", config={"filters": 1, "kernel_size": [10**4000 - 1] * 300}),
    ),
    "a layer built of a list": ("keras_file", lambda: keras(class_name="Dense", build_config=[1], config={"units": 3})),
    "groups that are a word": (
        "keras_file",
        lambda: keras(class_name="Conv2D", config={"groups": "a", "filters": 3, "kernel_size": 3}),
    ),
    "a configuration of 60 MB": ("keras_file", lambda: zipped("config.json", b"[" + b"[]," * (20 << 20) + b"[]]")),
    "5,000 brackets": ("settings", lambda: b"a=" + b"[" * 5000),
    "2,000 tables in each other": ("settings", lambda: b"a" + b".a" * 2000 + b"=1"),
}  # fmt: skip


@pytest.mark.parametrize(("target", "make"), list(HARMFUL.values()), ids=list(HARMFUL))
def test_it_costs_little(target: str, make: Callable[[], bytes]) -> None:
    judge(TARGETS[target], make(), slower=3.0)


# --- images

SMALL = ImageOptions(height=224, width=224, channels=3, scale=1.0)


def png(width: int, height: int) -> bytes:
    """A black PNG of 1 bit a pixel."""
    packing = zlib.compressobj(9)
    rows = [packing.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)]
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = b"".join(rows) + packing.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(2_000_000, 1), (80_000, 25)])
def test_an_image_of_few_rows_does_not_take_them_many_times(width: int, height: int) -> None:
    """2 million columns, 224 times, would be 1.3 GB."""

    def decode(data: bytes) -> None:
        assert images.tensor(data, SMALL).shape == (224, 224, 3)

    assert judge(Target("image", decode, (), list, seconds=5.0, peak_bytes=128 * 2**20), png(width, height), slower=3.0)


@pytest.mark.parametrize("size", [(3, 40), (40, 3), (1, 300), (300, 1), (17, 19)])
def test_columns_first_or_rows_first_gives_the_same_bits(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    first = images.resized(found, 16, 16)
    monkeypatch.setattr(images, "_columns", lambda found, left, right: (found, left, right))
    np.testing.assert_array_equal(first, images.resized(found, 16, 16))


def test_an_image_in_pieces_has_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: [images.pixels(one.data, channels) for channels in (1, 3, 4)] for name, one in pictures().items()}
    for most in (7, 20):
        monkeypatch.setattr(images, "PIECE_PIXELS", most)
        for name, one in pictures().items():
            for channels, found in zip((1, 3, 4), whole[name], strict=True):
                np.testing.assert_array_equal(images.pixels(one.data, channels), found, err_msg=name)


def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("L", (1500, 1500)).save(buffer, "JPEG", progressive=True)
    plain = buffer.getvalue()
    scan = plain[plain.rindex(b"\xff\xda") : -2]
    assert images.pixels(plain, 1).shape == (1500, 1500, 1)
    assert images.pixels(plain[:-2] + scan * 5 + plain[-2:], 1).shape == (1500, 1500, 1)
    with pytest.raises(Unusable, match="too many scans"):
        images.pixels(plain[:-2] + scan * 1000 + plain[-2:], 1)


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "INFLATION_FROM_BYTES", 2**22)
    path = tmp_path / "a.npz"
    path.write_bytes(zipped("x.npy", npy(np.zeros(2**21))))
    with pytest.raises(InvalidData, match="unpacks to 17 MB"):
        arrays.read_file(path, None)
    path.write_bytes(zipped("x.npy", npy(np.random.default_rng(1).random(2**20))))
    assert len(arrays.read_file(path, None)[0]["x"]) == 2**20


# --- words, topics and types


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ("image/png", "image/png"),
        ("Text/Plain; charset=utf-8", "text/plain"),
        ("", "application/octet-stream"),
        ("image", "application/octet-stream"),
        ("a/b/c", "application/octet-stream"),
        ("a/b; " + '"a' * 3900, "a/b"),
        ("(" * 7000, "application/octet-stream"),
        ("a/" + "b" * 200, "application/octet-stream"),
    ],
)
def test_a_content_type_is_read_at_once(header: str, kind: str) -> None:
    began = time.process_time()
    assert media_type(make_mocked_request("POST", "/", headers={"Content-Type": header})) == kind
    assert time.process_time() - began < 0.1


def test_an_error_quotes_no_more_than_can_be_read_and_sent() -> None:
    error = InvalidRequest("begins " + "x" * 10**6 + " \ud800 ends")
    assert len(error.message) < WORDS_LIMIT + 100
    assert error.message.startswith("begins ")
    assert error.message.endswith("\\ud800 ends")
    assert "characters left out" in error.message
    assert str(error) == error.message
    assert error.message.encode()


def test_long_topics_are_not_remembered() -> None:
    table: filters.FilterTable[int] = filters.FilterTable()
    table["models/+/infer"] = 1
    for number in range(10):
        assert table.find(f"models/{'m' * 5000}{number}/infer") == (1,)
    assert table.find("models/m/infer") == (1,)
    assert len(table._found) == 1
