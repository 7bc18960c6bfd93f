"""The store: bytes named by their SHA-256, as files. A file is written whole or not at all; the least used go first."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from potluck.blobs.partial import CHUNKS_SUFFIX, PARTIAL_PREFIX, Partial
from potluck.blobs.room import UNUSED_SECONDS, UPLOADS_EACH, UPLOADS_SHARE, Disk, Uploads, Usage
from potluck.errors import CorruptBlob, DiskFull, InvalidRequest, NotFound
from potluck.logs import fields
from potluck.wire.identities import is_identity
from potluck.wire.values import BlobRef

log = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MADE_UP = "0" * 16
"""How made-up names of bytes without a hash begin. No hash begins so."""
_NEW_PREFIX = "new-"
_READ_BYTES = 1 << 20
_PARTIAL_SECONDS = 24 * 3600.0
_PARTIALS_KEPT = 8
_USED_SECONDS = 3600.0
"""How exactly the time of a blob's last use is kept on the disk. To write it makes the blob look changed: it is hashed again."""
_BLOCK_BYTES = 512
"""In which `stat` counts, on every file system."""


class _State(NamedTuple):
    """What changes when a file is written to."""

    inode: int
    size: int
    modified: int
    changed: int


class NewFile:
    """A file in the store's folder that is not a blob yet. Raises DiskFull."""

    def __init__(self, path: Path, file: IO[bytes], growing: Callable[[int], AbstractContextManager[None]]) -> None:
        self.path = path
        self._file = file
        self._growing = growing

    def write(self, data: bytes) -> None:
        with self._growing(len(data)), no_room():
            self._file.write(data)

    def flush(self) -> None:
        with no_room():
            self._file.flush()


class BlobStore:
    """Blobs below `folder`, `limit_bytes` in all, or as many as the disk has room for. Only one process may use a folder.

    To make room, uploads that nothing has used for a while are removed first, then the least used blobs. If this would not make
    enough room, DiskFull is raised and nothing is removed.

    Methods may be called in any thread. They block on files: for large files, call them in a thread. Stored blobs survive the end
    of the process.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        *,
        quota_bytes: int = 0,
        usage: Callable[[Path], Usage] = shutil.disk_usage,
        clock: Callable[[], float] = time.monotonic,
        used_seconds: float = _USED_SECONDS,
    ) -> None:
        """Take over the blobs in `folder`, and remove unfinished files of a killed process.

        `used_seconds`: how exactly the time of a use is kept on the disk.
        `quota_bytes`: most that unused uploads of one sender may hold; 0: half of the room, and one that comes alone may take all.
        """
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.quota_bytes = quota_bytes
        self._used_seconds = used_seconds
        self._lock = threading.RLock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """Sizes by hash, the least used first."""
        self._total = 0
        self._being_written = 0
        """Bytes that threads write just now: the disk may not count them yet."""
        self._hashed: dict[str, _State] = {}
        """The state of each file when its bytes were last hashed, in this process."""
        self._pins: Counter[str] = Counter()
        self._named: set[str] = set()
        self._partials_open: dict[str, int] = {}
        """Sizes of the blobs that are being fetched, by hash."""
        self._disk = Disk(folder, usage)
        self._uploads = Uploads(clock)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found: list[tuple[float, str, int]] = []
        empty = hashlib.sha256().hexdigest()
        for path in folder.iterdir():
            seen = path.stat()
            if is_sha256(path.name) and (seen.st_size or path.name == empty):
                found.append((max(seen.st_atime, seen.st_mtime), path.name, seen.st_size))
            elif is_sha256(path.name) or path.name.startswith(_NEW_PREFIX):
                path.unlink(missing_ok=True)  # an empty file is what a power cut leaves of a blob
        for _, name, size in sorted(found):
            self._sizes[name] = size
            self._total += size
        self._sweep_partials(kept=_PARTIALS_KEPT)

    @property
    def size_bytes(self) -> int:
        return self._total

    def has(self, sha256: str) -> bool:
        """Whether the blob is here. It is not if another program removed its file."""
        with self._lock:
            if sha256 not in self._sizes:
                return False
            if not (self.folder / sha256).exists():
                self._forget(sha256)
                return False
            return True

    def path(self, sha256: str) -> Path:
        """The blob's file, which counts as used now. Pin it before you wait for anything. Raises NotFound."""
        with self._lock:
            path = self.folder / sha256
            if sha256 in self._sizes:
                self._sizes.move_to_end(sha256)
                self._uploads.asked(sha256)
                try:
                    self._note_use(path)
                except FileNotFoundError:
                    self._forget(sha256)
                else:
                    return path
        raise NotFound(f"there is no blob {sha256[:12]} here")

    def unchanged(self, sha256: str) -> Path | None:
        """`path`, if the file has not been changed since its bytes were hashed in this process; None: use `checked`. Raises NotFound.

        Whoever owns a file can set all its times but the last (`ctime`).
        """
        path = self.path(sha256)
        with self._lock:
            known = self._hashed.get(sha256)
        return path if is_made_up(sha256) or known == _state(path) else None

    def checked(self, sha256: str) -> Path:
        """The file of a blob that is whole: its bytes are hashed unless it is unchanged. Blocks.

        Raises NotFound; CorruptBlob if it was changed, and then it is gone.
        """
        if (path := self.unchanged(sha256)) is not None:
            return path
        if not self.check(sha256):
            raise CorruptBlob(f"blob {sha256[:12]} was changed on this disk, and is not kept: fetch or send it again")
        return self.folder / sha256

    def size(self, sha256: str) -> int:
        self.path(sha256)
        return self._sizes[sha256]

    def read(self, sha256: str) -> bytes:
        """The bytes of a blob. Raises NotFound, CorruptBlob."""
        return self.checked(sha256).read_bytes()

    def put_bytes(self, data: bytes) -> BlobRef:
        """Store bytes. Raises DiskFull, as do all methods that store."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not self._has_whole(sha256):
            with self.new_file() as file:
                file.write(data)
                file.flush()
                self._take(file.path, sha256, len(data))
        return BlobRef(sha256=sha256, size=len(data))

    def put_file(self, path: Path, *, move: bool = False) -> BlobRef:
        """Store the bytes of `path`, copied or moved."""
        if move:
            sha256, size = hash_file(path)
            return self._move(path, sha256, size)
        digest, size = hashlib.sha256(), 0
        with self.new_file() as file:
            # Hashed while copied: the stored bytes are those that were hashed, even if the file is written to meanwhile.
            with path.open("rb") as source:
                while chunk := source.read(_READ_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    file.write(chunk)
            file.flush()
            return self._move(file.path, digest.hexdigest(), size)

    def adopt(self, path: Path, sha256: str) -> BlobRef:
        """Move a file that this process wrote and hashed; it is not read again. Raises InvalidRequest."""
        if not is_sha256(sha256):
            raise InvalidRequest(f"{sha256!r} is not a SHA-256 in hexadecimal")
        return self._move(path, sha256, path.stat().st_size)

    def take(self, path: Path, sha256: str) -> BlobRef:
        """Move a file of a process that is not trusted. Raises CorruptBlob if it is no plain file, or its bytes are others.

        It is copied and hashed at once: that process may have it open, or by another name, and change it at any time. No more is
        read than the file has now, and only if there is room for that.
        """
        digest = hashlib.sha256()
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, or a socket
                raise CorruptBlob(f"{path.name[:12]} is no plain file") from error
            raise
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise CorruptBlob(f"{path.name[:12]} is no plain file")
        left = size = found.st_size
        with os.fdopen(descriptor, "rb", buffering=0) as source:
            self.check_room(size)
            with self.new_file() as file:
                while left and (chunk := source.read(min(left, _READ_BYTES))):
                    digest.update(chunk)
                    left -= len(chunk)
                    file.write(chunk)
                file.flush()
                if digest.hexdigest() != sha256:
                    raise CorruptBlob(f"{path.name[:12]} has the bytes of {digest.hexdigest()[:12]}")
                if not self._has_whole(sha256):
                    self._take(file.path, sha256, size)
        path.unlink(missing_ok=True)
        return BlobRef(sha256=sha256, size=size)

    def verify(self, file: Path, ref: BlobRef) -> BlobRef:
        """Take a downloaded file as the blob `ref`. Raises CorruptBlob if its bytes differ."""
        sha256, size = hash_file(file)
        if sha256 != ref.sha256:
            raise CorruptBlob(f"blob {ref.sha256[:12]} arrived as {sha256[:12]}: {size} bytes of {ref.size}")
        return self._move(file, sha256, size)

    def check(self, sha256: str) -> bool:
        """Whether the blob is here and whole. A damaged one is removed, pinned or not. Blocks: it reads the whole blob."""
        path = self.folder / sha256
        state: _State | None = None
        try:
            if not self.has(sha256):
                return False
            state = _state(path)
            if hash_file(path)[0] == sha256:
                with self._lock:
                    if sha256 in self._sizes and _state(path) == state:
                        self._hashed[sha256] = state
                return True
            log.error("blob was changed on the disk, and is thrown away %s", fields(blob=sha256[:12]))
        except OSError as error:
            log.warning("blob cannot be read %s", fields(blob=sha256[:12], reason=error))
        with self._lock, suppress(FileNotFoundError):
            if sha256 in self._sizes and (
                state is None or _state(path).inode == state.inode
            ):  # not one that came meanwhile
                self._forget(sha256)
                path.unlink(missing_ok=True)
        return False

    def delete(self, sha256: str) -> bool:
        """Delete the blob, unless it is pinned. Returns whether it was deleted."""
        with self._lock:
            if sha256 not in self._sizes or self._pins[sha256] > 0:
                return False
            self._forget(sha256)
            (self.folder / sha256).unlink(missing_ok=True)
            return True

    def pin(self, sha256: str) -> None:
        """Keep the blob until it is unpinned as often as it was pinned. It need not be here yet."""
        with self._lock:
            self._pins[sha256] += 1
            self._uploads.used(sha256)

    def unpin(self, sha256: str) -> None:
        with self._lock:
            self._pins[sha256] -= 1
            if self._pins[sha256] <= 0:
                del self._pins[sha256]

    @contextmanager
    def pinning(self) -> Iterator[Callable[[str], None]]:
        """Gives a function that pins a blob until the end of the block."""
        pinned: list[str] = []

        def pin(sha256: str) -> None:
            self.pin(sha256)
            pinned.append(sha256)

        try:
            yield pin
        finally:
            for sha256 in pinned:
                self.unpin(sha256)

    @contextmanager
    def new_file(self) -> Iterator[NewFile]:
        """A temporary file beside the blobs. It is removed after the block, unless it became a blob."""
        with no_room():
            descriptor, name = tempfile.mkstemp(prefix=_NEW_PREFIX, dir=self.folder)
        path = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield NewFile(path, file, self._growing)
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def partial(self, ref: BlobRef, chunk_bytes: int) -> Iterator[Partial]:
        """The chunks of a blob that are here already. Chunks that are missing after the block can be fetched next time.

        Raises DiskFull if there is no room for the blob.
        """
        self.check_room(ref.size)
        partial = Partial(self.folder / f"{PARTIAL_PREFIX}{ref.sha256}", ref.size, chunk_bytes)
        if not partial.path.exists():
            self.clear(ref.size)
        with self._lock:
            self._partials_open[ref.sha256] = ref.size
        try:
            with no_room():
                partial.open()
            yield partial
        except DiskFull:
            partial.discard()
            raise
        finally:
            with self._lock:
                self._partials_open.pop(ref.sha256, None)
                if partial.path.exists():
                    self._sweep_partials(kept=_PARTIALS_KEPT)

    def check_room(self, size: int) -> None:
        """Raises DiskFull if `size` bytes do not fit beside the pinned blobs, even with all others removed."""
        with self._lock:
            pinned = sum(self._sizes.get(sha256, 0) for sha256 in self._pins)
            left = self._spare() + self._total - pinned
        if pinned + size > self.limit_bytes:
            raise DiskFull(
                f"a blob of {size} bytes does not fit beside the {pinned} bytes in use (limit {self.limit_bytes}): "
                "raise blob_limit_bytes, or delete models and data sets"
            )
        if size > left:
            raise DiskFull(self._disk.full())

    def clear(self, size: int) -> None:
        """Make `size` bytes free on the disk, besides the reserve, for a file to be written. Raises DiskFull."""
        with self._lock:
            self._evict(size - self._spare())

    @contextmanager
    def _growing(self, size: int) -> Iterator[None]:
        """`clear`, for a file that grows by `size` bytes within the block. Others that grow at the same time are counted, too."""
        with self._lock:
            self._evict(size - self._spare())
            self._being_written += size
        try:
            yield
        finally:
            with self._lock:
                self._being_written -= size

    def shortage(self) -> str:
        """Why no more blobs can be taken; "": they can."""
        try:
            self.check_room(1)
        except DiskFull as error:
            return error.message
        return ""

    @contextmanager
    def receiving(self, peer: str) -> Iterator[Callable[[int], None]]:
        """For an upload from this sender, an identity or an address: call the function with each piece's size before it is written.
        It raises DiskFull if unused uploads from there take too much. Call `uploaded` when the upload is complete."""
        coming = 0

        def more(size: int) -> None:
            nonlocal coming
            with self._lock:
                self._check_quota(peer, coming, size)
                self._uploads.coming(peer, size)
                coming += size

        try:
            yield more
        finally:
            with self._lock:
                self._uploads.coming(peer, -coming)

    def check_quota(self, peer: str, size: int) -> None:
        """Raises DiskFull if this sender may not send a blob of `size` bytes now."""
        with self._lock:
            self._check_quota(peer, 0, size)

    def _check_quota(self, peer: str, coming: int, size: int) -> None:
        """`coming`: bytes of the same blob that are counted already."""
        uploads = self._uploads
        most = self.quota_bytes or UPLOADS_SHARE * min(self.limit_bytes, self._total + max(0, self._spare()))

        def too_much() -> bool:
            return uploads.held(peer) + size > most or uploads.count(peer) >= UPLOADS_EACH

        if too_much():
            for sha256 in uploads.unused(peer):
                self.delete(sha256)
        if not too_much():
            return
        if not self.quota_bytes and uploads.held(peer) == coming:  # it is the only upload, and may take all the room
            self.check_room(coming + size)
            return
        many = uploads.count(peer) >= UPLOADS_EACH
        held = f"{uploads.count(peer)} blobs" if many else f"{uploads.held(peer)} bytes"
        share = f"{self.quota_bytes} bytes are" if self.quota_bytes else "half of the room is"
        raise DiskFull(
            f"{held} were sent from {peer} that no job and no name uses yet, and {'no more may be' if many else share} for such: "
            f"use them, or wait {UNUSED_SECONDS / 60:g} minutes"
        )

    def uploaded(self, sha256: str, peer: str) -> None:
        """Note that `peer` sent this blob. From an address, it counts as unused until it is pinned; from an identity, until it is named."""
        with self._lock:
            lasting = is_identity(peer)
            if sha256 in self._sizes and sha256 not in self._named and (lasting or not self._pins[sha256]):
                self._uploads.add(sha256, peer, self._sizes[sha256], lasting=lasting)

    def named(self, sha256: str) -> None:
        """The blob has a name in the registry: it counts for nobody's quota any more."""
        with self._lock:
            self._named.add(sha256)
            self._uploads.forget(sha256)

    def unnamed(self, sha256: str) -> None:
        """The blob has no name any more."""
        with self._lock:
            self._named.discard(sha256)

    def sent(self, sha256: str, peer: str) -> bool:
        """Whether `peer` sent this blob since this process began, and it has no name yet."""
        with self._lock:
            return self._uploads.sent(sha256, peer)

    def _has_whole(self, sha256: str) -> bool:
        """Whether the blob is here and needs no look at its bytes. If it may be damaged, the same bytes are taken again."""
        with self._lock, suppress(NotFound):
            return self.has(sha256) and self.unchanged(sha256) is not None
        return False

    def _move(self, path: Path, sha256: str, size: int) -> BlobRef:
        if self._has_whole(sha256):
            path.unlink(missing_ok=True)
        elif path.stat().st_dev == self.folder.stat().st_dev:
            self._take(path, sha256, size)
        else:
            with self.new_file() as file:
                with no_room():
                    shutil.copyfile(path, file.path)
                self._take(file.path, sha256, size)
            path.unlink(missing_ok=True)
        return BlobRef(sha256=sha256, size=size)

    def _take(self, path: Path, sha256: str, size: int) -> None:
        """Make a complete file on this file system a blob. Its bytes were hashed just now."""
        with self._lock:
            self._make_room(size)
            path.replace(self.folder / sha256)
            self._total += size - self._sizes.get(sha256, 0)
            self._sizes[sha256] = size
            self._sizes.move_to_end(sha256)
            self._hashed[sha256] = _state(self.folder / sha256)

    def _make_room(self, size: int) -> None:
        """Make room for a blob whose bytes are on the disk already."""
        over = self._total + size - self.limit_bytes
        if over > 0:
            self.check_room(size)
        self._evict(max(over, -self._spare()))

    def _evict(self, size: int) -> None:
        """Remove `size` bytes of blobs that are not pinned, or none. Raises DiskFull."""
        if size <= 0:
            return
        free = self._total - sum(self._sizes.get(sha256, 0) for sha256 in self._pins)
        if free < size:
            raise DiskFull(self._disk.full())
        for sha256 in [*self._uploads.unused(), *self._sizes]:
            if size <= 0:
                return
            gone = self._sizes.get(sha256, 0)
            if self.delete(sha256):
                size -= gone

    def _spare(self) -> int:
        """Bytes that may still be written, less those that files here will take although the disk does not count them yet."""
        spare = self._disk.spare() - self._being_written
        for sha256, size in self._partials_open.items():
            try:
                taken = (self.folder / f"{PARTIAL_PREFIX}{sha256}").stat().st_blocks * _BLOCK_BYTES
            except FileNotFoundError:
                taken = 0
            spare -= max(0, size - taken)
        return spare

    def _forget(self, sha256: str) -> None:
        self._total -= self._sizes.pop(sha256)
        self._hashed.pop(sha256, None)
        self._uploads.forget(sha256)

    def _note_use(self, path: Path) -> None:
        """So that the order of use survives this process."""
        now, found = time.time(), path.stat()
        if now - max(found.st_atime, found.st_mtime) > self._used_seconds:
            os.utime(path, (now, found.st_mtime))

    def _sweep_partials(self, kept: int) -> None:
        """Remove unfinished downloads: old ones, and all but the newest `kept`."""
        files = [path for path in self.folder.glob(f"{PARTIAL_PREFIX}*") if not path.name.endswith(CHUNKS_SUFFIX)]
        idle = [path for path in files if path.name.removeprefix(PARTIAL_PREFIX) not in self._partials_open]
        idle.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for place, path in enumerate(idle):
            if place >= kept or time.time() - path.stat().st_mtime > _PARTIAL_SECONDS:
                Partial(path, 0, 1).discard()
        for log in self.folder.glob(f"{PARTIAL_PREFIX}*{CHUNKS_SUFFIX}"):
            if not log.with_suffix("").exists():
                log.unlink(missing_ok=True)


def _state(path: Path) -> _State:
    found = path.stat()
    return _State(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


def made_up_name() -> str:
    """A name for bytes that were not hashed. It cannot be guessed."""
    return _MADE_UP + secrets.token_hex(24)


def is_made_up(name: str) -> bool:
    return name.startswith(_MADE_UP)


def hash_file(path: Path) -> tuple[str, int]:
    """(SHA-256 in hexadecimal, size) of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return digest.hexdigest(), file.tell()


@contextmanager
def no_room() -> Iterator[None]:
    """Raises DiskFull for an OSError that means a full disk."""
    try:
        yield
    except OSError as error:
        if full := disk_full(error):
            raise full from error
        raise


def disk_full(error: OSError) -> DiskFull | None:
    """The DiskFull to raise for an error that means a full disk; None: it means something else."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull("the disk is full: free some room, or choose another --state-dir")
    return None
