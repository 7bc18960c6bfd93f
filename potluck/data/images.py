"""Folders of images, a sub-folder a class, as WebDataset tars: `<key>.<suffix>` and `<key>.cls` (class index as text).

Images are copied byte for byte; those that TensorFlow cannot decode (webp, tiff) are written anew as PNG.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from potluck import codec
from potluck.blobs.store import BlobStore
from potluck.data.order import cuts, shuffled
from potluck.errors import InvalidData
from potluck.messages import DataFormat, Dataset, DataShard

NATIVE = {"png": "png", "jpeg": "jpg", "gif": "gif", "bmp": "bmp"}
"""Formats (as Pillow names them) that TensorFlow decodes, and their suffixes in a shard."""
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
BAD_SHARE_LIMIT = 0.01
NAMED_LIMIT = 1000
_THREADS = 8

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Item:
    """An image to pack: where it is or what it is, its name among the set's keys, and its class (-1: none)."""

    key: str
    label: int
    path: Path | None = None
    data: bytes = b""

    def read(self) -> bytes:
        return self.path.read_bytes() if self.path is not None else self.data


def pack_folder(
    folder: Path,
    name: str,
    store: BlobStore,
    shuffle: bool,
    labels: bool,
    seed: int,
    shard_bytes: int,
    progress: Progress,
) -> Dataset:
    """Raises InvalidData: no class folders, an empty class, no images, or too many that cannot be decoded."""
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    items: list[Item] = []
    classes: list[str] = []
    for index, class_folder in enumerate(class_folders):
        found = [Item(str(path.relative_to(folder)), index, path) for path in _images_in(class_folder)]
        if not found:
            raise InvalidData(
                f"class folder {class_folder} has no images ({_suffixes()}): add some, or remove the folder"
            )
        classes.append(class_folder.name)
        items += found
    if not class_folders:
        items = [Item(str(path.relative_to(folder)), -1, path) for path in _images_in(folder)]
        if items and labels:
            raise InvalidData(
                f"{folder} has {len(items)} images but no class folders: put each image into a folder named for its class"
            )
    if not items:
        raise InvalidData(f"{folder} has no images ({_suffixes()}) in it, nor folders that have")
    return pack_items(items, classes, name, store, shuffle, seed, shard_bytes, progress)


def pack_items(
    items: Sequence[Item],
    classes: Sequence[str],
    name: str,
    store: BlobStore,
    shuffle: bool,
    seed: int,
    shard_bytes: int,
    progress: Progress,
) -> Dataset:
    """Check every image, and pack those that decode. Raises InvalidData when more than 1 % do not."""
    kept, sizes, skipped = _check(items, progress)
    bad = len(skipped)
    if bad > len(items) * BAD_SHARE_LIMIT:
        shown = "; ".join(skipped[:5]) + ("; ..." if bad > 5 else "")
        raise InvalidData(f"{bad} of {len(items)} images cannot be decoded (1 % may be skipped): {shown}")
    found = np.asarray([item.label for item in kept])
    for index, label in enumerate(classes):
        if not (found == index).any():
            raise InvalidData(f"class {label!r} has no image that can be decoded")
    order = shuffled(found, len(kept), seed) if shuffle else np.arange(len(kept))
    ordered = [kept[place] for place in order]
    shards: list[DataShard] = []
    for start, stop in cuts([sizes[place] for place in order], shard_bytes):
        data = _tar(ordered[start:stop], start)
        shards.append(DataShard(blob=store.put_bytes(data), count=stop - start))
    return Dataset(
        name=name,
        format=DataFormat(kind="images", classes=tuple(classes)),
        count=len(kept),
        shards=tuple(shards),
        class_counts=tuple(int((found == index).sum()) for index in range(len(classes))),
        skipped=tuple(skipped[:NAMED_LIMIT]),
        keys=store.put_bytes(codec.pack([item.key for item in ordered], "json")),
    )


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _check(items: Sequence[Item], progress: Progress) -> tuple[list[Item], list[int], list[str]]:
    """Items that decode, their sizes in bytes, and what is wrong with the others."""
    kept: list[Item] = []
    sizes: list[int] = []
    skipped: list[str] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, (item, result) in enumerate(zip(items, pool.map(_decoded_size, items), strict=True), 1):
            if isinstance(result, int):
                kept.append(item)
                sizes.append(result)
            else:
                skipped.append(f"{item.key}: {result}")
            if number % 100 == 0 or number == len(items):
                progress(number, len(items))
    return kept, sizes, skipped


def _decoded_size(item: Item) -> int | str:
    """Size of the file when it decodes wholly; else why it does not."""
    try:
        data = item.read()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except UnidentifiedImageError:
        return "not an image" if data else "an empty file"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error)
    return len(data)


def _tar(items: Sequence[Item], first: int) -> bytes:
    """A tar that depends on its items alone: no times, no owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, item in enumerate(items, first):
            for suffix, data in _members(item):
                info = tarfile.TarInfo(f"{number:09}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _members(item: Item) -> Iterator[tuple[str, bytes]]:
    data = item.read()
    with Image.open(io.BytesIO(data)) as image:
        suffix = NATIVE.get((image.format or "").lower())
        if suffix is None:
            again = io.BytesIO()
            image.convert("RGBA" if image.mode in ("RGBA", "LA", "PA") else "RGB").save(again, "PNG")
            suffix, data = "png", again.getvalue()
    yield suffix, data
    if item.label >= 0:
        yield "cls", str(item.label).encode()


def _suffixes() -> str:
    return ", ".join(sorted(SUFFIXES))
