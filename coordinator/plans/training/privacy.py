"""How much training tells of the data: the epsilon of (epsilon, delta)-differential privacy, computed by dp-accounting."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass

from potluck import extras
from potluck.errors import InvalidRequest
from potluck.wire.values import Privacy


@dataclass(frozen=True)
class Spent:
    """How one node's data were used: it holds `items`, has taken `steps` on them, and has sent its update in `rounds`."""

    items: int
    steps: int = 0
    rounds: int = 0


def check() -> None:
    """Raises InvalidRequest if dp-accounting is not installed here."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise InvalidRequest(
            "noise needs an accountant that says what it is worth, and the coordinator has none: "
            f"{extras.install('privacy')} there"
        )


def load() -> None:
    """Import dp-accounting. The first import takes seconds (SciPy): do it in a thread, before `epsilon` is needed."""
    import dp_accounting.rdp  # noqa: F401


def loudness(rules: Privacy, spent: Iterable[Spent], weights: int, batch_size: int) -> float:
    """The expected length of the noise in the nodes' mean, as a multiple of the greatest length that the mean has without noise.

    For the unit `node` this is the noise of one round, for `example` that of one step. Lengths are Euclidean. In each of the `weights`
    directions, the noise has the standard deviation noise_multiplier * l2_norm_clip. What is clipped has at most the length
    l2_norm_clip in all directions together.
    """
    items = [node.items for node in spent]
    # This is 1 / nodes if all of them hold equally many items.
    shares = sum((count / sum(items)) ** 2 for count in items)
    # The gradients of so many examples are added up before the noise.
    cut = batch_size if rules.unit == "example" else 1
    return rules.noise_multiplier * math.sqrt(weights * shares) / cut


def epsilon(rules: Privacy, spent: Iterable[Spent], batch_size: int) -> float:
    """The largest epsilon of all nodes. Each item lives on one node, so what other nodes did tells nothing of it.

    It is computed by Renyi differential privacy (Mironov, 2017; for the Poisson-sampled Gaussian mechanism: Mironov et al., 2019).
    For the unit `example`, each step takes every item with the probability batch_size / items. For `node`, each round takes every
    node. Neighbouring data sets differ in this: one item, or all the items of one node, are there or not.
    """
    import dp_accounting
    from dp_accounting import rdp

    found = 0.0
    noise = dp_accounting.GaussianDpEvent(rules.noise_multiplier)
    for node in set(spent):
        accountant = rdp.RdpAccountant()
        if rules.unit == "example":
            rate = min(1.0, batch_size / node.items)
            accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, noise), node.steps)
        else:
            accountant.compose(noise, node.rounds)
        found = max(found, float(accountant.get_epsilon(rules.delta)))
    return found
