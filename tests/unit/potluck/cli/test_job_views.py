"""A job's history: rounds kept within bounds, the plot, event files as TensorBoard reads them, and `potluck job`."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from coordinator.plans.events import EpochEnded, JobSubmitted, RoundClosed
from coordinator.plans.history import ROUNDS_LIMIT_BYTES
from coordinator.plans.job import Job, Training
from potluck.cli import following
from potluck.cli.jobs import EPOCHS
from potluck.cli.main import app
from potluck.cli.session import Session
from potluck.client import event_files, plots
from potluck.errors import Conflict, InvalidRequest
from potluck.wire import codec
from potluck.wire.jobs import EpochMetrics, JobProgress, RoundMetrics, Train
from potluck.wire.questions import JobChanged, JobEnded
from potluck.wire.values import INLINE_LIMIT_BYTES, BlobRef

BLOB = BlobRef(sha256="0" * 64, size=1)


def job_ended(epochs: int, metrics: tuple[str, ...] = ("loss", "accuracy"), **parts: Any) -> JobEnded:
    """A training job with epochs of 10 s and two rounds; a value is its epoch, with `val_` the negative of it."""
    history = tuple(
        EpochMetrics(
            epoch=epoch,
            metrics={name: float(epoch) for name in metrics} | {f"val_{name}": -float(epoch) for name in metrics},
            seconds=10.0,
        )
        for epoch in range(1, epochs + 1)
    )
    rounds = tuple(
        RoundMetrics(
            round=number, samples=64, metrics={"loss": float(number)}, outer_learning_rate=0.5, outer_momentum=0.25,
            closed_at=100.0 + number, rejected={"n1": "too large"} if number == 1 else {},
        )
        for number in range(2 * epochs)
    )  # fmt: skip
    ended = JobEnded(
        job_id="j1", kind="train", state="succeeded", created_at=90.0, started_at=100.0, ended_at=200.0,
        history=history, rounds=rounds,
    )  # fmt: skip
    return replace(ended, **parts)


# --- rounds ------------------------------------------------------------------------------------------------------------


def training() -> Any:
    """A strategy that no event changes."""
    strategy = Mock(spec=Training)
    strategy.happened.side_effect = lambda event: strategy
    return strategy


def job_after(rounds: int, metrics: dict[str, float]) -> Job:
    spec = Train(model="m", dataset="d")
    job = Job(JobSubmitted(at=0.0, job_id="j", request_id="", spec=spec), training())
    for number in range(rounds):
        job.apply(closed(number, metrics))
    return job


def closed(number: int, metrics: dict[str, float]) -> RoundClosed:
    return RoundClosed(
        at=float(number), round=number, base=BLOB, step=BLOB, weights=BLOB, velocity=BLOB, samples=10 + number,
        learning_rate=1.0, momentum=0.9, metrics=metrics, rejected={"b": "it was late"} if number == 1 else {},
    )  # fmt: skip


def test_rounds_are_kept_as_they_were_closed() -> None:
    job = job_after(3, {"loss": 0.5})
    assert [kept.round for kept in job.history.rounds] == [0, 1, 2]
    assert job.history.rounds[1] == RoundMetrics(
        round=1, samples=11, metrics={"loss": 0.5}, outer_learning_rate=1.0, outer_momentum=0.9, closed_at=1.0,
        rejected={"b": "it was late"},
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 40))
def test_however_many_rounds_they_fit_into_a_message_evenly(rounds: int, names: int) -> None:
    job = job_after(rounds, {f"metric_with_a_long_name_{number}": 1 / 3 for number in range(names)})
    numbers = [kept.round for kept in job.history.rounds]
    assert numbers == list(range(0, rounds, job.history.stride))
    for encoding in ("json", "msgpack"):
        size = len(
            codec.encode(job_ended(1, rounds=tuple(job.history.rounds)), encoding, limit=10 * INLINE_LIMIT_BYTES)
        )
        assert size < ROUNDS_LIMIT_BYTES + 1024 < INLINE_LIMIT_BYTES / 3
    if job.history.stride > 1:
        assert size > ROUNDS_LIMIT_BYTES / 5, "no more are left out than must be"


def test_beside_very_many_epochs_fewer_rounds_are_kept() -> None:
    metrics = dict.fromkeys(("loss", "accuracy", "val_loss", "val_accuracy"), 1 / 3)
    job = job_after(0, {})
    kept = []
    for number in range(1000):
        job.apply(closed(number, metrics))
        epoch = EpochMetrics(epoch=number + 1, metrics=metrics, samples=number, seconds=1.5, rounds=1, computing=0.5)
        job.apply(EpochEnded(at=float(number), epoch=epoch))
        kept.append(len(job.history.rounds))
    assert max(kept) > 200
    assert kept[-1] < 20
    ended = job_ended(1, history=tuple(job.history.epochs), rounds=tuple(job.history.rounds))
    assert codec.encode(ended, "json")


# --- the plot ----------------------------------------------------------------------------------------------------------


def test_panels_hold_training_and_validation_losses_first() -> None:
    ended = job_ended(2, ("accuracy", "loss"))
    assert list(plots.panels(ended.history)) == ["loss", "accuracy"]
    assert plots.panels(ended.history)["loss"] == {
        "training": ([1, 2], [1.0, 2.0]),
        "validation": ([1, 2], [-1.0, -2.0]),
    }
    holes = (EpochMetrics(epoch=1, metrics={"loss": math.nan}), EpochMetrics(epoch=2, metrics={"loss": 3.0}))
    assert plots.panels(holes) == {"loss": {"training": ([2], [3.0])}}


@pytest.mark.parametrize(
    ("epochs", "metrics", "parts"),
    [
        (1, ("loss",), {}),
        (12, ("loss", "accuracy"), {"best_epoch": 9, "registered": "digits:1"}),
        (100, ("loss", "a_loss", "$odd_{name}$"), {"state": "failed"}),
    ],
)
def test_plots_are_pictures(tmp_path: Path, epochs: int, metrics: tuple[str, ...], parts: dict[str, Any]) -> None:
    path = tmp_path / "out.PNG"
    plots.save(job_ended(epochs, metrics, **parts), path)
    with Image.open(path) as picture:
        width, height = picture.size
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 24) or []}
    assert width >= 800
    assert height >= 500
    assert {(31, 111, 180), (224, 112, 26)} <= colors, "both lines are there"


def test_the_suffix_says_what_is_drawn(tmp_path: Path) -> None:
    for suffix, begins in (("svg", b"<?xml"), ("pdf", b"%PDF")):
        plots.save(job_ended(2), tmp_path / f"out.{suffix}")
        assert (tmp_path / f"out.{suffix}").read_bytes().startswith(begins)
    with pytest.raises(InvalidRequest, match=r"must end in \.png, \.svg or \.pdf"):
        plots.check_path(tmp_path / "out.gif")
    with pytest.raises(InvalidRequest, match="there is no folder"):
        plots.check_path(tmp_path / "nowhere" / "out.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InvalidRequest, match="cannot be saved"):
        plots.save(job_ended(2), tmp_path / "folder.png")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib.figure", "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InvalidRequest, match=r"needs matplotlib: .* -m pip install .*\[plot\]"):
        plots.check_path(tmp_path / "out.png")
    with pytest.raises(InvalidRequest, match=r"needs tensorboardX: .* -m pip install .*\[tensorboard\]"):
        event_files.check_folder(tmp_path, "j1")


# --- event files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Scalars of a run as TensorBoard reads them: by tag, (step, value, Unix time)."""
    # This tells TensorBoard not to use TensorFlow: the import would take seconds.
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars_of(run: Path) -> dict[str, list[tuple[int, float, float]]]:
        events = EventAccumulator(str(run)).Reload()
        return {
            tag: [(event.step, event.value, event.wall_time) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }

    return scalars_of


def test_tensorboard_reads_what_was_written(tmp_path: Path, read: Any) -> None:
    event_files.save(job_ended(2), tmp_path / "new" / "logs")
    train = read(tmp_path / "new" / "logs" / "train")
    assert train["epoch_loss"] == train["epoch_accuracy"] == [(0, 1.0, 110.0), (1, 2.0, 120.0)]
    assert train["round_loss"] == [(number, float(number), 100.0 + number) for number in range(4)]
    assert [value for _, value, _ in train["round_rejected"]] == [0.0, 1.0, 0.0, 0.0]
    assert set(train) == {
        "epoch_loss", "epoch_accuracy",
        "round_loss", "round_samples", "round_outer_learning_rate", "round_outer_momentum", "round_rejected",
    }  # fmt: skip
    assert read(tmp_path / "new" / "logs" / "validation") == {
        "epoch_loss": [(0, -1.0, 110.0), (1, -2.0, 120.0)],
        "epoch_accuracy": [(0, -1.0, 110.0), (1, -2.0, 120.0)],
    }


def test_a_job_is_written_once_and_no_other_beside_it(tmp_path: Path, read: Any) -> None:
    for epochs in (1, 2):
        event_files.save(job_ended(epochs), tmp_path)
    assert len(list(tmp_path.glob("train/*"))) == len(list(tmp_path.glob("validation/*"))) == 1
    assert len(read(tmp_path / "train")["epoch_loss"]) == 2
    with pytest.raises(InvalidRequest, match="event files of another run"):
        event_files.save(job_ended(1, job_id="j2"), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="is a file"):
        event_files.check_folder(tmp_path / "file", "j1")


def test_without_validation_there_is_no_such_run(tmp_path: Path, read: Any) -> None:
    event_files.save(job_ended(0, history=(EpochMetrics(epoch=1, metrics={"loss": math.nan}),)), tmp_path)
    assert math.isnan(read(tmp_path / "train")["epoch_loss"][0][1])
    assert not (tmp_path / "validation").exists()


# --- the command ---------------------------------------------------------------------------------------------------------


class FakeClient:
    """One job, as the synchronous client shows it."""

    id = "j1"

    def __init__(self, state: JobChanged, ended: JobEnded | None) -> None:
        self.state, self.ended = state, ended

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *error: object) -> None: ...

    def job(self, job_id: str) -> FakeClient:
        return self

    def status(self) -> JobChanged:
        return self.state

    def result(self) -> JobEnded:
        assert self.ended is not None
        return self.ended

    def plot(self, path: Path) -> Path:
        plots.save(self.result(), path)
        return path

    def tensorboard(self, folder: Path) -> Path:
        event_files.save(self.result(), folder)
        return folder


def run(monkeypatch: pytest.MonkeyPatch, state: str, ended: JobEnded | None, *arguments: str) -> Any:
    progress = JobProgress(quarantined={"n3": "its loss became nan"})
    changed: Any = JobChanged(job_id="j1", kind="train", state=state, created_at=90.0, progress=progress)  # type: ignore[arg-type]
    monkeypatch.setattr(Session, "client", lambda self: FakeClient(changed, ended))
    return CliRunner().invoke(app, ["job", "j1", *arguments])


def test_a_job_that_has_ended_is_shown_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = job_ended(2, best_epoch=1)
    shown = run(monkeypatch, "succeeded", ended, "--plot", str(tmp_path / "o.png"), "--tensorboard", str(tmp_path))
    assert shown.exit_code == 0, shown.output
    for part in (
        "computing",
        "exchanged",
        "val_loss -2.0000",
        "the model is that of the best epoch, 1",
        "n3 is left out: its loss became nan",
    ):
        assert part in shown.stdout, part
    assert f"tensorboard --logdir {tmp_path}" in shown.stderr
    assert (tmp_path / "o.png").exists()
    assert list(tmp_path.glob("validation/*tfevents*"))


def test_of_a_long_job_the_state_comes_first_and_then_the_last_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run(monkeypatch, "succeeded", job_ended(50)).stdout.splitlines()
    assert shown[1].split()[:3] == ["j1", "train", "succeeded"]
    assert sum("computing" in line for line in shown) == EPOCHS
    everything = CliRunner().invoke(app, ["--verbose", "job", "j1"]).stdout
    assert everything.count("computing") == 50


def test_json_tells_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run(monkeypatch, "succeeded", job_ended(1), "--json")
    assert '"outer_momentum": 0.25' in shown.stdout


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = run(monkeypatch, "running", None, "--plot", str(tmp_path / "o.png"))
    assert isinstance(refused.exception, Conflict)
    assert "--wait" in str(refused.exception)
    assert isinstance(run(monkeypatch, "running", None, "--plot", "o.gif").exception, InvalidRequest)


def test_lines_that_may_be_copied_stay_whole_beside_a_live_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it says why there is no news."""
    written = io.StringIO()
    console = Console(file=written, width=40, force_terminal=True, color_system=None)
    monkeypatch.setattr(following, "Console", lambda **_: console)
    line = "echo iVBORw0KGgo= | base64 -d | curl --data-binary @- http://192.168.1.7:7814/models/pictures/classify"
    trouble = ["", "the connection to the broker is lost"]
    state = JobChanged(job_id="j", kind="deploy", state="running", created_at=0.0, progress=JobProgress())
    job: Any = SimpleNamespace(id="j", states=lambda: [state], epochs_so_far=tuple, trouble=lambda: trouble[0])
    following._live(job, False, lambda _: [line])
    assert f"{line}\n" in written.getvalue().replace("\r", "")
    assert "no news" not in written.getvalue()
    trouble[0] = trouble[1]
    following._live(job, False, lambda _: ())
    assert "no news: the connection to the" in written.getvalue()
