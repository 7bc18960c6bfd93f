"""Frames between a node and its engine: whatever is written can be read again, however the stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.engine import frames
from potluck.errors import BadMessage, TooLarge
from potluck.wire import codec
from potluck.wire.reports import RequestOutcome
from potluck.wire.tasks import ExportTask
from potluck.wire.values import BlobRef, ErrorInfo, Tensor

BLOB = BlobRef(sha256="a" * 64, size=3)
TENSOR = Tensor(name="x", datatype="FP32", shape=(1, 2), data=b"\0" * 8)
LISTED = Tensor(name="x", datatype="INT64", shape=(2,), data=[1, 2])

QUESTIONS = [
    frames.RunTask(number=1, job_id="j", task=ExportTask(model=BLOB, weights=BLOB), files={"a" * 64: "/blobs/a"}),
    frames.CancelTask(),
    frames.DropJob(job_id="j"),
    frames.LoadReplica(number=2, replica_id="r", path="/blobs/a"),
    frames.UnloadReplica(number=3, replica_id="r"),
    frames.RunBatch(number=4, replica_id="r", requests=((TENSOR,), (LISTED,))),
]
ANSWERS = [
    frames.Started(runtimes={"keras": "3"}),
    frames.Heartbeat(),
    frames.TaskProgressed(number=1, done=5, metrics={"loss": 0.5}),
    frames.Done(number=3),
    frames.BatchRun(number=4, outcomes=(RequestOutcome(outputs=(TENSOR,)),), seconds=0.1),
    frames.Failed(number=1, error=ErrorInfo(code="invalid_model", message="why")),
]


@pytest.mark.parametrize("frame", QUESTIONS, ids=lambda frame: type(frame).__name__)
def test_questions_come_back(frame: frames.Frame) -> None:
    [body] = frames.FrameSplitter().feed(frames.encode(frame))
    assert frames.to_engine(body) == frame
    assert body == codec.pack(frame)


@pytest.mark.parametrize("frame", ANSWERS, ids=lambda frame: type(frame).__name__)
def test_answers_come_back(frame: frames.Frame) -> None:
    [body] = frames.FrameSplitter().feed(frames.encode(frame))
    assert frames.from_engine(body) == frame


def test_what_does_not_fit_a_frame_is_an_error_of_ours() -> None:
    """Otherwise, it would end the daemon."""
    for data in ([2**64], [2**64, "x"], [object()]):
        tensor = Tensor(name="x", datatype="INT64", shape=(1,), data=data)
        with pytest.raises(BadMessage, match="RunBatch cannot be given to the engine"):
            frames.encode(frames.RunBatch(number=1, replica_id="r", requests=((tensor,),)))


@given(st.lists(st.sampled_from(ANSWERS), max_size=8), st.lists(st.integers(1, 40)))
def test_a_stream_may_be_cut_anywhere(sent: list[frames.Frame], cuts: list[int]) -> None:
    stream = b"".join(frames.encode(frame) for frame in sent)
    splitter = frames.FrameSplitter()
    received: list[frames.Frame] = []
    for cut in [*cuts, len(stream) + 1]:
        piece, stream = stream[:cut], stream[cut:]
        bodies = splitter.feed(piece)
        received += [frames.from_engine(body) for body in bodies]
        assert splitter.missing > 0
    assert received == sent


@given(st.binary(max_size=200))
def test_what_is_no_frame_is_a_bad_message(body: bytes) -> None:
    with pytest.raises(BadMessage):
        frames.to_engine(body)


def test_a_frame_announced_too_long_is_refused() -> None:
    with pytest.raises(BadMessage, match="announces"):
        frames.FrameSplitter().feed(frames.LENGTH.pack(frames.FRAME_LIMIT_BYTES + 1))


def test_a_frame_over_the_limit_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "FRAME_LIMIT_BYTES", 20)
    with pytest.raises(TooLarge, match="fewer items"):
        frames.encode(QUESTIONS[-1])


def test_how_much_is_missing() -> None:
    data = frames.encode(ANSWERS[2])
    splitter = frames.FrameSplitter()
    assert splitter.missing == 4
    splitter.feed(data[:10])
    assert splitter.missing == len(data) - 10
