"""What a `.keras` file claims about itself is believed if that costs little, and refused if it is too much."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from node.engine import archives
from node.engine.archives import check, parameters
from potluck.errors import InvalidModel, OutOfMemory


def layer(kind: str, shape: list[int | None] | None = None, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"module": "keras.layers", "class_name": kind, "config": options}
    if shape is not None:
        found["build_config"] = {"input_shape": shape}
    return found


def saved(path: Path, *layers: dict[str, Any], weights: bytes = b"", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        model = {"module": "keras", "class_name": "Sequential", "config": {"layers": list(layers)}}
        archive.writestr("config.json", json.dumps(model))
        archive.writestr("model.weights.h5", weights)
    return path


@pytest.mark.parametrize(
    ("found", "weights"),
    [
        (layer("Dense", [None, 8], units=500_000_000), 4_000_000_000),
        (layer("Dense", units=500_000_000), 500_000_000),
        (layer("Embedding", input_dim=10**9, output_dim=64), 64 * 10**9),
        (layer("Conv2D", [None, 28, 28, 3], filters=10**8, kernel_size=[3, 3]), 27 * 10**8),
        (layer("Conv2D", [None, 28, 28, 4], filters=8, kernel_size=[3, 3], groups=4), 72),
        (layer("LSTM", [None, 5, 3], units=10**6), 10**12),
        (layer("TimeDistributed", layer=layer("Dense", [None, 8], units=10**9)), 8 * 10**9),
        (layer("Dropout", rate=0.5), 0),
        (layer("Dense", [None, None], units="many"), 0),
        ({"module": "own", "class_name": "Dense", "config": {"units": 10**9}}, 0),
    ],
)
def test_weights_that_layers_imply(found: dict[str, Any], weights: int) -> None:
    assert parameters({"config": {"layers": [found]}}) == weights


def test_a_small_file_with_a_huge_layer_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m", layer("Dense", [None, 8], units=500_000_000), weights=bytes(2000))
    with pytest.raises(InvalidModel, match="at least 4,000,000,000 weights, and its file only 2,000 bytes"):
        check(path, 0)


def test_weights_of_four_bits_are_enough(tmp_path: Path) -> None:
    check(saved(tmp_path / "m", layer("Dense", [None, 4096], units=4096), weights=bytes(4096 * 4096 // 2)), 0)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m", weights=bytes(2**21), method=zipfile.ZIP_DEFLATED)
    check(path, 0)
    with pytest.raises(OutOfMemory, match=r"unpacks to 0\.0 GiB, and this node lets an engine have 0\.0 GiB"):
        check(path, 2**20)
    monkeypatch.setattr(archives, "INFLATION_FROM_BYTES", 2**20)
    with pytest.raises(InvalidModel, match="unpacks to 2 MB, which weights do not"):
        check(path, 0)
    monkeypatch.setattr(archives, "CONFIG_LIMIT_BYTES", 10)
    with pytest.raises(InvalidModel, match=r"config\.json"):
        check(saved(path), 0)


def test_what_is_damaged_is_left_to_keras(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{")
    check(path, 0)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", "")
    check(path, 0)
    path.write_bytes(b"PK nothing")
    check(path, 0)
