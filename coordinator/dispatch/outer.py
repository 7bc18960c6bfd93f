"""The outer step: from the updates of a round's nodes to the weights of the next round, piece by piece.

The mean of the updates by samples (FedAvg, McMahan et al., 2017; FedNova, Wang et al., 2020, for data that live on the nodes) is
used as the gradient of the outer optimizer: SGD with Nesterov momentum (DiLoCo, Douillard et al., 2023),
v <- m v + d, w <- w + lr (d + m v). What is added to the weights is quantised first, and the nodes get the same update, so that all have
the same bits. State that is not trained is averaged where a mean makes sense (moving statistics); else the values of the largest part
are used. Weights that no node changed stay. Memory is for a few pieces, for any size of model and any number of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potluck.errors import Diverged, InvalidModel
from potluck.weights.files import Array, Reader, Spec, Writer
from potluck.weights.updates import Role, Travel, UpdateReader, UpdateWriter, choose, spans, square
from potluck.wire.values import Compression

MOMENTUM_LIMIT = 0.9
COOLING = 0.3
"""The last part of a job, in which momentum falls to zero."""
AGREEMENT_KEPT = 0.8
"""How much of the smoothed agreement is kept in each round ..."""
AGREEMENT_KEPT_ALONE = 0.95
"""... and in a round with a single update: usually the others were lost, so it says nothing about agreement."""


@dataclass(frozen=True)
class Outer:
    """The outer optimizer's settings for one round."""

    learning_rate: float
    momentum: float


def outer_for(
    round: int,
    done: float,
    agreement: float,
    learning_rate: float | None = None,
    momentum: float | None = None,
    inner_momentum: float = 0.0,
) -> Outer:
    """The settings of `round` (from 0), after which the share `done` of the job is done; `agreement` is of the rounds before.

    Uses what the user has set. Else: full steps, with momentum that rises as in Nesterov's accelerated gradient (1983; k / (k + 3), as
    Beck and Teboulle write it, 2009), and falls to zero at the end. It is smaller the more the nodes agree: the mean of updates that
    agree is a full step already; else the mean is shorter than each update. docs/training.md has the evidence. On nodes with their own
    data, `inner_momentum` already made steps 1 / (1 - inner_momentum) times as long, each towards that data (see docs/federated.md).
    """
    agreed = min(1.0, max(0.0, agreement))
    rising = min(round / (round + 3), MOMENTUM_LIMIT, 1 - agreed**2)
    ruled = rising * min(1.0, max(0.0, 1 - done) / COOLING) * (1 - min(1.0, max(0.0, inner_momentum)))
    return Outer(1.0 if learning_rate is None else learning_rate, ruled if momentum is None else momentum)


def nova_scales(items: Sequence[int], steps: Sequence[int]) -> list[float]:
    """FedNova's factors (Wang et al., 2020) for each node's update, before the mean by `items` (the size of its data).

    A node that took more steps has gone further towards the optimum of its own data, and would pull all others there. So each update
    counts per step, and the mean is as long as the mean number of steps (equation 7 there, for SGD steps of equal weight).
    """
    mean = sum(count * taken for count, taken in zip(items, steps, strict=True)) / sum(items)
    return [mean / taken for taken in steps]


def agreement_of(square: float, updates: Sequence[tuple[float, int]], before: float | None) -> float:
    """How much a round's nodes agree, smoothed over the rounds: the mean cosine between two updates; 1 for a single node.

    `square` is the squared norm of the mean update; `updates` are (norm, weight in the mean).
    """
    total = sum(weight for _, weight in updates)
    shares = [weight / total for _, weight in updates]
    parts = sum(share * norm**2 for share, (norm, _) in zip(shares, updates, strict=True))
    alone = sum(share**2 for share in shares)  # the square, as a share of the mean square, if no two updates agree
    single = alone > 0.999
    now = 1.0 if parts <= 0 or single else (square / parts - alone) / (1 - alone)
    if before is None:
        return now
    kept = AGREEMENT_KEPT_ALONE if single else AGREEMENT_KEPT
    return kept * before + (1 - kept) * now


def combine(
    weights: Path,
    updates: Sequence[tuple[Path, int]],
    velocity: Path | None,
    outer: Outer,
    compression: Compression,
    *,
    scales: Sequence[float] | None = None,
    step: Path,
    after: Path,
    velocity_after: Path,
) -> float:
    """Take the outer step of a round from `weights`, with `updates` as (file, weight in the mean) and the `velocity` of the round before.

    The mean is by samples, or for data that live on the nodes by items; `scales` multiply the updates of trained weights before that.
    Writes `step` (what is added, as the nodes get it), `after` (the new weights) and `velocity_after` (of trained weights). Returns the
    squared norm of the mean update of trained weights. Raises InvalidModel where files do not fit the weights, Diverged where values are
    not finite.
    """
    if not updates or sum(weight for _, weight in updates) <= 0:
        raise InvalidModel("no samples were trained on in this round, so there is nothing to average")
    with ExitStack() as stack:
        base = stack.enter_context(Reader(weights))
        before = stack.enter_context(Reader(velocity)) if velocity is not None else None
        parts = [
            _Part(stack.enter_context(UpdateReader(path, base)), weight, scale)
            for (path, weight), scale in zip(updates, scales or [1.0] * len(updates), strict=True)
        ]
        roles = {name: role for name in base.specs if (role := _role(parts, name)) is not None}

        def pushed(spec: Spec, start: int, stop: int) -> tuple[Array, Array, float]:
            """(what to add, the velocity, the mean's square) for a piece of a trained weight."""
            mean = _mean(parts, spec, start, stop)
            found = square(mean)
            momentum, rate = mean.dtype.type(outer.momentum), mean.dtype.type(outer.learning_rate)
            if not momentum:
                return rate * mean, mean, found
            known = before is not None and spec.name in before.specs
            fast = before.read(spec.name, start, stop) if before is not None and known else np.zeros_like(mean)
            fast *= momentum
            fast += mean
            wanted = momentum * fast
            wanted += mean
            wanted *= rate
            return wanted, fast, found

        specs = list(base.specs.values())
        plan: list[tuple[Spec, Travel]] = []
        for spec in specs:
            if (role := roles.get(spec.name)) is not None:
                read = lambda start, stop, spec=spec: pushed(spec, start, stop)[0]  # noqa: E731
                plan.append((spec, choose(spec, compression, read) if role == "trained" else role))
        writer = stack.enter_context(UpdateWriter(step, plan))
        target = stack.enter_context(Writer(after, specs))
        trained = [spec for spec in specs if roles.get(spec.name) == "trained"]
        moving = stack.enter_context(Writer(velocity_after, trained))
        travels = {spec.name: travel for spec, travel in plan}
        squares: list[float] = []
        for spec in specs:
            role = roles.get(spec.name)
            if role is None:
                for span in spans(spec):
                    target.write(base.read(spec.name, *span))
                continue
            # Used in step with the quantised pieces that come back: what was made for one is not made again for the other.
            made: list[Array] = []

            def pieces(spec: Spec = spec, role: Role = role, made: list[Array] = made) -> Iterator[Array]:
                for start, stop in spans(spec):
                    if role != "trained":
                        yield _state(parts, role, spec, start, stop)
                        continue
                    wanted, fast, found = pushed(spec, start, stop)
                    squares.append(found)
                    moving.write(fast)
                    made.append(base.read(spec.name, start, stop))
                    yield wanted

            for piece in writer.write_and_read(travels[spec.name], pieces()):
                new = made.pop() + piece if role == "trained" else piece
                if role != "value" and not np.isfinite(new).all():
                    raise Diverged(
                        f"training diverged: weight {spec.name} is not finite any more; lower the learning rate, "
                        "or look for values in the data that are not finite"
                    )
                target.write(new)
        return math.fsum(squares)


@dataclass(frozen=True)
class _Part:
    """An update, its weight in the mean, and its factor there for trained weights."""

    update: UpdateReader
    weight: int
    scale: float


def _role(parts: Sequence[_Part], name: str) -> Role | None:
    """The role of a weight by the nodes that changed it; None if none did. Raises InvalidModel where they do not agree."""
    found = {part.update.role(name) for part in parts} - {None}
    if len(found) > 1:
        raise InvalidModel(f"the nodes do not agree whether weight {name} is trained")
    return found.pop() if found else None


def _mean(parts: Sequence[_Part], spec: Spec, start: int, stop: int) -> Array:
    """The mean difference of a piece of a trained weight."""
    total = sum(part.weight for part in parts)
    # 64 bits for 64-bit weights, 32 bits for others: the sum is exact to a few parts in ten million.
    dtype = spec.dtype if spec.dtype.itemsize > 4 else np.dtype(np.float32)
    sums: Array | None = None
    for part in parts:
        if part.update.role(spec.name) is None:
            continue
        values = part.update.read(spec.name, start, stop).astype(dtype, copy=False)
        values *= dtype.type(part.weight / total * part.scale)
        sums = values if sums is None else np.add(sums, values, out=sums)
    assert sums is not None
    return sums.astype(spec.dtype, copy=False)


def _state(parts: Sequence[_Part], role: Role, spec: Spec, start: int, stop: int) -> Array:
    """A piece of state: the mean of the new values, or the values of the largest part that changed them."""
    if role == "value":
        changed = [part for part in parts if part.update.role(spec.name) is not None]
        return max(changed, key=lambda part: part.weight).update.read(spec.name, start, stop)
    # Whole numbers of samples and 64 bits: if all nodes have the same value, their mean is exactly that value.
    sums = np.zeros(stop - start, np.float64)
    for part in parts:
        sums += part.weight * part.update.read(spec.name, start, stop).astype(np.float64)
    return (sums / sum(part.weight for part in parts)).astype(spec.dtype)
