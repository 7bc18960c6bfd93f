"""`.keras` files that depend only on the model. Keras writes the time of day into its files, so no two are alike."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

METADATA = "metadata.json"
DAY = (1980, 1, 1, 0, 0, 0)
"""The first date that a zip file can hold."""
SAVED = "1980-01-01@00:00:00"


def save(model: Any, path: Path) -> None:
    """Write a model's file. The same model always gives the same bytes."""
    written = path.with_name(f"dated-{path.name}")
    model.save(written)
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            fixed = zipfile.ZipInfo(entry.filename, DAY)
            fixed.compress_type = entry.compress_type
            if entry.filename == METADATA:
                target.writestr(fixed, json.dumps(json.loads(source.read(entry)) | {"date_saved": SAVED}))
                continue
            fixed.file_size = entry.file_size  # whether it needs the fields of large ones
            with source.open(entry) as given, target.open(fixed, "w") as kept:
                shutil.copyfileobj(given, kept, 2**20)
    written.unlink()
