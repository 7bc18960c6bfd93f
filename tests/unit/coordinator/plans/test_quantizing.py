"""Conversion before a deployment: one node converts, both models are evaluated completely, and only then the job is done."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.plans.decisions import Complete, Lease
from coordinator.plans.job import Attempt
from coordinator.plans.placement import ClusterView, NodeView
from coordinator.plans.quantizing import CALIBRATION_ITEMS, CONVERT, QuantizeStrategy, convert_task
from coordinator.plans.training.scores import changes
from potluck.wire.tasks import ConvertResult, ConvertTask, EvaluateResult, EvaluateTask
from potluck.wire.values import BlobRef, DataFormat, Dataset, DataShard, ImageOptions

MODEL, LITE = BlobRef(sha256="1" * 64, size=1), BlobRef(sha256="2" * 64, size=1)
BOTH = frozenset({"tensorflow", "litert"})


def dataset(*counts: int) -> Dataset:
    shards = tuple(
        DataShard(blob=BlobRef(sha256=f"{number:064x}", size=1), count=count) for number, count in enumerate(counts)
    )
    return Dataset(name="d", format=DataFormat(kind="images"), count=sum(counts), shards=shards)


def strategy() -> QuantizeStrategy:
    data = dataset(300, 200)
    return QuantizeStrategy(MODEL, "keras", None, data, convert_task(MODEL, "keras", None, data))


def test_it_is_calibrated_with_the_first_items() -> None:
    assert [(one.start, one.stop) for one in convert_task(MODEL, "keras", None, dataset(60, 60)).slices] == [
        (0, 60),
        (0, CALIBRATION_ITEMS - 60),
    ]
    assert [(one.start, one.stop) for one in convert_task(MODEL, "keras", None, dataset(7)).slices] == [(0, 7)]


def test_what_was_made_goes_to_nodes_with_litert() -> None:
    made = strategy()
    nodes = (NodeView("a", 1.0, 2), NodeView("b", 2.0, 20, runtimes=BOTH))
    (convert,) = [
        one for one in made.plan(ClusterView(nodes, 0), {}) if isinstance(one, Lease) and one.shard_id == CONVERT
    ]
    assert convert.node_id == "b"
    attempt = Attempt("1", CONVERT, "b", 0.0)
    made.leased(attempt, convert.task)
    made.finished(attempt, ConvertResult(model=LITE), 1.0)
    leases = [one for one in made.plan(ClusterView(nodes, 1), {}) if isinstance(one, Lease)]
    after = [one for one in leases if one.shard_id.startswith("after")]
    assert {one.node_id for one in after} == {"b"}
    task = after[0].task
    assert isinstance(task, EvaluateTask)
    assert (task.model, task.model_format, task.by_outputs) == (LITE, "tflite", True)
    assert all(
        not one.shard_id.startswith("after")
        for one in made.plan(ClusterView(nodes[:1], 1), {})
        if isinstance(one, Lease)
    )


def test_what_was_made_gets_the_pixels_that_the_original_says_it_expects() -> None:
    made, expected = strategy(), ImageOptions(height=8, width=8, scale=1.0)
    attempt = Attempt("1", CONVERT, "b", 0.0)
    made.leased(attempt, convert_task(MODEL, "keras", None, dataset(7)))
    made.finished(attempt, ConvertResult(model=LITE, image=expected), 1.0)
    view = ClusterView((NodeView("b", 2.0, 20, runtimes=BOTH),), 1)
    after = [one for one in made.plan(view, {}) if isinstance(one, Lease) and one.shard_id.startswith("after")]
    assert after
    assert all(isinstance(one.task, EvaluateTask) and one.task.image == expected for one in after)


def test_metrics_of_the_model_say_what_has_changed() -> None:
    found = changes({"accuracy": 0.9, "f1": 0.8}, {"accuracy": 0.88, "f1": 0.7})
    assert found["accuracy_before"] == 0.9
    assert round(found["accuracy_change"], 9) == -0.02
    assert "f1_before" not in found
    assert set(changes({"mae": 1.0, "mse": 2.0}, {"mae": 1.5, "mse": 3.0})) >= {"mae_change", "mse_change"}


class Quantizing(RuleBasedStateMachine):
    """Nodes that come, fail and finish in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.strategy = strategy()
        self.open: dict[str, tuple[Attempt, object]] = {}
        self.number = 0
        self.now = 0.0
        self.complete = False

    @rule(slots=st.lists(st.integers(0, 2), min_size=1, max_size=3), lite=st.booleans())
    def plan(self, slots: list[int], lite: bool) -> None:
        self.now += 1.0
        nodes = tuple(
            NodeView(f"n{number}", 1.0, free, runtimes=BOTH if lite or number else frozenset({"tensorflow"}))
            for number, free in enumerate(slots)
        )
        leased: dict[str, int] = {}
        for decision in self.strategy.plan(
            ClusterView(nodes, self.now), {key: one for key, (one, _) in self.open.items()}
        ):
            if isinstance(decision, Complete):
                self.complete = True
            elif isinstance(decision, Lease):
                self.number += 1
                leased[decision.node_id] = leased.get(decision.node_id, 0) + 1
                attempt = Attempt(str(self.number), decision.shard_id, decision.node_id, self.now)
                self.strategy.leased(attempt, decision.task)
                self.open[attempt.attempt_id] = attempt, decision.task
        assert all(count <= slots[int(node_id[1:])] for node_id, count in leased.items())

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        attempt, task = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
        if isinstance(task, ConvertTask):
            self.strategy.finished(attempt, ConvertResult(model=LITE, seconds=1.0), self.now)
        elif isinstance(task, EvaluateTask):
            count = sum(piece.stop - piece.start for piece in task.slices)
            self.strategy.finished(attempt, EvaluateResult(count=count, seconds=1.0), self.now)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        attempt, _ = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
        self.strategy.ended(attempt, None)

    @invariant()
    def one_converts_and_nothing_is_missing_at_the_end(self) -> None:
        converting = [one for one, _ in self.open.values() if one.shard_id == CONVERT]
        assert len(converting) <= 1
        assert not converting or self.strategy.converted is None
        progress = self.strategy.progress({})
        assert 0 <= progress.done <= progress.total == 1000
        if self.complete:
            assert self.strategy.converted == LITE
            for results in self.strategy.evaluated():
                assert sum(result.count for result in results if isinstance(result, EvaluateResult)) == 500


Quantizing.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestQuantizing = Quantizing.TestCase
