"""The only decoder: the right pixels for every kind of file, and the same pixels from a shard."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potluck.data import images, items
from potluck.data.folders import Unusable
from potluck.data.pack import pack
from potluck.errors import InvalidData, InvalidRequest
from potluck.wire.questions import ModelInfo
from potluck.wire.values import BlobRef, ImageOptions, Signature, TensorSpec
from support.pictures import HEIGHT, WIDTH, chunk, pictures, png, saved
from support.shards import keys_of, new_store


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", pictures())
def test_every_kind_of_file_gives_its_pixels_also_from_a_shard(name: str, channels: int) -> None:
    picture = pictures()[name]
    expected = picture.pixels(channels)
    assert np.array_equal(images.pixels(picture.data, channels), expected)
    _, packed = images.write(picture.data, images.check(picture.data))
    assert np.array_equal(images.pixels(packed, channels), expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_white_are_refused(mode: str) -> None:
    data = saved(Image.new(mode, (4, 4)), "TIFF")
    for use in (images.check, lambda data: images.pixels(data, 3)):
        with pytest.raises(
            Unusable, match="its range from black to white is unknown: save it with unsigned 8 or 16 bits"
        ):
            use(data)


def test_a_colour_of_16_bits_that_is_clear_does_no_harm() -> None:
    values = np.full((2, 2, 3), 40_000, np.uint16)
    found = images.pixels(png(values, 2, 16, chunk(b"tRNS", b"\x9c\x40" * 3)), 4)
    assert found[..., :3].tolist() == [[[156] * 3] * 2] * 2


def test_a_limit_of_pixels() -> None:
    with pytest.raises(Unusable, match=f"it has {WIDTH} x {HEIGHT} pixels, but at most 10 are decoded"):
        images.pixels(pictures()["png rgb"].data, 3, limit=10)


@pytest.mark.parametrize(("size", "said"), [((9460, 9460), r"89491600|9460 x 9460"), ((22_000, 22_000), "484000000")])
def test_an_image_with_very_many_pixels_is_refused_by_its_header(size: tuple[int, int], said: str) -> None:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    options = ImageOptions(height=8, width=8, scale=1.0)
    for use in (images.check, lambda data: images.tensor(data, options)):
        began = time.perf_counter()
        with pytest.raises(
            Unusable, match=f"it has ({said}) pixels, but at most 89478485 are decoded: make it smaller"
        ):
            use(data)
        assert time.perf_counter() - began < 0.3


def test_pixels_for_whole_numbers_are_rounded() -> None:
    data = saved(Image.fromarray(np.array([[0, 101]], np.uint8)), "PNG")
    options = ImageOptions(height=1, width=4, channels=1, scale=1.0)
    assert images.tensor(data, options).ravel().tolist() == [0.0, 25.25, 75.75, 101.0]
    assert items.image(data, options, dtype="uint8").ravel().tolist() == [0, 25, 76, 101]


def info(datatype: str = "FP32", expected: float = 0.0, image: ImageOptions | None = None) -> ModelInfo:
    spec = TensorSpec(name="x", datatype=datatype, shape=(-1, 8, 8, 3))
    signature = Signature(inputs=(spec,), outputs=(spec,), pixel_scale=expected)
    blob = BlobRef(sha256="0" * 64, size=1)
    return ModelInfo(name="m", version=1, model=blob, created_at=0.0, signature=signature, image=image)


def sized(scale: float | None) -> ImageOptions:
    return ImageOptions(height=4, width=4, scale=scale)


def test_what_is_asked_goes_before_what_is_registered_and_that_before_what_layers_say() -> None:
    def scale(model: ModelInfo, asked: ImageOptions | None = None) -> float | None:
        return items.image_options(model, "", asked).scale

    assert scale(info()) == 1 / 255
    assert scale(info(expected=1.0)) == scale(info("UINT8")) == scale(info("INT32")) == 1.0
    assert scale(info(expected=1.0, image=sized(1 / 255))) == 1 / 255
    assert scale(info(expected=1.0, image=sized(None))) == 1.0
    assert scale(info(expected=1.0, image=sized(0.5)), sized(None)) == 0.5, "another size, and nothing of the scale"
    assert scale(info(expected=1.0, image=sized(0.5)), sized(2.0)) == 2.0
    assert items.image_options(info(), "", sized(None)).height == 4
    for wrong in (1 / 255, 2.0):
        with pytest.raises(InvalidRequest, match=r"whole numbers \(uint8\), .*leave out the scale"):
            scale(info("UINT8"), sized(wrong))
    for given in (None, sized(1.0)):
        with pytest.raises(InvalidRequest, match=r"at most 127 \(int8\), but pixels are 0 to 255: begin .* uint8, or"):
            scale(info("INT8"), given)


def test_images_that_cannot_be_read_are_named_and_counted(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    data = pictures()["jfif"].data
    for name in ("cat/1.jpg", "cat/2.jfif", "cat/3.JFIF", "cat/4.jpe", "dog/1.ppm"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes(pictures()["ppm"].data if name.endswith("ppm") else data)
    for name in ("cat/5.heic", "dog/2.AVIF", "dog/.hidden.heic"):
        (tmp_path / "p" / name).write_bytes(b"x")
    dataset = pack(tmp_path / "p", "p", store, shuffle=False)
    assert dataset.class_counts == (4, 1)
    reason = "such files cannot be read: convert it to JPEG or PNG"
    assert dataset.skipped == (f"cat/5.heic: {reason}", f"dog/2.AVIF: {reason}")
    flat = pack(tmp_path / "p/cat", "flat", store, labels=False)
    assert sorted(keys_of(flat, store)) == ["1.jpg", "2.jfif", "3.JFIF", "4.jpe"]
    assert flat.skipped == (f"5.heic: {reason}",)
    (tmp_path / "p/dog/1.ppm").unlink()
    with pytest.raises(InvalidData, match=r"dog has no images .*; 1 in other formats, such as 2.AVIF, cannot be read"):
        pack(tmp_path / "p", "p", store)


def test_a_picture_is_its_first_frame_and_lies_as_it_is_stored() -> None:
    for name, other in (
        ("gif animated", "gif"),
        ("tiff pages", "tiff rgb"),
        ("jpeg turned by EXIF", "jpeg"),
        ("mpo", "jpeg"),
    ):
        found, expected = (images.pixels(pictures()[one].data, 3).astype(int) for one in (name, other))
        assert np.array_equal(found, expected), name
    with Image.open(io.BytesIO(pictures()["jpeg turned by EXIF"].data)) as turned:
        assert turned.getexif()[0x0112] == 6


@pytest.mark.parametrize(
    ("start", "format"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF"),
        (b"\xff\x0a\x10\x20", "JPEG XL"),
        (b"8BPS\0\1\0\0", "Photoshop"),
        (b'<?xml version="1.0"?><svg>', "SVG"),
    ],
)
def test_an_image_that_is_not_decoded_is_called_by_its_format_whatever_its_name(start: bytes, format: str) -> None:
    with pytest.raises(Unusable, match=f"^{format} files cannot be read: convert it to JPEG or PNG$"):
        images.pixels(start + bytes(64), 3)


@pytest.mark.parametrize("start", [b"\0\0\0\x18ftypisom", b"DDS is a format", b"a text"])
def test_what_is_no_image_is_said_to_be_none(start: bytes) -> None:
    with pytest.raises(Unusable, match=r"^not an image$"):
        images.pixels(start + bytes(64), 3)
