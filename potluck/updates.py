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


def quantise(values: Array, kind: Literal["int8", "int4"]) -> tuple[Array, Array]:
    """(codes, scales) of float values: codes int8, or uint8 with two values each; scales float32, one a block.

    Raises Diverged where a value is not finite.
    """
    count = len(values)
    padded = np.zeros(-(-count // BLOCK) * BLOCK, np.float32)
    padded[:count] = values
    blocks = padded.reshape(-1, BLOCK)
    scales = np.maximum(blocks.max(axis=1), -blocks.min(axis=1)) / np.float32(_LEVELS[kind])
    if not np.isfinite(scales).all():
        raise Diverged(_DIVERGED)
    # Of values too small to have an inverse nothing is left.
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > np.finfo(np.float32).tiny)
    np.multiply(blocks, inverse[:, None], out=blocks)
    codes = np.rint(blocks, out=blocks).astype(np.int8).reshape(-1)[:count]
    if kind == "int8":
        return codes, scales
    nibbles = np.full(count + count % 2, 8, np.uint8)
    nibbles[:count] = (codes + np.int8(8)).view(np.uint8)
    return nibbles[0::2] | (nibbles[1::2] << np.uint8(4)), scales


def dequantise(codes: Array, scales: Array, kind: Literal["int8", "int4"], count: int) -> Array:
    """The `count` float32 values that the codes stand for: the same bits on every machine."""
    values = np.zeros(len(scales) * BLOCK, np.float32)
    if kind == "int8":
        values[:count] = codes
    else:
        half = -(-count // 2)
        values[0 : 2 * half : 2] = codes & np.uint8(15)
        values[1 : 2 * half : 2] = codes >> np.uint8(4)
        values -= np.float32(8)
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

    def write(self, kind: Kind, pieces: Iterable[Array]) -> Iterator[Array]:
        """Write one weight's difference; yields each piece as a reader will have it. To be used to its end."""
        scales: list[Array] = []
        for piece in pieces:
            if kind == "none":
                self._writer.write(piece)
                yield piece
            else:
                codes, scale = quantise(piece, kind)
                self._writer.write(codes)
                scales.append(scale)
                yield dequantise(codes, scale, kind, len(piece))
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
        each = 1 if kind == "int8" else 2
        codes = self._file.read(f"{name}.{kind}", start // each, -(-stop // each))
        scales = self._file.read(f"{name}.scale", start // BLOCK, -(-stop // BLOCK))
        return dequantise(codes, scales, kind, stop - start)

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
    squares = 0.0
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
                for piece in writer.write(kind, (difference(spec.name, *span) for span in spans(spec))):
                    squares += square(piece)
    return math.sqrt(squares)


def norm(path: Path, weights: Path) -> float:
    """Of an update for these weights: L2, over all that are floating-point. Raises InvalidModel, Diverged."""
    with Reader(weights) as base, UpdateReader(path, base) as update:
        return math.sqrt(
            math.fsum(square(update.read(name, *span)) for name, spec in base.specs.items() for span in spans(spec))
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
