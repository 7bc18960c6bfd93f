"""The output of the command line: JSON with every field, tables, CSV, plain lines of progress."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from potluck.cli import following, output, predict
from potluck.wire.jobs import ClassScore, EpochMetrics, Evaluation, JobProgress
from potluck.wire.questions import ClusterEvent, JobChanged, NodeInfo
from potluck.wire.values import Capacity, Gpu
from potluck.wording import counted

NODE = NodeInfo(
    node_id="n1",
    state="online",
    capacity=Capacity(
        hostname="kitchen", system="Linux", cores=4, memory_bytes=8 << 30, gpus=(Gpu(name="T4", memory_bytes=16 << 30),),
        runtimes={"tensorflow": "2.21.0", "keras": "3.15.1"}, gflops=120.4,
    ),
)  # fmt: skip


def text_of(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_json_has_every_field_and_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit([JobProgress(metrics={"loss": float("nan")}), np.float32(2.5)])
    progress, number = json.loads(capsys.readouterr().out)
    assert progress["metrics"] == {"loss": None}
    assert progress["done"] == 0
    assert progress["nodes"] == {}
    assert number == 2.5


def test_nodes_show_what_they_have_and_do() -> None:
    busy = replace(NODE, cpu_percent=55.0, leases=2, replicas=("r1",))
    shown = text_of(output.nodes_table([busy]))
    for part in (
        "n1",
        "online",
        "kitchen",
        "4",
        "8.0 GiB",
        "T4 16.0 GiB",
        "120",
        "55 %",
        "2 shards, 1 replica",
        "TensorFlow 2.21.0",
    ):
        assert part in shown, part
    small = replace(NODE, capacity=replace(NODE.capacity, runtimes={"litert": "2.3.0"}))
    assert "nothing  T4 16.0 GiB  LiteRT 2.3.0" in text_of(output.nodes_table([small]))
    assert "2 shards (give way)" in text_of(output.nodes_table([replace(busy, gives_way=True)]))
    none = replace(NODE, capacity=replace(NODE.capacity, runtimes={}))
    assert "no runtime" in text_of(output.nodes_table([none]))
    lines = text_of(output.nodes_table([replace(busy, left_out="it lies"), NODE])).splitlines()
    assert [("left out: it lies" in line) for line in lines] == [False, False, True, False]


def test_an_offline_node_shows_no_load_and_when_it_was_heard_of() -> None:
    gone = replace(NODE, state="offline", cpu_percent=55.0, leases=2, seen_at=time.time() - 180)
    shown = text_of(output.nodes_table([gone]))
    assert "offline" in shown
    assert "55" not in shown
    assert "heard 3 min 00 s ago" in shown
    assert "left" in text_of(output.nodes_table([replace(gone, left=True)]))


@pytest.mark.parametrize("width", [60, 80])
def test_of_nodes_the_ids_are_whole_on_narrow_terminals_and_what_counts_is_in_the_line(width: int) -> None:
    node_id = "a-very-long-host-nam-abc123"  # as long as ids that potluck makes can be
    first, *_ = output.nodes_table([replace(NODE, node_id=node_id)]).lines(width)
    lines = [line.plain for line in output.nodes_table([replace(NODE, node_id=node_id)]).lines(width)]
    assert lines[1].startswith(f"{node_id}  online  ")
    assert all(len(line) <= width for line in lines)
    assert {"cores", "memory"} | ({"GFLOP/s", "load"} if width == 80 else set()) <= set(first.plain.split())


def test_events_are_told_in_lines() -> None:
    at = time.mktime((2026, 1, 7, 10, 31, 4, 0, 0, -1))
    event = ClusterEvent(number=41, at=at, subject="job", name="4be1", what="failed", text="out of\n\x1b[31m memory")
    lines = text_of(output.events_table([event])).splitlines()
    assert lines[0].split() == ["number", "time", "subject", "name", "event", "text"]
    assert lines[1].split() == [
        "41",
        "2026-01-07",
        "10:31:04",
        "job",
        "4be1",
        "failed",
        "out",
        "of\\n\\x1b[31m",
        "memory",
    ]
    assert text_of(output.event_line(event)).rstrip() == (
        "2026-01-07 10:31:04  job 4be1  failed  out of\\n\\x1b[31m memory"
    )
    missed = ClusterEvent(
        number=40, at=at, subject="events", name="", what="missed", text="3 to 40 are not kept any more"
    )
    assert "events  missed  3 to 40" in text_of(output.event_line(missed))


def test_an_evaluation_shows_scores_and_confusion() -> None:
    score = ClassScore(label="cat", precision=0.5, recall=1.0, f1=2 / 3, support=2)
    other = ClassScore(label="dog", precision=0.0, recall=0.0, f1=0.0, support=2)
    shown = text_of(
        output.evaluation_report(
            Evaluation(count=4, metrics={"accuracy": 0.5}, confusion=((2, 0), (2, 0)), classes=(score, other))
        )
    )
    for part in ("4 items", "accuracy 0.5000", "precision", "cat", "0.6667", "confusion"):
        assert part in shown, part


def test_a_conversion_is_told_by_what_it_changed() -> None:
    before, after = (Evaluation(count=360, metrics={"accuracy": value, "f1": value}) for value in (0.975, 0.9722))
    line = output.change_text("digits-int8:1", before, after, "digits-test")
    assert line == "digits-int8:1: accuracy 0.9722 instead of 0.9750 (-0.0028) on 360 items of digits-test"
    before, after = (Evaluation(count=1, metrics={"mae": value, "mse": value}) for value in (0.5, 0.75))
    line = output.change_text("m-int8:1", before, after, "d")
    assert (
        line
        == "m-int8:1: mae 0.7500 instead of 0.5000 (+0.2500), mse 0.7500 instead of 0.5000 (+0.2500) on 1 item of d"
    )
    before, after = (Evaluation(count=1, metrics={"kind_accuracy": value, "size_mae": 0.0}) for value in (0.5, 0.75))
    line = output.change_text("m-int8:1", before, after, "d")
    assert "kind_accuracy 0.7500 instead of 0.5000 (+0.2500), size_mae 0.0000 instead of" in line


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3661, "1 h 01 min")]
)
def test_seconds_as_people_read_them(seconds: float, shown: str) -> None:
    assert output.seconds_text(seconds) == shown


def test_plain_lines_come_with_changes_and_now_and_then() -> None:
    def state(done: int, epoch: int) -> JobChanged:
        progress = JobProgress(done=done, total=100, epoch=epoch, epochs=2, items_per_second=10.0, nodes={"n1": 10.0})
        return JobChanged(job_id="j", kind="train", state="running", created_at=0.0, progress=progress)

    times = iter([0.0, 1.0, 2.0, 8.0])
    lines = list(following.plain_lines([state(1, 1), state(2, 1), state(3, 2), state(4, 2)], lambda: next(times)))
    assert len(lines) == 3
    assert lines[0] == "train j running  epoch 1/2  1/100 items (1%)  10 items/s on 1 node  10 s left"


def test_what_was_exchanged_and_who_is_left_out_is_told() -> None:
    progress = JobProgress(exchanged_bytes=3 << 20, message="training", quarantined={"n3": "its loss became nan"})
    assert following.progress_text(progress) == "3.0 MiB exchanged  training  n3 is left out: its loss became nan"
    state = JobChanged(job_id="j", kind="train", state="running", created_at=0.0, progress=progress)
    shown = text_of(following.picture(state))
    assert "3.0 MiB exchanged" in shown
    assert "n3 is left out: its loss became nan" in shown
    before = JobChanged(
        job_id="j", kind="train", state="running", created_at=0.0, progress=JobProgress(message="training")
    )
    assert len(list(following.plain_lines([before, state, state], lambda: 0.0))) == 2, "said at once, and once"


def test_what_a_validation_measured_is_not_said_of_the_epoch_under_way() -> None:
    """While the model is written, and after the end, no epoch is under way: progress stays at the last."""
    metrics = {"loss": 0.5, "val_loss": 0.75}
    for done in (3, 4):
        progress = JobProgress(done=done, total=4, epoch=2, epochs=2, metrics=metrics)
        assert following.progress_text(progress).endswith("loss 0.5000  (last validation: val_loss 0.7500)")


def test_epochs_show_what_they_took() -> None:
    history = [
        EpochMetrics(
            epoch=number, metrics={"loss": 0.5, "val_loss": 0.75}, samples=1437 * (number - 2), seconds=65.0, rounds=3,
            computing=0.874, exchanged_bytes=5 << 20,
        )
        for number in (3, 4)
    ]  # fmt: skip
    shown = [line.split("  ") for line in text_of(output.epochs_table(history)).splitlines()]
    lines = [[part.strip() for part in line if part.strip()] for line in shown]
    assert lines[3] == ["4", "loss 0.5000", "val_loss 0.7500"]
    assert lines[4] == ["1,437 samples in 1 min 05 s", "3 rounds", "87% computing", "5.0 MiB exchanged"]


@pytest.mark.parametrize("width", [40, 60, 200])
def test_on_narrow_terminals_a_name_stays_with_its_value(width: int) -> None:
    metrics = {f"{name}_accuracy": 0.5 for name in ("top", "val_size", "colour", "val_a_long_output")}
    progress = JobProgress(
        epoch=3, epochs=120, done=1200, total=100_000, items_per_second=3.0, nodes={"attic-1234abcd": 1.5}, metrics=metrics,
        exchanged_bytes=5 << 20, message="round 17: waiting for the slowest node of the cluster",
    )  # fmt: skip
    state = JobChanged(job_id="0123456789ab", kind="train", state="running", created_at=0.0, progress=progress)
    epoch = EpochMetrics(epoch=1, metrics=metrics, samples=100, seconds=3.0, rounds=2, computing=0.9)
    for shown in (following.picture(state), output.epochs_table([epoch])):
        console = Console(file=io.StringIO(), width=width)
        console.print(shown, crop=False)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        for name in metrics:
            assert any(f"{name} 0.5000" in line for line in lines), lines
        assert all(len(line) <= max(width, 50) for line in lines), lines


def test_of_many_epochs_the_last_are_shown() -> None:
    history = [EpochMetrics(epoch=number, metrics={"loss": 0.5}, samples=10 * number) for number in range(1, 201)]
    lines = text_of(output.epochs_table(history, 10)).splitlines()
    assert lines[1].strip() == "190 epochs before these: --verbose shows all"
    assert [line.split()[0] for line in lines[2::2]] == [str(number) for number in range(191, 201)]
    assert all("10 samples in" in line for line in lines[3::2])
    assert "before these" not in text_of(output.epochs_table(history[:10], 10))


def test_one_of_a_thing_is_singular() -> None:
    assert [counted(count, "node") for count in (0, 0.7, 1, 2, 1200)] == [
        "0 nodes", "1 node", "1 node", "2 nodes", "1,200 nodes",
    ]  # fmt: skip
    one = JobProgress(done=0, total=1, items_per_second=1.2, nodes={"n1": 1.2})
    assert following.progress_text(one).startswith("0/1 item (0%)  1 item/s on 1 node  ")
    assert "1 item " in text_of(output.evaluation_report(Evaluation(count=1, metrics={"accuracy": 1.0})))


def test_a_job_that_succeeded_is_shown_as_done() -> None:
    """Also after a restart of the coordinator, which then remembers no counts."""
    state = JobChanged(job_id="j", kind="train", state="succeeded", created_at=0.0)
    assert "100%" in text_of(following.picture(state))
    assert "100%" in text_of(output.jobs_table([state]))
    running = JobChanged(job_id="j", kind="train", state="running", created_at=0.0, progress=JobProgress(total=4))
    assert "0%" in text_of(following.picture(running))


def test_csv_names_classes_and_keys() -> None:
    scores = {"": np.array([[0.25, 0.75], [1.0, 0.0]], np.float32)}
    assert predict.as_csv(scores, ["a.png", "b.png"], ("cat", "dog")).splitlines() == [
        "key,predicted,cat,dog",
        "a.png,dog,0.25,0.75",
        "b.png,cat,1.0,0.0",
    ]
    two = {"x": np.zeros((1, 1)), "y": np.ones((1, 2))}
    assert predict.as_csv(two, [], ()).splitlines() == ["key,x_0,y_0,y_1", "0,0.0,1.0,1.0"]


def test_several_outputs_for_a_file_of_one_array_are_not_lost(tmp_path: Path) -> None:
    one, two = {"": np.ones((2, 1))}, {"x": np.zeros((1, 1)), "y": np.ones((1, 2))}
    assert predict.write(tmp_path / "one.npy", one, [], ()) == tmp_path / "one.npy"
    assert np.load(tmp_path / "one.npy").tolist() == [[1.0], [1.0]]
    assert predict.write(tmp_path / "two.npy", two, [], ()) == tmp_path / "two.npz"
    assert not (tmp_path / "two.npy").exists()
    assert np.load(tmp_path / "two.npz")["y"].tolist() == [[1.0, 1.0]]


@given(st.floats(0, 1e16))
def test_sizes_are_short(count: float) -> None:
    assert len(output.bytes_text(count)) <= 12
