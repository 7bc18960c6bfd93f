"""Images in shards: PNG and JPEG byte for byte; what TensorFlow cannot decode to any number of channels written anew as PNG."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from potluck.data.folders import Checked, Kind, Unusable

_JPEG_MODES = ("L", "RGB")
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
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise for damaged files."""


def check(data: bytes) -> Checked:
    """Decodes it wholly. Raises Unusable."""
    with opened(data) as image:
        image.load()
        suffix = _suffix(image)
        if suffix == "png":
            _check_png(data)
        return Checked(len(data) if suffix else image.width * image.height * len(image.getbands()) // 2, suffix)


def write(data: bytes, checked: Checked) -> tuple[str, bytes]:
    """(suffix, bytes) as in a shard. Raises Unusable."""
    if checked.suffix:
        return checked.suffix, data
    with opened(data) as image:
        buffer = io.BytesIO()
        _as_png(image).save(buffer, "PNG")
        return "png", buffer.getvalue()


@contextmanager
def opened(data: bytes, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """An image in one of `formats` (Pillow's names; None: any). Raises Unusable for what Pillow raises within."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            yield image
    except UnidentifiedImageError as error:
        raise Unusable("not an image") from error
    except _UNDECODABLE as error:
        raise Unusable(str(error) or type(error).__name__) from error


def _suffix(image: Image.Image) -> str:
    """The suffix under which TensorFlow decodes the file as it is, to any number of channels; empty if it does not."""
    if image.format == "PNG":
        return "png"
    return "jpg" if image.format in ("JPEG", "MPO") and image.mode in _JPEG_MODES else ""


def _check_png(data: bytes) -> None:
    """Raises ValueError for what libpng refuses though Pillow does not: a wrong CRC, or no end (PNG specification, 5.3)."""
    place, kind = 8, b""
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", data, place)
        kind = data[place + 4 : place + 8]
        (crc,) = struct.unpack_from(">I", data, place + 8 + length)
        if zlib.crc32(data[place + 4 : place + 8 + length]) != crc:
            raise ValueError(f"broken PNG file (bad checksum in {kind!r})")
        place += 12 + length


def _as_png(image: Image.Image) -> Image.Image:
    """The first frame as grey, colour, or colour with transparency."""
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return image.convert("RGBA")
    return image if image.mode == "I;16" else image.convert("RGB")


KIND = Kind(
    name="images",
    one="image",
    many="images",
    suffixes=frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}),
    check=check,
    write=write,
)
