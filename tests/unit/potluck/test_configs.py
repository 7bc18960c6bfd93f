"""The example settings load, name and explain every setting, and are the defaults; mosquitto accepts its file."""

from __future__ import annotations

import asyncio
import re
import socket
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from potluck.net.broker import find_mosquitto
from potluck.settings import CoordinatorSettings, NetworkSettings, NodeSettings
from potluck.settings_sources import load
from support.eventually import eventually

CONFIGS = Path(__file__).parents[3] / "configs"
EXAMPLES = pytest.mark.parametrize(("name", "kind"), [("node", NodeSettings), ("coordinator", CoordinatorSettings)])


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POTLUCK_CLUSTER", "POTLUCK_SEEDS", "POTLUCK_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def keys(table: dict[str, Any]) -> set[str]:
    """Dotted names of all settings in `table`."""
    return {
        f"{key}.{inner}" if inner else key
        for key, value in table.items()
        for inner in (keys(value) if isinstance(value, dict) else {""})
    }


def test_every_file_is_checked_here() -> None:
    assert {file.name for file in CONFIGS.iterdir()} == {"node.toml", "coordinator.toml", "mosquitto.conf"}


@EXAMPLES
def test_the_examples_are_the_defaults_in_full(name: str, kind: type[NetworkSettings]) -> None:
    file = CONFIGS / f"{name}.toml"
    assert load(kind, file) == kind()
    assert keys(tomllib.loads(file.read_text())) == keys(msgspec.to_builtins(kind()))


@EXAMPLES
def test_every_setting_is_explained(name: str, kind: type[NetworkSettings]) -> None:
    blocks = re.split(r"\n(?=#)", (CONFIGS / f"{name}.toml").read_text())
    named = [re.findall(r"^(\w+) =", block, re.MULTILINE) for block in blocks]
    # A comment may be for two settings that belong together, but not for more.
    assert [found for found in named if len(found) > 2] == []


async def test_mosquitto_takes_its_file(tmp_path: Path) -> None:
    program = find_mosquitto()
    if program is None:
        pytest.skip("mosquitto is not installed (apt install mosquitto): its example file was not tried")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    written = (CONFIGS / "mosquitto.conf").read_text()
    assert "listener 1883 127.0.0.1" in written
    file = tmp_path / "mosquitto.conf"
    file.write_text(written.replace("listener 1883", f"listener {port}"))
    # As root, mosquitto becomes another user, who may not exist: it says so and goes on.
    process = await asyncio.create_subprocess_exec(
        program, "-c", str(file), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert process.stdout is not None

    def listens() -> bool:
        assert process.returncode is None, "mosquitto has ended"
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", port)) == 0

    try:
        assert await eventually(listens, 10)
    finally:
        if process.returncode is None:
            process.terminate()
        output, _ = await asyncio.wait_for(process.communicate(), 10)
    assert b"Error" not in output
