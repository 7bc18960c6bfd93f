"""Data that live on a node: packed in their own store, announced without items, filled into tasks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from node.own_data import OwnData
from potluck.data.pack import pack
from potluck.errors import InvalidRequest, Unavailable
from potluck.settings import NodeDataSettings
from potluck.wire.tasks import EvaluateTask, ExportTask, TrainTask, WarmUpTask
from potluck.wire.values import BlobRef, DataFormat, Dataset, Privacy
from support.tampering import tamper

MODEL = BlobRef(sha256="a" * 64, size=1)


@pytest.fixture
def own(tmp_path: Path) -> OwnData:
    path = tmp_path / "table.csv"
    path.write_text("a,b,kind\n1,2,cat\n3,4,dog\n5,6,cat\n")
    np.savez(tmp_path / "plain.npz", x=np.zeros((4, 2), np.float32), y=np.arange(4))
    return OwnData(
        tmp_path / "data",
        {
            "pets": NodeDataSettings(path=str(path), target="kind"),
            "plain": str(tmp_path / "plain.npz"),
            "gone": str(tmp_path / "nothing.npz"),
        },
    )


def training(name: str, *classes: str) -> TrainTask:
    return TrainTask(
        model=MODEL, weights=None, data=(), format=DataFormat(kind="arrays", classes=classes, inputs=("x",), target="y"),
        image=None, round=0, samples=2, seconds=1.0, batch_size=2, node_data=name,
    )  # fmt: skip


def test_what_is_ready_is_announced_and_what_fails_is_logged(own: OwnData, caplog: pytest.LogCaptureFixture) -> None:
    assert own.unpacked == ("pets", "plain", "gone")
    assert own.announced == ()
    assert own.pack("pets")
    assert own.pack("plain")
    assert not own.pack("gone")
    assert "nothing.npz does not exist" in caplog.text
    assert [(data.name, data.count, data.format.classes) for data in own.announced] == [
        ("pets", 3, ("cat", "dog")),
        ("plain", 4, ()),
    ]


def test_changed_settings_are_taken_over(own: OwnData, tmp_path: Path) -> None:
    for name in own.unpacked:
        own.pack(name)
    pets = replace(own._settings["pets"], sample_weight="a")
    own.change({"pets": pets, "plain": str(tmp_path / "plain.npz"), "new": str(tmp_path / "plain.npz")})
    assert own.unpacked == ("pets", "new")
    assert [data.name for data in own.announced] == ["plain"]
    assert own.missing == {}
    assert all(own.pack(name) for name in own.unpacked)
    assert [data.name for data in own.announced] == ["new", "pets", "plain"]
    own.change({})
    assert own.unpacked == ()
    assert own.announced == ()
    with pytest.raises(Unavailable):
        own.filled_in(training("plain"))


def test_a_bound_for_noise_holds_at_once_and_nothing_is_packed_again(own: OwnData) -> None:
    own.pack("pets")
    task = training("pets", "cat", "dog")
    with own.using(task):
        own.change({"pets": replace(own._settings["pets"], least_noise_multiplier=1.0)})
    assert own.unpacked == ()
    assert [data.name for data in own.announced] == ["pets"]
    with pytest.raises(InvalidRequest, match="least_noise_multiplier"):
        own.filled_in(task)
    # What a task has found that began before may not leave either.
    for begun in (task, WarmUpTask(task=task)):
        with pytest.raises(InvalidRequest, match="least_noise_multiplier"):
            own.check(begun)
    own.check(replace(task, privacy=Privacy(l2_norm_clip=1.0, noise_multiplier=1.0)))
    own.change({})
    with pytest.raises(Unavailable, match="no data named 'pets' any more"):
        own.check(task)


def test_settings_may_change_while_data_are_packed(own: OwnData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing takes minutes: until its end, removed data must not stay."""
    given = dict(own._settings)
    own.pack("pets")

    def meanwhile(*arguments: Any, **options: Any) -> Dataset:
        own.change(changed)
        with pytest.raises(Unavailable):
            own.filled_in(training("pets", "cat", "dog"))
        return pack(*arguments, **options)

    monkeypatch.setattr("potluck.data.pack.pack", meanwhile)
    changed: dict[str, NodeDataSettings] = {"plain": replace(given["plain"], least_noise_multiplier=1.0)}
    assert own.pack("plain")
    assert [data.name for data in own.announced] == ["plain"]
    own.change(given)
    changed = {"plain": given["plain"]}
    assert not own.pack("pets")
    assert not own.pack("gone")
    assert (own.unpacked, own.missing) == ((), {})


def test_a_disk_that_hangs_keeps_no_node_from_its_end(tmp_path: Path) -> None:
    """Also data that take minutes to pack: systemd would kill the node, and count that as a crash."""
    path = tmp_path / "plain.npz"
    np.savez(path, x=np.zeros((4, 2), np.float32), y=np.arange(4))
    program = (
        "import asyncio, sys, threading\n"
        "from pathlib import Path\n"
        "import potluck.data.pack\n"
        "from node.own_data import OwnData\n"
        "begun = threading.Event()\n"
        "potluck.data.pack.pack = lambda *given, **more: (begun.set(), threading.Event().wait())\n"
        "async def main():\n"
        "    packing = asyncio.create_task(OwnData(Path(sys.argv[1]), {'a': sys.argv[2]}).packed('a'))\n"
        "    await asyncio.to_thread(begun.wait)\n"
        "    packing.cancel()\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "data"), str(path)], check=True, timeout=30)


async def test_what_packing_finds_is_told(own: OwnData, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await own.packed("plain")
    assert not await own.packed("gone")
    monkeypatch.setattr(own, "pack", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await own.packed("plain")


def test_files_of_data_go_once_no_task_uses_them(own: OwnData, tmp_path: Path) -> None:
    def files() -> set[str]:
        return {path.name for path in (tmp_path / "data").iterdir()}

    own.pack("plain")
    plain = files()
    own.pack("pets")
    with own.using(training("pets", "cat", "dog")) as (_, used):
        own.change({"plain": str(tmp_path / "plain.npz")})
        own.sweep()
        assert files() == plain | set(used)
        assert used
    assert files() == plain
    # The same files by another name: they are packed again, and do not go with the old name.
    own.change({"as plain": str(tmp_path / "plain.npz")})
    assert own.pack("as plain")
    own.sweep()
    assert files() == plain
    own.change({})
    own.sweep()
    assert files() == set()


def test_whatever_is_wrong_with_files_the_node_goes_on(
    own: OwnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("in a library")

    for _ in range(3):
        assert not own.pack("gone")
    assert caplog.text.count("data not available") == 1
    monkeypatch.setattr("potluck.data.pack.pack", broken)
    assert not own.pack("pets")
    assert own.missing["pets"] == f"{tmp_path / 'table.csv'} cannot be read: ZeroDivisionError: in a library"
    monkeypatch.undo()
    assert own.pack("pets")
    assert set(own.missing) == {"gone"}


@pytest.mark.parametrize("path", ["/home/nobody-has-this-name/photos", "/tmp/of/others/photos", "/srv/nothing-there"])
@pytest.mark.parametrize("service", [True, False])
def test_a_service_says_which_folders_are_hidden_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, service: bool
) -> None:
    monkeypatch.setattr("potluck.lifecycle._notify_address", "/run/systemd/notify" if service else "")
    own = OwnData(tmp_path / "data", {"photos": path})
    own.pack("photos")
    hidden = "ProtectHome" if path.startswith("/home") else "PrivateTmp"
    assert (hidden in own.missing["photos"]) == (service and not path.startswith("/srv"))


def test_a_folder_too_far_up_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("train", "test"):
        (tmp_path / "films" / part / "good").mkdir(parents=True)
        (tmp_path / "films" / part / "good" / "1.txt").write_text("fine")
    own = OwnData(tmp_path / "data", {"films": str(tmp_path / "films")})
    assert not own.pack("films")
    assert "test and train are parts of a data set, not classes: give one of them" in caplog.text


def test_a_pipe_is_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.csv")
    own = OwnData(tmp_path / "data", {"t": str(tmp_path / "t.csv"), "zeros": "/dev/zero"})
    assert not own.pack("t")
    assert not own.pack("zeros")
    assert own.missing == {
        "t": f"{tmp_path / 't.csv'} is neither a folder nor a plain file",
        "zeros": "/dev/zero is neither a folder nor a plain file",
    }


def test_what_is_left_out_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.csv").write_text(",a,y\n0,1.5,2\n1,2.5,3\n")
    assert OwnData(tmp_path / "data", {"t": str(tmp_path / "t.csv")}).pack("t")
    assert "the first column, '', is left out as an index" in caplog.text


def test_more_names_of_classes_than_fit_into_a_message_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "many.csv"
    path.write_text("a,kind\n" + "".join(f"{i},{'long name ' * 10}{i}\n" for i in range(1000)))
    settings = NodeDataSettings(path=str(path), target="kind")
    own = OwnData(tmp_path / "data", {"many": settings, "as many": settings})
    assert own.pack("many")
    assert not own.pack("as many")
    assert [data.name for data in own.announced] == ["many"]
    assert "with it: the names of the 2000 classes have" in caplog.text


def test_a_task_is_filled_in_with_shards_and_the_jobs_numbers_of_classes(own: OwnData) -> None:
    own.pack("pets")
    task, files = own.filled_in(training("pets", "ant", "cat", "cow", "dog"))
    assert isinstance(task, TrainTask)
    assert task.format.classes == ("ant", "cat", "cow", "dog")
    assert task.format.places == (1, 3)
    assert sum(shard.count for shard in task.data) == 3
    assert {shard.blob.sha256 for shard in task.data} == set(files)
    assert all(path.is_file() for path in files.values())


def test_packed_data_that_were_changed_are_packed_again(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,kind\n1,cat\n3,dog\n")
    settings = {"pets": NodeDataSettings(path=str(tmp_path / "t.csv"), target="kind")}
    damages: list[int] = []
    own = OwnData(tmp_path / "data", settings, lambda: damages.append(1))
    own.pack("pets")
    task = training("pets", "cat", "dog")
    with own.using(task) as (_, files):
        own.check_files(task, files)
        tamper(next(iter(files.values())))
        with pytest.raises(Unavailable, match="packs its data 'pets' again"):
            own.check_files(WarmUpTask(task=task), files)
    assert damages == [1]
    assert own.unpacked == ("pets",)
    own.pack("pets")
    with own.using(task) as (_, again):
        assert again == files
        own.check_files(task, again)


def test_an_evaluation_is_always_of_all_items(own: OwnData) -> None:
    own.pack("plain")
    wanted = EvaluateTask(
        model=MODEL, weights=None, slices=(), image=None, batch_size=2, node_data="plain",
        format=DataFormat(kind="arrays", inputs=("x",), target="y"),
    )  # fmt: skip
    task, files = own.filled_in(wanted)
    assert isinstance(task, EvaluateTask)
    assert [(part.start, part.stop) for part in task.slices] == [(0, 4)]
    assert len(files) == 1


def test_other_tasks_stay_what_they_are(own: OwnData) -> None:
    task = ExportTask(model=MODEL, weights=MODEL)
    assert own.filled_in(task) == (task, {})


def test_data_that_are_not_there_and_classes_that_the_job_does_not_know(own: OwnData) -> None:
    with pytest.raises(Unavailable, match="no data named 'pets'"):
        own.filled_in(training("pets", "cat", "dog"))
    own.pack("pets")
    with pytest.raises(Unavailable, match="classes that the job does not know"):
        own.filled_in(training("pets", "cat"))


def test_an_owner_may_ask_for_noise(own: OwnData, tmp_path: Path) -> None:
    given = NodeDataSettings(path=str(tmp_path / "plain.npz"), least_noise_multiplier=1.0)
    strict = OwnData(tmp_path / "strict", {"plain": given})
    strict.pack("plain")
    task = training("plain")
    for privacy in (None, Privacy(l2_norm_clip=1.0), Privacy(l2_norm_clip=1.0, noise_multiplier=0.9)):
        with pytest.raises(InvalidRequest, match="noise_multiplier=1 or more"):
            strict.filled_in(replace(task, privacy=privacy))
    assert strict.filled_in(replace(task, privacy=Privacy(l2_norm_clip=1.0, noise_multiplier=1.0)))[1]
    evaluation = EvaluateTask(
        model=MODEL, weights=None, slices=(), image=None, batch_size=2, node_data="plain", format=task.format
    )
    with pytest.raises(InvalidRequest, match="evaluation has none"):
        strict.filled_in(evaluation)


def test_the_store_is_made_anew_and_for_its_user_alone(own: OwnData, tmp_path: Path) -> None:
    own.pack("pets")
    folder = tmp_path / "data"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = set(folder.iterdir())
    assert before
    OwnData(folder, {})
    assert not before & set(folder.iterdir())
