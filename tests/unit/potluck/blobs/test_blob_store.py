"""The store: whole blobs or none, the least used go first, pinned ones stay, remains are swept."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from potluck.blobs import store as blob_store
from potluck.blobs.store import BlobStore, hash_file, made_up_name
from potluck.errors import CorruptBlob, DiskFull, InvalidRequest, NotFound, from_code
from potluck.wire.values import BlobRef
from support.tampering import tamper


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs", 1000)


def names(store: BlobStore) -> set[str]:
    return {path.name for path in store.folder.iterdir()}


def test_bytes_come_back_under_their_hash(store: BlobStore) -> None:
    ref = store.put_bytes(b"soup")
    assert ref == BlobRef(sha256=sha(b"soup"), size=4)
    assert store.has(ref.sha256)
    assert store.read(ref.sha256) == b"soup"
    assert store.size(ref.sha256) == 4
    assert store.put_bytes(b"soup") == ref
    assert store.size_bytes == 4


def test_the_empty_blob_is_a_blob(store: BlobStore) -> None:
    ref = store.put_bytes(b"")
    assert store.read(ref.sha256) == b""
    assert BlobStore(store.folder, 10).has(ref.sha256)


def test_a_file_is_copied_or_moved(store: BlobStore, tmp_path: Path) -> None:
    file = tmp_path / "soup"
    file.write_bytes(b"soup")
    ref = store.put_file(file)
    assert file.exists()
    assert store.put_file(file, move=True) == ref
    assert not file.exists()
    file.write_bytes(b"salad")
    moved = store.put_file(file, move=True)
    assert not file.exists()
    assert store.read(moved.sha256) == b"salad"


def test_a_file_moves_between_file_systems(store: BlobStore) -> None:
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == store.folder.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    for number, take in enumerate((lambda p: store.put_file(p, move=True), lambda p: store.adopt(p, sha(b"far 1")))):
        file = Path(f"/dev/shm/potluck-test-{os.getpid()}")
        file.write_bytes(f"far {number}".encode())
        assert store.read(take(file).sha256) == f"far {number}".encode()
        assert not file.exists()


def test_an_adopted_file_is_taken_at_its_word(store: BlobStore, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    assert store.adopt(file, sha(b"weights")).size == 7
    assert not file.exists()
    file.write_bytes(b"weights")
    with pytest.raises(InvalidRequest, match="SHA-256"):
        store.adopt(file, "../../etc/passwd")


def test_a_file_of_a_process_that_is_not_trusted_is_copied_and_hashed(store: BlobStore, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    with file.open("r+b") as kept:  # as that process may keep it
        assert store.take(file, sha(b"weights")).size == 7
        kept.write(b"changed")
    assert store.read(sha(b"weights")) == b"weights"
    assert not file.exists()
    file.write_bytes(b"others")
    with pytest.raises(CorruptBlob, match="has the bytes of"):
        store.take(file, sha(b"wanted"))
    assert not store.has(sha(b"wanted"))
    assert [path.name for path in store.folder.iterdir()] == [sha(b"weights")]


def test_a_file_without_end_costs_no_other_blob(store: BlobStore, tmp_path: Path) -> None:
    kept, file = store.put_bytes(b"kept"), tmp_path / "sparse"
    file.touch()
    os.truncate(file, 1 << 42)
    with pytest.raises(DiskFull):
        store.take(file, sha(b"sparse"))
    assert store.has(kept.sha256)


def test_links_pipes_and_folders_are_not_taken(store: BlobStore, tmp_path: Path) -> None:
    secret, link, pipe = tmp_path / "secret", tmp_path / "link", tmp_path / "pipe"
    secret.write_bytes(b"secret")
    link.symlink_to(secret)
    os.mkfifo(pipe)
    for path in (link, pipe, tmp_path):
        with pytest.raises(CorruptBlob, match="no plain file"):
            store.take(path, sha(b"secret"))
    assert not store.has(sha(b"secret"))
    assert secret.exists()


def test_wrong_bytes_are_not_taken(store: BlobStore, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    with pytest.raises(CorruptBlob, match="7 bytes of 5"):
        store.verify(file, BlobRef(sha256=sha(b"other"), size=5))
    assert names(store) == set()


@pytest.mark.parametrize("name", ["", "..", "a" * 64 + "\n", "A" * 64, "new-x"])
def test_what_is_no_hash_is_not_found(store: BlobStore, name: str) -> None:
    assert not store.has(name)
    with pytest.raises(NotFound):
        store.path(name)


def test_a_file_that_somebody_removed_is_gone(store: BlobStore) -> None:
    ref = store.put_bytes(b"soup")
    store.path(ref.sha256).unlink()
    with pytest.raises(NotFound):
        store.path(ref.sha256)
    assert not store.has(ref.sha256)
    assert store.size_bytes == 0
    store.put_bytes(b"soup")
    assert store.read(ref.sha256) == b"soup"


def test_leftovers_of_a_crash_are_swept_and_blobs_taken_over(store: BlobStore) -> None:
    ref = store.put_bytes(b"soup")
    (store.folder / "new-abc").write_bytes(b"half")
    (store.folder / sha(b"lost in a power cut")).write_bytes(b"")
    (store.folder / "part-gone.chunks").write_bytes(b"")
    old = store.folder / f"part-{sha(b'old')}"
    old.write_bytes(b"half")
    os.utime(old, (0, time.time() - 48 * 3600))
    again = BlobStore(store.folder, 1000)
    assert names(again) == {ref.sha256}
    assert again.size_bytes == 4


def test_a_process_killed_while_putting_leaves_nothing_that_counts(tmp_path: Path) -> None:
    code = f"""
import os, pathlib
from potluck.blobs import store as blob_store
from potluck.blobs.store import BlobStore, hash_file, made_up_name
store = BlobStore(pathlib.Path({str(tmp_path)!r}), 1 << 30)
store.put_bytes(b"whole")
with store.new_file() as file:
    file.write(b"x" * 1000000)
    file.flush()
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    store = BlobStore(tmp_path, 1 << 30)
    assert names(store) == {sha(b"whole")}


def test_the_least_used_goes_first(store: BlobStore) -> None:
    one, two, three = (store.put_bytes(bytes([n]) * 400) for n in (1, 2, 3))
    # the third made room for itself: the first went
    assert not store.has(one.sha256)
    store.path(two.sha256)
    store.put_bytes(b"4" * 400)
    assert store.has(two.sha256)
    assert not store.has(three.sha256)
    assert store.size_bytes == 800


def test_use_outlives_the_process(store: BlobStore) -> None:
    refs = [store.put_bytes(bytes([n]) * 300) for n in (1, 2, 3)]
    for place, ref in enumerate(refs):
        os.utime(store.folder / ref.sha256, (1000 + place, 1000 + place))
    store.path(refs[0].sha256)
    again = BlobStore(store.folder, 1000)
    again.put_bytes(b"4" * 300)
    assert [again.has(ref.sha256) for ref in refs] == [True, False, True]


def test_pins_are_counted_and_keep(store: BlobStore) -> None:
    kept = store.put_bytes(b"1" * 600)
    store.pin(kept.sha256)
    store.pin(kept.sha256)
    store.unpin(kept.sha256)
    with pytest.raises(DiskFull, match="600 bytes in use") as caught:
        store.put_bytes(b"2" * 600)
    assert isinstance(from_code(caught.value.code, ""), DiskFull)
    assert not store.delete(kept.sha256)
    assert names(store) == {kept.sha256}
    store.unpin(kept.sha256)
    other = store.put_bytes(b"2" * 600)
    assert names(store) == {other.sha256}


def test_what_can_never_fit_throws_nothing_away(store: BlobStore) -> None:
    kept = store.put_bytes(b"1" * 600)
    with pytest.raises(DiskFull):
        store.put_bytes(b"2" * 1001)
    assert store.has(kept.sha256)


def test_a_blob_may_be_pinned_before_it_is_here(store: BlobStore) -> None:
    store.pin(sha(b"1" * 600))
    kept = store.put_bytes(b"1" * 600)
    assert not store.delete(kept.sha256)


def test_what_is_pinned_in_a_block_is_kept_until_its_end(store: BlobStore) -> None:
    kept = store.put_bytes(b"1")
    with store.pinning() as pin:
        pin(kept.sha256)
        assert not store.delete(kept.sha256)
    assert store.delete(kept.sha256)


def test_a_full_disk_is_said(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("potluck.blobs.store.tempfile.mkstemp", full)
    with pytest.raises(DiskFull, match="disk is full"):
        store.put_bytes(b"soup")


def test_a_disk_that_is_really_full_is_said_and_nothing_stays(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("may not mount here")
    try:
        small = BlobStore(mount / "blobs", 1 << 30)
        with pytest.raises(DiskFull, match="disk is full"):
            small.put_bytes(b"x" * (1 << 20))
        assert names(small) == set()
        assert small.put_bytes(b"soup").size == 4
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_an_unfinished_download_is_gone_on_with(store: BlobStore) -> None:
    ref = BlobRef(sha256=sha(b"abcdefgh"), size=8)
    with store.partial(ref, 3) as partial:
        assert (partial.missing, partial.resumed) == ({0, 1, 2}, False)
        partial.write(2, b"gh")
    again = BlobStore(store.folder, 1000)
    with again.partial(ref, 3) as partial:
        assert (partial.missing, partial.resumed) == ({0, 1}, True)
        partial.write(0, b"abc")
        partial.write(1, b"def")
        again.verify(partial.path, ref)
        partial.discard()
    assert again.read(ref.sha256) == b"abcdefgh"
    assert names(again) == {ref.sha256}


def test_few_unfinished_downloads_are_kept(store: BlobStore) -> None:
    for number in range(20):
        ref = BlobRef(sha256=sha(b"%d" % number), size=8)
        with store.partial(ref, 4) as partial:
            partial.write(0, b"half")
    assert len(names(store)) == 2 * 8


def test_threads_may_put_at_once(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 5_000)
    items = [bytes([n % 50]) * (n % 50 + 100) for n in range(400)]
    with ThreadPoolExecutor(8) as pool:
        refs = list(pool.map(store.put_bytes, items))
    assert [ref.sha256 for ref in refs] == [sha(item) for item in items]
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sum(files.values()) == store.size_bytes <= 5_000
    assert all(sha((tmp_path / name).read_bytes()) == name for name in files)


@given(st.binary(max_size=5000), st.integers(1, 700), st.randoms())
def test_chunks_in_any_order_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, chunk_bytes: int, random: object
) -> None:
    store = BlobStore(tmp_path_factory.mktemp("blobs"), 10_000)
    ref = BlobRef(sha256=sha(data), size=len(data))
    with store.partial(ref, chunk_bytes) as partial:
        order = sorted(partial.missing)
        random.shuffle(order)  # type: ignore[attr-defined]
        for number in order:
            start, stop = partial.span(number)
            partial.write(number, data[start:stop])
        assert not partial.missing
        store.verify(partial.path, ref)
    assert store.read(ref.sha256) == data


class StoreAgainstModel(RuleBasedStateMachine):
    """Whatever happens to it: it stays within its limit, keeps pinned blobs, and counts right."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = BlobStore(Path(self.folder.name), 100)
        self.pins: dict[str, int] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(size=st.integers(0, 60), letter=st.sampled_from("abc"))
    def put(self, size: int, letter: str) -> None:
        pinned = sum(self.store.size(one) for one in self.pins if self.store.has(one))
        data = letter.encode() * size
        try:
            ref = self.store.put_bytes(data)
        except DiskFull:
            assert pinned + size > 100
        else:
            assert self.store.read(ref.sha256) == data

    @rule(size=st.integers(0, 60), letter=st.sampled_from("abc"))
    def pin(self, size: int, letter: str) -> None:
        name = sha(letter.encode() * size)
        if self.store.has(name):
            self.store.pin(name)
            self.pins[name] = self.pins.get(name, 0) + 1

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        if self.pins:
            name = data.draw(st.sampled_from(sorted(self.pins)))
            self.store.unpin(name)
            self.pins[name] -= 1
            if not self.pins[name]:
                del self.pins[name]

    @rule()
    def restart(self) -> None:
        self.store = BlobStore(self.store.folder, 100)
        for name, count in self.pins.items():
            for _ in range(count):
                self.store.pin(name)

    @invariant()
    def holds(self) -> None:
        files = {path.name: path.stat().st_size for path in self.store.folder.iterdir()}
        assert sum(files.values()) == self.store.size_bytes <= 100
        assert set(self.pins) <= set(files)
        assert all(self.store.has(name) for name in files)


TestStoreAgainstModel = StoreAgainstModel.TestCase


def test_a_blob_that_is_damaged_is_thrown_away_although_it_is_pinned(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 1000)
    good, bad = store.put_bytes(b"good"), store.put_bytes(b"bad")
    store.pin(bad.sha256)
    (tmp_path / bad.sha256).write_bytes(b"BAD")
    assert store.check(good.sha256)
    assert not store.check(bad.sha256)
    assert (store.has(good.sha256), store.has(bad.sha256), store.size_bytes) == (True, False, 4)
    assert not store.check(bad.sha256)
    store.put_bytes(b"bad")
    assert store.check(bad.sha256)


class SmallDisk:
    """A disk of 10,000 bytes with a reserve of 200: bytes outside of the store's folder belong to others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.others = 0
        self.now = 0.0

    def __call__(self, folder: Path) -> SimpleNamespace:
        here = sum(path.stat().st_size for path in self.folder.iterdir()) if self.folder.exists() else 0
        return SimpleNamespace(total=10_000, free=max(0, 10_000 - here - self.others))

    def store(self) -> BlobStore:
        return BlobStore(self.folder, 1 << 40, usage=self, clock=lambda: self.now)


@pytest.fixture
def disk(tmp_path: Path) -> SmallDisk:
    return SmallDisk(tmp_path / "blobs")


def test_the_limit_follows_the_disk_and_a_reserve_stays(disk: SmallDisk) -> None:
    store = disk.store()
    old, new = store.put_bytes(b"a" * 5000), store.put_bytes(b"b" * 4000)
    third = store.put_bytes(b"c" * 3000)
    assert (store.has(old.sha256), store.has(new.sha256), store.has(third.sha256)) == (False, True, True)
    assert disk(disk.folder).free >= 200
    with pytest.raises(DiskFull, match="the disk is full"):
        store.put_bytes(b"d" * 9900)
    assert store.has(new.sha256), "nothing goes in vain"


def test_what_others_write_takes_from_the_store_and_comes_back(disk: SmallDisk) -> None:
    store = disk.store()
    kept, loose = store.put_bytes(b"a" * 4000), store.put_bytes(b"b" * 1000)
    store.pin(kept.sha256)
    disk.others = 4900
    store.pin(store.put_bytes(b"c" * 500).sha256)
    assert not store.has(loose.sha256)
    disk.others = 5500
    assert "the disk is full" in store.shortage()
    for attempt in (lambda: store.put_bytes(b"d"), lambda: store.clear(1), lambda: store.check_room(1)):
        with pytest.raises(DiskFull, match="the disk is full"):
            attempt()
    with pytest.raises(DiskFull), store.partial(BlobRef(sha256=sha(b"x"), size=1), 1):
        pass
    disk.others = 0
    assert store.shortage() == ""
    assert store.put_bytes(b"d").size == 1


def test_uploads_that_nothing_uses_go_first(disk: SmallDisk) -> None:
    store = disk.store()
    first, used, asked, fresh = (store.put_bytes(letter * 1500) for letter in (b"a", b"b", b"c", b"d"))
    for ref in (used, asked, fresh):
        store.uploaded(ref.sha256, "them")
    store.pin(used.sha256)
    store.unpin(used.sha256)
    disk.now = 800
    store.path(asked.sha256)
    disk.now = 1000
    store.put_bytes(b"e" * 5000)
    assert [store.has(ref.sha256) for ref in (first, used, asked, fresh)] == [True, True, True, False]


def test_one_address_holds_no_more_than_its_share(disk: SmallDisk) -> None:
    store = disk.store()

    def send(letter: bytes, size: int, peer: str) -> BlobRef:
        with store.receiving(peer) as coming:
            coming(size)
            ref = store.put_bytes(letter * size)
            store.uploaded(ref.sha256, peer)
        return ref

    whole = send(b"a", 6000, "a large one alone")
    store.pin(whole.sha256)
    send(b"b", 2000, "them")
    with pytest.raises(DiskFull, match=r"2000 bytes were sent from them that no job and no name uses"):
        send(b"c", 3000, "them")
    assert send(b"d", 500, "others").size == 500
    disk.now = 1000
    assert send(b"c", 1000, "them").size == 1000
    with store.receiving("them") as coming:
        coming(1500)  # a blob on its way counts, too
        with pytest.raises(DiskFull):
            send(b"e", 3000, "them")


class LazyDisk:
    """A disk of 1 MB, with a reserve of 20 kB, that counts bytes only when it is told to, as when they wait in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counted = 0

    def __call__(self, folder: Path) -> SimpleNamespace:
        return SimpleNamespace(total=1_000_000, free=1_000_000 - self.counted)


def test_many_that_write_at_once_leave_the_reserve(tmp_path: Path) -> None:
    disk = LazyDisk(tmp_path / "blobs")
    store = BlobStore(disk.folder, 1 << 40, usage=disk)
    together = threading.Barrier(8)
    written: list[int] = []

    class Slow:
        """A file whose bytes are on their way to the disk when all others have begun."""

        def write(self, data: bytes) -> None:
            together.wait(5)
            written.append(len(data))

    def send(number: int) -> str:
        with store.new_file() as file:
            file._file = Slow()  # type: ignore[assignment]
            try:
                file.write(bytes(200_000))
            except DiskFull as error:
                together.wait(5)
                return error.message
        return ""

    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(send, range(8))]
    assert sum(written) == 800_000
    assert [bool(answer) for answer in answers].count(True) == 4
    assert all("the disk is full" in answer for answer in answers if answer)
    with store.new_file() as file:
        file.write(bytes(200_000))  # those that have ended count no longer


def test_blobs_that_are_fetched_at_once_have_room_for_all_their_bytes(tmp_path: Path) -> None:
    disk = LazyDisk(tmp_path / "blobs")  # files with holes take no room on it
    store = BlobStore(disk.folder, 1 << 40, usage=disk)
    refs = [BlobRef(sha256=sha(bytes([number])), size=400_000) for number in range(3)]
    with store.partial(refs[0], 100_000) as first, store.partial(refs[1], 100_000):
        with pytest.raises(DiskFull), store.partial(refs[2], 100_000):
            pass
        with pytest.raises(DiskFull):
            store.put_bytes(bytes(200_000))
        first.write(0, bytes(100_000))
        disk.counted = first.path.stat().st_blocks * 512
        store.put_bytes(bytes(170_000))
    store.put_bytes(bytes(400_000))


def test_a_file_that_was_changed_is_refused_and_thrown_away(store: BlobStore) -> None:
    ref = store.put_bytes(b"soup")
    store.pin(ref.sha256)
    assert store.unchanged(ref.sha256) == store.checked(ref.sha256)
    tamper(store.folder / ref.sha256)
    assert store.unchanged(ref.sha256) is None
    with pytest.raises(CorruptBlob, match="was changed on this disk"):
        store.read(ref.sha256)
    assert not store.has(ref.sha256)
    assert names(store) == set()
    with pytest.raises(NotFound):
        store.checked(ref.sha256)
    assert store.put_bytes(b"soup") == ref
    assert store.read(ref.sha256) == b"soup"


def test_bytes_are_hashed_once_for_each_process_and_change(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = store.put_bytes(b"soup")
    hashed: list[str] = []

    def counted(path: Path) -> tuple[str, int]:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(blob_store, "hash_file", counted)
    for _ in range(3):
        store.checked(ref.sha256)
    assert hashed == []
    again = BlobStore(store.folder, 1000)
    for _ in range(3):
        again.checked(ref.sha256)
    assert hashed == [ref.sha256]
    os.utime(store.folder / ref.sha256, (1000, 1000))
    for _ in range(3):
        again.checked(ref.sha256)
    assert 2 <= len(hashed) <= 3, "the time of use was old: it was written, and that is a change, too"


def test_what_comes_again_takes_the_place_of_a_damaged_file(store: BlobStore, tmp_path: Path) -> None:
    ref = store.put_bytes(b"soup")
    for put in (lambda: store.put_bytes(b"soup"), lambda: store.put_file(tmp_path / "soup")):
        (tmp_path / "soup").write_bytes(b"soup")
        tamper(store.folder / ref.sha256)
        put()
        assert store.read(ref.sha256) == b"soup"
        assert store.size_bytes == 4


def test_a_name_that_was_made_up_is_no_hash(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "soup").write_bytes(b"soup")
    name = made_up_name()
    store.adopt(tmp_path / "soup", name)
    tamper(store.folder / name)
    assert store.checked(name).exists()
