"""Recordings in shards: WAV files of 16-bit PCM with the plainest header, which TensorFlow can decode.

Reads RIFF/WAVE with PCM of 8 to 32 bits, or floats of 32 and 64 bits, also as WAVE_FORMAT_EXTENSIBLE
(Multimedia Programming Interface and Data Specifications 1.0, IBM and Microsoft, 1991; Microsoft's WAVEFORMATEXTENSIBLE).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from potluck.data.folders import Checked, Kind, Unusable
from potluck.data.packing import Array
from potluck.wording import counted

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_UNKNOWN_SIZES = (0x7FFFFFFF - 36, 0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF)
"""The length that programs write when they write to a pipe: the data go to the end of the file."""
CHANNELS_LIMIT = 32
_DATA_LIMIT_BYTES = 2**32 - 1 - 36


@dataclass(frozen=True)
class Wave:
    """A WAV file's samples as stored: `data` is frames of `channels` values of `bits` each."""

    floats: bool
    channels: int
    rate: int
    bits: int
    data: memoryview

    @property
    def frames(self) -> int:
        return len(self.data) // (self.channels * self.bits // 8)


def read(data: bytes) -> Wave:
    """Parse a WAV file. Raises Unusable, with the reason, for another file, one cut off or without samples, or an unknown coding."""
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise Unusable("not a WAV file")
    form: tuple[bool, int, int, int] | None = None
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        body, place = place + 8, place + 8
        if name == b"data":
            if form is None:
                raise Unusable("damaged: its samples come before their format")
            return _wave(form, memoryview(data)[body:], size)
        if body + size > len(data):
            raise Unusable("cut off")
        if name == b"fmt ":
            form = _form(data[body : body + size])
        place = body + size + size % 2
    raise Unusable("cut off: it has no samples")


def _form(chunk: bytes) -> tuple[bool, int, int, int]:
    """(floats, channels, rate, bits)."""
    if len(chunk) < 16:
        raise Unusable("damaged: its format is cut off")
    code, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", chunk)
    if code == _EXTENSIBLE and len(chunk) >= 26:
        (code,) = struct.unpack_from("<H", chunk, 24)
    if (code, bits) not in {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}:
        raise Unusable(f"its samples are coded as format {code} of {bits} bits: save it again as 16-bit PCM")
    written = rate * channels * 2  # the bytes of a second in a shard, for which its header has 32 bits
    if not 1 <= channels <= CHANNELS_LIMIT or not 0 < written < 2**32 or frame != channels * bits // 8:
        raise Unusable(f"damaged: {channels} channels at {rate} samples a second, {frame} bytes a frame")
    return code == _FLOAT, channels, rate, bits


def _wave(form: tuple[bool, int, int, int], rest: memoryview, size: int) -> Wave:
    floats, channels, rate, bits = form
    if size > len(rest) and size not in _UNKNOWN_SIZES:
        raise Unusable(f"cut off: {counted(size, 'byte')} of samples announced, {len(rest):,} there")
    length = min(size, len(rest))
    wave = Wave(floats, channels, rate, bits, rest[: length - length % (channels * bits // 8)])
    if not wave.frames:
        raise Unusable("without samples")
    if wave.frames * channels * 2 > _DATA_LIMIT_BYTES:
        raise Unusable("too long: as 16-bit PCM it has more than the 4 GiB of a WAV file")
    return wave


def samples(wave: Wave) -> Array:
    """int16 samples of shape (frames, channels). Floats from -1 to 1 are scaled, values beyond are clipped. Raises Unusable for NaN."""
    found: Array
    if wave.floats:
        values = np.frombuffer(wave.data, f"<f{wave.bits // 8}")
        if not np.isfinite(values).all():
            raise Unusable("has samples that are not finite numbers")
        found = np.minimum(np.round(np.clip(values, -1.0, 1.0) * 32768.0), 32767).astype("<i2")
    elif wave.bits == 8:  # 8-bit samples are unsigned, unlike all others
        found = (np.frombuffer(wave.data, np.uint8).astype("<i2") - 128) << 8
    else:  # keep the two most significant bytes
        size = wave.bits // 8
        raw = np.frombuffer(wave.data, np.uint8).reshape(-1, size)
        found = np.ascontiguousarray(raw[:, size - 2 :]).view("<i2")
    return found.reshape(-1, wave.channels)


def encode(values: Array, rate: int) -> bytes:
    """int16 samples of shape (frames, channels) as a WAV file with a header of 44 bytes."""
    channels = values.shape[1]
    data = values.astype("<i2", copy=False).tobytes()
    form = struct.pack("<HHIIHH", _PCM, channels, rate, rate * channels * 2, channels * 2, 16)
    return (
        struct.pack("<4sI4s4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", len(form))
        + form
        + struct.pack("<4sI", b"data", len(data))
        + data
    )


def fitted(data: bytes, shape: tuple[int, ...], rate: int = 0) -> Array:
    """float32 of `shape`, (samples,) or (samples, channels), as nodes make it from a recording (docs/data.md).

    Raises Unusable, also for a recording without `rate` samples a second (0: any rate is fine).
    """
    wave = read(data)
    if rate not in (0, wave.rate):
        raise Unusable(f"it has {wave.rate} samples a second, but the model was trained on {rate}: resample it")
    values = samples(wave)[: shape[0]] / np.float32(32768)
    channels = shape[1] if len(shape) > 1 else 1
    if channels == 1:
        values = values.mean(axis=1, keepdims=True)
    else:
        values = values[:, np.minimum(np.arange(channels), wave.channels - 1)]
    found = np.zeros((shape[0], channels), np.float32)
    found[: len(values)] = values
    return found.reshape(shape)


def check(data: bytes) -> Checked:
    """Check a recording. Raises Unusable."""
    wave = read(data)
    if wave.floats:
        samples(wave)
    return Checked(44 + 2 * wave.frames * wave.channels, "wav", wave.rate)


def write(data: bytes, checked: Checked) -> tuple[str, bytes]:
    """(suffix, bytes) for a shard. Raises Unusable."""
    wave = read(data)
    if wave.rate != checked.rate:
        raise Unusable(f"has {wave.rate} samples a second now")
    return checked.suffix, encode(samples(wave), wave.rate)


KIND = Kind(name="audio", one="recording", many="recordings", suffixes=frozenset({".wav"}), check=check, write=write)
