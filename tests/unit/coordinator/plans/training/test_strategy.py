"""Training of every kind: what it is made of, and what the dispatcher may ask of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from coordinator.plans.events import JobSubmitted, StrategyChosen
from coordinator.plans.job import Attempt, Job, Training
from coordinator.plans.strategies import strategy_for
from coordinator.plans.training.auto import AutoStrategy
from coordinator.plans.training.federated import Federated
from coordinator.plans.training.fixed import Fixed
from coordinator.plans.training.local import Local
from coordinator.plans.training.rounds import UpdateRounds
from coordinator.plans.training.strategy import TrainingStrategy
from coordinator.plans.training.sync import SyncRounds
from potluck.wire.jobs import Evaluate, Train
from potluck.wire.values import BlobRef, DataFormat, Dataset, DataShard

BLOB = BlobRef(sha256="0" * 64, size=1)
DATA = Dataset(name="d", format=DataFormat(kind="arrays"), count=100, shards=(DataShard(blob=BLOB, count=100),))
KINDS: dict[str, dict[str, Any]] = {
    "local": {"strategy": "local"},
    "sync": {"strategy": "sync"},
    "auto": {"strategy": "auto"},
    "deterministic": {"strategy": "local", "deterministic": True},
    "federated": {"strategy": "local", "dataset": "node:d"},
}


def job(kind: str) -> Job:
    spec = Train(**{"model": "m", "dataset": "d", "validation": "v", "epochs": 1, **KINDS[kind]})
    submitted = JobSubmitted(at=0.0, job_id="j", request_id="", spec=spec, model=BLOB)
    return Job(submitted=submitted, strategy=strategy_for(submitted, DATA, DATA), dataset=DATA)


def parts(of: Any) -> Iterator[Any]:
    """What it is made of that may change, itself among it."""
    if dataclasses.is_dataclass(of) and not of.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        yield of
        for one in dataclasses.fields(of):
            yield from parts(getattr(of, one.name))


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_may_change_is_printed_once(kind: str) -> None:
    """So that tests see it when a plan changes something (`support.purely`)."""
    strategy = job(kind).strategy
    found = {id(part): type(part).__name__ for part in parts(strategy)}
    assert {"TrainingStrategy", "TrainingState", "Epochs", "Exchange", "OpenRound", "Trust"} <= set(found.values())
    text = repr(strategy)
    assert {name: text.count(f"{name}(") for name in found.values()} == dict.fromkeys(found.values(), 1)


def made_of(training: TrainingStrategy) -> list[type]:
    rounds = training.rounds
    return [type(rounds), type(rounds.manner)] if isinstance(rounds, UpdateRounds) else [type(rounds)]


def test_each_kind_has_its_rounds() -> None:
    found = {}
    for kind in KINDS:
        strategy = job(kind).strategy
        training = strategy.local if isinstance(strategy, AutoStrategy) else strategy
        assert isinstance(training, TrainingStrategy)
        found[kind] = made_of(training)
    assert found == {
        "local": [UpdateRounds, Local],
        "sync": [SyncRounds],
        "auto": [UpdateRounds, Local],
        "deterministic": [UpdateRounds, Fixed],
        "federated": [UpdateRounds, Federated],
    }


@pytest.mark.parametrize("chosen", ["local", "sync"])
def test_what_auto_has_chosen_goes_on_with_its_state(chosen: Any) -> None:
    found = job("auto")
    assert isinstance(found.strategy, AutoStrategy)
    state = found.strategy.local.state
    found.apply(StrategyChosen(at=1.0, chosen=chosen, why="it is faster"))
    assert isinstance(found.strategy, TrainingStrategy)
    assert found.strategy.state is state
    assert made_of(found.strategy) == ([UpdateRounds, Local] if chosen == "local" else [SyncRounds])
    assert found.strategy.progress({}).strategy == "it is faster"


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_kind_the_dispatcher_gets_its_answers(kind: str) -> None:
    training = job(kind).training
    assert isinstance(training, Training)
    assert training.wants(Attempt("1", "validation-1-0-5", "a", 0.0))
    assert training.wants(Attempt("1", "round-0", "a", 0.0))
    assert not training.wants(Attempt("1", "round-7", "a", 0.0)), "a round without it"
    assert (training.kept(), training.used_up(), training.checkpoint()) == (set(), (), None)
    assert (training.exported(), training.best_epoch()) == (None, 0)


def test_an_evaluation_is_no_training() -> None:
    submitted = JobSubmitted(at=0.0, job_id="j", request_id="", spec=Evaluate(model="m", dataset="d"), model=BLOB)
    found = Job(submitted=submitted, strategy=strategy_for(submitted, DATA, None), dataset=DATA)
    assert found.training is None
    with pytest.raises(ValueError, match="no training"):
        found.apply(StrategyChosen(at=1.0, chosen="local", why=""))
