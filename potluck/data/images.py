"""Images: the one decoder, which training, `predict`, `infer` and HTTP share, and how they stand in shards.

The rule (docs/data.md, "Images"): the first frame, as grey, RGB or RGBA of 8 bits; of 16 bits the upper 8; alpha is dropped where
none is asked for, and not blended; grey of colours is ITU-R 601; neither EXIF orientation nor colour profiles are applied.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from potluck.data.folders import Checked, Kind, Unusable
from potluck.data.packing import Array
from potluck.wire.messages import ImageOptions

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What is decoded (MPO is JPEG): Pillow knows others, some by way of other programs."""
PIXELS_LIMIT = 89_478_485
"""Of an image as it is in the file: as many as Pillow takes without a word. A file of 60 KB may have twenty times as many, and each
takes up to 4 bytes, twice."""
DEFAULT_SCALE = 1.0 / 255.0
"""Of pixels, for a model that does not say what its layers expect."""
_COPIED_JPEG_MODES = ("L", "RGB")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_TAG_BITS, _TAG_PHOTOMETRIC = 258, 262
"""Of TIFF 6.0: BitsPerSample, PhotometricInterpretation (0: white is zero)."""
_BRANDS = {
    b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"hevc": "HEIC", b"hevx": "HEIC",
    b"mif1": "HEIF", b"msf1": "HEIF", b"avif": "AVIF", b"avis": "AVIF", b"crx ": "CR3",
}  # fmt: skip
"""Major brands of ISO base media files that hold images (ISO/IEC 14496-12, 4.3; 23008-12; the AVIF specification)."""
_UNREAD = {
    b"\x00\x00\x00\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"8BPS\x00\x01": "Photoshop",
    b"gimp xcf ": "GIMP",
    b"DDS |\x00\x00\x00": "DDS",
    b"v/1\x01": "OpenEXR",
    b"\x00\x00\x01\x00": "ICO",
}
"""How files of images begin that are not decoded."""
CONVERT = "files cannot be read: convert it to JPEG or PNG"
"""What to do with an image of these."""
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
)
"""What Pillow's decoders raise for damaged files."""


def tensor(data: bytes, options: ImageOptions, *, whole: bool = False) -> Array:
    """float32 of (height, width, channels): the pixels, resized bilinearly without smoothing, times `scale`.

    `whole` rounds them, for an input of whole numbers. `options.scale` must be known. Raises Unusable.
    """
    found = resized(pixels(data, options.channels), options.height, options.width)
    found = found.astype(np.float32, copy=False)
    if options.scale is None:
        raise ValueError("what pixels are multiplied by is not known")
    if options.scale != 1.0:
        found = found * np.float32(options.scale)
    return np.rint(found) if whole else found


def pixels(data: bytes, channels: int, limit: int = PIXELS_LIMIT) -> Array:
    """uint8 of (height, width, `channels`). Raises Unusable, also for more than `limit` pixels."""
    with _opened(data, limit) as image:
        plain = _plain(image)
        mode = _MODES[channels]
        found = np.asarray(plain if plain.mode == mode else plain.convert(mode))
        return found.reshape(*found.shape[:2], channels)


def resized(found: Array, height: int, width: int) -> Array:
    """Bilinear with pixel centres at one half, as `tf.image.resize` does it without antialias; as it is where the size is right."""
    if found.shape[:2] == (height, width):
        return found
    channels = found.shape[2]
    top, bottom, down = _places(found.shape[0], height)
    left, right, along = _places(found.shape[1], width)
    # Rows whole, and then single values of them: three times as quick as by row and column at once.
    rows = found.reshape(len(found), -1)
    first, second = ((place[:, None] * channels + np.arange(channels)).ravel() for place in (left, right))
    share = np.repeat(along, channels)
    upper, lower = (
        _between(some.take(first, 1).astype(np.float32), some.take(second, 1), share)
        for some in (rows.take(place, 0) for place in (top, bottom))
    )
    return _between(upper, lower, down[:, None]).reshape(height, width, channels)


def check(data: bytes) -> Checked:
    """Decodes it wholly. Raises Unusable."""
    with _opened(data) as image:
        plain = _plain(image)
        suffix = _suffix(image)
        return Checked(len(data) if suffix else plain.width * plain.height * len(plain.getbands()) // 2, suffix)


def write(data: bytes, checked: Checked) -> tuple[str, bytes]:
    """(suffix, bytes) as in a shard. Raises Unusable."""
    if checked.suffix:
        return checked.suffix, data
    with _opened(data) as image:
        buffer = io.BytesIO()
        _plain(image).save(buffer, "PNG")
        return "png", buffer.getvalue()


def unread_format(data: bytes) -> str | None:
    """What people call the format of an image that is not decoded, by its first bytes; None for all others."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(bytes(data[8:12]))
    if data.lstrip()[:1] == b"<" and b"<svg" in data[:1024]:
        return "SVG"
    return next((format for start, format in _UNREAD.items() if data.startswith(start)), None)


@contextmanager
def _opened(data: bytes, limit: int = PIXELS_LIMIT) -> Iterator[Image.Image]:
    """An image whose pixels can be read. Raises Unusable for what Pillow raises within, and by its header for one that is too large."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > limit:
                raise _too_many(f"{image.width} x {image.height}", limit)
            if image.format == "PNG":
                _check_png(data)
            image.load()
            yield image
    except UnidentifiedImageError as error:
        format = unread_format(data)
        raise Unusable(f"{format} {CONVERT}" if format else "not an image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # before we could ask for its size
        found = re.search(r"\d+", str(error))
        raise _too_many(found[0] if found else "too many", limit) from error
    except _UNDECODABLE as error:
        raise Unusable(str(error) or type(error).__name__) from error


def _too_many(pixels: str, limit: int) -> Unusable:
    return Unusable(f"it has {pixels} pixels, and {limit} are decoded at most: make it smaller")


def _plain(image: Image.Image) -> Image.Image:
    """The first frame as L, RGB or RGBA: what any number of channels is made of. Written as a PNG it gives the same again."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _of_16_bits(image)
    if image.mode in ("I", "F"):
        raise Unusable("nothing says which of its values is white: write it with 8 or 16 bits without a sign")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        mode = "RGBA"
    else:
        mode = "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _of_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 12 or 16 bits by the upper 8 of each, as libpng's `png_set_strip_16` has it, and so TensorFlow and Keras."""
    tags = getattr(image, "tag_v2", {})
    bits = int(tags.get(_TAG_BITS, (16,))[0])
    values = np.asarray(image).astype(np.int32) >> (bits - 8)
    if tags.get(_TAG_PHOTOMETRIC) == 0:
        values = 255 - values
    return Image.fromarray(values.astype(np.uint8))


def _suffix(image: Image.Image) -> str:
    """The suffix under which the file stands in a shard as it is; empty if it is written anew, so that any program can read it there."""
    if image.format == "PNG":
        return "png"
    return "jpg" if image.format in ("JPEG", "MPO") and image.mode in _COPIED_JPEG_MODES else ""


def _check_png(data: bytes) -> None:
    """Raises ValueError for what Pillow takes though it is damaged: a wrong CRC, or no end (PNG specification, 5.3)."""
    view = memoryview(data)
    place, kind = 8, b""
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", data, place)
        kind = data[place + 4 : place + 8]
        (crc,) = struct.unpack_from(">I", data, place + 8 + length)
        if zlib.crc32(view[place + 4 : place + 8 + length]) != crc:
            raise ValueError(f"broken PNG file (bad checksum in {kind!r})")
        place += 12 + length


def _places(before: int, after: int) -> tuple[Array, Array, Array]:
    """Of each pixel after resizing along an axis: the two that it lies between, and its share of the second."""
    at = (np.arange(after, dtype=np.float32) + np.float32(0.5)) * np.float32(before / after) - np.float32(0.5)
    low = np.floor(at)
    return (
        np.clip(low, 0, before - 1).astype(np.intp),
        np.clip(low + 1, 0, before - 1).astype(np.intp),
        at - low,
    )


def _between(first: Array, second: Array, share: Array) -> Array:
    found: Array = first + (second - first) * share
    return found


KIND = Kind(
    name="images",
    one="image",
    many="images",
    suffixes=frozenset(
        {".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
        | {".ppm", ".pgm", ".pbm", ".pnm"}
    ),
    check=check,
    write=write,
    unread=frozenset(
        {".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".svg", ".ico", ".psd", ".tga", ".dds"}
        | {
            ".exr",
            ".hdr",
            ".pcx",
            ".xcf",
            ".eps",
            ".raw",
            ".dng",
            ".cr2",
            ".cr3",
            ".nef",
            ".arw",
            ".orf",
            ".rw2",
            ".raf",
        }
    ),
)
