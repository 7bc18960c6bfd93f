"""What a result must look like, by its lease; and which node is believed when a loss is not a number."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
from msgspec.structs import replace

from coordinator.plans.checking import (
    Doubts,
    bounded_error,
    bounded_renewal,
    is_no_number,
    violation,
    wrong_signature,
)
from potluck.wire.reports import LeaseRenewed
from potluck.wire.tasks import (
    AnyTask,
    AnyTaskResult,
    ConvertResult,
    ConvertTask,
    EvaluateResult,
    EvaluateTask,
    ExportResult,
    ExportTask,
    PredictResult,
    PredictTask,
    SyncResult,
    SyncTask,
    TrainResult,
    TrainTask,
    WarmUpResult,
    WarmUpTask,
)
from potluck.wire.values import (
    BlobRef,
    DataFormat,
    DataShard,
    DataSlice,
    ErrorInfo,
    ImageOptions,
    Signature,
    Tensor,
    TensorSpec,
)

BLOB = BlobRef(sha256="a" * 64, size=1000)
FORMAT = DataFormat(kind="arrays")
SLICES = (DataSlice(blob=BLOB, start=5, stop=10), DataSlice(blob=BLOB, start=0, stop=3))
EVALUATE = EvaluateTask(model=BLOB, weights=None, slices=SLICES, format=FORMAT, image=None, batch_size=4)
OWN = replace(EVALUATE, slices=(), node_data="photos")
VALUES = replace(EVALUATE, states={"auc": (1.0,)})
PREDICT = PredictTask(model=BLOB, slices=SLICES, format=FORMAT, image=None, batch_size=4)
TRAIN = TrainTask(
    model=BLOB, weights=None, data=(DataShard(blob=BLOB, count=100),), format=FORMAT, image=None, round=1, samples=50,
    seconds=10, batch_size=10,
)  # fmt: skip
SYNC = SyncTask(
    model=BLOB, data=(), format=FORMAT, image=None, formation="f", members=("a:1", "b:1"), batches=(3, 4), rank=1,
    first_step=0, steps=10,
)  # fmt: skip
LEADS = replace(SYNC, rank=0)
EXPORT = ExportTask(model=BLOB, weights=BLOB)
CONVERT = ConvertTask(model=BLOB, slices=SLICES, format=FORMAT, image=None)
WARM = WarmUpTask(task=TRAIN)

EVALUATED = EvaluateResult(count=8, sums={"loss": 3.0}, confusion=((4, 1), (0, 3)), seconds=1.0)
OUTPUT = Tensor(name="y", datatype="FP32", shape=(8, 2), data=bytes(64))
PREDICTED = PredictResult(count=8, outputs=(OUTPUT,))
TRAINED = TrainResult(base=BLOB, update=BLOB, samples=50, steps=5, items=100, metrics={"loss": nan}, norm=1.0)
SYNCED = SyncResult(samples=40, steps=10, rate=3.0)
CHECKPOINT = SyncResult(samples=30, steps=10, weights=BLOB, optimizer=BLOB)
SIGNATURE = Signature(inputs=(), outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 3)),))
EXPORTED = ExportResult(model=BLOB, signature=SIGNATURE)
EMPTY = replace(BLOB, size=0)


@pytest.mark.parametrize(
    ("task", "result"),
    [
        (EVALUATE, EVALUATED),
        (EVALUATE, replace(EVALUATED, sums={"loss": nan, "mae": inf}, values={"r2": nan})),
        (OWN, EVALUATED),
        (VALUES, EvaluateResult(count=0, values={"auc": 0.5})),
        (PREDICT, PREDICTED),
        (PREDICT, replace(PREDICTED, outputs=(replace(OUTPUT, data=replace(BLOB, size=64)),))),
        (PREDICT, replace(PREDICTED, outputs=(Tensor(name="t", datatype="BYTES", shape=(8,), data=["x"] * 8),))),
        (TRAIN, TRAINED),
        (TRAIN, replace(TRAINED, samples=60, steps=6)),
        (replace(TRAIN, data=(), node_data="photos"), TRAINED),
        (SYNC, SYNCED),
        (LEADS, CHECKPOINT),
        (EXPORT, EXPORTED),
        (CONVERT, ConvertResult(model=BLOB)),
        (WARM, WarmUpResult(rate=10.0, beside_seconds=0.0)),
    ],
)  # fmt: skip
def test_what_nodes_answer(task: AnyTask, result: AnyTaskResult) -> None:
    assert violation(task, result, 100) == ""


@pytest.mark.parametrize(
    ("task", "result", "said"),
    [
        (EVALUATE, PREDICTED, "a task of kind 'evaluate' has kind 'predict'"),
        (WARM, TRAINED, "kind 'train'"),
        (EVALUATE, replace(EVALUATED, count=0, confusion=()), "count is 0, but 8 were asked for"),
        (EVALUATE, replace(EVALUATED, count=2**53), "count is 9007199254740992"),
        (EVALUATE, replace(EVALUATED, sums={"loss": 1e305}), "1e+305"),
        (EVALUATE, replace(EVALUATED, sums={str(n): 0.0 for n in range(2000)}), "2000 names"),
        (EVALUATE, replace(EVALUATED, counts={"mae": -1.0}), "below 0"),
        (EVALUATE, replace(EVALUATED, confusion=((9, 0), (0, 0))), "counts 9 items of 8"),
        (EVALUATE, replace(EVALUATED, confusion=((1, 0),)), "not a square"),
        (EVALUATE, replace(EVALUATED, confusion=((9, -1), (0, 0))), "not a square"),
        (EVALUATE, replace(EVALUATED, seconds=-1.0), "seconds is -1"),
        (EVALUATE, replace(EVALUATED, seconds=nan), "seconds is nan"),
        (EVALUATE, replace(EVALUATED, seconds=1e-300), "items a second"),
        (EVALUATE, replace(EVALUATED, fetch_seconds=inf), "fetch_seconds"),
        (EVALUATE, replace(EVALUATED, image=ImageOptions(height=1, width=1, scale=nan)), "scale"),
        (OWN, replace(EVALUATED, count=101), "count is 101, of 100 items"),
        (VALUES, EVALUATED, "count is 8, but 0"),
        (PREDICT, replace(PREDICTED, count=7), "count is 7"),
        (PREDICT, replace(PREDICTED, outputs=()), "without outputs"),
        (PREDICT, replace(PREDICTED, outputs=(replace(OUTPUT, shape=(7, 2)),)), "shape [7, 2], but there are 8"),
        (PREDICT, replace(PREDICTED, outputs=(replace(OUTPUT, data=bytes(63)),)), "has 63 bytes"),
        (PREDICT, replace(PREDICTED, outputs=(replace(OUTPUT, data=replace(BLOB, size=2**53)),)), "bytes"),
        (PREDICT, replace(PREDICTED, outputs=(replace(OUTPUT, datatype="FP31"),)), "'FP31'"),
        (PREDICT, replace(PREDICTED, outputs=(replace(OUTPUT, data=[1.0] * 16),)), "is a list"),
        (PREDICT, replace(PREDICTED, outputs=(replace(OUTPUT, datatype="BYTES"),)), "16 texts"),
        (TRAIN, replace(TRAINED, samples=0, steps=0), "0 samples in 0 steps"),
        (TRAIN, replace(TRAINED, steps=51), "50 samples in 51 steps"),
        (TRAIN, replace(TRAINED, samples=2**53), "but 50 were asked for"),
        (TRAIN, replace(TRAINED, items=101), "101 items of 100"),
        (TRAIN, replace(TRAINED, norm=nan), "norm is nan"),
        (TRAIN, replace(TRAINED, momentum=2.0), "momentum"),
        (TRAIN, replace(TRAINED, update=replace(BLOB, size=2**40)), "an update of"),
        (TRAIN, replace(TRAINED, base=EMPTY), "0 bytes"),
        (SYNC, replace(SYNCED, samples=39), "samples is 39, but 40"),
        (SYNC, replace(SYNCED, steps=9, samples=36), "steps is 9"),
        (SYNC, replace(SYNCED, rate=inf), "rate is inf"),
        (SYNC, replace(SYNCED, weights=BLOB), "member 1 has a checkpoint"),
        (LEADS, replace(CHECKPOINT, optimizer=None), "member 0 has no checkpoint"),
        (EXPORT, replace(EXPORTED, model=EMPTY), "0 bytes"),
        (EXPORT, replace(EXPORTED, signature=replace(SIGNATURE, pixel_scale=nan)), "pixel_scale"),
        (CONVERT, ConvertResult(model=EMPTY), "0 bytes"),
        (WARM, WarmUpResult(rate=0.0, beside_seconds=0.0), "rate is 0"),
        (WARM, WarmUpResult(rate=nan, beside_seconds=0.0), "rate is nan"),
        (WARM, WarmUpResult(rate=1.0, beside_seconds=inf), "beside_seconds is inf"),
    ],
)  # fmt: skip
def test_what_none_that_works_answers(task: AnyTask, result: AnyTaskResult, said: str) -> None:
    assert said in violation(task, result, 100)


@pytest.mark.parametrize("changes", [{"sums": {"loss": nan}}, {"states": {"auc": (1.0, inf)}}, {"counts": {"x": nan}}])
def test_no_number(changes: dict[str, Any]) -> None:
    assert is_no_number(replace(EVALUATED, **changes))
    assert not is_no_number(replace(EVALUATED, values={"r2": nan}))
    assert not is_no_number(PREDICTED)


def test_two_nodes_are_believed_that_a_loss_is_no_number_and_a_lonely_one() -> None:
    doubts = Doubts()
    assert doubts.doubted("s1", "n1", alone=False)
    assert doubts.doubted("s2", "n1", alone=False)
    assert not doubts.doubted("s1", "n2", alone=False)
    assert not doubts.doubted("s2", "n1", alone=False)
    assert not Doubts().doubted("s1", "n1", alone=True)


def test_who_is_disproved_is_named_once() -> None:
    doubts = Doubts()
    doubts.doubted("s1", "n1", alone=False)
    assert doubts.disproved("s2", "n2") == ""
    assert doubts.disproved("s1", "n2") == "n1"
    assert doubts.disproved("s1", "n2") == ""


def test_what_is_shown_of_progress_and_errors_has_bounds() -> None:
    said = LeaseRenewed(attempt_id="a", done=2**53, stage="x" * 9999, metrics={str(n): 0.0 for n in range(9999)})
    shown = bounded_renewal(EVALUATE, said)
    assert (shown.done, len(shown.stage), len(shown.metrics)) == (8, 200, 64)
    assert bounded_renewal(TRAIN, said).done < 1000
    assert len(bounded_error(ErrorInfo(code="c", message="x" * 200_000)).message) == 4000
    assert bounded_error(error := ErrorInfo(code="c", message="x")) is error


@pytest.mark.parametrize(
    ("signature", "said"),
    [
        (Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),), outputs=()), ""),
        (
            Signature(
                inputs=(TensorSpec(name="x", datatype="BYTES", shape=(-1, -1)),), outputs=(), pixel_scale=1 / 255
            ),
            "",
        ),
        (Signature(inputs=(TensorSpec(name="x", datatype="FP31", shape=(-1, 2)),), outputs=()), "datatype 'FP31'"),
        (Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(-7, 2)),), outputs=()), "shape [-7, 2]"),
        (Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(1,) * 99),), outputs=()), "shape [1, 1"),
        (Signature(inputs=(), outputs=(TensorSpec(name="x" * 300, datatype="FP32", shape=(-1,)),)), "very long ones"),
        (Signature(inputs=(), outputs=(), pixel_scale=inf), "pixel_scale is inf"),
    ],
)
def test_a_signature_that_none_can_have(signature: Signature, said: str) -> None:
    found = wrong_signature(signature)
    assert said in found
    assert bool(said) == bool(found)
