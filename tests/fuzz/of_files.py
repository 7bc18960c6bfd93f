"""Files: images, recordings, tables, records, arrays, weights, archives and models; as clients, nodes and engines read them."""

from __future__ import annotations

import atexit
import io
import json
import os
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fuzz import mutators
from fuzz.judging import Target, hold
from fuzz.records import example, written
from node.engine import archives, shards
from node.engine.shards import ShardPart
from potluck import savedmodels
from potluck.data import arrays, audio, parquet, tables, tfrecords
from potluck.data import images as decoder
from potluck.data.folders import Unusable
from potluck.data.packing import Packing
from potluck.errors import Diverged, InvalidData, InvalidModel, OutOfMemory
from potluck.weights import files as weights
from potluck.weights import updates
from potluck.wire.values import BlobRef, ImageOptions

OPTIONS = ImageOptions(height=8, width=8, channels=3, scale=1.0)


@cache
def scratch() -> Path:
    """A folder of this process, on a file system in memory where there is one, until its end."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{os.getpid()}-", dir=shared if shared.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def clean(process: int) -> None:
    """Remove the folder of another process, which has ended without doing so."""
    for parent in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        for folder in parent.glob(f"fuzz-{process}-*"):
            shutil.rmtree(folder, ignore_errors=True)


def file_of(data: bytes, name: str) -> Path:
    """A file with these bytes. Each has a new name, as no cache may know it."""
    path = scratch() / name
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


# --- images and recordings


def image(data: bytes) -> None:
    """An image is decoded, resized, and written for a shard; what is written is decoded to the same pixels."""
    found = decoder.pixels(data, 3)
    hold(found.ndim == 3 and found.shape[2] == 3 and found.dtype == np.uint8, "pixels are (height, width, 3) of 8 bits")
    hold(decoder.tensor(data, OPTIONS).shape == (8, 8, 3), "a tensor has the size that was asked for")
    checked = decoder.check(data)
    suffix, kept = decoder.write(data, checked)
    hold(suffix in ("png", "jpg"), "shards have PNG and JPEG")
    hold((decoder.pixels(kept, 3) == found).all(), "an image in a shard has the same pixels")


def images() -> Iterator[bytes]:
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    photo = Image.fromarray(np.stack([grey, grey.T.reshape(6, 8), 255 - grey], axis=2))

    def saved(one: Image.Image, format: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        one.save(buffer, format, **options)
        return buffer.getvalue()

    for mode in ("L", "LA", "RGB", "RGBA", "P", "1", "I;16"):
        one = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else photo.convert(mode)
        yield saved(one, "PNG")
        if mode in ("L", "RGB", "P", "1", "RGBA", "I;16"):
            yield saved(one, "TIFF")
    for options in ({}, {"progressive": True}, {"quality": 30, "subsampling": 2}, {"exif": photo.getexif()}):
        yield saved(photo, "JPEG", **options)
    yield saved(photo.convert("CMYK"), "JPEG")
    for format in ("BMP", "GIF", "WEBP", "PPM"):
        yield saved(photo, format)
    yield saved(photo, "WEBP", lossless=True)
    yield saved(photo, "GIF", save_all=True, append_images=[photo.rotate(90)])
    for coding in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4"):
        yield saved(photo.convert("1") if coding == "group4" else photo, "TIFF", compression=coding)


def recording(data: bytes) -> None:
    """A recording is read, fitted to a model, and written for a shard, where it has the same samples."""
    wave = audio.read(data)
    hold(wave.frames > 0 and 1 <= wave.channels <= audio.CHANNELS_LIMIT, "a recording has frames")
    checked = audio.check(data)
    suffix, kept = audio.write(data, checked)
    again = audio.read(kept)
    hold(suffix == "wav" and again.rate == wave.rate and len(kept) == checked.size, "a shard has the recording")
    hold((audio.samples(again) == audio.samples(wave)).all(), "a recording in a shard has the same samples")
    for shape in ((100,), (50, 2)):
        hold(audio.fitted(data, shape).shape == shape, "a recording fits")


def recordings() -> Iterator[bytes]:
    values = (np.sin(np.arange(60) / 3) * 30000).astype("<i2").reshape(30, 2)
    plain = audio.encode(values, 16000)
    yield plain
    for code, bits in ((1, 8), (1, 24), (1, 32), (3, 32), (3, 64)):
        body = (values / 40000).astype(f"<f{bits // 8}").tobytes() if code == 3 else bytes(range(120)) * (bits // 8)
        form = struct.pack("<HHIIHH", code, 2, 8000, 8000 * bits // 4, bits // 4, bits)
        chunks = b"fmt " + struct.pack("<I", 16) + form + b"LIST" + struct.pack("<I", 3) + b"abc\0"
        chunks += b"data" + struct.pack("<I", len(body)) + body
        yield b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
    yield plain[:40] + b"\xff\xff\xff\xff" + plain[44:]


# --- tables, records and arrays


def _packing() -> Packing:
    def put(data: bytes) -> BlobRef:
        return BlobRef(sha256="0" * 64, size=len(data))

    return Packing("d", put, lambda done, of: None, shuffle=True, seed=1, shard_bytes=1 << 20)


def _table(found: tables.Table) -> None:
    lengths = {len(column) for column in found.columns.values()}
    hold(len(lengths) == 1 and lengths.pop() > 0, "columns have one length")
    for column in found.columns.values():
        hold(column.dtype.kind in "if" and np.isfinite(column).all(), "a table has finite numbers")
    arrays.pack(found.columns, found.target, _packing(), sample_weight=found.sample_weight, classes=found.classes)


def csv(data: bytes) -> None:
    """A table as text."""
    _table(tables.read_csv(file_of(data, "t.csv"), None))


def csvs() -> Iterator[bytes]:
    yield b"a,b,y\n1,2.5,cat\n3,-4e2,dog\n"
    yield b'\xef\xbb\xbf"a ","b,c",target\r\n1,"2",0\r\n"3",4,1\r\n\r\n'
    yield b",a,label,sample_weight\n0,1,x,1\n1,True,y,0\n"
    yield b"y,x\n1,nan\n"
    yield b"a;b\n1;2\n"
    yield b"x\n" + b"1\n" * 50


def parquet_file(data: bytes) -> None:
    """A table of columns."""
    _table(parquet.read([file_of(data, "t.parquet")], None))


def parquets() -> Iterator[bytes]:
    import pyarrow as pa
    from pyarrow import parquet as pq

    whole = pa.table({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "y": ["cat", "dog", "cat"]})
    others = pa.table(
        {
            "a": pa.array([1, 2, 3], pa.int8()),
            "d": pa.array([1, 2, 3], pa.decimal128(5, 2)),
            "y": pa.array(["a", "b", "a"]).dictionary_encode(),
            "t": pa.array([True, False, True]),
        }
    )
    for table in (whole, others, whole.slice(0, 0)):
        for options in (
            {},
            {"compression": "none"},
            {"compression": "gzip", "data_page_version": "2.0"},
            {"row_group_size": 1},
        ):
            buffer = io.BytesIO()
            pq.write_table(table, buffer, **options)
            yield buffer.getvalue()


def tfrecord(data: bytes) -> None:
    """Records of examples, packed."""
    hold(tfrecords.pack([file_of(data, "t.tfrecord")], None, _packing()).count > 0, "a data set has items")


def tfrecord_files() -> Iterator[bytes]:
    picture = next(images())
    yield written([example(x=[1.0, 2.0], label=[0]), example(x=[3.0, 4.0], label=[1])])
    yield written([example(x=[1, 2, 3], y=[0.5]), example(x=[3, 4, 5], y=[1.5])])
    yield written([example(x=[1.0], label=[b"cat"]), example(x=[2.0], label=[b"doggy"])])
    yield written([example(**{"image/encoded": [picture], "image/class/label": [1], "image/class/text": [b"cat"]})] * 2)


def npz(data: bytes) -> None:
    """Arrays of a user's file, packed."""
    found, target, weight = arrays.read_file(file_of(data, "a.npz"), None)
    hold(all(isinstance(one, np.ndarray) for one in found.values()), "arrays are arrays")
    arrays.pack(found, target or arrays.target_arrays(tuple(found), None), _packing(), sample_weight=weight)


def npzs() -> Iterator[bytes]:
    for values in (
        {"x": np.arange(6.0).reshape(3, 2), "y": np.array([0, 1, 0])},
        {"x_train": np.zeros((4, 2), np.uint8), "y_train": np.array(["a", "b", "a", "b"]), "x_test": np.ones((1, 2))},
        {"a": np.arange(3, dtype=">i4"), "y": np.eye(3), "sample_weight": np.ones(3)},
    ):
        for save in (np.savez, np.savez_compressed):
            buffer = io.BytesIO()
            save(buffer, **values)  # type: ignore[arg-type]
            yield buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, np.arange(4.0))
    yield buffer.getvalue()


# --- shards, weights and updates


def shard_arrays(data: bytes) -> None:
    """A shard of arrays, as an engine reads it."""
    path = file_of(data, "0" * 64)
    found = shards.load_arrays([ShardPart(path, 0, 2)], ["x", "y"])
    hold(all(len(one) == 2 for one in found.values()), "a part has the items that were asked for")


def shards_of_arrays() -> Iterator[bytes]:
    from safetensors.numpy import save

    yield save({"x": np.arange(6, dtype=np.float32).reshape(3, 2), "y": np.array([0, 1, 0])})
    yield save({"x": np.zeros((2, 3), np.uint8), "y": np.zeros((2,), np.float16)})


def shard_files(data: bytes) -> None:
    """A shard of files, as an engine reads it."""
    path = file_of(data, "1" * 64)
    shards.file_index.cache_clear()
    index = shards.file_index(path)
    part = ShardPart(path, 0, len(index.classes))
    size = sum(map(len, shards.item_files(part)))
    hold(size <= len(data) * max(1, part.count) and size == shards.files_bytes(part), "items are pieces of the shard")


def tar_of(*members: tuple[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=format) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            if name.endswith("/"):
                entry.type = tarfile.DIRTYPE
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def shards_of_files() -> Iterator[bytes]:
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        yield tar_of(("0.png", b"abc"), ("0.cls", b"1"), ("1.png", b"d" * 600), ("1.cls", b"0"), format=format)
    yield tar_of(("0.txt", b"hello"))


def weights_file(data: bytes) -> None:
    """Weights as every node reads them."""
    total = 0
    with weights.Reader(file_of(data, "2" * 64)) as reader:
        for name, spec in reader.specs.items():
            found = reader.whole(name)
            hold(found.shape == spec.shape and found.dtype == spec.dtype, "a tensor is as it says")
            total += found.nbytes
            json.dumps(name, ensure_ascii=False).encode()
    hold(total <= len(data), "tensors are pieces of the file")


def weight_files() -> Iterator[bytes]:
    yield _saved(w00000=np.arange(6, dtype=np.float32).reshape(2, 3), s00001=np.array(3, np.int64))
    yield _saved(w00000=np.zeros((0, 4), np.float16))


def _saved(**tensors: Any) -> bytes:
    path = scratch() / "made"
    weights.save(path, tensors.items())
    return path.read_bytes()


@cache
def _base() -> Path:
    path = scratch() / "base"
    weights.save(
        path,
        [
            ("w00000", np.zeros((64, 80), np.float32)),
            ("w00001", np.ones(5, np.float32)),
            ("s00002", np.ones(3, np.float32)),
            ("s00003", np.ones(2, np.int64)),
        ],
    )
    return path


def update(data: bytes) -> None:
    """An update from another node, applied to weights."""
    target = scratch() / "after"
    path = file_of(data, "3" * 64)
    updates.norm(path, _base())
    updates.apply_update(_base(), path, target)
    with weights.Reader(target) as reader, weights.Reader(_base()) as base:
        hold(reader.specs == base.specs, "weights keep their shapes")


def update_files() -> Iterator[bytes]:
    path = scratch() / "update"
    rng = np.random.default_rng(1)
    after = [
        rng.normal(size=(64, 80)).astype(np.float32),
        np.zeros(5, np.float32),
        np.zeros(3, np.float32),
        np.zeros(2, np.int64),
    ]
    for compression in ("none", "int8", "int4"):
        updates.write_update(path, _base(), after, compression)  # type: ignore[arg-type]
        yield path.read_bytes()


def safetensors_mutated(data: bytes, most: int, seed: int) -> bytes:
    """The header of a safetensors file as JSON, and its length made right again."""
    if len(data) < 10 or seed % 5 == 0:
        return mutators.mutated(data, most)
    (length,) = struct.unpack_from("<Q", data)
    header, rest = data[8 : 8 + length], data[8 + length :]
    header = mutators.of_json(header, max(2, most - 8 - len(rest)), seed)
    return (struct.pack("<Q", len(header)) + header + rest)[:most]


# --- models


def savedmodel_tar(data: bytes) -> None:
    """The tar of a SavedModel, unpacked: nothing is written outside of its folder."""
    folder = scratch() / "unpacked"
    tar = file_of(data, "model.tar")
    before = {path.name for path in scratch().iterdir()}
    try:
        savedmodels.unpack(tar, folder)
        found = list(folder.rglob("*"))
        hold(all(path.is_dir() or path.is_file() for path in found), "files and folders only")
        hold(not any(path.is_symlink() for path in found), "no links")
        size = sum(path.stat().st_size for path in found if path.is_file())
        hold(size <= len(data), "a tar is not compressed")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    hold({path.name for path in scratch().iterdir()} <= before, "nothing else is left")


def savedmodel_tars() -> Iterator[bytes]:
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = (("saved_model.pb", b"\x08\x01"), ("variables/", b""), ("variables/variables.index", b"i" * 600))
        yield tar_of(*members, ("assets/" + "a" * 50 + "/" + "é" * 30, b"x"), format=format)


def keras_file(data: bytes) -> None:
    """The check of a `.keras` file before Keras reads it."""
    archives.check(file_of(data, "m.keras"), 2**30)


def keras_files() -> Iterator[bytes]:
    def layer(kind: str, shape: list[Any] | None = None, **options: Any) -> dict[str, Any]:
        build = {} if shape is None else {"build_config": {"input_shape": shape}}
        return {"module": "keras.layers", "class_name": kind, "config": {"name": "l", **options}, **build}

    layers = [
        layer("Dense", [None, 4], units=3),
        layer("Embedding", input_dim=10, output_dim=4),
        layer("Conv2D", [None, 8, 8, 3], filters=4, kernel_size=[3, 3], groups=1),
        layer("LSTM", [None, 3, 4], units=5),
    ]
    config = {"module": "keras", "class_name": "Sequential", "config": {"layers": layers}}
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", kind) as archive:
            archive.writestr("metadata.json", "{}")
            archive.writestr("config.json", json.dumps(config))
            archive.writestr("model.weights.h5", bytes(600))
        yield buffer.getvalue()


DATA = (InvalidData,)
TARGETS = (
    Target("image", image, (Unusable,), images, mutators.of_png, seconds=2.0, peak_bytes=2**30),
    Target("recording", recording, (Unusable,), recordings, mutators.plain),
    Target("csv", csv, DATA, csvs, mutators.plain),
    # pyarrow believes a page about how many values it has, and makes room for them: that is not ours to mend.
    Target("parquet", parquet_file, DATA, parquets, mutators.plain, peak_bytes=4 * 2**30, needs=("pyarrow",)),
    Target("tfrecord", tfrecord, DATA, tfrecord_files, mutators.of_records, needs=("google_crc32c", "google.protobuf")),
    Target("npz", npz, DATA, npzs, mutators.of_zip({}), peak_bytes=256 * 2**20),
    Target("shard_arrays", shard_arrays, DATA, shards_of_arrays, safetensors_mutated),
    Target("shard_files", shard_files, DATA, shards_of_files, mutators.of_tar),
    Target("weights", weights_file, (InvalidModel,), weight_files, safetensors_mutated),
    Target("update", update, (InvalidModel, Diverged), update_files, safetensors_mutated),
    Target("savedmodel_tar", savedmodel_tar, (InvalidModel,), savedmodel_tars, mutators.of_tar),
    Target(
        "keras_file",
        keras_file,
        (InvalidModel, OutOfMemory),
        keras_files,
        mutators.of_zip({"config.json": mutators.of_json}),
        peak_bytes=256 * 2**20,
    ),
)
