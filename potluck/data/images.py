"""Folders of images, a sub-folder a class, as WebDataset tars: `<key>.<png|jpg>` and `<key>.cls` (class index as text).

PNG and JPEG are copied byte for byte; what TensorFlow cannot decode to any number of channels is written anew as PNG.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from potluck.data.packing import Array, Packing, reading
from potluck.errors import InvalidData
from potluck.messages import DataFormat, Dataset, DataShard

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
BAD_SHARE_LIMIT = 0.01
NAMED_LIMIT = 1000
"""So many skipped images are named in a manifest."""
_JPEG_MODES = ("L", "RGB")
_CHECKS_AT_ONCE = 1024
_UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise for damaged files."""


@dataclass(frozen=True)
class Item:
    """An image to pack: its name among the set's keys, its class (-1: none), and how to get its bytes."""

    key: str
    label: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class _Checked:
    """An image that decodes: about its size in a shard, and its suffix there; empty when it is to be written anew."""

    size: int
    suffix: str


def pack_folder(folder: Path, labels: bool, packing: Packing) -> Dataset:
    """Images in class folders. With `labels` False and images directly in `folder`: all below it, without classes.

    Raises InvalidData: no class folders, an empty class, no images, or too many that cannot be used.
    """
    with reading(folder):
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    beside = [path for path in entries if path.suffix.lower() in SUFFIXES and path.is_file()]
    if beside and not labels:
        return pack_items([_item(path, folder, -1) for path in _images_in(folder)], (), packing)
    items: list[Item] = []
    classes: list[str] = []
    for class_folder in (path for path in entries if path.is_dir()):
        found = [_item(path, folder, len(classes)) for path in _images_in(class_folder)]
        if not found:
            raise InvalidData(
                f"class folder {class_folder} has no images ({_suffixes()}): add some, or remove the folder"
            )
        classes.append(_text(class_folder.name))
        items += found
    if not items and beside:
        raise InvalidData(
            f"{folder} has {len(beside)} images but no class folders: put each image into a folder named for its class"
        )
    if not items:
        raise InvalidData(
            f"{folder} has no class folders with images: expected {folder}/<class>/<image> ({_suffixes()})"
        )
    skipped = [f"{_text(path.name)}: lies beside the class folders, in none of them" for path in beside]
    return pack_items(items, classes, packing, skipped)


def pack_items(items: Sequence[Item], classes: Sequence[str], packing: Packing, skipped: Sequence[str] = ()) -> Dataset:
    """Check every image, and pack those that decode. Raises InvalidData when more than 1 % cannot be used."""
    total = len(items)
    threads = min(8, (os.cpu_count() or 1) + 2)
    with ThreadPoolExecutor(threads, thread_name_prefix="ThreadPoolExecutor-images") as pool:
        kept: list[Item] = []
        checks: list[_Checked] = []
        bad = list(skipped)
        for done, (item, result) in enumerate(_checked(items, pool), 1):
            if isinstance(result, _Checked):
                kept.append(item)
                checks.append(result)
            else:
                bad.append(f"{item.key}: {result}")
            if done % 100 == 0 or done == total:
                packing.progress(done // 2, total)
        labels = _usable(items, kept, bad, classes)
        order = packing.order(labels, len(kept)).tolist()
        shards: list[DataShard] = []
        for start, stop in packing.cuts([checks[place].size for place in order]):
            part = [(kept[place], checks[place]) for place in order[start:stop]]
            files = pool.map(_shard_file, part)
            shards.append(
                DataShard(blob=packing.put(_tar(files, [item.label for item, _ in part], start)), count=len(part))
            )
            packing.progress(total // 2 + (total - total // 2) * stop // len(order), total)
    described = DataFormat(kind="images", classes=tuple(classes))
    return packing.dataset(described, shards, [kept[place].key for place in order], labels, bad[:NAMED_LIMIT])


def _usable(items: Sequence[Item], kept: Sequence[Item], bad: Sequence[str], classes: Sequence[str]) -> Array:
    """The labels of the images to pack. Raises InvalidData when those are too few."""
    count = len(kept) + len(bad)
    if len(bad) > count * BAD_SHARE_LIMIT:
        shown = "; ".join(bad[:5]) + ("; ..." if len(bad) > 5 else "")
        raise InvalidData(f"{len(bad)} of {count} images cannot be used (1 % may be skipped): {shown}")
    left = {item.label for item in kept}
    for label in sorted({item.label for item in items} - left):
        raise InvalidData(f"class {classes[label]!r} has no image that can be decoded")
    return np.asarray([item.label for item in kept], np.int64)


def _checked(items: Sequence[Item], pool: ThreadPoolExecutor) -> Iterator[tuple[Item, _Checked | str]]:
    rest = iter(items)
    while some := list(islice(rest, _CHECKS_AT_ONCE)):
        yield from zip(some, pool.map(_check, some), strict=True)


def _check(item: Item) -> _Checked | str:
    """What it takes in a shard, when it decodes wholly; else why it does not."""
    data = b""
    try:
        data = item.read()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            suffix = _suffix(image)
            if suffix == "png":
                _check_png(data)
            return _Checked(len(data) if suffix else image.width * image.height * len(image.getbands()) // 2, suffix)
    except UnidentifiedImageError:
        return "not an image" if data else "an empty file"
    except _UNDECODABLE as error:
        return str(error) or type(error).__name__


def _suffix(image: Image.Image) -> str:
    """The suffix under which TensorFlow decodes the file as it is, to any number of channels; empty if it does not."""
    if image.format == "PNG":
        return "png"
    return "jpg" if image.format in ("JPEG", "MPO") and image.mode in _JPEG_MODES else ""


def _check_png(data: bytes) -> None:
    """Raises ValueError for what libpng refuses though Pillow does not: a wrong CRC, or no end (PNG specification, 5.3)."""
    place, kind = 8, b""
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", data, place)
        kind = data[place + 4 : place + 8]
        (crc,) = struct.unpack_from(">I", data, place + 8 + length)
        if zlib.crc32(data[place + 4 : place + 8 + length]) != crc:
            raise ValueError(f"broken PNG file (bad checksum in {kind!r})")
        place += 12 + length


def _shard_file(part: tuple[Item, _Checked]) -> tuple[str, bytes]:
    """(suffix, bytes) as in the shard. Raises InvalidData for an image that was changed meanwhile."""
    item, checked = part
    try:
        data = item.read()
        if checked.suffix:
            return checked.suffix, data
        with Image.open(io.BytesIO(data)) as image:
            buffer = io.BytesIO()
            _as_png(image).save(buffer, "PNG")
            return "png", buffer.getvalue()
    except _UNDECODABLE as error:
        raise InvalidData(f"{item.key} changed while it was packed: {error}") from error


def _as_png(image: Image.Image) -> Image.Image:
    """The first frame as grey, colour, or colour with transparency."""
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return image.convert("RGBA")
    return image if image.mode == "I;16" else image.convert("RGB")


def _tar(files: Iterator[tuple[str, bytes]], labels: Sequence[int], first: int) -> bytes:
    """A tar that depends on its items alone: no times, no owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for number, ((suffix, data), label) in enumerate(zip(files, labels, strict=True), first):
            add(f"{number:09}.{suffix}", data)
            if label >= 0:
                add(f"{number:09}.cls", str(label).encode())
    return buffer.getvalue()


def _images_in(folder: Path) -> list[Path]:
    """All below `folder`, nested ones too; hidden files and folders are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _item(path: Path, folder: Path, label: int) -> Item:
    return Item(_text(path.relative_to(folder).as_posix()), label, path.read_bytes)


def _text(name: str) -> str:
    """A file's name as text, though it be no UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def _suffixes() -> str:
    return ", ".join(sorted(SUFFIXES))
