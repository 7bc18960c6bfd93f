"""The order of items in a data set, and where it is cut into shards. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from potluck.wire.values import SHARDS_LIMIT

SHARDS_WANTED = 32
"""Small sets are cut into this many shards, so that several nodes can share them by speed."""
ITEMS_WANTED = 16
"""A shard has at least this many items, if the set has them."""


def shuffled(labels: np.ndarray[Any, Any] | None, count: int, seed: int) -> np.ndarray[Any, Any]:
    """A permutation of `count` items in which every stretch has about the class mixture of the whole.

    Items of a class with n members lie at random within n equal stretches of the order (stratified sampling).
    """
    rng = np.random.default_rng(seed)
    if labels is None:
        return rng.permutation(count)
    places = np.empty(count, np.float64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        places[members] = (np.arange(len(members)) + rng.random(len(members))) / len(members)
    return np.argsort(places, kind="stable")


def cuts(sizes: Sequence[int] | np.ndarray[Any, Any], shard_bytes: int) -> list[tuple[int, int]]:
    """(start, stop) of shards over items of `sizes` bytes: equal in bytes, each up to about `shard_bytes`, or SHARDS_LIMIT of them."""
    ends = np.cumsum(np.asarray(sizes, np.float64))
    count = len(ends)
    if not count:
        return []
    wanted = max(int(np.ceil(ends[-1] / shard_bytes)), min(SHARDS_WANTED, count // ITEMS_WANTED), 1)
    wanted = min(wanted, count, SHARDS_LIMIT)
    edges = np.searchsorted(ends, ends[-1] * np.arange(1, wanted) / wanted, side="left") + 1
    bounds = [0, *np.unique(edges[edges < count]).tolist(), count]
    return list(pairwise(bounds))


def passes(count: int, seed: int, skip: int = 0) -> Iterator[int]:
    """Item numbers for training, pass after pass without end, each pass in its own order; leaves out the first `skip`.

    The order is the same on every machine, so nodes that take steps together need not tell each other what comes next.
    """
    number, first = divmod(skip, count)
    while True:
        yield from np.random.default_rng((seed, number)).permutation(count)[first:].tolist()
        number, first = number + 1, 0
