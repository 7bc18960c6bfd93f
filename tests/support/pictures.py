"""One photograph in many kinds of files, each with its true 8-bit pixels, found without our decoder."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

Array = np.ndarray[Any, Any]
HEIGHT, WIDTH = 6, 8


@dataclass(frozen=True)
class Picture:
    """A file, and its pixels as (height, width, 4): red, green, blue, alpha."""

    suffix: str
    data: bytes
    rgba: Array

    def pixels(self, channels: int) -> Array:
        """uint8 of shape (height, width, channels), by the rule in docs/data.md."""
        if channels > 1:
            return self.rgba[..., :channels]
        red, green, blue = (self.rgba[..., place].astype(np.int64) for place in range(3))
        grey = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16  # ITU-R 601
        return grey.astype(np.uint8)[..., None]


def rgba(colour: Array, alpha: Array | int = 255) -> Array:
    """RGBA pixels from colours (height, width, 3), or from grey (height, width)."""
    colour = np.repeat(colour[..., None], 3, axis=2) if colour.ndim == 2 else colour
    alpha = np.broadcast_to(np.asarray(alpha, np.uint8), colour.shape[:2])
    return np.concatenate([colour, alpha[..., None]], axis=2).astype(np.uint8)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(values: Array, colour_type: int, bits: int, *chunks: bytes) -> bytes:
    """A PNG by its specification, of samples (height, width, n) with `bits` bits: 8 or 16."""
    rows = values.reshape(len(values), -1).astype(">u2" if bits == 16 else np.uint8)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour_type, 0, 0, 0)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    )


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def decoded(data: bytes) -> Array:
    """RGBA pixels of a lossy file, decoded by its format's library."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@cache
def pictures() -> dict[str, Picture]:
    """The pictures, by name."""
    photo = Image.fromarray(load_sample_images().images[0]).resize((WIDTH, HEIGHT))
    rgb, grey = np.asarray(photo), np.asarray(photo.convert("L"))
    alpha = np.linspace(0, 255, HEIGHT * WIDTH).astype(np.uint8).reshape(HEIGHT, WIDTH)
    clear = Image.fromarray(rgba(rgb, alpha))
    palette = photo.quantize(16)
    of_palette = np.asarray(palette.convert("RGB"))
    index = np.asarray(palette)
    bits = photo.convert("1")
    of_bits = np.asarray(bits).astype(np.uint8) * 255
    grey16 = grey.astype(np.uint16) * 257 - grey // 2
    rgb16 = rgb.astype(np.uint16) * 256 + 77
    found = {
        "png grey": Picture("png", saved(Image.fromarray(grey), "PNG"), rgba(grey)),
        "png grey alpha": Picture("png", saved(clear.convert("LA"), "PNG"), rgba(grey, alpha)),
        "png rgb": Picture("png", saved(photo, "PNG"), rgba(rgb)),
        "png rgba": Picture("png", saved(clear, "PNG"), rgba(rgb, alpha)),
        "png 1 bit": Picture("png", saved(bits, "PNG"), rgba(of_bits)),
        "png palette": Picture("png", saved(palette, "PNG"), rgba(of_palette)),
        "png palette, one clear": Picture(
            "png", saved(palette, "PNG", transparency=3), rgba(of_palette, np.where(index == 3, 0, 255))
        ),
        "png grey, one clear": Picture(
            "png",
            saved(Image.fromarray(grey), "PNG", transparency=int(grey[0, 0])),
            rgba(grey, np.where(grey == grey[0, 0], 0, 255)),
        ),
        "png grey 16": Picture("png", png(grey16[..., None], 0, 16), rgba(grey16 >> 8)),
        "png grey alpha 16": Picture(
            "png", png(np.stack([grey16, grey16 // 2], axis=2), 4, 16), rgba(grey16 >> 8, grey16 // 2 >> 8)
        ),
        "png rgb 16": Picture("png", png(rgb16, 2, 16), rgba(rgb16 >> 8)),
        "png rgba 16": Picture(
            "png", png(np.concatenate([rgb16, grey16[..., None]], axis=2), 6, 16), rgba(rgb16 >> 8, grey16 >> 8)
        ),
        "png interlaced": Picture("png", interlaced(rgb), rgba(rgb)),
        "gif": Picture("gif", saved(palette, "GIF"), rgba(of_palette)),
        "gif animated": Picture(
            "gif", saved(palette, "GIF", save_all=True, append_images=[palette.rotate(180)]), rgba(of_palette)
        ),
        "gif, one clear": Picture(
            "gif", saved(palette, "GIF", transparency=3), rgba(of_palette, np.where(index == 3, 0, 255))
        ),
        "bmp": Picture("bmp", saved(photo, "BMP"), rgba(rgb)),
        "bmp 1 bit": Picture("bmp", saved(bits, "BMP"), rgba(of_bits)),
        "bmp grey": Picture("bmp", saved(Image.fromarray(grey), "BMP"), rgba(grey)),
        "webp lossless": Picture("webp", saved(photo, "WEBP", lossless=True), rgba(rgb)),
        "webp alpha": Picture("webp", saved(clear, "WEBP", lossless=True, exact=True), rgba(rgb, alpha)),
        "tiff rgb": Picture("tif", saved(photo, "TIFF"), rgba(rgb)),
        "tiff lzw": Picture("tiff", saved(photo, "TIFF", compression="tiff_lzw"), rgba(rgb)),
        "tiff rgba": Picture("tif", saved(clear, "TIFF"), rgba(rgb, alpha)),
        "tiff 1 bit": Picture("tif", saved(bits, "TIFF", compression="group4"), rgba(of_bits)),
        "tiff grey": Picture("tif", saved(Image.fromarray(grey), "TIFF"), rgba(grey)),
        "tiff grey 16": Picture("tif", saved(Image.fromarray(grey16), "TIFF"), rgba(grey16 >> 8)),
        "tiff grey 16, white is zero": Picture(
            "tif", saved(Image.fromarray(65535 - grey16), "TIFF", tiffinfo={262: 0}), rgba(grey16 >> 8)
        ),
        "tiff rgb 16": Picture("tif", tiff16(rgb16), rgba(rgb16 >> 8)),
        "tiff palette": Picture("tif", saved(palette, "TIFF"), rgba(of_palette)),
        "tiff pages": Picture("tif", saved(photo, "TIFF", save_all=True, append_images=[photo.rotate(180)]), rgba(rgb)),
        "ppm": Picture("ppm", saved(photo, "PPM"), rgba(rgb)),
        "pgm": Picture("pgm", saved(Image.fromarray(grey), "PPM"), rgba(grey)),
        "pgm 16": Picture(
            "pgm", b"P5\n%d %d\n65535\n" % (WIDTH, HEIGHT) + grey16.astype(">u2").tobytes(), rgba(grey16 >> 8)
        ),
        "pbm": Picture("pbm", saved(bits, "PPM"), rgba(of_bits)),
    }
    turned = Image.Exif()
    turned[0x0112] = 6
    lossy = {
        "jpeg": ("jpg", saved(photo, "JPEG")),
        "jfif": ("jfif", saved(photo, "JPEG", quality=95)),
        "jpeg grey": ("jpg", saved(Image.fromarray(grey), "JPEG")),
        "jpeg progressive": ("jpeg", saved(photo, "JPEG", progressive=True)),
        "jpeg cmyk": ("jpg", saved(photo.convert("CMYK"), "JPEG")),
        "jpeg turned by EXIF": ("jpg", saved(photo, "JPEG", exif=turned)),
        "mpo": ("jpg", saved(photo, "MPO", save_all=True, append_images=[photo.rotate(180)])),
        "webp lossy": ("webp", saved(photo, "WEBP")),
        "tiff cmyk": ("tif", saved(photo.convert("CMYK"), "TIFF")),
        "tiff jpeg": ("tif", saved(photo.resize((WIDTH, HEIGHT)), "TIFF", compression="jpeg")),
    }
    return found | {name: Picture(suffix, data, rgba(decoded(data))) for name, (suffix, data) in lossy.items()}


def interlaced(rgb: Array) -> bytes:
    """A PNG in the seven passes of Adam7 (PNG specification, 8.2), which Pillow reads but does not write."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    body = b""
    for top, left, down, along in passes:
        part = rgb[top::down, left::along]
        body += b"".join(b"\0" + row.tobytes() for row in part if row.size)
    head = struct.pack(">IIBBBBB", rgb.shape[1], rgb.shape[0], 8, 2, 0, 0, 1)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    )


def tiff16(rgb: Array) -> bytes:
    """A TIFF with 16 bits per colour, in one tile of 16x16 (TIFF 6.0, section 15), which Pillow reads but does not write."""
    tile = np.zeros((16, 16, 3), "<u2")
    tile[: rgb.shape[0], : rgb.shape[1]] = rgb
    data = tile.tobytes()
    bits_at = 8 + len(data)
    entries = [
        (256, 3, 1, rgb.shape[1]),
        (257, 3, 1, rgb.shape[0]),
        (258, 3, 3, bits_at),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (277, 3, 1, 3),
        (284, 3, 1, 1),
        (322, 3, 1, 16),
        (323, 3, 1, 16),
        (324, 4, 1, 8),
        (325, 4, 1, len(data)),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<2sHI", b"II", 42, bits_at + 6) + data + struct.pack("<3H", 16, 16, 16) + directory + bytes(4)
