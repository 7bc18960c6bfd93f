"""Image files give the same pixels by every way in, and the pixels that the model's own layers expect."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potluck.client import Client
from potluck.errors import InvalidData, InvalidRequest
from potluck.local_cluster import LocalCluster
from potluck.wire.values import ImageOptions
from support.pictures import HEIGHT, WIDTH, pictures

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster"), cluster="images", nodes=1, discovery=False) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(f"{cluster.broker_host}:{cluster.broker_port}", cluster=cluster.cluster) as connected:
        yield connected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file, in two class folders."""
    found = tmp_path_factory.mktemp("pictures")
    for number, picture in enumerate(pictures().values()):
        path = found / "ab"[number % 2] / f"{number:02}.{picture.suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture.data)
    return found


def seen(channels: int, dtype: str = "float32", *before: Any) -> Any:
    """A model that answers its own input, one number for each pixel."""
    import keras

    image = made = keras.Input((HEIGHT, WIDTH, channels), dtype=dtype)
    for layer in before:
        made = layer(made)
    return keras.Model(image, keras.layers.Flatten()(made))


def judge(channels: int, *before: Any, dtype: str = "float32") -> Any:
    """A compiled model whose loss depends on every pixel."""
    import keras

    layers = [
        *before,
        keras.layers.Flatten(),
        keras.layers.Dense(1, use_bias=False, kernel_initializer="glorot_uniform"),
    ]
    model = keras.Sequential([keras.Input((HEIGHT, WIDTH, channels), dtype=dtype), *layers])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    return model


def classified(
    cluster: LocalCluster, model: str, data: bytes, count: int, classes: tuple[str, ...] = ()
) -> list[float]:
    """The answer of `/classify`, as a row."""
    names = classes or tuple(map(str, range(count)))
    request = urllib.request.Request(f"{cluster.http_url}/models/{model}/classify?top={count}", data)
    with urllib.request.urlopen(request, timeout=60) as response:
        scores = json.load(response)["scores"]
    return [one["score"] for one in sorted(scores, key=lambda one: names.index(one["label"]))]


def potluck(cluster: LocalCluster, *arguments: str) -> str:
    where = ("--seed", f"{cluster.broker_host}:{cluster.broker_port}", "--cluster", cluster.cluster)
    command = [sys.executable, "-m", "potluck.cli.main", *where, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_kind_of_file_by_every_way(cluster: LocalCluster, client: Client, folder: Path, channels: int) -> None:
    files = sorted(folder.rglob("*.*"))
    by_number = list(pictures().values())
    assert len(files) == len(by_number) > 40
    found = [by_number[int(path.stem)] for path in files]
    expected = np.stack([one.pixels(channels) for one in found]).reshape(len(files), -1).astype(np.float32) / 255
    name = f"seen{channels}"
    client.deploy(seen(channels), name=name).wait(timeout=120)

    ways = {
        "predict": client.predict(name, folder).wait(timeout=120).predictions,
        "infer, a folder": client.infer(name, folder),
        "infer, paths": client.infer(name, [str(path) for path in files]),
        "HTTP": np.array(
            [classified(cluster, name, path.read_bytes(), expected.shape[1]) for path in files], np.float32
        ),
    }
    if channels == 3:
        told = json.loads(potluck(cluster, "infer", name, str(folder), "--json"))
        assert told["files"] == [str(path) for path in files]
        ways["command line"] = np.array(told["outputs"], np.float32)
    for way, pixels in ways.items():
        for path, one, row, right in zip(files, found, pixels, expected, strict=True):
            assert np.abs(row - right).max() < 1e-6, f"{way}: {path.name}, {len(one.data)} bytes"

    model = judge(channels)
    labels = np.array([float(path.parent.name == "b") for path in files], np.float32)
    loss = model.evaluate(expected.reshape(-1, HEIGHT, WIDTH, channels), labels, verbose=0)
    trained = client.train(model, folder, epochs=1, batch_size=len(files), name=f"judge{channels}", strategy="local")
    assert trained.wait(timeout=120).history["loss"][0] == pytest.approx(loss, rel=1e-4)
    evaluated = client.evaluate(f"judge{channels}", folder).wait(timeout=120).evaluation
    assert evaluated.metrics["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "scaled", "scale"), [("float32", True, 1.0), ("uint8", True, 1.0), ("float16", False, 1 / 255)]
)
def test_a_model_gets_the_pixels_that_its_layers_expect(
    cluster: LocalCluster, client: Client, folder: Path, dtype: str, scaled: bool, scale: float
) -> None:
    """In training, evaluation, prediction and each way of asking. The job, the registry and the listing name them."""
    import keras

    rescaling = [keras.layers.Rescaling(1 / 255 if scaled else 1.0)]
    name, file = f"own-{dtype}", sorted(folder.glob("a/*.png"))[2]
    pixels = pictures()[list(pictures())[int(file.stem)]].pixels(3)
    model = judge(3, *rescaling, dtype=dtype)
    given = np.asarray(pixels if scale == 1.0 else pixels * np.float32(scale), dtype)[None]
    expected = model.predict(given, verbose=0)
    job = client.train(model, folder, name=name, strategy="local").wait(timeout=120)
    options = ImageOptions(height=HEIGHT, width=WIDTH, scale=scale)
    assert job.status().progress.image == options
    assert client.get_model(name).image == options
    assert "pixels 0 to 255" in potluck(cluster, "models", "show", name) or scale != 1.0
    client.evaluate(name, folder).wait(timeout=120)
    client.deploy(name).wait(timeout=120)
    answers = {
        "predict": client.predict(name, file.parent)
        .wait(timeout=120)
        .predictions[sorted(file.parent.iterdir()).index(file)],
        "infer": client.infer(name, file),
        "uint8": client.infer(name, pixels),
        "predict, uint8": client.predict(name, pixels[None]).wait(timeout=120).predictions,
        "HTTP": classified(cluster, name, file.read_bytes(), 2, ("a", "b"))[1:],
    }
    for way, answer in answers.items():
        assert np.ravel(answer) == pytest.approx(np.ravel(expected), abs=2e-3 if dtype == "float16" else 1e-4), way


def test_inputs_that_infer_takes_and_refuses(
    cluster: LocalCluster, client: Client, folder: Path, tmp_path: Path
) -> None:
    """It takes a path, a Path, and one item without a batch axis. It refuses 8-bit pixels if the model's scale is unknown."""
    import keras

    client.deploy(seen(3), name="asked").wait(timeout=120)
    client.deploy(seen(3, "float32", keras.layers.Rescaling(1 / 255)), name="raw").wait(timeout=120)
    file = sorted(folder.rglob("*.png"))[0]
    pixels = pictures()[list(pictures())[int(file.stem)]].pixels(3)
    expected = pixels.reshape(1, -1) / np.float32(255)
    for asked in (file, str(file), [file], np.float32(pixels / 255), np.float32(pixels / 255)[None]):
        np.testing.assert_allclose(client.infer("asked", asked), expected, atol=1e-6)
    np.testing.assert_allclose(client.infer("raw", pixels), expected, atol=1e-6)
    np.testing.assert_allclose(client.infer("raw", file), expected, atol=1e-6)
    raw = ImageOptions(height=HEIGHT, width=WIDTH, scale=1.0)
    np.testing.assert_allclose(client.infer("asked", file, image=raw), expected * 255, atol=1e-4)
    with pytest.raises(InvalidRequest, match="nothing says whether the model takes them as 0 to 255 or as 0 to 1"):
        client.infer("asked", pixels)
    with pytest.raises(InvalidRequest, match="the inputs are not files: leave image out"):
        client.infer("asked", pixels, image=raw)
    with pytest.raises(InvalidData, match=r"there is no file or folder 'nowhere\.jpg' here"):
        client.infer("asked", "nowhere.jpg")
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(InvalidData, match=r"a\.heic: \.heic files cannot be read: convert it to JPEG or PNG"):
        client.infer("asked", tmp_path / "a.heic")
    two = potluck(cluster, "infer", "raw", str(file), str(file))
    assert len([line for line in two.splitlines() if line.startswith(f"{file}: [")]) == 2


def test_predictions_for_a_folder_without_classes_have_those_of_the_model(
    cluster: LocalCluster, client: Client, folder: Path, tmp_path: Path
) -> None:
    import keras

    model = keras.Sequential(
        [keras.Input((HEIGHT, WIDTH, 3)), keras.layers.Flatten(), keras.layers.Dense(2, activation="softmax")]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    client.train(model, folder, name="named").wait(timeout=120)
    for source in (folder / "a", folder):
        said = potluck(cluster, "predict", "named", str(source)).splitlines()
        assert said[0] == "key,predicted,a,b"
        assert all(line.split(",")[1] in ("a", "b") for line in said[1:])
