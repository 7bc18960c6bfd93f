"""This node's id, the same at every start."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from potluck.errors import InvalidSettings
from potluck.settings import short_hostname
from potluck.wire.topics import NODE_ID, check_node_id


def node_id(configured: str, folder: Path) -> str:
    """The configured id; else the one in the state folder, made once from the machine's name and random characters.

    Raises InvalidSettings for an id that a topic cannot contain.
    """
    if configured:
        check_node_id(configured)
        return configured
    file = folder / "node-id"
    try:
        if file.exists() and NODE_ID.fullmatch(kept := file.read_text(errors="replace").strip()):
            return kept
        made = f"{short_hostname()}-{uuid.uuid4().hex[:6]}"
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(made)
        temporary.replace(file)
    except OSError as error:
        raise InvalidSettings(
            f"the state folder {folder} cannot be used: {error.strerror}: choose one with --state-dir"
        ) from error
    return made
