"""The command line's own rules: where options stand, exit codes, errors as one sentence, quick help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints
from unittest import mock

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from potluck.cli import completion
from potluck.cli.infer import read_input
from potluck.cli.joining import CLAIM, elected
from potluck.cli.main import app
from potluck.cli.registry import read_labels, read_tags
from potluck.cli.session import check_output, global_options_first, image_size
from potluck.cli.train import train
from potluck.client import files
from potluck.client.training import TrainOptions
from potluck.data import items
from potluck.errors import InvalidData, InvalidRequest
from potluck.wire.jobs import Strategy, Train
from potluck.wire.questions import DatasetInfo, JobChanged, ModelInfo
from potluck.wire.values import BlobRef, Compression, ImageOptions, Signature, TensorSpec
from support.recordings import wav


def model(shape: tuple[int, ...], datatype: str = "FP32") -> ModelInfo:
    spec = TensorSpec(name="x", datatype=datatype, shape=shape)
    return ModelInfo(
        name="m",
        version=1,
        model=BlobRef(sha256="0" * 64, size=1),
        created_at=0.0,
        signature=Signature(inputs=(spec,), outputs=()),
    )


def potluck(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "potluck.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("nodes --seed h --json", "--seed h nodes --json"),
        ("--cluster=a train m d --timeout 3", "--cluster=a --timeout 3 train m d"),
        ("up --seed h --insecure", "--seed h up --insecure"),
        ("--debug up --cluster c", "--debug --cluster c up"),
        ("up -v --debug --timeout 5 --data a=b", "-v --debug --timeout 5 up --data a=b"),
        ("demo --seed h --keep f", "--seed h demo --keep f"),
        ("infer m -- --seed", "infer m -- --seed"),
        ("evaluate up --seed h", "--seed h evaluate up"),
    ],
)
def test_common_options_stand_anywhere(given: str, wanted: str) -> None:
    assert global_options_first(given.split()) == wanted.split()


def test_image_sizes() -> None:
    assert image_size("128x96") == (128, 96)
    assert image_size("28X28x1") == (28, 28, 1)
    assert image_size("224x192:1") == ImageOptions(height=224, width=192, scale=1.0)
    assert image_size("28x28x1:0.5") == ImageOptions(height=28, width=28, channels=1, scale=0.5)
    for wrong in ("128", "0x3", "ax3", "1x2x3x4", "8x8:", "8x8:a", "8x8:-1"):
        with pytest.raises(InvalidRequest, match="height x width"):
            image_size(wrong)


def test_tags_and_labels(tmp_path: Path) -> None:
    assert read_tags(["team=garden", "note=a=b", "empty="]) == {"team": "garden", "note": "a=b", "empty": ""}
    for wrong in ("team", "=x"):
        with pytest.raises(InvalidRequest, match="write KEY=VALUE"):
            read_tags([wrong])
    (tmp_path / "labels.txt").write_text("cat\n\n größer dog \n", encoding="utf-8")
    assert read_labels(str(tmp_path / "labels.txt")) == ("cat", "größer dog")
    assert read_labels("cat, dog") == ("cat", "dog")
    assert read_labels(None) == ()
    for wrong in ("cat", "cat,,dog", str(tmp_path / "nowhere")):
        with pytest.raises(InvalidRequest, match="write the classes as a,b,c"):
            read_labels(wrong)
    (tmp_path / "labels.txt").write_bytes(b"\xff")
    with pytest.raises(InvalidRequest, match="UTF-8"):
        read_labels(str(tmp_path / "labels.txt"))


def test_the_smallest_candidate_is_elected_and_a_claim_comes_before_all() -> None:
    assert elected("aa", [])
    assert elected("aa", ["ab"])
    assert not elected("0f", [f"{CLAIM}ff"])


def test_images_are_resized_as_the_nodes_do_it(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    Image.fromarray(np.array([[0, 100], [200, 100]], np.uint8)).save(path)
    pixels = items.image(path.read_bytes(), ImageOptions(height=4, width=1, channels=1, scale=1.0))
    assert pixels.shape == (4, 1, 1)
    assert pixels.ravel().tolist() == [50.0, 75.0, 125.0, 150.0], "half-pixel centres, edges repeated"
    assert read_input(str(path), model((-1, 2, 2, 3)), None).shape == (1, 2, 2, 3)
    with pytest.raises(InvalidRequest, match="--image"):
        read_input(str(path), model((-1, -1, -1, 3)), None)
    with pytest.raises(InvalidData, match="no file"):
        read_input("nowhere.png", model((-1, 2, 2, 3)), None)


def test_json_and_arrays_get_their_batch_axis(tmp_path: Path) -> None:
    assert read_input("[1, 2]", model((-1, 2)), None).tolist() == [[1.0, 2.0]]
    assert read_input('{"a": [[1, 2]], "b": [0.5]}', model((-1, 2)), None)["a"].dtype.kind == "i"
    np.save(tmp_path / "rows.npy", np.zeros((3, 2), np.float32))
    assert read_input(str(tmp_path / "rows.npy"), model((-1, 2)), None).shape == (3, 2)
    for array in ("[1, 2]", str(tmp_path / "rows.npy")):
        with pytest.raises(InvalidRequest, match="--image"):
            read_input(array, model((-1, 2)), ImageOptions(height=2, width=1))
    with pytest.raises(InvalidData, match="no file"):
        read_input("x" * 300, model((-1, 2)), None)
    with pytest.raises(InvalidData, match="JSON"):
        read_input("[1,", model((-1, 2)), None)
    with pytest.raises(InvalidData, match=r"not finite at \[0\]\[1\]: give"):
        read_input("[[1, 1e999]]", model((-1, 2)), None)
    with pytest.raises(InvalidData, match=r'not finite at \["a"\]\[0\]: give'):
        read_input('{"a": [NaN]}', model((-1, 2)), None)


def test_an_empty_input_is_refused_and_not_read_as_the_folder_here() -> None:
    refused = potluck("infer", "m", "")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("potluck: INPUT is empty: give an image")


def test_what_is_asked_of_files_is_told_with_names_that_a_terminal_only_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = mock.MagicMock()
    client.__enter__.return_value.deployed_model.return_value = model((-1, 2))
    client.__enter__.return_value.infer.return_value = np.array([[1.0], [np.nan]], np.float32)
    monkeypatch.setattr("potluck.cli.session.Session.client", lambda self: client)
    names = [str(tmp_path / name) for name in ("\x1b[31m\n.npy", "é.npy")]
    for name in names:
        np.save(name, np.zeros((1, 2), np.float32))
    app(["infer", "m", *names], standalone_mode=False)
    said = capsys.readouterr()
    assert said.out == f"{tmp_path}/\\x1b[31m\\n.npy: [1.0]\n{tmp_path}/é.npy: [null]\n"
    assert "not finite" in said.err


def test_texts_get_the_shape_of_the_input(tmp_path: Path) -> None:
    path = tmp_path / "film.txt"
    path.write_text("größer\nthan life", encoding="utf-8")
    assert read_input(str(path), model((-1,), "BYTES"), None).tolist() == ["größer\nthan life"]
    assert read_input(str(path), model((-1, 1), "BYTES"), None).tolist() == [["größer\nthan life"]]
    assert read_input('["a", "b"]', model((-1,), "BYTES"), None).tolist() == ["a", "b"]
    assert read_input('["a"]', model((-1, 1), "BYTES"), None).tolist() == [["a"]]
    assert read_input('"a \\"fine\\" film"', model((-1,), "BYTES"), None).tolist() == ['a "fine" film']
    assert read_input(' "a"', model((-1, 1), "BYTES"), None).tolist() == [["a"]]
    with pytest.raises(InvalidRequest, match="the input is text, but model m:1 takes no text"):
        read_input('"a"', model((-1, 4)), None)
    with pytest.raises(InvalidData, match="the input is not JSON"):
        read_input('"a', model((-1,), "BYTES"), None)
    with pytest.raises(InvalidRequest, match="is text, but model m:1 takes no text"):
        read_input(str(path), model((-1, 4)), None)
    with pytest.raises(InvalidRequest, match="--image"):
        read_input(str(path), model((-1,), "BYTES"), ImageOptions(height=2, width=1))
    path.write_text(" \n")
    with pytest.raises(InvalidData, match=r"film\.txt is empty"):
        read_input(str(path), model((-1,), "BYTES"), None)
    path.write_bytes(b"\xff")
    with pytest.raises(InvalidData, match="cannot be read as text in UTF-8"):
        read_input(str(path), model((-1,), "BYTES"), None)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2,), (4, 2), (3, 3)])
def test_recordings_are_cut_and_padded(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.wav"
    left, right = [0.5, -0.25, 0.125], [0.25, 0.25, -0.125]
    path.write_bytes(wav(np.stack([left, right], axis=1)))
    found = read_input(str(path), model((-1, *shape)), None)
    channels = [left, right, right][: shape[1]] if shape[1:] not in ((), (1,)) else [np.mean([left, right], axis=0)]
    expected = np.zeros((shape[0], len(channels)))
    expected[:3] = np.transpose(channels)[: shape[0]]
    np.testing.assert_allclose(found, expected.reshape(1, *shape), atol=1e-4)
    assert found.dtype == np.float32


def test_recordings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF")
    for info in (model((-1, -1)), model((-1, 2, 2, 3)), model((-1,)), model((-1, 4), "BYTES")):
        with pytest.raises(InvalidRequest, match=r"model m:1 does not take \(samples,\)"):
            read_input(str(path), info, None)
    with pytest.raises(InvalidData, match="cannot be read as a recording: not a WAV file"):
        read_input(str(path), model((-1, 4)), None)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from potluck.cli import main\n"
        "heavy = {'numpy', 'aiohttp', 'zeroconf', 'aiomqtt', 'tensorflow', 'keras'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    shown = potluck("--help")
    assert shown.returncode == 0
    for command in (
        "up",
        "status",
        "nodes",
        "events",
        "train",
        "evaluate",
        "predict",
        "jobs",
        "cancel",
        "deploy",
        "infer",
        "models",
        "data",
        "demo",
    ):
        assert command in shown.stdout


def test_errors_are_one_sentence_with_their_exit_code(unused_tcp_port: int) -> None:
    refused = potluck("nodes", "--seed", f"127.0.0.1:{unused_tcp_port}", "--timeout", "0.5")
    assert (refused.returncode, refused.stdout) == (4, "")
    assert refused.stderr.startswith("potluck: no broker answers")
    assert refused.stderr.count("\n") == 1
    assert potluck("train", "m.keras", "d", "--image", "5").returncode == 2, "said before anything is looked for"
    assert potluck("nodes", "--seed", "h:99999").returncode == 2
    open_to_all = potluck("up", "--listen", "0.0.0.0")
    assert open_to_all.returncode == 2
    assert "--insecure" in open_to_all.stderr
    assert potluck("nonsense").returncode == 2


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command, suffix in (("predict", "csv"), ("train", "keras")):
        nowhere = tmp_path / "nowhere" / f"o.{suffix}"
        refused = potluck(command, "m", "d", "--output", str(nowhere), "--seed", f"127.0.0.1:{unused_tcp_port}")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr == f"potluck: --output {nowhere}: there is no folder {nowhere.parent}\n"
    other = potluck("train", "m", "d", "--output", str(tmp_path / "o.h5"), "--seed", f"127.0.0.1:{unused_tcp_port}")
    assert (other.returncode, other.stdout) == (2, "")
    assert (
        other.stderr == f"potluck: --output {tmp_path}/o.h5: the result is a .keras file; name it {tmp_path}/o.keras\n"
    )
    with pytest.raises(InvalidRequest, match="this is a folder"):
        check_output(tmp_path)
    check_output(tmp_path / "o.csv")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InvalidRequest, match=f"o.csv: {tmp_path} cannot be written: you have no permission"):
        check_output(tmp_path / "o.csv")


def test_a_deployment_that_cannot_be_is_refused_before_training(unused_tcp_port: int) -> None:
    nowhere = ("--seed", f"127.0.0.1:{unused_tcp_port}")
    for typed, said in (
        (("--deploy", "2"), "--deploy needs --name"),
        (("--deploy", "2", "--name", "m", "--detach"), "--detach does not wait"),
        (("--deploy", "some", "--name", "m"), "a whole number from 1 to 999,999"),
    ):
        refused = potluck("train", "m.keras", "d", *typed, *nowhere)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert said in refused.stderr


def test_options_of_noise_go_to_the_client_when_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses options that alone hide nothing; options that were not typed are not sent."""
    client = mock.MagicMock()
    client.__enter__.return_value.train.side_effect = InvalidRequest("seen")
    monkeypatch.setattr("potluck.cli.session.Session.client", lambda self: client)
    for typed, given in (
        ([], {}),
        (["--private-unit", "node", "--delta", "0.5"], {"private_unit": "node", "delta": 0.5}),
    ):
        with pytest.raises(InvalidRequest, match="seen"):
            app(["train", "m", "node:d", *typed], standalone_mode=False)
        options = client.__enter__.return_value.train.call_args.kwargs
        names = ("l2_norm_clip", "noise_multiplier", "private_unit", "delta")
        assert {name: options[name] for name in names if name in options} == given


def test_a_data_set_with_the_name_of_a_folder_here_is_said_to_be_hidden_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = mock.MagicMock()
    monkeypatch.setattr("potluck.cli.session.Session.client", lambda self: client)
    monkeypatch.chdir(tmp_path)
    for name, here in (("films", ""), ("films", "films")):
        info = DatasetInfo(name=name, kind="texts", count=2, shards=1, size_bytes=1)
        client.__enter__.return_value.add_data.return_value = info
        if here:
            (tmp_path / here).mkdir()
        app(["data", "add", "films"], standalone_mode=False)
        said = capsys.readouterr()
        assert "films" in said.out
        assert ("DATA films means the folder of that name" in said.err) == bool(here)


def test_each_data_set_that_is_packed_for_a_job_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = mock.MagicMock()
    job = client.__enter__.return_value.train.return_value
    job.id, job.status.return_value.subject.data = "j", "train-0a"
    monkeypatch.setattr("potluck.cli.session.Session.client", lambda self: client)
    monkeypatch.chdir(tmp_path)
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
    for validation, packed in (("test", "test-1b"), ("held-out", "held-out"), (None, None)):
        job.asked = Train(model="m", dataset="train-0a", validation=packed)
        options = ["--validation", validation] if validation else []
        app(["train", "m", "train", "--detach", *options], standalone_mode=False)
        said = [line for line in capsys.readouterr().err.splitlines() if "is packed as" in line]
        expected = ["train is packed as data set train-0a"]
        expected += ["test is packed as data set test-1b"] if validation == "test" else []
        assert said == [f"job j: {one}, which is removed with the job" for one in expected]


@pytest.mark.parametrize(
    ("options", "level"),
    [([], "WARNING"), (["--debug"], "DEBUG"), (["--debug", "--log-level", "INFO"], "INFO")],
)
def test_debugging_reaches_the_daemons(options: list[str], level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joining = mock.MagicMock()
    joining.return_value.run = mock.AsyncMock()
    configure = mock.Mock()
    monkeypatch.setattr("potluck.cli.joining.Joining", joining)
    monkeypatch.setattr("potluck.logs.configure", configure)
    app(global_options_first(["up", *options]), standalone_mode=False)
    assert joining.call_args.args[0].log_level == level
    assert configure.call_args.args == (level,)


@pytest.mark.parametrize("command", ["cancel", "stop"])
def test_a_job_that_has_ended_is_said_to_have(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = JobChanged(job_id="j", kind="train", state="succeeded", created_at=0.0)
    client = mock.MagicMock()
    client.__enter__.return_value.cancel.return_value = (
        client.__enter__.return_value.job.return_value.stop.return_value
    ) = ended
    monkeypatch.setattr("potluck.cli.session.Session.client", lambda self: client)
    app([command, "j"], standalone_mode=False)
    assert capsys.readouterr().out == "job j had already ended: succeeded\n"


def test_numbers_in_json_become_what_the_model_takes(tmp_path: Path) -> None:
    def info(datatype: str) -> ModelInfo:
        spec = TensorSpec(name="x", datatype=datatype, shape=(-1, 3))
        blob = BlobRef(sha256="0" * 64, size=1)
        signature = Signature(inputs=(spec,), outputs=(spec,))
        return ModelInfo(name="m", version=1, model=blob, created_at=0.0, signature=signature)

    for datatype, dtype in (("INT64", np.int64), ("INT32", np.int32), ("FP32", np.float32), ("FP16", np.float32)):
        assert read_input("[1, 2, 3]", info(datatype), None).dtype == dtype
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(InvalidData, match="is not an image: give an image"):
        read_input(str(tmp_path / "a.zip"), info("FP32"), None)


@pytest.mark.parametrize("name", ["q.csv", "q.parquet", "q.npz", "q.tfrecord"])
def test_who_asks_with_a_data_set_is_told_of_predict(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    said = rf"q\.\w+ holds a data set, not one item: `potluck predict m:1 {tmp_path}/{name}`"
    with pytest.raises(InvalidData, match=said):
        read_input(str(tmp_path / name), model((-1, 4)), None)
    with pytest.raises(InvalidData, match=said):
        files.paths(tmp_path, model((-1, 4)))


def test_of_a_folder_is_said_what_is_in_it_and_what_the_model_takes(tmp_path: Path) -> None:
    cases = (
        (
            "a.png",
            model((-1, 4)),
            r"holds images \(a.png\), but model m:1 takes arrays of the shape \(4\) \(\.npy, JSON\)",
        ),
        ("a.txt", model((-1, 4)), r"holds texts \(a.txt\), but model m:1 takes arrays of the shape \(4\)"),
        ("a.wav", model((-1, 8, 8, 3)), r"holds recordings \(a.wav\), but model m:1 takes images \(.*\.png"),
        ("a.png", model((-1,), "BYTES"), r"holds images \(a.png\), but model m:1 takes texts \(\.txt\)"),
        ("a.png", replace(model((-1, 4)), rate=8000), r"but model m:1 takes recordings \(\.wav\)"),
        ("a.xyz", model((-1, 4)), r"holds files \(a.xyz\), but model m:1 takes arrays"),
        ("a.npy", model((-1, 4)), r"holds arrays: name the files themselves, as in .*/\*\.npy"),
        ("", model((-1, 4)), "has no files"),
    )
    for place, (name, info, said) in enumerate(cases):
        folder = tmp_path / str(place)
        folder.mkdir()
        if name:
            (folder / name).write_bytes(b"x")
        with pytest.raises(InvalidData, match=said):
            files.paths(folder, info)


def test_an_image_for_a_model_of_tables_is_refused_with_its_shape(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(InvalidRequest, match=r"model m:1 takes no images: its input has the shape \(any, 4\)"):
        read_input(str(tmp_path / "a.png"), model((-1, -1, 4)), None)


def test_completion_without_a_cluster_is_silent_and_offers_files(tmp_path: Path, unused_tcp_port: int) -> None:
    for name in ("net.keras", ".hidden", "pictures/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def offered(*words: str) -> list[str]:
        environment = os.environ | {
            "_POTLUCK_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("potluck", *words)), "COMP_CWORD": str(len(words)),
            "POTLUCK_SEEDS": f"127.0.0.1:{unused_tcp_port}",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "potluck.cli.main"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert done.stderr == ""
        return done.stdout.split()

    assert offered("job", "") == []
    assert offered("train", "") == ["net.keras", "pictures"]
    assert offered("train", "net.keras", "pictures/") == ["pictures/a.png"]
    assert offered("train", "--strategy", "") == ["auto", "local", "sync"]
    assert offered("train", "--strategy", "l") == ["local"]


@pytest.mark.parametrize(
    ("parts", "at", "words", "place", "stands"),
    [
        ("infer digits :", 2, "infer digits:", 1, "digits:"),
        ("infer digits : 1", 3, "infer digits:1", 1, "digits:"),
        ("infer dig", 1, "infer dig", 1, ""),
        ("infer digits:1", 1, "infer digits:1", 1, ""),
        ("--seed 127.0.0.1 : 1883 infer di", 5, "--seed 127.0.0.1:1883 infer di", 3, ""),
        ("--cluster = ab infer di", 4, "--cluster=ab infer di", 2, ""),
        ("train net node : ph", 4, "train net node:ph", 2, "node:"),
        ("infer digits : ", 3, "infer digits: ", 2, ""),
    ],
)
def test_words_that_bash_breaks_at_colons_are_put_together(
    parts: str, at: int, words: str, place: int, stands: str
) -> None:
    """The parts as bash 5.2 has them in COMP_WORDS; of `name:1` it replaces only the 1."""
    assert completion.joined(parts.split(" "), at) == (words.split(" "), place, stands)


def test_completion_imports_neither_arrays_nor_http() -> None:
    """People would notice a second of processor time for each TAB."""
    code = (
        "import sys; from potluck.cli import main; from potluck.client import listings, connection\n"
        "heavy = {'numpy', 'aiohttp', 'zeroconf', 'PIL', 'importlib.metadata'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_option_that_there_is_none_of_is_answered_with_what_was_meant() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "potluck.cli.main", "train", "m", "d", "--epoch", "3"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "No such option: --epoch: did you mean --epochs" in done.stderr, "the likeliest first"


def test_fixed_words_that_the_shell_offers_are_those_that_are_taken() -> None:
    taken = {
        "strategy": get_args(Strategy),
        "compression": get_args(Compression),
        "monitor_mode": get_args(get_type_hints(Train)["monitor_mode"]),
        "private_unit": get_args(get_type_hints(TrainOptions)["private_unit"]),
    }
    options = get_type_hints(train, include_extras=True)
    offered = {name: tuple(options[name].__metadata__[0].autocompletion("")) for name in taken}
    assert {name: sorted(words) for name, words in offered.items()} == {
        name: sorted(words) for name, words in taken.items()
    }


def test_no_module_of_the_command_line_takes_a_name_of_pythons_library() -> None:
    """`plain_mqtt.py` runs as a script: then its folder comes first where Python looks for modules."""
    names = {path.stem for path in Path(completion.__file__).parent.glob("*.py")}
    assert names & sys.stdlib_module_names == set()
