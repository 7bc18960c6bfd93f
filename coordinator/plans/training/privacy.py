"""How much training tells of the data: epsilon of (epsilon, delta)-differential privacy, by an accountant (dp-accounting)."""

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
    """What was done with one node's data: `items` that it holds, training `steps` on them, and `rounds` whose update it sent."""

    items: int
    steps: int = 0
    rounds: int = 0


def check() -> None:
    """Raises InvalidRequest where there is no accountant here."""
    if importlib.util.find_spec("dp_accounting") is None:
        raise InvalidRequest(
            "noise needs an accountant that says what it is worth, and the coordinator has none: "
            f"{extras.install('privacy')} there"
        )


def load() -> None:
    """Import the accountant, once: it takes seconds (SciPy), so do it in a thread before `epsilon` is asked for."""
    import dp_accounting.rdp  # noqa: F401


def loudness(rules: Privacy, spent: Iterable[Spent], weights: int, batch_size: int) -> float:
    """How long the noise in the nodes' mean is, to be expected, as a multiple of the longest that a mean can be without it.

    Of one round for `node`, of one step for `example`. Both lengths are Euclidean: in each of the `weights` directions the noise has the
    standard deviation noise_multiplier * l2_norm_clip, while what is cut has l2_norm_clip in all of them together.
    """
    items = [node.items for node in spent]
    shares = sum((count / sum(items)) ** 2 for count in items)  # 1 / nodes, where each holds as many
    # The gradients of so many examples are added up before the noise.
    cut = batch_size if rules.unit == "example" else 1
    return rules.noise_multiplier * math.sqrt(weights * shares) / cut


def epsilon(rules: Privacy, spent: Iterable[Spent], batch_size: int) -> float:
    """Of the node whose data are known best: each item lives on one node, so what others did tells nothing of it.

    By Renyi differential privacy (Mironov, 2017; of the Poisson-sampled Gaussian mechanism, Mironov et al., 2019). For `example`
    each step takes every item with the probability batch_size / items; for `node` each round takes all of them.
    Neighbouring data sets differ by one item, or by all the items of one node, that are there or not.
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
