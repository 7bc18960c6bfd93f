"""Images: the only decoder, for training, `predict`, `infer` and HTTP, and the form of images in shards.

The rule (docs/data.md, "Images"): the first frame, as grey, RGB or RGBA with 8 bits; of 16 bits the upper 8. Alpha is dropped, not
blended, where the model does not want it. Colours become grey by ITU-R 601. EXIF orientation and colour profiles are ignored.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
from PIL import Image, UnidentifiedImageError

from potluck.data.folders import Checked, Kind, Unusable
from potluck.data.packing import Array
from potluck.wire.values import ImageOptions

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""The formats that are decoded (MPO is JPEG). Pillow knows more, some through other programs."""
PIXELS_LIMIT = 89_478_485
"""How many pixels an image file may have: Pillow warns above this. A file of 60 KB may have twenty times as many pixels, and each
takes up to 4 bytes, twice."""
PIECE_PIXELS = 2**22
"""Larger images are converted in pieces."""
SCANS_FREE = 20
SCANNED_LIMIT = 20 * PIXELS_LIMIT
"""How many pixels all scans of a progressive JPEG may have together. Programs write about 10 scans; more than SCANS_FREE are counted."""
DEFAULT_SCALE = 1.0 / 255.0
"""The factor for pixels where a model does not say what its layers expect."""
_COPIED_JPEG_MODES = ("L", "RGB")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_TAG_BITS, _TAG_PHOTOMETRIC = 258, 262
"""Tags of TIFF 6.0: BitsPerSample, PhotometricInterpretation (0: white is zero)."""
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
"""First bytes of image formats that are not decoded."""
CONVERT = "files cannot be read: convert it to JPEG or PNG"
"""What to do with an image in such a format."""
_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd8\x01]", re.DOTALL)
"""A marker of JPEG with a segment behind it, or the end of the image."""
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
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
"""Errors of Pillow's decoders for damaged files."""


def tensor(data: bytes, options: ImageOptions, *, whole: bool = False) -> Array:
    """float32 of shape (height, width, channels): the pixels, resized bilinearly without smoothing, times `scale`.

    `whole` rounds the values, for an input of whole numbers. `options.scale` must be known. Raises Unusable.
    """
    found = resized(pixels(data, options.channels), options.height, options.width)
    found = found.astype(np.float32, copy=False)
    if options.scale is None:
        raise ValueError("the scale of the pixels is unknown")
    if options.scale != 1.0:
        found = found * np.float32(options.scale)
    return np.rint(found) if whole else found


def pixels(data: bytes, channels: int, limit: int = PIXELS_LIMIT) -> Array:
    """uint8 of shape (height, width, `channels`). Raises Unusable, also for more than `limit` pixels."""
    with _opened(data, limit) as image:
        convert, mode = _converter(image), _MODES[channels]

        def made(piece: Image.Image) -> Array:
            plain = convert(piece)
            return np.asarray(plain if plain.mode == mode else plain.convert(mode)).reshape(*piece.size[::-1], channels)

        if image.width * image.height <= PIECE_PIXELS:
            return made(image)
        found = np.empty((image.height, image.width, channels), np.uint8)
        for left, top, right, bottom in _pieces(image.width, image.height):
            found[top:bottom, left:right] = made(image.crop((left, top, right, bottom)))
        return found


def resized(found: Array, height: int, width: int) -> Array:
    """Resize bilinearly with pixel centres at one half, as `tf.image.resize` without antialias; returns an image of the right size as it is."""
    if found.shape[:2] == (height, width):
        return found
    channels = found.shape[2]
    top, bottom, down = _places(found.shape[0], height)
    left, right, along = _places(found.shape[1], width)
    if 2 * width * found.shape[0] < height * found.shape[1]:
        # An image of one row may have millions of columns: whole rows of it would be repeated.
        found, left, right = _columns(found, left, right)
    # First along whole rows, then along single values: three times as fast as both axes at once.
    rows = found.reshape(len(found), -1)
    first, second = ((place[:, None] * channels + np.arange(channels)).ravel() for place in (left, right))
    share = np.repeat(along, channels)
    upper, lower = (
        _between(some.take(first, 1).astype(np.float32), some.take(second, 1), share)
        for some in (rows.take(place, 0) for place in (top, bottom))
    )
    return _between(upper, lower, down[:, None]).reshape(height, width, channels)


def check(data: bytes) -> Checked:
    """Decode an image completely. Raises Unusable."""
    with _opened(data) as image:
        plain = _plain(image)
        suffix = _suffix(image)
        return Checked(len(data) if suffix else plain.width * plain.height * len(plain.getbands()) // 2, suffix)


def write(data: bytes, checked: Checked) -> tuple[str, bytes]:
    """(suffix, bytes) for a shard. Raises Unusable."""
    if checked.suffix:
        return checked.suffix, data
    with _opened(data) as image:
        buffer = io.BytesIO()
        _plain(image).save(buffer, "PNG")
        return "png", buffer.getvalue()


def unread_format(data: bytes) -> str | None:
    """The name of an image format that is not decoded, by its first bytes; None for any other file."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(bytes(data[8:12]))
    if data.lstrip()[:1] == b"<" and b"<svg" in data[:1024]:
        return "SVG"
    return next((format for start, format in _UNREAD.items() if data.startswith(start)), None)


@contextmanager
def _opened(data: bytes, limit: int = PIXELS_LIMIT) -> Iterator[Image.Image]:
    """An open image whose pixels can be read. Raises Unusable for Pillow's errors inside the block, and at once for too many pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > limit:
                raise _too_many(f"{image.width} x {image.height}", limit)
            if image.format == "PNG":
                _check_png(data)
            elif image.format in ("JPEG", "MPO"):
                _check_scans(data, image.width * image.height)
            image.load()
            yield image
    except UnidentifiedImageError as error:
        format = unread_format(data)
        raise Unusable(f"{format} {CONVERT}" if format else "not an image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # It is raised before we can ask for the size.
        found = re.search(r"\d+", str(error))
        raise _too_many(found[0] if found else "too many", limit) from error
    except _UNDECODABLE as error:
        raise Unusable(str(error) or type(error).__name__) from error


def _too_many(pixels: str, limit: int) -> Unusable:
    return Unusable(f"it has {pixels} pixels, but at most {limit} are decoded: make it smaller")


def _plain(image: Image.Image) -> Image.Image:
    """The first frame as L, RGB or RGBA, from which any number of channels is made. Writing it as PNG and reading it keeps it equal."""
    return _converter(image)(image)


def _converter(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What makes the image, or a piece of it, into such an image. Raises Unusable."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tags = getattr(image, "tag_v2", {})
        bits = int(tags.get(_TAG_BITS, (16,))[0])
        return partial(_of_16_bits, bits=bits, white_is_zero=tags.get(_TAG_PHOTOMETRIC) == 0)
    if image.mode in ("I", "F"):
        raise Unusable("its range from black to white is unknown: save it with unsigned 8 or 16 bits")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        mode = "RGBA"
    else:
        mode = "L" if image.mode in ("1", "L") else "RGB"
    return lambda piece: piece if piece.mode == mode else piece.convert(mode)


def _of_16_bits(image: Image.Image, bits: int, white_is_zero: bool) -> Image.Image:
    """Grey of 12 or 16 bits by its upper 8 bits, like libpng's `png_set_strip_16`, and so like TensorFlow and Keras."""
    values = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - values if white_is_zero else values)


def _pieces(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of at most PIECE_PIXELS that cover an image. Pillow takes several times the memory of what it converts."""
    across = min(width, PIECE_PIXELS)
    down = max(1, PIECE_PIXELS // across)
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)


def _suffix(image: Image.Image) -> str:
    """The suffix for a file that goes into a shard as it is; empty if it is encoded again, so that any program can read it."""
    if image.format == "PNG":
        return "png"
    return "jpg" if image.format in ("JPEG", "MPO") and image.mode in _COPIED_JPEG_MODES else ""


def _check_png(data: bytes) -> None:
    """Raises ValueError for damage that Pillow accepts: a wrong CRC, or no end (PNG specification, 5.3)."""
    view = memoryview(data)
    place, kind = 8, b""
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", data, place)
        kind = data[place + 4 : place + 8]
        (crc,) = struct.unpack_from(">I", data, place + 8 + length)
        if zlib.crc32(view[place + 4 : place + 8 + length]) != crc:
            raise ValueError(f"broken PNG file (bad checksum in {kind!r})")
        place += 12 + length


def _check_scans(data: bytes, pixels: int) -> None:
    """Raises ValueError for a JPEG whose scans take minutes to decode: 1 MB may have ten thousand, each over the whole image (ITU-T T.81, B.1)."""
    place, scans = 2, 0
    while (marker := _MARKER.search(data, place)) is not None:
        kind, place = marker[0][-1], marker.end()
        if kind == _END_OF_IMAGE:
            return
        if kind == _START_OF_SCAN:
            scans += 1
            if scans > SCANS_FREE and scans * pixels > SCANNED_LIMIT:
                raise ValueError(f"a JPEG with too many scans ({scans} so far, over {pixels} pixels each)")
        # What follows is a segment with its length. Behind the header of a scan are its data, in which FF 00 is no marker.
        place += int.from_bytes(data[place : place + 2])


def _places(before: int, after: int) -> tuple[Array, Array, Array]:
    """For each pixel after resizing along an axis: the two pixels that it lies between, and the share of the second."""
    at = (np.arange(after, dtype=np.float32) + np.float32(0.5)) * np.float32(before / after) - np.float32(0.5)
    low = np.floor(at)
    return (
        np.clip(low, 0, before - 1).astype(np.intp),
        np.clip(low + 1, 0, before - 1).astype(np.intp),
        at - low,
    )


def _columns(found: Array, left: Array, right: Array) -> tuple[Array, Array, Array]:
    """Only the columns that are used, and where these are now."""
    used, places = np.unique(np.concatenate([left, right]), return_inverse=True)
    return found.take(used, 1), places[: len(left)], places[len(left) :]


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
