"""`potluck config`: what is wrong with settings, and where they came from."""

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from potluck.cli import config
from potluck.cli.main import app
from potluck.errors import InvalidRequest, NotFound
from potluck.settings import NodeSettings
from potluck.settings_sources import load


@pytest.fixture(autouse=True)
def usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SYSTEM", tmp_path / "etc")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("POTLUCK_SEEDS", raising=False)


def test_right_settings(tmp_path: Path) -> None:
    file = tmp_path / "my-node.toml"
    file.write_text("threads = 1\n")
    done = CliRunner().invoke(app, ["config", "check", str(file)])
    assert (done.exit_code, done.stdout) == (0, f"{file}: the settings are right\n")


def test_each_wrong_setting_has_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("threads = -1\nclustre = 1\n")
    done = CliRunner().invoke(app, ["config", "check", str(file)])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"{file}:1: threads is -1, expected a whole number of at least 0",
        f"{file}:2: there is no setting clustre: did you mean cluster?",
    ]


def test_problems_as_json(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("queue_limit = 0\n")
    done = CliRunner().invoke(app, ["config", "check", "--role", "coordinator", str(file), "--json"])
    assert done.exit_code == 2
    ((result),) = json.loads(done.stdout)
    assert (result["role"], result["file"]) == ("coordinator", str(file))
    ((problem),) = result["problems"]
    assert (problem["setting"], problem["from"], problem["name"], problem["line"]) == (
        "queue_limit",
        "file",
        str(file),
        1,
    )


def test_without_a_file_all_in_the_usual_places_are_checked(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "home" / "potluck").mkdir(parents=True)
    (tmp_path / "etc" / "node.toml").write_text("threads = 0\n")
    (tmp_path / "home" / "potluck" / "client.toml").write_text("timeout_seconds = 0\n")
    done = CliRunner().invoke(app, ["config", "check", "--json"])
    assert done.exit_code == 2
    found = {result["role"]: len(result["problems"]) for result in json.loads(done.stdout)}
    assert found == {"node": 0, "client": 1}


def test_no_file_and_a_file_of_nobody() -> None:
    with pytest.raises(NotFound, match="there is no file of settings"):
        CliRunner().invoke(app, ["config", "check"], catch_exceptions=False)
    with pytest.raises(InvalidRequest, match="--role"):
        CliRunner().invoke(app, ["config", "check", "x.toml"], catch_exceptions=False)


def test_what_is_shown_can_be_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text("threads = 3\n[data]\nphotos = '/srv/photos'\n")
    monkeypatch.setenv("POTLUCK_SEEDS", "a,b")
    done = CliRunner().invoke(app, ["--cluster", "lab", "config", "show", str(file)])
    assert done.exit_code == 0
    lines = {line.split(" = ")[0]: line.split("  # ")[-1] for line in done.stdout.splitlines()}
    assert lines["threads"] == f"{file}:1"
    assert lines["data.photos"] == f"{file}:3"
    assert lines["seeds"] == "environment POTLUCK_SEEDS"
    assert lines["cluster"] == "command line"
    assert lines["listen.port"] == "default"
    monkeypatch.delenv("POTLUCK_SEEDS")
    tomllib.loads(done.stdout)
    shown = tmp_path / "shown.toml"
    shown.write_text(done.stdout)
    assert load(NodeSettings, shown) == load(NodeSettings, file, {"cluster": "lab", "seeds": ["a", "b"]})


def test_defaults_are_shown_without_a_file() -> None:
    done = CliRunner().invoke(app, ["config", "show", "--role", "coordinator", "--json"])
    ((result),) = json.loads(done.stdout)
    by_name = {one["setting"]: (one["value"], one["from"]) for one in result["settings"]}
    assert by_name["listen.port"] == (7814, "default")
