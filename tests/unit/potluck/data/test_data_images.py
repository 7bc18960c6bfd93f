"""Folders of real images as WebDataset tars: nothing is lost, bad files are named, and the same input gives the same shards."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from potluck.blobs.store import BlobStore
from potluck.data.pack import pack
from potluck.errors import DiskFull, InvalidData
from potluck.wire.values import Dataset
from support.digits import digits, write_png_folder
from support.shards import check_manifest, images_of, keys_of, new_store

NAMES = ("eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero")


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return new_store(tmp_path)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_png_folder(tmp_path / "train", 400)


def photo(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).resize(size).convert(mode)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_every_image_is_there_byte_for_byte_under_its_class_and_key(train: Path, store: BlobStore) -> None:
    dataset = pack(train, "digits", store)
    check_manifest(dataset, store)
    assert (dataset.name, dataset.format.kind, dataset.format.classes) == ("digits", "images", NAMES)
    assert (dataset.count, dataset.skipped) == (400, ())
    found = list(images_of(dataset, store))
    keys = keys_of(dataset, store)
    assert sorted(keys) == sorted(path.relative_to(train).as_posix() for path in train.rglob("*.png"))
    for key, (suffix, data, label) in zip(keys, found, strict=True):
        assert suffix == "png"
        assert data == (train / key).read_bytes()
        assert key.startswith(NAMES[label] + "/")
    assert dataset.class_counts == tuple(len(list((train / name).iterdir())) for name in NAMES)


def test_each_shard_has_the_mixture_of_the_whole(train: Path, store: BlobStore) -> None:
    dataset = pack(train, "digits", store)
    assert len(dataset.shards) == 25
    labels = [label for _, _, label in images_of(dataset, store)]
    start = 0
    for shard in dataset.shards:
        assert max(Counter(labels[start : start + shard.count]).values()) <= 4  # 16 of 10 classes
        start += shard.count


def test_the_same_input_gives_the_same_shards(train: Path, tmp_path: Path, store: BlobStore) -> None:
    dataset = pack(train, "digits", store)
    copy = tmp_path / "elsewhere"
    for path in sorted(train.rglob("*.png"), reverse=True):
        target = copy / path.relative_to(train)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        os.utime(target, (1, 1))
    assert pack(copy, "digits", store) == dataset
    other = pack(train, "digits", store, seed=1)
    assert other.shards != dataset.shards
    assert sorted(keys_of(other, store)) == sorted(keys_of(dataset, store))


def test_without_shuffling_the_order_is_that_of_the_folders(train: Path, store: BlobStore) -> None:
    dataset = pack(train, "digits", store, shuffle=False)
    keys = keys_of(dataset, store)
    assert keys == sorted(keys)
    assert [label for _, _, label in images_of(dataset, store)] == sorted(
        NAMES.index(key.split("/")[0]) for key in keys
    )


def test_progress_goes_to_the_end(train: Path, store: BlobStore) -> None:
    told: list[tuple[int, int]] = []
    pack(train, "digits", store, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (400, 400)
    assert told == sorted(told)
    assert len(told) > 5


def test_formats_nesting_and_hidden_files(tmp_path: Path, store: BlobStore) -> None:
    folder = tmp_path / "pets"
    files = {
        "cat/a.PNG": encoded(photo(), "PNG"),
        "cat/b.JPG": encoded(photo(), "JPEG"),
        "cat/deep/er/c.jpeg": encoded(photo("L"), "JPEG"),
        "cat/d.webp": encoded(photo(), "WEBP", lossless=True),
        "cat/really-a-jpeg.png": encoded(photo(), "JPEG"),
        "dog/e.gif": encoded(photo("P"), "GIF"),
        "dog/f.bmp": encoded(photo(), "BMP"),
        "dog/g.tiff": encoded(photo("RGBA"), "TIFF"),
        "dog/h.jpg": encoded(photo("CMYK"), "JPEG"),
        "dog/i.png": encoded(photo("P"), "PNG"),
        "dog/.hidden.png": b"no image",
        "dog/.cache/x.png": b"no image",
        "dog/notes.txt": b"about dogs",
        ".git/x.png": b"no image",
        "README.md": b"pets",
    }
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    dataset = pack(folder, "pets", store, shuffle=False)
    check_manifest(dataset, store)
    assert dataset.format.classes == ("cat", "dog")
    assert dataset.class_counts == (5, 5)
    suffixes = {}
    for key, (suffix, data, label) in zip(keys_of(dataset, store), images_of(dataset, store), strict=True):
        suffixes[key] = suffix
        assert label == (0 if key.startswith("cat") else 1)
        with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(files[key])) as original:
            assert image.format == {"png": "PNG", "jpg": "JPEG"}[suffix]
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(original.convert("RGB")))
            if original.format in ("PNG", "JPEG") and original.mode != "CMYK":
                assert data == files[key]
            if original.mode == "RGBA":
                assert image.mode == "RGBA"
    jpegs = {key for key, suffix in suffixes.items() if suffix == "jpg"}
    assert jpegs == {"cat/b.JPG", "cat/deep/er/c.jpeg", "cat/really-a-jpeg.png"}


BAD = {
    "text.png": (b"this is not an image", "not an image"),
    "empty.png": (b"", "an empty file"),
    "cut.jpg": (encoded(photo(), "JPEG")[:-500], "truncated"),
    "cut.png": (encoded(photo(), "PNG")[:-20], ""),
    "noend.png": (encoded(photo(), "PNG")[:-9], ""),
}


@pytest.mark.parametrize("name", BAD)
def test_an_image_that_will_not_decode_is_named_counted_and_skipped(train: Path, store: BlobStore, name: str) -> None:
    data, reason = BAD[name]
    (train / "six" / name).write_bytes(data)
    dataset = pack(train, "digits", store)
    check_manifest(dataset, store)
    assert dataset.count == 400
    (skipped,) = dataset.skipped
    assert skipped.startswith(f"six/{name}: ")
    assert reason in skipped
    assert f"six/{name}" not in keys_of(dataset, store)


def test_a_png_with_a_wrong_checksum_is_found(train: Path, store: BlobStore) -> None:
    """Pillow decodes it, but TensorFlow does not."""
    data = bytearray(encoded(photo(), "PNG"))
    data[-13] ^= 1  # the CRC of the last IDAT
    Image.open(io.BytesIO(data)).load()
    (train / "six" / "crc.png").write_bytes(data)
    (skipped,) = pack(train, "digits", store).skipped
    assert "checksum" in skipped


def test_more_than_one_in_a_hundred_is_refused(train: Path, store: BlobStore) -> None:
    for number in range(7):
        (train / "two" / f"bad{number}.png").write_bytes(b"nonsense")
    with pytest.raises(InvalidData) as caught:
        pack(train, "digits", store)
    message = caught.value.message
    assert message.startswith("7 of 407 images cannot be used")
    assert "two/bad0.png: not an image; two/bad1.png" in message
    assert "bad6" not in message
    assert message.endswith("; ...")


def test_images_beside_the_class_folders_count_as_skipped(train: Path, store: BlobStore) -> None:
    (train / "cover.png").write_bytes(encoded(photo(), "PNG"))
    dataset = pack(train, "digits", store)
    assert dataset.skipped == ("cover.png: is not in a class folder",)


def test_unreadable_files_are_skipped_like_bad_ones(train: Path, store: BlobStore) -> None:
    (train / "six" / "dangling.png").symlink_to("nowhere")
    assert pack(train, "digits", store).skipped == ()  # it is not a file
    target = train / "six" / "gone.png"
    target.write_bytes(b"x")

    def remove(done: int, total: int) -> None:
        for path in list(train.rglob("*.png"))[:3]:
            path.unlink()

    with pytest.raises(InvalidData, match=r"changed while it was packed.*No such file|cannot be used"):
        pack(train, "digits", store, progress=remove)


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, store: BlobStore) -> None:
    with pytest.raises(InvalidData, match="missing does not exist"):
        pack(tmp_path / "missing", "x", store)
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(
        InvalidData, match=r"data has no class folders with images, .*expected .*data/<class>/<file> .*\.wav"
    ):
        pack(folder, "x", store)
    (folder / "a.png").write_bytes(encoded(photo(), "PNG"))
    with pytest.raises(InvalidData, match="has 1 image but no class folders"):
        pack(folder, "x", store)
    (folder / "cat").mkdir()
    with pytest.raises(InvalidData, match=r"class folder .*data/cat has no images .*remove the folder"):
        pack(folder, "x", store)
    file = tmp_path / "data.zip"
    file.write_bytes(b"")
    with pytest.raises(InvalidData, match=r"data.zip cannot be packed as a data set"):
        pack(file, "x", store)


def test_a_class_of_which_nothing_decodes_is_refused(train: Path, store: BlobStore) -> None:
    (train / "ten").mkdir()
    (train / "ten" / "bad.png").write_bytes(b"nonsense")
    with pytest.raises(InvalidData, match="class 'ten' has no image that can be decoded"):
        pack(train, "digits", store)


def test_a_flat_folder_is_for_prediction(tmp_path: Path, store: BlobStore) -> None:
    folder = tmp_path / "new"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.png", "more/c.png")):
        (folder / name).write_bytes(encoded(photo(size=(8 + number, 8)), "PNG"))
    dataset = pack(folder, "new", store, labels=False, shuffle=False)
    check_manifest(dataset, store)
    assert (dataset.format.classes, dataset.class_counts) == ((), ())
    assert keys_of(dataset, store) == ["a.png", "b.png", "more/c.png"]
    assert [label for _, _, label in images_of(dataset, store)] == [-1, -1, -1]


def test_names_that_are_no_utf8(tmp_path: Path, store: BlobStore) -> None:
    folder = tmp_path / "odd" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"\xff.png")).write_bytes(encoded(photo(), "PNG"))
    dataset = pack(tmp_path / "odd", "odd", store)
    check_manifest(dataset, store)
    assert dataset.format.classes == ("caf\ufffd",)
    assert keys_of(dataset, store) == ["caf\ufffd/\ufffd.png"]


def test_shards_are_of_the_size_asked_for(tmp_path: Path, store: BlobStore) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), np.uint8)
    for number, pixels in enumerate(noise):
        path = tmp_path / "noise" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    dataset = pack(tmp_path / "noise", "noise", store, shard_bytes=100_000)
    assert len(dataset.shards) >= 7
    assert all(shard.blob.size < 140_000 for shard in dataset.shards)


def test_a_store_too_small_is_said_and_shards_do_not_push_each_other_out(train: Path, tmp_path: Path) -> None:
    small = BlobStore(tmp_path / "small", 100_000)
    with pytest.raises(DiskFull):
        pack(train, "digits", small)
    assert small.put_bytes(bytes(100_000)).size == 100_000  # nothing stays pinned


def test_ten_thousand_small_images_take_seconds(tmp_path: Path, store: BlobStore) -> None:
    pixels, labels = digits()
    files = [
        encoded(Image.fromarray((row.reshape(8, 8) * 255).astype(np.uint8)).resize((28, 28)), "PNG") for row in pixels
    ]
    for label in range(10):
        (tmp_path / "many" / str(label)).mkdir(parents=True)
    for number in range(10_000):
        place = number % len(files)
        (tmp_path / "many" / str(labels[place]) / f"{number}.png").write_bytes(files[place])
    began = time.monotonic()
    dataset: Dataset = pack(tmp_path / "many", "many", store)
    seconds = time.monotonic() - began
    print(f"10,000 images in {seconds:.1f} s")
    assert dataset.count == 10_000
    assert seconds < 30  # about 3 s on two idle cores
