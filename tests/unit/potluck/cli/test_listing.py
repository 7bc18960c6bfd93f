"""Listings on terminals of any width: text that people copy from them is whole, and nothing is lost."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console, RenderableType
from rich.text import Text

from potluck.cli import output
from potluck.cli.listing import PIPE_COLUMNS, Facts, Line, Listing
from potluck.wire.jobs import ClassScore, EpochMetrics, Evaluation, JobProgress
from potluck.wire.questions import DatasetInfo, DeploymentInfo, JobChanged, ModelInfo, ReplicaInfo
from potluck.wire.values import BlobRef, ErrorInfo, Signature, TensorSpec

WORDS = st.text("abcdefghij0123456789:.-_", min_size=1, max_size=70)
CELLS = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)


def printed(renderable: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(renderable, crop=False)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@given(st.lists(st.tuples(WORDS, CELLS, CELLS, CELLS), max_size=4), st.sampled_from((20, 60, 80, 10_000)))
def test_every_word_is_there_whole_at_any_width(rows: list[tuple[str, ...]], width: int) -> None:
    below = [[" ".join(row)] for row in rows]
    shown = printed(Listing(("name", "said", "count", ""), rows, right=("count",), below=below), width)
    words = {word for line in shown.splitlines() for word in line.split()}
    assert {word for row in rows for cell in row for word in cell.split()} <= words
    for line in shown.splitlines():
        assert len(line) <= width or len(line.split()) <= 2, "only a word that is longer than the line passes its end"


@given(st.lists(st.tuples(st.just("known"), CELLS), max_size=3), st.sampled_from((20, 60, 80)))
def test_facts_break_between_words_alone(rows: list[tuple[str, str]], width: int) -> None:
    shown = printed(Facts([*rows, ("unknown", "")]), width)
    assert {word for _, said in rows for word in said.split()} <= set(shown.split())
    assert "unknown" not in shown


def test_what_is_known_of_no_model_has_no_column() -> None:
    new = replace(MODEL, name="new", signature=None, aliases=(), metrics={})
    assert printed(output.models_table([new]), 200).split("\n")[0].split() == ["model", "format", "size", "made"]
    both = printed(output.models_table([new, MODEL]), 300)
    assert {"inputs", "outputs", "aliases", "metrics"} <= set(both.splitlines()[0].split())
    assert "?" not in both.splitlines()[1]


def test_data_sets_show_what_is_to_be_said_of_them() -> None:
    films = DatasetInfo(name="films", kind="texts", count=2, shards=1, size_bytes=9, classes=("bad", "good"))
    line = printed(output.datasets_table([films]), 80).splitlines()
    assert [one.split() for one in line] == [
        ["data", "set", "kind", "items", "size", "classes"],
        ["films", "texts", "2", "9", "B", "bad,", "good"],
    ]
    told = printed(output.datasets_table([replace(films, skipped=3), replace(films, nodes=("a",))]), 100)
    assert "skipped  lives on" in told.splitlines()[0]


NAME = "flowers-of-the-garden:12"
NODE = "kitchen-raspberry-pi-8f3a2c"
SHA256 = "ab" * 32
URL = "http://[fe80::1234:5678:9abc:def0]:45123"
SPECS = tuple(
    TensorSpec(name=f"image_of_{side}", datatype="FP32", shape=(-1, 128, 128, 3)) for side in ("left", "right")
)
MODEL = ModelInfo(
    name="flowers-of-the-garden", version=12, model=BlobRef(sha256=SHA256, size=1 << 20, holders=(URL,)), created_at=1.0,
    signature=Signature(inputs=SPECS, outputs=SPECS), aliases=("prod", "best-of-all"), metrics={"val_accuracy": 0.98},
)  # fmt: skip
REPLICA = ReplicaInfo(
    replica_id="r1",
    node_id=NODE,
    state="failed",
    error=ErrorInfo(code="invalid_model", message="the model cannot be loaded"),
)
LISTINGS: tuple[tuple[RenderableType, tuple[str, ...]], ...] = (
    (output.models_table([MODEL]), (NAME, "prod", "best-of-all", "val_accuracy 0.9800", "image_of_right")),
    (output.model_report(MODEL), (NAME, SHA256, URL)),
    (
        output.deployments_table(
            [
                DeploymentInfo(
                    name=NAME, wanted=2, replicas=(REPLICA,), state="failing", role="canary", weight=10, p99_seconds=0.1,
                    failure_rate=0.25, served=1000, reason="2 replicas are wanted, and one node has room",
                )
            ]
        ),
        (NAME, NODE, "failing", "0/2", "canary 10 %", "100.0 ms", "25.0%", "1000", "one node has room"),
    ),
    (
        output.datasets_table(
            [
                DatasetInfo(
                    name="photographs-0123456789ab", kind="images", count=12000, shards=4, size_bytes=1 << 30,
                    classes=tuple(f"class{place}" for place in range(9)), nodes=(NODE, f"{NODE}-2"),
                )
            ]
        ),
        ("photographs-0123456789ab", "12000", NODE, f"{NODE}-2", "class8"),
    ),
    (
        output.jobs_table(
            [
                JobChanged(
                    job_id="4be1c06f2a9d", kind="train", state="failed", created_at=1.0,
                    progress=JobProgress(done=1, total=4), error=ErrorInfo(code="invalid_data", message=f"no item of {SHA256}"),
                )
            ]
        ),
        ("4be1c06f2a9d", "failed", "25%", SHA256),
    ),
    (
        output.epochs_table([EpochMetrics(epoch=10, metrics={f"output_{n}_accuracy": 0.5 for n in range(5)}, samples=8)]),
        ("10", "output_4_accuracy 0.5000", "8 samples"),
    ),
)  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, PIPE_COLUMNS])
@pytest.mark.parametrize(("listing", "parts"), LISTINGS)
def test_what_people_copy_is_whole_in_every_listing(
    listing: RenderableType, parts: tuple[str, ...], width: int
) -> None:
    shown = printed(listing, width)
    for part in parts:
        assert part in shown, part
    assert all(len(line) <= width or len(line.split()) <= 3 for line in shown.splitlines())


def test_a_confusion_matrix_that_does_not_fit_is_told_by_what_was_confused() -> None:
    labels = [f"class number {place}" for place in range(12)]
    rows = [[0] * 12 for _ in labels]
    rows[3][4], rows[5][6], rows[7][7] = 2, 9, 5
    evaluation = Evaluation(
        count=16, metrics={}, confusion=tuple(map(tuple, rows)),
        classes=tuple(ClassScore(label=label, precision=1, recall=1, f1=1, support=1) for label in labels),
    )  # fmt: skip
    narrow = printed(output.Confusion(evaluation), 80).splitlines()
    assert [line.split("  ")[-3:] for line in narrow[2:]] == [
        ["9", "class number 5", "class number 6"],
        ["2", "class number 3", "class number 4"],
    ]
    assert "confusion (rows: truth)" in printed(output.Confusion(evaluation), PIPE_COLUMNS)


@pytest.mark.parametrize("text", ["saved as /home/[me]/model.keras", f"{'x' * 100} {'y' * 100}"])
def test_a_sentence_is_printed_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are not markup, and the terminal itself wraps."""
    output.show(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_a_pipe_gets_a_line_for_each_entry() -> None:
    listing = Listing(["a", "b"], [["x", "1"], ["y", "2"]], below=[["told of x", "and more"], []])
    assert printed(listing, PIPE_COLUMNS) == "a  b\nx  1  told of x  and more\ny  2\n"


@pytest.mark.parametrize("width", [60, PIPE_COLUMNS])
def test_a_terminal_shows_names_and_does_not_obey_them(width: int) -> None:
    name = "red\x1b[31m\nnext é 猫"
    data = DatasetInfo(name="d", kind="images", count=2, shards=1, size_bytes=1, classes=(name,))
    for shown in (
        output.datasets_table([data]),
        output.model_report(replace(MODEL, classes=(name,))),
        Listing([name], [[Text(name, style="red")]], right=[name], below=[[name]]),
        Line(name),
    ):
        assert "red\\x1b[31m\\nnext é 猫" in (text := printed(shown, width))
        assert "\x1b" not in text
        assert "\nnext" not in text
