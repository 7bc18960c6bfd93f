"""How long a task will still take, as its progress tells."""

from __future__ import annotations

from math import inf

from msgspec.structs import replace

from node.finishing import seconds_left
from potluck.wire.tasks import EvaluateTask, ExportTask, SyncTask, TrainTask
from potluck.wire.values import BlobRef, DataFormat, DataSlice

BLOB = BlobRef(sha256="a" * 64, size=1)
EVALUATE = EvaluateTask(
    model=BLOB,
    weights=None,
    slices=(DataSlice(blob=BLOB, start=10, stop=60), DataSlice(blob=BLOB, start=0, stop=50)),
    format=DataFormat(kind="arrays"),
    image=None,
    batch_size=8,
)
TRAIN = TrainTask(
    model=BLOB,
    weights=None,
    data=(),
    format=DataFormat(kind="arrays"),
    image=None,
    round=1,
    samples=1000,
    seconds=20,
    batch_size=8,
)
SYNC = SyncTask(
    model=BLOB, data=(), format=DataFormat(kind="arrays"), image=None, formation="f", members=("a", "b"), batches=(6, 2), rank=1, first_step=0, steps=10,
)  # fmt: skip


def test_the_rest_takes_as_long_as_the_part_before() -> None:
    assert seconds_left(EVALUATE, 80, 4.0) == 1.0
    assert seconds_left(EVALUATE, 100, 4.0) == 0.0
    assert seconds_left(SYNC, 10, 5.0) == 5.0


def test_a_round_ends_with_its_samples_or_its_time() -> None:
    assert seconds_left(TRAIN, 900, 9.0) == 1.0
    assert seconds_left(TRAIN, 300, 18.0) == 2.0
    assert seconds_left(replace(TRAIN, part=1, parts=2), 300, 18.0) == 42.0, "its time is no limit"


def test_of_what_tells_no_progress_nothing_is_known() -> None:
    assert seconds_left(EVALUATE, 0, 4.0) == inf
    assert seconds_left(EVALUATE, 5, 0.0) == inf
    assert seconds_left(ExportTask(model=BLOB, weights=BLOB), 5, 1.0) == inf
