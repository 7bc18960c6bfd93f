"""A node's leases: whatever comes in any order, one runs at a time, and each gets an answer."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from node.assignments import (
    FENCE_SECONDS,
    QUEUE_LIMIT,
    REPORTS_RENEWED,
    Assignments,
    Effect,
    GiveUp,
    Outcome,
    Prefetch,
    Run,
    Send,
    Stop,
)
from potluck.wire.commands import AcknowledgeResult, LeaseShard, WithdrawLease
from potluck.wire.reports import LeaseRefused, LeaseRenewed, LeaseTaken, ShardFailed, ShardFinished
from potluck.wire.tasks import EvaluateResult, ExportTask
from potluck.wire.values import BlobRef, ErrorInfo

TASK = ExportTask(model=BlobRef(sha256="a" * 64, size=1), weights=BlobRef(sha256="b" * 64, size=1))
CANCELLED = ErrorInfo(code="cancelled", message="withdrawn")


def lease(attempt_id: str, epoch: int = 1) -> LeaseShard:
    return LeaseShard(epoch=epoch, job_id="job", shard_id="shard", attempt_id=attempt_id, lease_seconds=10, task=TASK)


def withdrawal(attempt_id: str, epoch: int = 1) -> WithdrawLease:
    return WithdrawLease(epoch=epoch, attempt_id=attempt_id, reason="test")


def finished(attempt_id: str) -> ShardFinished:
    return ShardFinished(attempt_id=attempt_id, result=EvaluateResult(count=1))


def sent(effects: Iterable[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def ran(effects: Iterable[Effect]) -> list[str]:
    return [effect.lease.attempt_id for effect in effects if isinstance(effect, Run)]


class Machine(RuleBasedStateMachine):
    """The assignments, with an obedient executor and coordinator around them, in any order."""

    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.assignments = Assignments()
        self.count = 0
        self.epoch = 1
        self.clusters = 0
        self.executing: str | None = None
        self.stopped = False
        self.started: list[str] = []
        self.taken: list[str] = []
        self.withdrawn: set[str] = set()
        self.outcomes: dict[str, Outcome] = {}
        self.acknowledged: set[str] = set()

    def perform(self, effects: Iterable[Effect]) -> list[object]:
        effects = list(effects)
        for effect in effects:
            match effect:
                case Run(lease=run):
                    assert self.executing is None, "two at once"
                    assert run.attempt_id not in self.started, "the same attempt twice"
                    self.executing, self.stopped = run.attempt_id, False
                    self.started.append(run.attempt_id)
                case Stop(attempt_id=attempt_id):
                    assert attempt_id == self.executing
                    assert not self.stopped
                    self.stopped = True
                case Prefetch(lease=ahead):
                    assert ahead.attempt_id not in self.started
                case Send(message=ShardFinished() | ShardFailed() as message):
                    assert self.outcomes[message.attempt_id] == message
                    assert message.attempt_id not in self.acknowledged | self.withdrawn
                case Send(message=LeaseTaken() | LeaseRenewed() as message):
                    assert message.attempt_id in self.assignments.held
                case _:
                    pass
        return sent(effects)

    @rule(target=attempts)
    def a_new_lease(self) -> str:
        self.count += 1
        attempt_id = f"a{self.count}"
        waiting = sum(held.state != "reporting" for held in self.assignments.held.values())
        told = self.perform(self.assignments.on_lease(lease(attempt_id, self.epoch)))
        if self.assignments.draining or waiting >= QUEUE_LIMIT:
            assert isinstance(told[0], LeaseRefused)
            assert told[0].error.retryable
        else:
            assert told == [LeaseTaken(attempt_id=attempt_id)]
            self.taken.append(attempt_id)
        return attempt_id

    @rule(attempt_id=attempts)
    def the_same_lease_again(self, attempt_id: str) -> None:
        if attempt_id not in self.assignments.held and attempt_id != self.assignments.stopping:
            return  # a coordinator does not resend leases that it knows to have ended, except as below
        before = list(self.assignments.held)
        told = self.perform(self.assignments.on_lease(lease(attempt_id, self.epoch)))
        assert list(self.assignments.held) == before
        if attempt_id in self.outcomes and attempt_id in before:
            assert told == [self.outcomes[attempt_id]]
        elif attempt_id in before:
            assert told == [LeaseTaken(attempt_id=attempt_id)]
        else:
            assert told == []

    @rule(attempt_id=attempts, back=st.integers(1, 3))
    def commands_of_an_older_coordinator(self, attempt_id: str, back: int) -> None:
        if not self.assignments.epoch:
            return
        before = repr(self.assignments)
        assert self.assignments.on_lease(lease(attempt_id, self.assignments.epoch - back)) == []
        assert self.assignments.on_lease(lease("never seen", self.assignments.epoch - back)) == []
        assert self.assignments.on_withdrawn(withdrawal(attempt_id, self.assignments.epoch - back)) == []
        assert not self.assignments.accepts(self.assignments.epoch - back)
        assert repr(self.assignments) == before

    @rule(raised=st.integers(0, 2))
    def a_coordinator_announces_itself(self, raised: int) -> None:
        self.epoch += raised
        cluster = f"cluster {self.clusters}" if self.clusters else ""
        assert self.assignments.on_coordinator(self.epoch, 0.0, cluster)
        assert self.assignments.epoch == self.epoch

    @rule(epoch=st.integers(1, 5))
    def another_bus(self, epoch: int) -> None:
        """Another coordinator, with its own journal and so another cluster id: its epochs may be lower."""
        held = list(self.assignments.held)
        self.assignments.on_disconnected()
        if self.assignments.epoch:
            assert not self.assignments.accepts(self.assignments.epoch - 1)
        self.epoch, self.clusters = epoch, self.clusters + 1
        assert self.assignments.on_coordinator(epoch, 0.0, f"cluster {self.clusters}")
        assert self.assignments.accepts(epoch)
        assert list(self.assignments.held) == held

    @rule(attempt_id=consumes(attempts))
    def a_lease_is_withdrawn(self, attempt_id: str) -> None:
        held = self.assignments.held.get(attempt_id)
        state = held.state if held else None
        effects = self.assignments.on_withdrawn(withdrawal(attempt_id, self.epoch))
        expected = {"running": [Stop(attempt_id)], "queued": [GiveUp(attempt_id)]}
        assert effects == expected.get(state or "", [])
        self.perform(effects)
        if held is not None:
            self.withdrawn.add(attempt_id)
        assert attempt_id not in self.assignments.held
        assert self.assignments.on_withdrawn(withdrawal(attempt_id, self.epoch)) == []

    @precondition(lambda self: self.executing)
    @rule(done=st.integers(0, 9))
    def progress(self, done: int) -> None:
        assert self.executing is not None
        self.assignments.on_progress(self.executing, done, {"loss": 1.0})
        if self.executing in self.assignments.held:
            (renewal,) = sent(self.assignments.on_renewal_due())
            assert isinstance(renewal, LeaseRenewed)
            assert (renewal.attempt_id, renewal.done, renewal.metrics) == (self.executing, done, {"loss": 1.0})

    @precondition(lambda self: self.executing)
    @rule(well=st.booleans())
    def the_engine_is_through(self, well: bool) -> None:
        attempt_id, self.executing = self.executing, None
        assert attempt_id is not None
        # A stopped attempt may have finished just before.
        outcome: Outcome = finished(attempt_id) if well else ShardFailed(attempt_id=attempt_id, error=CANCELLED)
        wanted = attempt_id in self.assignments.held
        if wanted:
            self.outcomes[attempt_id] = outcome
        told = self.perform(self.assignments.on_outcome(outcome))
        assert told == ([outcome] if wanted else [])

    @rule(attempt_id=attempts)
    def an_acknowledgement(self, attempt_id: str) -> None:
        assert self.assignments.on_acknowledged(AcknowledgeResult(attempt_id=attempt_id)) == []
        if attempt_id in self.outcomes:
            self.acknowledged.add(attempt_id)
            assert attempt_id not in self.assignments.held

    @rule()
    def time_passes(self) -> None:
        renewals = self.perform(self.assignments.on_renewal_due())
        assert len(renewals) <= 1, "one message, however many leases"
        renewed = [name for message in renewals for name in (message.attempt_id, *message.also)]  # type: ignore[attr-defined]
        resent = [message.attempt_id for message in self.perform(self.assignments.on_resend_due())]  # type: ignore[attr-defined]
        held = self.assignments.held
        reporting = [name for name in held if held[name].state == "reporting"]
        assert set(resent) <= set(reporting)
        assert set(renewed) >= {name for name in held if name not in reporting}
        said = self.perform(self.assignments.on_connected())
        told = [name for message in said for name in (message.attempt_id, *getattr(message, "also", ()))]  # type: ignore[attr-defined]
        assert sorted(told) == sorted(held)

    @rule(finishing=st.booleans())
    def the_node_stops(self, finishing: bool) -> None:
        states = {"queued"} if finishing else {"queued", "running"}
        waiting = [key for key, held in self.assignments.held.items() if held.state in states]
        told = self.perform(self.assignments.on_drain(finishing=finishing))
        assert [message.attempt_id for message in told] == waiting  # type: ignore[attr-defined]
        assert all(isinstance(message, LeaseRefused) and message.error.code == "unavailable" for message in told)
        self.withdrawn.update(waiting)

    @invariant()
    def invariants_hold(self) -> None:
        self.assignments.check_invariants()
        assert self.assignments.busy == bool(self.executing)
        order = [self.taken.index(attempt_id) for attempt_id in self.started]
        assert order == sorted(order), "not in the order they came"

    def teardown(self) -> None:
        """Every lease that was taken is run or was withdrawn; after the acknowledgements nothing is left."""
        while self.executing:
            self.the_engine_is_through(True)
        for attempt_id in self.taken:
            assert (attempt_id in self.outcomes) != (attempt_id in self.withdrawn - self.outcomes.keys())
            self.assignments.on_acknowledged(AcknowledgeResult(attempt_id=attempt_id))
        assert not self.assignments.held
        assert not self.assignments.busy


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_one_runs_and_the_next_are_prefetched() -> None:
    assignments = Assignments()
    first = assignments.on_lease(lease("a"))
    assert first == [Send(LeaseTaken(attempt_id="a")), Run(lease("a"))]
    second = assignments.on_lease(lease("b"))
    assert second == [Send(LeaseTaken(attempt_id="b")), Prefetch(lease("b"))]
    assert assignments.on_outcome(finished("a")) == [Send(finished("a")), Run(lease("b"))]


def test_a_full_node_refuses_and_keeps_what_it_has() -> None:
    assignments = Assignments()
    for attempt_id in "abc":
        assignments.on_lease(lease(attempt_id))
    (refused,) = sent(assignments.on_lease(lease("d")))
    assert isinstance(refused, LeaseRefused)
    assert refused.error.code == "overloaded"
    assert assignments.attempt_ids == ("a", "b", "c")
    assignments.on_outcome(finished("a"))  # reported, not acknowledged yet: there is room again
    assert sent(assignments.on_lease(lease("d"))) == [LeaseTaken(attempt_id="d")]


def test_the_next_waits_until_the_withdrawn_one_has_stopped() -> None:
    assignments = Assignments()
    for attempt_id in "ab":
        assignments.on_lease(lease(attempt_id))
    assert assignments.on_withdrawn(withdrawal("a")) == [Stop("a")]
    assert sent(assignments.on_lease(lease("c"))) == [LeaseTaken(attempt_id="c")]
    assert assignments.on_outcome(ShardFailed(attempt_id="a", error=CANCELLED)) == [Run(lease("b"))]


def test_a_late_copy_of_a_withdrawn_lease_is_not_taken_for_a_new_one() -> None:
    assignments = Assignments()
    assignments.on_lease(lease("a"))
    assignments.on_withdrawn(withdrawal("a"))
    assert assignments.on_lease(lease("a")) == []
    assert assignments.on_outcome(ShardFailed(attempt_id="a", error=CANCELLED)) == []
    assert not assignments.held


def test_a_result_is_reported_until_it_is_acknowledged() -> None:
    assignments = Assignments()
    assignments.on_lease(lease("a"))
    assignments.on_outcome(finished("a"))
    turns = [turn for turn in range(1, 17) if sent(assignments.on_resend_due()) == [finished("a")]]
    assert turns == [1, 2, 4, 8, 12, 16], "a coordinator that is behind gets less to read"
    assert sent(assignments.on_lease(lease("a"))) == [finished("a")]  # not done twice
    assert sent(assignments.on_connected()) == [finished("a")], "at once: it may wait for it"
    assignments.on_acknowledged(AcknowledgeResult(attempt_id="a"))
    assert assignments.on_resend_due() == []


def test_the_lease_of_an_outcome_is_renewed_between_its_reports_but_not_for_ever() -> None:
    """With long pauses between reports, the lease ran out, and another node did the same again."""
    assignments = Assignments()
    assignments.on_lease(lease("a"))
    assignments.on_outcome(finished("a"))
    assert sent(assignments.on_renewal_due()) == [], "usually it is acknowledged now"
    assert sent(assignments.on_renewal_due()) == [LeaseRenewed(attempt_id="a")]
    assignments.on_lease(lease("b"))
    assert sent(assignments.on_renewal_due()) == [LeaseRenewed(attempt_id="b", also=("a",))]
    renewals = [sent(assignments.on_renewal_due()) for _ in range(2 * REPORTS_RENEWED)]
    assert renewals.count([LeaseRenewed(attempt_id="b", also=("a",))]) == REPORTS_RENEWED - 3
    assert renewals[-1] == [LeaseRenewed(attempt_id="b")]
    assignments.on_connected()
    assignments.on_renewal_due()
    assert sent(assignments.on_renewal_due()) == [LeaseRenewed(attempt_id="b", also=("a",))], "perhaps another one"
    assignments.on_acknowledged(AcknowledgeResult(attempt_id="a"))
    assert sent(assignments.on_renewal_due()) == [LeaseRenewed(attempt_id="b")]


def test_a_stopping_node_gives_back_what_is_not_done_and_keeps_what_is() -> None:
    assignments = Assignments()
    for attempt_id in "abc":
        assignments.on_lease(lease(attempt_id))
    assignments.on_outcome(finished("a"))
    effects = assignments.on_drain(finishing=True)
    assert [message.attempt_id for message in sent(effects)] == ["c"]  # type: ignore[attr-defined]
    assert sent(assignments.on_renewal_due()) == [LeaseRenewed(attempt_id="b")]
    effects = assignments.on_drain()
    assert Stop("b") in effects
    assert [message.attempt_id for message in sent(effects)] == ["b"]  # type: ignore[attr-defined]
    assert sent(assignments.on_resend_due()) == [finished("a")]
    (refused,) = sent(assignments.on_lease(lease("d")))
    assert isinstance(refused, LeaseRefused)
    assert refused.error.message == "the node is stopping"


def test_acknowledging_what_still_runs_changes_nothing() -> None:
    assignments = Assignments()
    assignments.on_lease(lease("a"))
    assignments.on_acknowledged(AcknowledgeResult(attempt_id="a"))
    assert ran(assignments.on_outcome(finished("a"))) == []
    assert sent(assignments.on_resend_due()) == [finished("a")]


def test_a_stage_is_told_at_once_and_until_there_is_progress() -> None:
    assignments = Assignments()
    assignments.on_lease(lease("a"))
    assignments.on_lease(lease("b"))
    start = "starting engine (TensorFlow)"
    assert sent(assignments.on_stage("a", start)) == [LeaseRenewed(attempt_id="a", stage=start)]
    assert sent(assignments.on_stage("a", start)) == [], "once"
    assert sent(assignments.on_stage("b", start)) == [], "it waits for the other"
    assert sent(assignments.on_renewal_due()) == [LeaseRenewed(attempt_id="a", stage=start, also=("b",))]
    assignments.on_progress("a", 3, {})
    assert sent(assignments.on_renewal_due()) == [LeaseRenewed(attempt_id="a", done=3, also=("b",))]


def test_an_epoch_that_nobody_repeats_keeps_no_coordinator_out() -> None:
    """One message with a forged epoch did that, until the node was started again."""
    assignments = Assignments()
    assert assignments.on_coordinator(7, now=0.0)
    assert not assignments.accepts(2**53), "a command says nothing of who is there"
    assert assignments.on_coordinator(2**53, now=0.0)
    seen = [assignments.on_coordinator(7, now) for now in (5.0, 10.0, 15.0, 20.0, 25.0, 30.0)]
    assert seen == [False, False, False, True, True, True]
    assert assignments.on_lease(lease("a", epoch=7))


def test_the_highest_epoch_of_a_cluster_is_remembered_over_disconnects_and_other_clusters() -> None:
    assignments = Assignments()
    assert assignments.on_coordinator(8, 0.0, "one")
    assignments.on_disconnected()
    assert not assignments.on_coordinator(7, 100.0, "one"), "it was replaced, however long that is ago"
    assert assignments.on_lease(lease("a", epoch=7)) == []
    assert assignments.on_coordinator(1, 101.0, "two")
    assert assignments.on_lease(lease("b", epoch=1))
    assert not assignments.on_coordinator(8, 102.0, "one"), "the other is heard of"
    assert not assignments.accepts(8), "its epochs are counted apart"
    assert not assignments.on_coordinator(7, 200.0, "one")
    assert assignments.on_coordinator(8, 201.0, "one")
    assert assignments.on_offline(8, "one")
    assert assignments.on_coordinator(1, 202.0, "two"), "the place is free"
    for number in range(100):
        assignments.on_disconnected()
        assert assignments.on_coordinator(1, 204.0, f"made up {number}")
    assert len(assignments.seen) <= 16


def test_what_an_older_coordinator_acknowledges_is_said_again_to_the_newer() -> None:
    assignments = Assignments()
    assignments.on_lease(lease("a", epoch=8))
    assignments.on_outcome(finished("a"))
    assignments.on_acknowledged(AcknowledgeResult(attempt_id="a", epoch=7))
    assert sent(assignments.on_resend_due()) == [finished("a")]
    assignments.on_acknowledged(AcknowledgeResult(attempt_id="a", epoch=9))
    assert sent(assignments.on_resend_due()) == []


def test_a_coordinator_of_another_cluster_keeps_the_real_one_out_for_no_longer_than_it_is_heard() -> None:
    assignments = Assignments()
    assert assignments.on_coordinator(1, 0.0, "real")
    for now in range(0, 60, 5):
        assert assignments.on_coordinator(1, float(now), "real")
        assert not assignments.on_coordinator(57, now + 1.0, "of before")
        assert not assignments.accepts(57)
        assert assignments.accepts(1)


def test_an_older_coordinator_is_fenced_off_while_the_newer_one_is_heard_of() -> None:
    assignments = Assignments()
    for now in range(0, 300, 5):
        assert assignments.on_coordinator(8, float(now))
        assert not assignments.on_coordinator(7, now + 1.0)
    assert not assignments.on_coordinator(7, 295.0 + FENCE_SECONDS)
    assert assignments.on_coordinator(7, 296.0 + FENCE_SECONDS)


def test_in_a_closed_cluster_a_lower_epoch_is_refused_for_ever() -> None:
    assignments = Assignments(only="ours", epoch=3)
    assert not assignments.on_coordinator(2, 0.0, "ours")
    assert assignments.on_coordinator(4, 0.0, "ours")
    for disconnected in (False, True):
        if disconnected:
            assignments.on_disconnected()
            assignments.on_offline(4, "ours")
        for now in (1.0, 10 * FENCE_SECONDS, 1e9):
            assert not assignments.on_coordinator(3, now, "ours")
            assert not assignments.on_coordinator(9, now, "theirs")
            assert not assignments.on_coordinator(9, now)
    assert assignments.epoch == 4
    assert not assignments.accepts(3)
    assert assignments.on_coordinator(5, 2e9, "ours")
