"""Training updates: differences of weights, quantised blockwise, and the weights that they lead to.

An update of a large tensor travels as one scale for each BLOCK values (the largest of them by size) and 8 or 4 bits a value,
symmetric and rounded to nearest: blockwise quantisation (Dettmers et al., "8-bit Optimizers via Block-wise
Quantization", 2022), as DiLoCo's followers use it for outer gradients. Small tensors (biases, normalisation) travel as they are.

A file of updates is safetensors. The weight `w00000` is there as `w00000` (the difference itself, or for weights that are no
floating-point numbers the new value), or as `w00000.int8` or `w00000.int4` (two values a byte, the first in the low bits,
each plus 8) beside `w00000.scale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from potluck.errors import Diverged, InvalidModel
from potluck.messages import Compression
from potluck.weights import Array, Reader, Spec, Writer

Kind = Literal["none", "int8", "int4"]

BLOCK = 256
PIECE = 512 * BLOCK
"""Values that are worked on at once: memory does not depend on the size of the model."""
SMALL = 4096
"""A tensor of fewer values is not worth its error."""
ERROR_LIMIT = 0.3
"""Relative error of 4 bits (root of the mean square over that of the values) above which `auto` takes 8."""
SAMPLED_BLOCKS = 512
_DIVERGED = (
    "training diverged: the update holds values that are not finite; lower the learning rate, "
    "or look for values in the data that are not finite"
)
_LEVELS = {"int8": 127, "int4": 7}
_BYTES = np.arange(256, dtype=np.uint8)
_PAIRS = np.stack([_BYTES & 15, _BYTES >> 4], axis=1).astype(np.int8) - np.int8(8)
"""The two values of 4 bits that a byte stands for."""
_PAIRS_FLOAT = _PAIRS.astype(np.float32).view(np.uint64).reshape(-1)
"""Both as one number of 64 bits, which is looked up at once."""
_SQUARES = {
    "int8": (_BYTES.view(np.int8).astype(np.int16) ** 2).astype(np.uint16),
    "int4": np.square(_PAIRS).sum(axis=1).astype(np.uint16),
}
"""By the byte: the sum of the squares of what it stands for."""


def quantise(values: Array, kind: Literal["int8", "int4"]) -> tuple[Array, Array]:
    """(codes, scales) of float values: codes int8, or uint8 with two values each; scales float32, one a block.

    Raises Diverged where a value is not finite.
    """
    count = len(values)
    padded = values.astype(np.float32, copy=False)
    if count % BLOCK:
        padded = np.concatenate([padded, np.zeros(-count % BLOCK, np.float32)])
    blocks = padded.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1) / np.float32(_LEVELS[kind])
    if not np.isfinite(scales).all():
        raise Diverged(_DIVERGED)
    # Of values too small to have an inverse nothing is left.
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > np.finfo(np.float32).tiny)
    levels = blocks * inverse[:, None]
    np.rint(levels, out=levels)
    if kind == "int8":
        return levels.astype(np.int8).reshape(-1)[:count], scales
    levels += np.float32(8)
    pairs = levels.astype(np.uint8).view("<u2").reshape(-1)[: -(-count // 2)]
    return (pairs | pairs >> np.uint16(4)).astype(np.uint8), scales


def dequantise(codes: Array, scales: Array, kind: Literal["int8", "int4"], count: int) -> Array:
    """The `count` float32 values that the codes stand for: the same bits on every machine."""
    values = np.empty(len(scales) * BLOCK, np.float32)
    if kind == "int8":
        values[:count] = codes
    else:
        np.take(_PAIRS_FLOAT, codes, out=values.view(np.uint64)[: len(codes)], mode="wrap")
    values[count:] = 0
    blocks = values.reshape(-1, BLOCK)
    np.multiply(blocks, scales[:, None], out=blocks)
    return values[:count]


def error(values: Array, kind: Literal["int8", "int4"]) -> float:
    """Relative error of quantising: root mean square of what is lost, over that of the values."""
    lost = dequantise(*quantise(values, kind), kind, len(values)) - values
    norm = float(np.linalg.norm(values))
    return float(np.linalg.norm(lost)) / norm if norm else 0.0


def choose(spec: Spec, compression: Compression, read: Callable[[int, int], Array]) -> Kind:
    """How a tensor travels, by its size and the error measured on some of its blocks. `read` gives values by position."""
    if compression == "none" or spec.dtype.kind != "f" or spec.count < SMALL:
        return "none"
    if compression != "auto":
        return compression
    blocks = spec.count // BLOCK
    places = np.linspace(0, blocks - 1, min(blocks, SAMPLED_BLOCKS // 32)).astype(int) * BLOCK
    sample = np.concatenate([read(place, min(place + 32 * BLOCK, spec.count)) for place in places.tolist()])
    return "int4" if error(sample, "int4") <= ERROR_LIMIT else "int8"


class UpdateWriter:
    """A file of updates for the weights in `plan`; a context manager. Their differences follow in order, in pieces of whole blocks."""

    def __init__(self, path: Path, plan: Sequence[tuple[Spec, Kind]]) -> None:
        specs: list[Spec] = []
        for spec, kind in plan:
            if kind == "none":
                specs.append(spec)
                continue
            codes = spec.count if kind == "int8" else -(-spec.count // 2)
            specs.append(Spec(f"{spec.name}.{kind}", np.dtype(np.int8 if kind == "int8" else np.uint8), (codes,)))
            specs.append(Spec(f"{spec.name}.scale", np.dtype(np.float32), (-(-spec.count // BLOCK),)))
        self._writer = Writer(path, specs)

    def __enter__(self) -> UpdateWriter:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def write(self, kind: Kind, pieces: Iterable[Array]) -> None:
        """Write one weight's difference."""
        for _ in self._written(kind, pieces):
            pass

    def write_and_read(self, kind: Kind, pieces: Iterable[Array]) -> Iterator[Array]:
        """Write one weight's difference; yields each piece as a reader will have it. To be used to its end."""
        for piece, quantised in self._written(kind, pieces):
            yield piece if kind == "none" else dequantise(*quantised, kind, len(piece))

    def _written(self, kind: Kind, pieces: Iterable[Array]) -> Iterator[tuple[Array, tuple[Array, Array]]]:
        scales: list[Array] = []
        for piece in pieces:
            codes, scale = (piece, piece[:0]) if kind == "none" else quantise(piece, kind)
            self._writer.write(codes)
            scales.append(scale)
            yield piece, (codes, scale)
        for scale in scales:
            self._writer.write(scale)


class UpdateReader:
    """The differences in a file of updates, by weight; a context manager. Raises InvalidModel for a file that is none."""

    def __init__(self, path: Path, weights: Reader) -> None:
        """`weights`: those that the updates are for."""
        self._file = Reader(path)
        self._weights = weights
        self._kinds: dict[str, Kind] = {}

    def __enter__(self) -> UpdateReader:
        self._file.__enter__()
        try:
            for name, spec in self._weights.specs.items():
                self._kinds[name] = self._kind(spec)
        except InvalidModel:
            self._file.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def read(self, name: str, start: int, stop: int) -> Array:
        """Differences `start` (at a block's beginning) to `stop` of the flattened weight."""
        kind = self._kinds[name]
        stop = min(stop, self._weights.specs[name].count)
        if kind == "none":
            return self._file.read(name, start, stop)
        return dequantise(*self._quantised(name, kind, start, stop), kind, stop - start)

    def square(self, name: str, start: int, stop: int) -> float:
        """The sum of the squares of the same differences, from their codes. Raises Diverged where it is not finite."""
        kind = self._kinds[name]
        stop = min(stop, self._weights.specs[name].count)
        if kind == "none":
            return square(self._file.read(name, start, stop))
        codes, scales = self._quantised(name, kind, start, stop)
        squares = np.zeros((len(scales), BLOCK if kind == "int8" else BLOCK // 2), np.uint16)
        np.take(_SQUARES[kind], codes.view(np.uint8), out=squares.reshape(-1)[: len(codes)], mode="wrap")
        return square(np.sqrt(squares.sum(axis=1, dtype=np.float64)) * scales)

    def _quantised(self, name: str, kind: Kind, start: int, stop: int) -> tuple[Array, Array]:
        each = 1 if kind == "int8" else 2
        codes = self._file.read(f"{name}.{kind}", start // each, -(-stop // each))
        return codes, self._file.read(f"{name}.scale", start // BLOCK, -(-stop // BLOCK))

    def _kind(self, spec: Spec) -> Kind:
        found = self._file.specs
        if (plain := found.get(spec.name)) is not None:
            if (plain.dtype, plain.shape) == (spec.dtype, spec.shape):
                return "none"
        elif (scale := found.get(f"{spec.name}.scale")) is not None and scale.count == -(-spec.count // BLOCK):
            for kind, dtype, each in (("int8", np.int8, 1), ("int4", np.uint8, 2)):
                codes = found.get(f"{spec.name}.{kind}")
                if codes is not None and codes.dtype == dtype and codes.count == -(-spec.count // each):
                    return kind  # type: ignore[return-value]
        raise InvalidModel(f"the update {self._file.path.name[:12]} does not fit weight {spec.name}")


def spans(spec: Spec) -> Iterator[tuple[int, int]]:
    """Positions of the pieces of a flattened weight."""
    for start in range(0, spec.count, PIECE):
        yield start, min(start + PIECE, spec.count)


def write_update(path: Path, before: Path, after: Sequence[Array], compression: Compression) -> float:
    """The update that leads from the weights in the file `before` to those of `after`, which are in memory; returns its norm.

    Raises InvalidModel where they do not fit, Diverged where they are not finite.
    """
    with Reader(before) as base:
        specs = sorted(base.specs.values(), key=lambda spec: spec.name[1:])  # in whatever order they were written
        if [spec.shape for spec in specs] != [array.shape for array in after]:
            raise InvalidModel("the weights before and after the round do not fit")
        flat = {spec.name: array.reshape(-1) for spec, array in zip(specs, after, strict=True)}

        def difference(name: str, start: int, stop: int) -> Array:
            values = flat[name][start:stop].astype(base.specs[name].dtype, copy=False)
            return values - base.read(name, start, stop) if values.dtype.kind == "f" else values

        plan = [
            (spec, choose(spec, compression, lambda start, stop, name=name: difference(name, start, stop)))  # type: ignore[misc]
            for name, spec in base.specs.items()
        ]
        with UpdateWriter(path, plan) as writer:
            for spec, kind in plan:
                writer.write(kind, (difference(spec.name, *span) for span in spans(spec)))
    return norm(path, before)


def norm(path: Path, weights: Path) -> float:
    """Of an update for these weights: L2, over all that are floating-point. Raises InvalidModel, Diverged."""
    with Reader(weights) as base, UpdateReader(path, base) as update:
        return math.sqrt(
            math.fsum(update.square(name, *span) for name, spec in base.specs.items() for span in spans(spec))
        )


def square(piece: Array) -> float:
    """The sum of the squares of differences. Raises Diverged where it is not finite."""
    if piece.dtype.kind != "f":
        return 0.0
    flat = piece.astype(np.float64, copy=False) if piece.dtype.itemsize < 4 else piece
    with np.errstate(over="ignore"):
        found = float(np.dot(flat, flat))
    if not math.isfinite(found):
        raise Diverged(_DIVERGED)
    return found


def apply_update(before: Path, update: Path, target: Path) -> None:
    """Write the weights that an update leads to: on every machine the same bytes. Raises InvalidModel."""
    with (
        Reader(before) as base,
        UpdateReader(update, base) as step,
        Writer(target, list(base.specs.values())) as writer,
    ):
        for name, spec in base.specs.items():
            for start, stop in spans(spec):
                writer.write(applied(base.read(name, start, stop), step.read(name, start, stop)))


def applied(before: Array, difference: Array) -> Array:
    """New values of a piece."""
    return before + difference if before.dtype.kind == "f" else difference
