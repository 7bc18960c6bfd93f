"""Data sets that live on this node and never leave it: packed for the engine, in a store that nobody else is served from."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec.structs import replace

from potluck import lifecycle
from potluck.blobs.store import BlobStore, is_sha256
from potluck.errors import CorruptBlob, InvalidRequest, NotFound, PotluckError, Unavailable
from potluck.logs import fields
from potluck.settings import NodeDataSettings
from potluck.surviving import surviving
from potluck.wire.tasks import AnyTask, EvaluateTask, TrainTask, WarmUpTask
from potluck.wire.values import Dataset, DataSlice, NodeData

log = logging.getLogger(__name__)

NO_LIMIT = 1 << 62
REASON_LIMIT = 600
_HIDDEN = {
    "ProtectHome": ("/home", "/root", "/run/user"),
    "PrivateTmp": ("/tmp", "/var/tmp"),  # noqa: S108 - compared, not written to
}
"""Settings of our systemd units, and the folders that each setting hides (systemd.exec(5))."""


class OwnData:
    """The data sets in the settings under `[data]`. `folder` is made again at each start, readable only by this user.

    `change` may come at any time, also while `pack` runs in a thread. It counts at once.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, str | NodeDataSettings],
        on_damage: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_damage` is called, in any thread, when packed data were changed on the disk, and are to be packed again."""
        shutil.rmtree(folder, ignore_errors=True)  # the files may have changed since
        folder.mkdir(mode=0o700)
        self._store = BlobStore(folder, NO_LIMIT)
        self._lock = threading.RLock()
        self._settings = _as_tables(settings)
        self._on_damage = on_damage
        self._packed: dict[str, Dataset] = {}
        self._missing: dict[str, str] = {}
        self._files = threading.Lock()
        """Held while files come or go: what is packed may have the same bytes as files that nobody needed any more."""
        self._left = False
        """Whether files that no data set needs any more stayed, because a task used them."""

    @property
    def unpacked(self) -> tuple[str, ...]:
        """The data sets that are to be packed."""
        with self._lock:
            return tuple(name for name in self._settings if name not in self._packed)

    @property
    def announced(self) -> tuple[NodeData, ...]:
        """What others may know of the data that are ready."""
        return tuple(
            NodeData(name=name, format=data.format, count=data.count) for name, data in sorted(self._packed.items())
        )

    @property
    def missing(self) -> Mapping[str, str]:
        """Why data that were tried are unavailable, by name."""
        return self._missing

    def change(self, settings: Mapping[str, str | NodeDataSettings]) -> None:
        """Take new settings. Data sets that are gone, or have other files or columns, are no longer announced, and no task gets them."""
        with self._lock:
            before, self._settings = self._settings, _as_tables(settings)
            same = {name for name, given in self._settings.items() if _same_data(before.get(name), given)}
            self._packed = {name: data for name, data in self._packed.items() if name in same}
            self._missing = {name: why for name, why in self._missing.items() if name in same}

    async def packed(self, name: str) -> bool:
        """`pack` in a thread of its own. A disk may hang, and large data take minutes: the end of this process does not wait for that."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bool] = loop.create_future()

        def work() -> None:
            try:
                found, error = self.pack(name), None
            except BaseException as raised:  # noqa: BLE001 - told to whoever waits
                found, error = False, raised
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(finish, found, error)

        def finish(found: bool, error: BaseException | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(found)

        threading.Thread(target=work, name=f"packing of {name}", daemon=True).start()
        return await done

    def pack(self, name: str) -> bool:
        """Prepare a data set. False if that fails, or its settings have changed meanwhile; logs a new reason once. Blocks: call it in a
        thread, one at a time.

        The node goes on without the data, whatever is wrong with the user's files.
        """
        given = self._settings.get(name)
        if given is None:
            return False
        with self._files:
            reason = self._why_not(name, given)
        self.sweep()
        with self._lock:
            if not _same_data(self._settings.get(name), given):
                return False
            known = self._missing.get(name)
            self._missing = {other: why for other, why in self._missing.items() if other != name}
            if reason:
                self._missing[name] = reason
        if reason and known != reason:
            log.error("data not available, trying again %s", fields(data=name, path=given.path, reason=reason))
        return not reason

    def _why_not(self, name: str, given: NodeDataSettings) -> str:
        """Pack it; the reason if that fails, else ""."""
        try:
            self._add(name, Path(given.path).expanduser(), given)
            return ""
        except PotluckError as error:
            reason = error.message
        except OSError as error:
            reason = f"{error.filename or given.path} cannot be read: {error.strerror or error}"
        except Exception as error:  # noqa: BLE001 - any error of the libraries that read files
            reason = f"{given.path} cannot be read: {type(error).__name__}: {error}"
        return f"{reason[:REASON_LIMIT]}{_hidden(given.path)}"

    def _add(self, name: str, path: Path, given: NodeDataSettings) -> None:
        # Imported here: it reads images and tables, which most nodes do not need.
        from potluck.data.pack import pack
        from potluck.data.packing import check_class_names, remarks

        data = pack(path, name, self._store, target=given.target, sample_weight=given.sample_weight)
        with self._lock:
            if not _same_data(self._settings.get(name), given):
                return  # changed, or taken away, since we began
            packed = {**self._packed, name: data}
            check_class_names([one for data in packed.values() for one in data.format.classes], "with it")
            self._packed = packed
        for remark in remarks(data):
            log.warning("data ready, but %s", fields(data=name, path=path, remark=remark))
        log.info("data ready %s", fields(data=name, items=data.count, skipped=len(data.skipped)))

    def sweep(self) -> None:
        """Delete the files that no data set needs any more, but not those that a task uses. Blocks on the disk."""
        if not self._files.acquire(blocking=False):
            return  # `pack` sweeps at its end
        try:
            with surviving("removal of data that were packed"):
                with self._lock:
                    needed = {shard.blob.sha256 for data in self._packed.values() for shard in data.shards}
                found = [path.name for path in self._store.folder.iterdir() if is_sha256(path.name)]
                gone = [self._store.delete(name) for name in found if name not in needed]
                self._left = not all(gone)
        finally:
            self._files.release()

    @contextmanager
    def using(self, task: AnyTask) -> Iterator[tuple[AnyTask, dict[str, Path]]]:
        """Gives what `filled_in` returns; the files stay until the end of the block. Raises what it raises."""
        with self._store.pinning() as pin:
            with self._lock:
                filled, files = self.filled_in(task)
                for sha256 in files:
                    pin(sha256)
            yield filled, files
        if self._left:
            self.sweep()

    def check_files(self, task: AnyTask, files: Iterable[str]) -> None:
        """Check the hashes of a task's files (names as from `using`), which are still in use. Blocks: call it in a thread.

        If one was changed, the data are packed again. Raises Unavailable.
        """
        try:
            for sha256 in files:
                self._store.checked(sha256)
        except (CorruptBlob, NotFound) as error:
            inner = task.task if isinstance(task, WarmUpTask) else task
            name = inner.node_data if isinstance(inner, TrainTask | EvaluateTask) else None
            with self._lock:
                self._packed = {other: data for other, data in self._packed.items() if other != name}
            self._on_damage()
            raise Unavailable(f"this node packs its data {name!r} again: {error.message}") from error

    def check(self, task: AnyTask) -> None:
        """What a task about data of this node has found may leave only if the settings, as they are now, allow the task. Raises what
        `filled_in` raises."""
        if isinstance(task, WarmUpTask):
            task = task.task
        if isinstance(task, TrainTask | EvaluateTask) and task.node_data is not None:
            if task.node_data not in self._settings:
                raise Unavailable(f"this node has no data named {task.node_data!r} any more")
            self._need_noise(task)

    def filled_in(self, task: AnyTask) -> tuple[AnyTask, dict[str, Path]]:
        """A task about data of this node, with its shards and their files; any other task as it is.

        Raises Unavailable, and InvalidRequest for less noise than the data's owner requires.
        """
        if isinstance(task, WarmUpTask):
            inner, files = self.filled_in(task.task)
            assert isinstance(inner, TrainTask)
            return WarmUpTask(task=inner), files
        if not isinstance(task, TrainTask | EvaluateTask) or task.node_data is None:
            return task, {}
        data = self._packed.get(task.node_data)
        if data is None:
            raise Unavailable(f"this node has no data named {task.node_data!r}, or they are not ready yet")
        self._need_noise(task)
        unknown = set(data.format.classes) - set(task.format.classes)
        if unknown:
            raise Unavailable(f"the data {task.node_data!r} of this node have classes that the job does not know")
        number = {label: index for index, label in enumerate(task.format.classes)}
        format = replace(
            data.format,
            classes=task.format.classes,
            places=tuple(number[label] for label in data.format.classes),
        )
        files = {shard.blob.sha256: self._store.path(shard.blob.sha256) for shard in data.shards}
        if isinstance(task, TrainTask):
            return replace(task, data=data.shards, format=format), files
        slices = tuple(DataSlice(blob=shard.blob, start=0, stop=shard.count) for shard in data.shards)
        return replace(task, slices=slices, format=format), files

    def _need_noise(self, task: TrainTask | EvaluateTask) -> None:
        """Raises InvalidRequest where a task would reveal more of the data than this node's settings allow."""
        name = task.node_data or ""
        least = self._settings[name].least_noise_multiplier
        privacy = task.privacy if isinstance(task, TrainTask) else None
        given = privacy.noise_multiplier if privacy is not None else 0.0
        if given < least:
            asked = f"this job has {given:g}" if isinstance(task, TrainTask) else "evaluation has none"
            raise InvalidRequest(
                f"a node with data {name!r} trains on them only with noise_multiplier={least:g} or more, but {asked} "
                "(least_noise_multiplier in its settings)"
            )


def _same_data(one: NodeDataSettings | None, other: NodeDataSettings) -> bool:
    """Whether the same is packed with both: how it may be used does not matter for that."""
    return one is not None and replace(one, least_noise_multiplier=other.least_noise_multiplier) == other


def _as_tables(settings: Mapping[str, str | NodeDataSettings]) -> dict[str, NodeDataSettings]:
    return {name: NodeDataSettings(path=given) if isinstance(given, str) else given for name, given in settings.items()}


def _hidden(path: str) -> str:
    """A hint, where a path lies in a folder that our systemd unit hides."""
    if lifecycle.is_service():
        for setting, folders in _HIDDEN.items():
            for folder in folders:
                if Path(path).is_relative_to(folder):
                    return (
                        f"; the service cannot see files in {folder} ({setting}): keep the data elsewhere, as in /srv, or "
                        'let it see that folder (docs/install.md, "Data of a node")'
                    )
    return ""
