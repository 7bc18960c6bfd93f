"""The store: bytes named by their SHA-256, as files, written whole or not at all, the least used thrown away first."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from potluck.errors import CorruptBlob, InvalidRequest, NotFound, PotluckError
from potluck.messages import BlobRef

_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_READ_BYTES = 1 << 20


class DiskFull(PotluckError):
    """No room for a blob: on the disk, or within the store's limit beside what is pinned."""

    code = "disk_full"
    retryable = True


class NewFile:
    """A file in the store's folder that is not a blob yet."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self._file = file

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


class BlobStore:
    """Blobs below `folder`, `limit_bytes` in all. Its methods block on files: large ones belong into a thread."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._pins: Counter[str] = Counter()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found: list[tuple[float, str, int]] = []
        for path in folder.iterdir():
            if _SHA256.match(path.name):
                stat = path.stat()
                found.append((stat.st_mtime, path.name, stat.st_size))
            elif path.name.startswith("new-"):
                path.unlink(missing_ok=True)
        for _, name, size in sorted(found):
            self._sizes[name] = size

    @property
    def size_bytes(self) -> int:
        return sum(self._sizes.values())

    def has(self, sha256: str) -> bool:
        return sha256 in self._sizes

    def path(self, sha256: str) -> Path:
        """Raises NotFound."""
        if sha256 not in self._sizes:
            raise NotFound(f"there is no blob {sha256[:12]} here")
        self._sizes.move_to_end(sha256)
        return self.folder / sha256

    def size(self, sha256: str) -> int:
        self.path(sha256)
        return self._sizes[sha256]

    def read(self, sha256: str) -> bytes:
        return self.path(sha256).read_bytes()

    def put_bytes(self, data: bytes) -> BlobRef:
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.has(sha256):
            with self.new_file() as file:
                with _no_room():
                    file.write(data)
                    file.flush()
                self._take(file.path, sha256, len(data))
        return BlobRef(sha256=sha256, size=len(data))

    def put_file(self, path: Path, *, move: bool = False) -> BlobRef:
        """The bytes of `path`, copied, or moved when it lies on the same file system."""
        sha256, size = _hash(path)
        if self.has(sha256):
            if move:
                path.unlink(missing_ok=True)
        elif move and path.stat().st_dev == self.folder.stat().st_dev:
            self._take(path, sha256, size)
        else:
            with self.new_file() as file:
                with _no_room(), path.open("rb") as source:
                    while chunk := source.read(_READ_BYTES):
                        file.write(chunk)
                    file.flush()
                self._take(file.path, sha256, size)
            if move:
                path.unlink(missing_ok=True)
        return BlobRef(sha256=sha256, size=size)

    def adopt(self, path: Path, sha256: str) -> BlobRef:
        """A file that a trusted child of ours wrote and hashed: moved, not read again."""
        if not _SHA256.match(sha256):
            raise InvalidRequest(f"{sha256!r} is not a SHA-256 in hexadecimal")
        size = path.stat().st_size
        if self.has(sha256):
            path.unlink()
        else:
            self._take(path, sha256, size)
        return BlobRef(sha256=sha256, size=size)

    def verify(self, file: Path, ref: BlobRef) -> BlobRef:
        """Take a downloaded file as `ref`. Raises CorruptBlob when its bytes are others."""
        sha256, size = _hash(file)
        if sha256 != ref.sha256:
            raise CorruptBlob(f"blob {ref.sha256[:12]} arrived as {sha256[:12]}: {size} bytes of {ref.size}")
        self._take(file, sha256, size)
        return BlobRef(sha256=sha256, size=size)

    def delete(self, sha256: str) -> bool:
        """Whether it was there and not pinned."""
        if sha256 not in self._sizes or self._pins[sha256] > 0:
            return False
        del self._sizes[sha256]
        (self.folder / sha256).unlink(missing_ok=True)
        return True

    def pin(self, sha256: str) -> None:
        self._pins[sha256] += 1

    def unpin(self, sha256: str) -> None:
        self._pins[sha256] -= 1
        if self._pins[sha256] <= 0:
            del self._pins[sha256]

    @contextmanager
    def new_file(self) -> Iterator[NewFile]:
        """A temporary file beside the blobs; gone after the block, unless it was put."""
        with _no_room():
            descriptor, name = tempfile.mkstemp(prefix="new-", dir=self.folder)
        path = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield NewFile(path, file)
        finally:
            path.unlink(missing_ok=True)

    def _take(self, path: Path, sha256: str, size: int) -> None:
        self._make_room(size)
        path.replace(self.folder / sha256)
        self._sizes[sha256] = size
        self._sizes.move_to_end(sha256)

    def _make_room(self, size: int) -> None:
        used = self.size_bytes
        for sha256 in list(self._sizes):
            if used + size <= self.limit_bytes:
                return
            if not self._pins[sha256]:
                used -= self._sizes[sha256]
                self.delete(sha256)
        if used + size > self.limit_bytes:
            raise DiskFull(
                f"a blob of {size} bytes does not fit beside the {used} bytes in use (limit {self.limit_bytes}): "
                "raise blob_limit_bytes, or delete models and data sets"
            )


def _hash(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return digest.hexdigest(), file.tell()


@contextmanager
def _no_room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("the disk is full: free some room, or choose another --state-dir") from error
        raise
