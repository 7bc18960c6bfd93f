"""A model's file depends only on the model, not on the time of day."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from node.engine.saving import save


@dataclass
class Dated:
    """Saves itself like Keras, at a given time."""

    second: int

    def save(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            dated = {"keras_version": "3.15.1", "date_saved": f"2026-11-28@22:00:{self.second:02}"}
            for name, data in (
                ("metadata.json", json.dumps(dated)),
                ("config.json", "{}"),
                ("model.weights.h5", "w" * 3_000_000),
            ):
                file.writestr(zipfile.ZipInfo(name, (2026, 11, 28, 22, 0, self.second)), data)


def test_the_same_model_is_the_same_file_whenever_it_is_saved(tmp_path: Path) -> None:
    save(Dated(10), tmp_path / "once.keras")
    save(Dated(44), tmp_path / "again.keras")
    assert (tmp_path / "once.keras").read_bytes() == (tmp_path / "again.keras").read_bytes()
    with zipfile.ZipFile(tmp_path / "once.keras") as file:
        assert file.namelist() == ["metadata.json", "config.json", "model.weights.h5"]
        assert json.loads(file.read("metadata.json")).keys() == {"keras_version", "date_saved"}
        assert file.read("model.weights.h5") == b"w" * 3_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.keras", "once.keras"]
