"""Settings: defaults, file, environment, flags, in this order; errors name the wrong setting."""

import re
from pathlib import Path

import pytest

from node.__main__ import parser, settings_from
from potluck.errors import InvalidSettings
from potluck.settings import (
    CoordinatorSettings,
    Listen,
    NodeSettings,
    check_listen,
    load,
    parse_address,
    short_hostname,
    state_folder,
)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POTLUCK_CLUSTER", "POTLUCK_SEEDS", "POTLUCK_THREADS", "STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text('cluster = "file"\nthreads = 1\n[listen]\nport = 1\nhost = "127.0.0.2"\n')
    monkeypatch.setenv("POTLUCK_THREADS", "2")
    monkeypatch.setenv("POTLUCK_LISTEN__PORT", "2")
    monkeypatch.setenv("POTLUCK_SEEDS", "a,b:1884")
    monkeypatch.setenv("POTLUCK_UNKNOWN_THING", "is somebody else's")
    settings = load(NodeSettings, file, {"listen.port": 3, "node_id": None})
    assert settings.cluster == "file"
    assert settings.threads == 2
    assert settings.listen == Listen(host="127.0.0.2", port=3)
    assert settings.seeds == ("a", "b:1884")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clustre = 1", "there is no setting clustre: did you mean cluster?"),
        ("[listen]\nwhere = 1", "there is no setting listen.where: there are host, port, insecure"),
        ("cluster = 1", "cluster: expected str, got int"),
        ("[listen]\nport = 70000", "listen.port: expected int <= 65535"),
        ("lease_seconds = 0.0", "lease_seconds"),
        ("cluster = ", "TOML"),
        ("[broker]\nmode = 'cloud'", "mode"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text(text)
    with pytest.raises(InvalidSettings, match=re.escape(said)):
        load(CoordinatorSettings, file)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("POTLUCK_THREADS", "many", "threads"),
        ("POTLUCK_LOG_LEVEL", "LOUD", "log_level"),
        ("POTLUCK_LISTEN", "0.0.0.0", "listen"),
        ("POTLUCK_LISTEN__INSECURE", "perhaps", "listen.insecure"),
        ("POTLUCK_LISTEN__PROT", "1", "prot"),
        ("POTLUCK_THREADS__PORT", "1", "threads is 1, not a table"),
    ],
)
def test_what_is_wrong_in_the_environment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, said: str
) -> None:
    file = tmp_path / "node.toml"
    file.write_text("threads = 1\n")
    monkeypatch.setenv(name, text)
    with pytest.raises(InvalidSettings, match=re.escape(said)):
        load(NodeSettings, file)


def test_the_environment_speaks_of_every_kind_of_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_LISTEN__INSECURE", "true")
    monkeypatch.setenv("POTLUCK_LISTEN__PORT", "9000")
    monkeypatch.setenv("POTLUCK_RENEW_SECONDS", "0.5")
    monkeypatch.setenv("POTLUCK_LOG_LEVEL", "debug")
    settings = load(NodeSettings)
    assert settings.listen == Listen(port=9000, insecure=True)
    assert (settings.renew_seconds, settings.log_level) == (0.5, "debug")


def test_modules_of_allowed_code_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_ALLOW_CODE", "json.tool,lambda")
    assert settings_from(parser().parse_args([])).allow_code == ("json.tool", "lambda")
    monkeypatch.setenv("POTLUCK_ALLOW_CODE", "json,no_such_module")
    with pytest.raises(
        InvalidSettings, match="allow_code names the module 'no_such_module', which Python does not find"
    ):
        settings_from(parser().parse_args([]))
    monkeypatch.setenv("POTLUCK_ALLOW_CODE", "../layers.py")
    with pytest.raises(InvalidSettings, match="allow_code"):
        settings_from(parser().parse_args([]))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="cannot be read"):
        load(NodeSettings, tmp_path / "none.toml")


def test_the_network_must_be_asked_for() -> None:
    check_listen(Listen())
    check_listen(Listen(host="::1"))
    check_listen(Listen(host="0.0.0.0", insecure=True))
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(InvalidSettings, match="--insecure"):
            check_listen(Listen(host=host))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host", ("host", 1883)),
        ("host:1", ("host", 1)),
        ("mqtt://host:99/", ("host", 99)),
        ("10.0.0.1", ("10.0.0.1", 1883)),
        ("[::1]:5", ("::1", 5)),
        ("fe80::1", ("fe80::1", 1883)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host:", "host:0", "host:99999", "host:x", ":1883"])
def test_addresses_that_are_none(text: str) -> None:
    if text == "host:":
        assert parse_address(text) == ("host", 1883)
    else:
        said = "from 1 to 65535" if text in ("host:0", "host:99999") else "host:port"
        with pytest.raises(InvalidSettings, match=said):
            parse_address(text)


def test_state_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state_folder("", "node") == tmp_path / "xdg" / "potluck" / "node"
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "systemd"))
    assert state_folder("", "node") == tmp_path / "systemd"
    assert state_folder(str(tmp_path / "asked"), "node") == tmp_path / "asked"
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidSettings, match="--state-dir"):
        state_folder(str(tmp_path / "file" / "below"), "node")


def test_the_hostname_fits_into_a_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Küche_7.local")
    assert short_hostname() == "k-che-7"
