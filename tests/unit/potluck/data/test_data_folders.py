"""Folders of texts and recordings: what is kept, what is refused and why, and which kind of files a folder has."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.blobs.store import BlobStore
from potluck.data import audio
from potluck.data.folders import Unusable
from potluck.data.pack import pack
from potluck.errors import InvalidData
from support.digits import write_png_folder
from support.recordings import FLOAT, RATE, chunk, tone, wav, write_files, write_texts, write_tones
from support.shards import check_manifest, images_of, keys_of, new_store


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return new_store(tmp_path)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_every_text_is_there_byte_for_byte_under_its_class_and_key(tmp_path: Path, store: BlobStore) -> None:
    folder = write_texts(tmp_path / "films", 100)
    odd = {"bad/deep/er/a.TXT": "größer\r\n日本".encode(), "good/bom.txt": b"\xef\xbb\xbfgood", "good/notes.md": b"x"}
    write_files(folder, odd | {"good/.hidden.txt": b"\xff", "README.md": b"films"})
    dataset = pack(folder, "films", store)
    check_manifest(dataset, store)
    assert (dataset.format.kind, dataset.format.classes) == ("texts", ("bad", "good"))
    assert (dataset.count, dataset.class_counts, dataset.skipped) == (102, (51, 51), ())
    for key, (suffix, data, label) in zip(keys_of(dataset, store), images_of(dataset, store), strict=True):
        assert suffix == "txt"
        assert data == (folder / key).read_bytes()
        assert key.startswith(("bad/", "good/")[label])
    assert pack(folder, "films", store) == dataset


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file"),
        (b" \n\t\r\n", "an empty file"),
        ("größer".encode("latin-1"), "not UTF-8 (invalid start byte at byte 2): save it again as UTF-8"),
        ("hello".encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_used_is_named_counted_and_skipped(
    tmp_path: Path, store: BlobStore, data: bytes, reason: str
) -> None:
    folder = write_files(write_texts(tmp_path / "films", 100), {"bad/odd.txt": data})
    dataset = pack(folder, "films", store)
    assert dataset.count == 100
    (skipped,) = dataset.skipped
    assert skipped.startswith("bad/odd.txt: ")
    assert reason in skipped


def test_a_folder_too_far_up_is_refused_with_what_is_meant(tmp_path: Path, store: BlobStore) -> None:
    def data(*names: str) -> Path:
        folder = tmp_path / "-".join(names) / "my data"
        for name in names:
            write_texts(folder / name, 4)
        return folder

    folder = data("train", "Test", "README")
    with pytest.raises(InvalidData) as caught:
        pack(folder, "x", store)
    assert caught.value.message == (
        f"{folder}: Test and train are parts of a data set, not classes: give one of them. To train: potluck train MODEL "
        f"'{folder}/train' --validation '{folder}/Test' (in Python: client.train(model, '{folder}/train', "
        f"validation='{folder}/Test'))"
    )
    with pytest.raises(InvalidData, match=r"train' --validation '[^']*/val' "):
        pack(data("test", "train", "val"), "x", store)
    with pytest.raises(InvalidData, match=r"test and val are parts .*: give one of them$"):
        pack(data("test", "val"), "x", store)
    folder = data("train")
    with pytest.raises(InvalidData, match=rf"train is a part of a data set, not a class: give {folder}/train$"):
        pack(folder, "x", store)
    assert pack(data("test", "train"), "x", store, labels=False).format.classes == ()  # for prediction, all of it
    with pytest.raises(InvalidData, match=r"seg_train' --validation '[^']*/seg_test' "):
        pack(data("seg_pred", "seg_test", "seg_train"), "x", store)
    write_files(tmp_path / "vehicles", {"car/a.txt": b"a car", "train/a.txt": b"a train"})
    assert pack(tmp_path / "vehicles", "x", store).format.classes == ("car", "train")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("training_set", "test_set"), True),
        (("train_images", "Test-Images"), True),
        (("x_train", "x_test", "x_val"), True),
        (("train2017", "val2017"), True),
        (("trainset", "testset"), True),
        (("train", "test1"), True),
        (("test_tube", "flask"), False),
        (("test_tube", "train_images"), False),
        (("train_set", "test_set", "car"), False),
        (("test1", "test2", "test3"), False),
        (("train", "bus"), False),
    ],
)
def test_parts_of_a_set_are_known_by_the_words_in_their_names(
    tmp_path: Path, store: BlobStore, names: tuple[str, ...], parts: bool
) -> None:
    for name in names:
        write_files(tmp_path / "data", {f"{name}/a/1.txt": b"a"})
    if not parts:
        assert pack(tmp_path / "data", "x", store).format.classes == tuple(sorted(names))
        return
    with pytest.raises(InvalidData, match="are parts of a data set, not classes"):
        pack(tmp_path / "data", "x", store)


def test_a_part_alone_is_one_where_it_has_folders(tmp_path: Path, store: BlobStore) -> None:
    folder = write_files(tmp_path / "data", {"training_set/a.txt": b"a"})
    assert pack(folder, "x", store).format.classes == ("training_set",)
    write_files(folder, {"training_set/cats/a.txt": b"a"})
    with pytest.raises(
        InvalidData, match=rf"training_set is a part of a data set, not a class: give {folder}/training"
    ):
        pack(folder, "x", store)


@pytest.mark.parametrize("labels", [True, False])
def test_what_is_left_out_is_named_and_counted(tmp_path: Path, store: BlobStore, labels: bool) -> None:
    folder = write_tones(tmp_path / "tones", 200)
    more = {"low/a.mp3": b"", "low/deep/b.MP3": b"", "low/cover": b"", "high/notes.txt": b"high tones"}
    hidden = {
        ".git/x": b"",
        "low/.a.wav": b"",
        "low/Thumbs.db": b"",
        "__MACOSX/low/a.wav": b"",
        "high/desktop.ini": b"",
    }
    write_files(folder, more | hidden)
    if not labels:
        for path in (folder / "high").glob("*.wav"):
            path.rename(folder / path.name)
    dataset = pack(folder, "tones", store, labels=labels)
    assert (dataset.count, dataset.skipped) == (200, ())
    (remark,) = dataset.remarks
    assert remark == (
        "4 files of other kinds left out (2 .mp3, 1 .txt, 1 no suffix): high/notes.txt, low/a.mp3, low/cover, low/deep/b.MP3"
    )
    assert pack(write_tones(tmp_path / "plain", 20), "x", store).remarks == ()


def test_what_lies_beside_the_class_folders_is_named_too(tmp_path: Path, store: BlobStore) -> None:
    files = {"labels.csv": b"a,b", "README.md": b"films", "LICENSE": b"free", "cover.png": b"x", ".hidden": b""}
    dataset = pack(write_files(write_texts(tmp_path / "films", 100), files), "films", store)
    assert (dataset.count, dataset.skipped) == (100, ())
    assert dataset.remarks == (
        "4 files of other kinds left out (1 no suffix, 1 .md, 1 .png, 1 .csv): LICENSE, README.md, cover.png, labels.csv",
    )


@pytest.mark.parametrize("labels", [True, False])
def test_links_to_folders_are_named_and_not_followed(tmp_path: Path, store: BlobStore, labels: bool) -> None:
    elsewhere = write_texts(tmp_path / "elsewhere", 10)
    folder = write_texts(tmp_path / "films", 100)
    (folder / "good" / "more").symlink_to(elsewhere / "good")
    (folder / "bad" / "all").symlink_to(folder)
    (folder / "bad" / "gone.txt").symlink_to(tmp_path / "nowhere")
    (folder / "lost").symlink_to(tmp_path / "nowhere")
    (folder / "good" / "one.txt").symlink_to(elsewhere / "bad" / "0000.txt")  # a link to a file counts as that file
    dataset = pack(folder, "films", store, labels=labels)
    assert dataset.count == 101
    assert dataset.remarks == (
        "4 links to folders or to nothing left out (replace a link by a copy to include its files): lost, bad/all, bad/gone.txt, good/more",
    )
    (folder / "new").mkdir()
    (folder / "new" / "more").symlink_to(elsewhere / "good")
    if labels:
        with pytest.raises(
            InvalidData, match=r"films/new has no texts .*; links to folders are not followed: add some"
        ):
            pack(folder, "films", store)


def test_an_empty_class_folder_is_a_class_without_items(tmp_path: Path, store: BlobStore) -> None:
    folder = write_texts(tmp_path / "films", 100)
    (folder / "dull" / "older").mkdir(parents=True)
    write_files(folder, {"dull/.gitkeep": b""})
    dataset = pack(folder, "films", store)
    assert (dataset.format.classes, dataset.class_counts) == (("bad", "dull", "good"), (50, 0, 50))
    assert dataset.remarks == ("1 class folder empty, but still a class (remove a folder that is no class): dull",)
    assert {label for _, _, label in images_of(dataset, store)} == {0, 2}


def test_more_than_one_text_in_a_hundred_is_refused(tmp_path: Path, store: BlobStore) -> None:
    folder = write_files(write_texts(tmp_path / "films", 100), {"bad/a.txt": b"\xff", "good/b.txt": b""})
    with pytest.raises(
        InvalidData, match=r"2 of 102 texts cannot be used \(1 % may be skipped\): bad/a.txt: not UTF-8"
    ):
        pack(folder, "films", store)


def test_texts_without_classes_are_for_prediction(tmp_path: Path, store: BlobStore) -> None:
    folder = write_files(tmp_path / "new", {"b.txt": b"two", "a.txt": b"one", "more/c.txt": b"three"})
    dataset = pack(folder, "new", store, labels=False, shuffle=False)
    assert dataset.format.classes == ()
    assert keys_of(dataset, store) == ["a.txt", "b.txt", "more/c.txt"]
    assert [(data, label) for _, data, label in images_of(dataset, store)] == [
        (b"one", -1),
        (b"two", -1),
        (b"three", -1),
    ]
    with pytest.raises(InvalidData, match=r"2 of 3 texts cannot be used .* a.txt: is not in a class folder"):
        pack(folder, "new", store)


def test_to_predict_folders_are_no_classes(tmp_path: Path, store: BlobStore) -> None:
    """For example an album with a folder per year: the model knows the classes."""
    album = write_files(tmp_path / "album", {"2023/a.txt": b"one", "2024/b.txt": b"two", "videos/c.mp4": b"x"})
    (album / "2025").mkdir()
    dataset = pack(album, "album", store, labels=False, shuffle=False)
    assert (dataset.format.classes, dataset.class_counts) == ((), ())
    assert keys_of(dataset, store) == ["2023/a.txt", "2024/b.txt"]
    assert [label for _, _, label in images_of(dataset, store)] == [-1, -1]
    assert dataset.remarks == ("1 file of other kinds left out (1 .mp4): videos/c.mp4",)
    with pytest.raises(InvalidData, match=r"2025 has no images, texts, recordings: expected \S*/2025/<file> \(\."):
        pack(album / "2025", "album", store, labels=False)


def test_hostile_names_become_keys_and_nothing_else(tmp_path: Path, store: BlobStore) -> None:
    names = ["a\\..\\etc.txt", "a\nb.txt", "-rf.txt", "x" * 200 + ".txt", "%s{0}.txt", os.fsdecode(b"\xff.txt")]
    folder = tmp_path / "odd" / "cls; rm *"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"text")
    dataset = pack(tmp_path / "odd", "odd", store)
    check_manifest(dataset, store)
    assert dataset.format.classes == ("cls; rm *",)
    assert sorted(keys_of(dataset, store)) == sorted(
        f"cls; rm */{os.fsencode(name).decode(errors='replace')}" for name in names
    )


# --- recordings -------------------------------------------------------------------------------------------------------


def test_recordings_keep_their_samples_class_and_rate(tmp_path: Path, store: BlobStore) -> None:
    folder = write_tones(tmp_path / "tones", 100)
    dataset = pack(folder, "tones", store)
    check_manifest(dataset, store)
    assert (dataset.format.kind, dataset.format.classes, dataset.format.rate) == ("audio", ("high", "low"), RATE)
    assert dataset.class_counts == (50, 50)
    for key, (suffix, data, label) in zip(keys_of(dataset, store), images_of(dataset, store), strict=True):
        assert suffix == "wav"
        assert data == (folder / key).read_bytes()  # its header is the plainest already
        assert key.startswith(("high/", "low/")[label])


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize(
    ("bits", "code", "step"),
    [(8, 1, 2**-7), (16, 1, 2**-15), (24, 1, 2**-15), (32, 1, 2**-15), (32, FLOAT, 2**-15), (64, FLOAT, 2**-15)],
)
def test_every_coding_becomes_16_bit_pcm(channels: int, extensible: bool, bits: int, code: int, step: float) -> None:
    values = np.random.default_rng(bits).uniform(-1, 1, (50, channels))
    data = wav(
        values, bits=bits, code=code, extensible=extensible, before=chunk(b"LIST", b"abc"), after=chunk(b"id3 ", b"x")
    )
    checked = audio.check(data)
    suffix, written = audio.write(data, checked)
    assert (suffix, checked.rate, checked.size) == ("wav", RATE, len(written))
    assert len(written) == 44 + 50 * channels * 2
    found = audio.samples(audio.read(written))
    assert found.shape == (50, channels)
    np.testing.assert_allclose(found / 32768, values, atol=1.5 * step)
    assert audio.write(written, checked)[1] == written


def test_floats_beyond_the_range_are_clipped() -> None:
    found = audio.samples(audio.read(wav(np.array([3e38, 1.0, 0.5, -1.0, -7.0]), bits=32, code=FLOAT)))
    assert found[:, 0].tolist() == [32767, 32767, 16384, -32768, -32768]


@pytest.mark.parametrize("announced", [0xFFFFFFFF, 0x7FFFF000])
def test_a_length_that_was_not_known_runs_to_the_end(announced: int) -> None:
    assert audio.read(wav(tone(300, 100), announced=announced)).frames == 100


GOOD = wav(tone(300, 100))
BAD = {
    "empty": (b"", "an empty file"),
    "mp3": (b"ID3\x03" + bytes(100), "not a WAV file"),
    "header alone": (GOOD[:12], "cut off: it has no samples"),
    "cut": (GOOD[:-50], "cut off: 200 bytes of samples announced, 150 there"),
    "cut in its format": (GOOD[:30], "cut off"),
    "silent": (wav(np.zeros(0)), "without samples"),
    "samples first": (GOOD[:12] + chunk(b"data", bytes(8)) + GOOD[12:], "its samples come before their format"),
    "coded": (wav(tone(300, 10), bits=8, code=7), "coded as format 7 of 8 bits: save it again as 16-bit PCM"),
    "no channels": (GOOD[:22] + bytes(2) + GOOD[24:], "damaged: 0 channels"),
    "no rate": (GOOD[:24] + bytes(4) + GOOD[28:], "at 0 samples a second"),
    "nan": (wav(np.full(8, np.nan), bits=32, code=FLOAT), "not finite numbers"),
    "another rate": (wav(tone(300, 100), rate=16000), "has 16000 samples a second, but most have 8000: resample it"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_recording_that_cannot_be_used_is_named_counted_and_skipped(
    tmp_path: Path, store: BlobStore, name: str
) -> None:
    data, reason = BAD[name]
    folder = write_files(write_tones(tmp_path / "tones", 100), {"low/odd.wav": data})
    dataset = pack(folder, "tones", store)
    assert (dataset.count, dataset.format.rate) == (100, RATE)
    (skipped,) = dataset.skipped
    assert skipped.startswith("low/odd.wav: ")
    assert reason in skipped


def test_rates_that_differ_are_refused(tmp_path: Path, store: BlobStore) -> None:
    folder = write_tones(tmp_path / "tones", 20)
    write_tones(folder / "low" / "more", 4, rate=44100)
    with pytest.raises(InvalidData, match=r"4 of 24 recordings cannot be used .*has 44100 samples a second, but most"):
        pack(folder, "tones", store)


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=8), st.integers(0, len(GOOD)))
def test_damaged_recordings_are_refused_or_read_whole(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    try:
        checked = audio.check(bytes(data[:length]))
    except Unusable:
        return
    _, written = audio.write(bytes(data[:length]), checked)
    again = audio.read(written)
    assert (again.bits, again.floats, again.rate, len(written)) == (16, False, checked.rate, checked.size)


# --- which kind -------------------------------------------------------------------------------------------------------


def test_a_mixture_of_kinds_is_refused(tmp_path: Path, store: BlobStore) -> None:
    folder = write_png_folder(tmp_path / "all", 20)
    write_texts(folder, 4)
    write_tones(folder, 2)
    with pytest.raises(InvalidData) as caught:
        pack(folder, "all", store)
    message = caught.value.message
    assert "all is a mixture of 20 images (such as " in message
    assert "4 texts (such as bad/0000.txt), 2 recordings (such as high/0000.wav)" in message
    assert "a data set holds one kind" in message
    with pytest.raises(InvalidData, match="is a mixture"):
        pack(write_files(tmp_path / "flat", {"a.txt": b"a", "b.wav": GOOD}), "flat", store, labels=False)


@pytest.mark.parametrize("labels", [True, False])
def test_a_note_among_files_of_another_kind_is_no_mixture(tmp_path: Path, store: BlobStore, labels: bool) -> None:
    folder = write_files(write_tones(tmp_path / "tones", 20), {"low/notes.txt": b"low tones", "README.txt": b"tones"})
    if not labels:
        (folder / "README.txt").unlink()
    dataset = pack(folder, "tones", store, labels=labels)
    assert (dataset.format.kind, dataset.count, dataset.skipped) == ("audio", 20, ())


@pytest.mark.parametrize(("suffix", "many"), [("txt", "texts"), ("wav", "recordings")])
def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, store: BlobStore, suffix: str, many: str) -> None:
    data = {"txt": b"text", "wav": GOOD}[suffix]
    folder = write_files(tmp_path / "data", {f"a.{suffix}": data})
    with pytest.raises(InvalidData, match=f"has 1 {many[:-1]} but no class folders"):
        pack(folder, "x", store)
    write_files(folder, {f"cat/a.{suffix}": data, "dog/a.mp3": b""})
    with pytest.raises(
        InvalidData, match=rf"class folder .*data/dog has no {many} \(\.{suffix}\): add some, or remove"
    ):
        pack(folder, "x", store)
    write_files(folder, {f"dog/a.{suffix}": b"\xff"})
    with pytest.raises(InvalidData, match=f"2 of 3 {many} cannot be used"):
        pack(folder, "x", store)
