"""Traffic: a canary gets its share of any requests, and a worse version is told apart from bad luck."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.serving.records import (
    AnyDeploymentEvent,
    Deployed,
    Parked,
    Records,
    Retired,
    Routed,
    Settled,
    TakenDown,
    Woken,
)
from coordinator.serving.traffic import ANSWERS_LEAST, Traffic, worse
from coordinator.serving.windows import IMPATIENT_SECONDS, SLOT_SECONDS, WINDOW_SECONDS, Summary, Window
from potluck.wire import codec
from potluck.wire.jobs import Deploy
from potluck.wire.values import BlobRef

MODEL = BlobRef(sha256="0" * 64, size=1)


def everything(name: str) -> bool:
    return True


def test_each_version_is_beside_the_one_that_it_replaces_or_has_replaced() -> None:
    traffic = Traffic("m", stable="m:2", canary="m:3", previous="m:1")
    assert [traffic.beside(f"m:{version}") for version in (1, 2, 3)] == ["m:2", "m:1", "m:2"]


@given(weight=st.integers(0, 100), begin=st.integers(0, 300), step=st.integers(1, 20))
def test_a_canary_gets_its_share_whatever_the_period_of_the_questions(weight: int, begin: int, step: int) -> None:
    traffic = Traffic("m", stable="m:1", canary="m:2", weight=weight)
    picked = [traffic.pick(everything) == "m:2" for _ in range(begin + 200 * step)]
    mine = picked[begin::step]  # requests of one client among others that take turns
    if step == 1:
        assert abs(sum(mine) - 2 * weight) <= 4
    assert abs(sum(mine) / len(mine) - weight / 100) < 0.12


def test_who_is_not_ready_gets_no_share() -> None:
    traffic = Traffic("m", stable="m:2", canary="m:3", weight=100, previous="m:1")
    assert {traffic.pick({"m:2"}.__contains__) for _ in range(50)} == {"m:2"}
    assert {traffic.pick({"m:1"}.__contains__) for _ in range(50)} == {"m:1"}
    assert {traffic.pick(set[str]().__contains__) for _ in range(50)} == {"m:2"}  # it is loaded on demand


def test_roles_and_shares() -> None:
    traffic = Traffic("m", stable="m:1", canary="m:2", weight=10, shadow="m:3", previous="m:4")
    assert [traffic.role(f"m:{n}") for n in range(6)] == ["", "stable", "canary", "shadow", "previous", ""]
    assert [traffic.share(f"m:{n}") for n in range(6)] == [0, 90, 10, 0, 0, 0]


def summary(seconds: list[float], failures: int = 0) -> Summary:
    window = Window()
    for one in seconds:
        window.answered(100.0, one, "")
    for _ in range(failures):
        window.answered(100.0, 0.001, "engine_failed")
    return window.summary(100.0)


def test_worse_by_failures() -> None:
    good = summary([0.05] * 500, failures=1)
    assert "of its answers failed" in worse([summary([0.05] * 60, failures=6)], good, 2.0)
    assert not worse([summary([0.05] * 60, failures=4)], good, 2.0)
    assert not worse([summary([], failures=ANSWERS_LEAST - 1)], good, 2.0)
    assert not worse([summary([0.05] * 100, failures=400)], good, 0)
    assert "failed" in worse([summary([], failures=50)], Summary(), 2.0)  # having nothing to compare with is no excuse


def test_worse_by_p99() -> None:
    good = summary([0.05] * 500)
    bad = summary([0.05] * 60 + [0.3] * 5)
    assert "p99 is 3" in worse([bad, bad], good, 2.0)
    assert not worse([bad, bad], good, 10.0)
    assert not worse([summary([0.05] * 100 + [0.3] * 2)] * 2, good, 2.0)  # four of two hundred: by chance
    assert not worse([bad, summary([0.05] * 60)], good, 2.0)  # a hiccup: all waiting requests were late, once
    assert not worse([summary([0.09] * 60)] * 3, good, 2.0)
    assert not worse([summary([9.0] * 40)] * 2, good, 2.0)  # too few to know a p99
    assert not worse([summary([9.0] * 500)] * 2, Summary(), 2.0)
    assert not worse([summary([0.03] * 500)] * 2, summary([0.002] * 500), 2.0)  # the difference is tiny


def test_what_says_nothing_against_a_version_is_no_failure() -> None:
    window = Window()
    for code in ("cancelled", "inputs_lost", "not_found", "overloaded", "invalid_request", "too_large", "bad_message"):
        window.answered(0.0, 0.1, code)
    assert window.summary(0.0).count == 0
    against = ("timed_out", "model_failed", "invalid_model", "engine_failed", "model_crashed", "out_of_memory")
    for code in (*against, "unavailable", "internal"):
        window.answered(0.0, IMPATIENT_SECONDS, code)
    window.answered(0.0, IMPATIENT_SECONDS / 2, "timed_out")  # the client was impatient
    found = window.summary(0.0)
    assert (found.count, found.failures) == (8, 8)


@given(st.lists(st.floats(1e-4, 50.0), min_size=1, max_size=300), st.floats(0.01, 1.0))
def test_quantiles_are_right_to_a_fifth(seconds: list[float], share: float) -> None:
    found = summary(seconds)
    rank = max(0, -(-int(share * len(seconds) * 1000) // 1000) - 1)
    exact = sorted(seconds)[min(rank, len(seconds) - 1)]
    assert exact / 1.21 <= found.quantile(share) or found.quantile(share) >= exact
    assert found.quantile(1.0) >= max(seconds) / 1.0001
    assert found.quantile(1.0) <= max(seconds) * 1.21 + 1e-4
    assert found.slower_than(max(seconds)) == 0


@given(st.lists(st.floats(0, 300.0), min_size=1, max_size=100))
def test_a_window_forgets_what_is_older(times: list[float]) -> None:
    window = Window()
    for at in sorted(times):
        window.answered(at, 0.01, "")
    now = max(times)
    found = window.summary(now).count
    assert found >= sum(at > now - WINDOW_SECONDS + SLOT_SECONDS for at in times)
    assert found <= sum(at > now - WINDOW_SECONDS - SLOT_SECONDS for at in times)
    assert window.summary(now + WINDOW_SECONDS + SLOT_SECONDS).count == 0


class Life(RuleBasedStateMachine):
    """Whatever happens to deployments, the plain name means an existing one, and a rewritten journal says the same."""

    def __init__(self) -> None:
        super().__init__()
        self.records = Records()

    def record(self, event: AnyDeploymentEvent) -> None:
        self.records.apply(codec.unpack(codec.pack(event), AnyDeploymentEvent))  # type: ignore[arg-type]

    @rule(version=st.integers(1, 4), wanted=st.integers(0, 2), asked=st.booleans())
    def deploy(self, version: int, wanted: int, asked: bool) -> None:
        spec = Deploy(model=f"m:{version}", canary=3) if asked else None
        self.record(Deployed(name=f"m:{version}", model=MODEL, wanted=wanted, asked=spec))

    @precondition(lambda self: self.records.deployments)
    @rule(data=st.data(), what=st.sampled_from((Settled, Woken, Retired, TakenDown)))
    def change(self, data: st.DataObject, what: type[Settled | Woken | Retired | TakenDown]) -> None:
        self.record(what(name=data.draw(st.sampled_from(sorted(self.records.deployments)))))

    @precondition(lambda self: self.records.deployments)
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.records.deployments)))
        self.record(Parked(name=name, why="withdrawn", reason="worse"))

    @precondition(lambda self: self.records.deployments)
    @rule(data=st.data())
    def route(self, data: st.DataObject) -> None:
        names = [*data.draw(st.permutations(sorted(self.records.deployments))), "", "", ""]
        stable, canary, shadow, previous = names[:4]
        weight = 10 if canary else 0
        self.record(Routed(name="m", stable=stable, canary=canary, weight=weight, shadow=shadow, previous=previous))

    @invariant()
    def holds(self) -> None:
        traffic = self.records.traffic.get("m")
        assert (traffic is None) == (not self.records.deployments)
        if traffic is not None:
            traffic.check_invariants()
            assert traffic.stable in self.records.deployments
            assert {traffic.canary, traffic.shadow, traffic.previous} <= {"", *self.records.deployments}
        again = Records()
        for event in self.records.events():
            again.apply(event)
        assert again == self.records


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_journal_from_before_there_was_traffic_means_the_newest_version_that_was_ready() -> None:
    records = Records()
    for event in (
        Deployed(name="m:1", model=MODEL, wanted=1),
        Settled(name="m:1"),
        Deployed(name="m:2", model=MODEL, wanted=1),
    ):
        records.apply(codec.unpack(codec.pack(event), AnyDeploymentEvent))  # type: ignore[arg-type]
    assert records.traffic["m"].stable == "m:1"
    records.apply(Settled(name="m:2"))
    assert records.traffic["m"].stable == "m:2"
    records.apply(TakenDown(name="m:2"))
    assert records.traffic["m"].stable == "m:1"
