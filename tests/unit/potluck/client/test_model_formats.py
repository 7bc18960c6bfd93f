"""Models as files: recognised by their content, SavedModels as tars that are always the same, and written back as they were."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from potluck import savedmodels
from potluck.client.formats import export_path, format_of, write
from potluck.client.models import is_model_path, keras_file, model_file
from potluck.errors import InvalidModel, InvalidRequest
from potluck.wire.questions import ModelInfo
from potluck.wire.values import BlobRef, ModelFormat

TFLITE = b"\x1c\x00\x00\x00TFL3" + bytes(40)


def zipped(path: Path, name: str = "config.json", text: str = '{"class_name": "Sequential", "config": {}}') -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, text)
    return path


def hdf5(path: Path, attribute: str) -> Path:
    with h5py.File(path, "w") as file:
        file.attrs[attribute] = '{"class_name": "Sequential"}'
        file["model_weights/dense/kernel"] = [[1.0, 2.0]]
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def saved_model(folder: Path) -> Path:
    (folder / "variables").mkdir(parents=True)
    (folder / "assets").mkdir()
    for name in (
        "variables/variables.index",
        "saved_model.pb",
        "assets/words größer.txt",
        "variables/variables.data-00000-of-00001",
    ):
        (folder / name).write_bytes(name.encode() * 100)
    return folder


def info(format: ModelFormat) -> ModelInfo:
    return ModelInfo(name="m", version=3, model=BlobRef(sha256="0" * 64, size=1), created_at=1.0, format=format)


@pytest.mark.parametrize("name", ["model", "model.keras", "model.pb", "model.tflite"])
def test_a_format_is_told_by_the_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert format_of(zipped(path)) == "keras"
    assert format_of(hdf5(path, "model_config")) == "h5"
    assert format_of(written(path, TFLITE)) == "tflite"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path / "nowhere", "there is no model file"),
        (lambda path: written(path / "m.keras", b""), "is empty"),
        (lambda path: written(path / "m.keras", b"hello there"), r"is not a \.keras file: it is not a zip, it begins with b'hello th'"),
        (lambda path: written(path / "m.h5", b"hello"), r"is not a \.h5 file: it is not HDF5"),
        (lambda path: written(path / "m.tflite", b"x"), r"is not a \.tflite file: it is not a FlatBuffer"),
        (lambda path: written(path / "m.onnx", b"\x08\x07"), r"is no model: give a \.keras, \.h5 or \.tflite"),
        (lambda path: written(path / "saved_model.pb", b"\x08\x01"), "only a part of a SavedModel: give its folder"),
        (lambda path: hdf5(path / "w.weights.h5", "layer_names"), "HDF5 file without a model"),
        (lambda path: zipped(path / "torch.pt", "archive/data.pkl"), r"is not a \.keras file.*config\.json"),
        (lambda path: zipped(path / "list.keras", text="[]"), "config.json is not a map"),
        (lambda path: path, r"folder without saved_model\.pb"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_said(tmp_path: Path, make: Callable[[Path], Path], said: str) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "given").mkdir()
    with pytest.raises(InvalidModel, match=said):
        model_file(make(tmp_path / "given"), tmp_path / "scratch")


def test_files_are_named_and_say_where_they_came_from(tmp_path: Path) -> None:
    found = model_file(hdf5(tmp_path / "old net.h5", "model_config"), tmp_path)
    assert (found.path, found.name, found.format) == (tmp_path / "old net.h5", "old net", "h5")
    assert found.source == "imported from old net.h5"
    packed = model_file(saved_model(tmp_path / "net"), tmp_path)
    assert (packed.name, packed.format, packed.source) == ("net", "savedmodel", "imported from net")
    with tarfile.open(packed.path) as archive:
        assert "saved_model.pb" in archive.getnames()
    with pytest.raises(InvalidModel, match=r"is a Keras HDF5 file, but this takes a \.keras file"):
        keras_file(tmp_path / "old net.h5", tmp_path, compiled=True)
    assert [is_model_path(text) for text in ("m.h5", "m.tflite", "./net", "net", "net:prod")] == [True] * 3 + [
        False
    ] * 2


def test_a_saved_model_is_the_same_tar_whoever_packs_it(tmp_path: Path) -> None:
    one, other = saved_model(tmp_path / "one"), tmp_path / "other"
    savedmodels.pack(one, tmp_path / "one.tar")
    savedmodels.unpack(tmp_path / "one.tar", other)
    for path in other.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    (other / "empty").mkdir()
    savedmodels.pack(other, tmp_path / "other.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "other.tar").read_bytes()
    files = {path.relative_to(one): path.read_bytes() for path in one.rglob("*") if path.is_file()}
    assert {path.relative_to(other): path.read_bytes() for path in other.rglob("*") if path.is_file()} == files


def entry(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, to, 4 if kind == tarfile.REGTYPE else 0
    return made


@pytest.mark.parametrize(
    "bad",
    [
        entry("../outside"), entry("/tmp/outside"), entry("a/../../outside"),
        entry("link", tarfile.SYMTYPE, "/etc/passwd"), entry("link", tarfile.LNKTYPE, "saved_model.pb"),
        entry("pipe", tarfile.FIFOTYPE), entry("device", tarfile.CHRTYPE),
    ],
    ids=lambda bad: f"{bad.name}-{bad.type!r}",
)  # fmt: skip
def test_nothing_is_unpacked_outside_or_half(tmp_path: Path, bad: tarfile.TarInfo) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.addfile(entry("saved_model.pb"), io.BytesIO(b"good"))
        archive.addfile(bad, io.BytesIO(b"evil"))
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(InvalidModel, match="entry that"):
        savedmodels.unpack(tmp_path / "bad.tar", inside / "net")
    assert list(inside.iterdir()) == []
    assert not (tmp_path / "outside").exists()


def test_a_folder_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    savedmodels.pack(saved_model(tmp_path / "net"), tmp_path / "tar")
    mine = written(tmp_path / "mine", b"x")
    for taken in (tmp_path / "net", mine):
        with pytest.raises(InvalidRequest, match="exists already: name a new or empty folder"):
            savedmodels.unpack(tmp_path / "tar", taken)
    with pytest.raises(InvalidRequest, match="cannot be written"):
        savedmodels.unpack(tmp_path / "tar", mine / "below")
    (tmp_path / "empty").mkdir()
    savedmodels.unpack(tmp_path / "tar", tmp_path / "empty")
    assert (tmp_path / "empty" / "saved_model.pb").is_file()
    with pytest.raises(InvalidModel, match="not a tar"):
        savedmodels.unpack(mine, tmp_path / "new")


def test_models_go_where_they_are_told(tmp_path: Path) -> None:
    assert export_path(info("keras"), tmp_path / "a.keras") == tmp_path / "a.keras"
    assert export_path(info("tflite"), tmp_path) == tmp_path / "m-3.tflite"
    assert export_path(info("savedmodel"), tmp_path) == tmp_path
    assert export_path(info("h5"), tmp_path / "weights.hdf5") == tmp_path / "weights.hdf5"
    with pytest.raises(InvalidRequest, match=r"m:3 is a Keras HDF5 file: name the file a\.h5"):
        export_path(info("h5"), tmp_path / "a.keras")
    nowhere = tmp_path / "not" / "there"
    said = f"model m:3 cannot be saved as {nowhere}/a.h5: there is no folder {nowhere}"
    with pytest.raises(InvalidRequest, match=f"^{said}$"):
        export_path(info("h5"), nowhere / "a.h5")
    blob = written(tmp_path / "blob", TFLITE)
    write(blob, info("tflite"), tmp_path / "a.tflite")
    assert (tmp_path / "a.tflite").read_bytes() == TFLITE
    with pytest.raises(InvalidRequest, match="cannot be saved as"):
        write(blob, info("tflite"), tmp_path / "no" / "a.tflite")
