"""Settings: defaults, file, environment, flags, in this order; errors name the wrong setting."""

import os
import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from node.__main__ import parser, settings_from
from potluck.errors import InvalidSettings
from potluck.settings import (
    BrokerSettings,
    CoordinatorSettings,
    GatewayListen,
    Listen,
    NodeSettings,
    check_coordinator,
    check_listen,
    is_closed,
    parse_address,
    short_hostname,
    state_folder,
)
from potluck.settings_sources import WrongSettings, find, load, toml


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
    ("text", "line", "said"),
    [
        ("clustre = 1", 1, "there is no setting clustre: did you mean cluster?"),
        ("[listen]\nwhere = 1", 2, "there is no setting listen.where: there are host, port, insecure"),
        ("\ncluster = 1", 2, "cluster is 1, expected a text"),
        ('cluster = "a b"', 1, "use letters, digits"),
        ("[listen]\n\n port = 70000", 3, "listen.port is 70000, expected a whole number from 0 to 65535"),
        ("listen = { host = '::1',  port = -1 }", 1, "listen.port is -1, expected a whole number from 0 to 65535"),
        ("seeds = [\n]\nlease_seconds = 0.0", 3, "lease_seconds is 0.0, expected a number above 0"),
        ("queue_limit = 1.5", 1, "queue_limit is 1.5, expected a whole number of at least 1"),
        ("seeds = ['a:x']", 1, "write it as host or host:port"),
        ("seeds = ['a', 7]", 1, "item 2 of seeds is 7, expected a text"),
        ("seeds = 'a'", 1, 'seeds is "a", expected a list, each a text'),
        ("log_level = 'LOUD'", 1, 'log_level is "LOUD", expected DEBUG, INFO, WARNING or ERROR'),
        ("[broker]\nmode = 'cloud'", 2, 'broker.mode is "cloud", expected "auto" or '),
        ("listen = 'x'", 1, 'listen is "x", expected a table with host, port, insecure'),
        ("seeds = ['a']\n[listen]\nhost = '0.0.0.0'", 1, "--insecure"),
        ("closed = true\n[broker]\nmode = 'embedded'", 3, "mosquitto of its own"),
        ("\ncluster = ", 2, "this is not valid TOML: Invalid value"),
        ("cluster = 'a'\ncluster = 'b'", 2, "this is not valid TOML: Cannot overwrite a value"),
        ("threads = [\n1,", 2, "this is not valid TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text(text)
    with pytest.raises(InvalidSettings, match=re.escape(said)) as caught:
        load(CoordinatorSettings, file)
    assert str(caught.value).startswith(f"{file}:{line}: ")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("[data]\nx = 'y'\n'a b' = 'z'", 3, """data."a b": a name here is letters, digits"""),
        ("[data]\na = 'x'\nb = 1", 3, "data.b is 1, expected a text or a table with path, target"),
        ("[data.a]\ntarget = 'x'", 1, "data.a has no path, expected a text"),
        ("[data.a]\npath = 'x'\npth = 1", 3, "there is no setting data.a.pth: did you mean path?"),
        ("[data.a]\npath = ''\nleast_noise_multiplier = -1", 3, "is -1, expected a number of at least 0"),
        ("allow_code = ['../x']", 1, "expected the name of a Python module, or lambda"),
        ("allow_code = ['no_such_module']", 1, "which Python does not find"),
        ("node_id = '/'", 1, "beginning with a letter or digit"),
    ],
)
def test_what_is_wrong_in_a_nodes_file_is_named_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    file = tmp_path / "node.toml"
    file.write_text(text)
    with pytest.raises(InvalidSettings, match=re.escape(said)) as caught:
        load(NodeSettings, file)
    assert str(caught.value).startswith(f"{file}:{line}: ")


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text("cluster = 1\n[listen]\nport = 'x'\n")
    monkeypatch.setenv("POTLUCK_THREADS", "-1")
    with pytest.raises(WrongSettings) as caught:
        load(NodeSettings, file, {"log_level": "LOUD"})
    assert [(one.setting, str(one.origin)) for one in caught.value.problems] == [
        ("cluster", f"{file}:1"),
        ("listen.port", f"{file}:3"),
        ("threads", "environment POTLUCK_THREADS"),
        ("log_level", "command line"),
    ]


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_bytes(b"threads = 1\n# \xff\n")
    with pytest.raises(InvalidSettings, match=f"^{re.escape(str(file))}:2: .*not text in UTF-8"):
        load(NodeSettings, file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"allow_code = {'[' * 5000}{']' * 5000}", "more than 8 deep"),
        (f"a{'.a' * 3000} = 1", "more than 8 deep"),
        (f"data = {'{a = ' * 2000}1{'}' * 2000}", "more than 8 deep"),
        (f"threads = {'9' * 5000}", "cannot be read as TOML"),
        ("telemetry_seconds = inf", "of at most 1e+09"),
        ('state_dir = "\\u0000"', "has the character of number 0"),
        ('seeds = ["a\\u0000"]', "item 1 of seeds"),
        (f"node_id = '{'x' * 100_000}'", "..."),
        ("".join(f"k{number} = 1\n" for number in range(5000)), "and more"),
        ("[data]\n" + "".join(f"d{number} = '/d'\n" for number in range(65)), "65 data sets, and a node may have 64"),
        ("#" * 2**18 + "\n", "no file of settings: it has more than 262144 bytes"),
    ],
)
def test_odd_files_are_refused_in_a_few_words(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "node.toml"
    file.write_text(text)
    with pytest.raises(InvalidSettings, match=re.escape(said)) as caught:
        load(NodeSettings, file)
    assert len(str(caught.value)) < 20_000


def test_a_pipe_is_no_file_of_settings(tmp_path: Path) -> None:
    """A daemon that reads it again would wait for a writer, for ever, or find nothing and take over the defaults."""
    os.mkfifo(tmp_path / "node.toml")
    with pytest.raises(InvalidSettings, match="this is a pipe, which can be read only once"):
        load(NodeSettings, tmp_path / "node.toml")


def test_a_file_may_begin_with_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_bytes(b"\xef\xbb\xbfthreads = 2\n[data]\na = '/a'\n")
    found = find(NodeSettings, file)
    assert (found.settings.threads, str(found.origins["data", "a"])) == (2, f"{file}:3")


def test_an_environment_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CLUSTER", "a\udcff"), ("SEEDS", "a,\udcff"), ("DATA__\udcff", "/a"), ("LISTEN__\udcff", "1")):
        monkeypatch.setenv(f"POTLUCK_{name}", value)
    with pytest.raises(WrongSettings) as caught:
        load(NodeSettings)
    assert {one.setting for one in caught.value.problems} == {"cluster", "seeds", 'data."?"', 'listen."?"'}


def test_each_setting_says_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "node.toml"
    file.write_text("threads = 1\n[data]\n# two\na = '/a'\nb = { path = '/b' }\n[listen]\nport = 1\n")
    monkeypatch.setenv("POTLUCK_LISTEN__PORT", "2")
    monkeypatch.setenv("POTLUCK_SEEDS", "a,b")
    found = {one.name: (toml(one.value), str(one.origin)) for one in find(NodeSettings, file, {"cluster": "c"}).each()}
    assert found["threads"] == ("1", f"{file}:1")
    assert found["data.a"] == ('"/a"', f"{file}:4")
    assert found["data.b.path"] == ('"/b"', f"{file}:5")
    assert found["data.b.least_noise_multiplier"] == ("0.0", "default")
    assert found["listen.port"] == ("2", "environment POTLUCK_LISTEN__PORT")
    assert found["listen.host"] == ('"127.0.0.1"', "default")
    assert found["seeds"] == ('["a", "b"]', "environment POTLUCK_SEEDS")
    assert found["cluster"] == ('"c"', "command line")
    # flags replace a table as a whole
    data = {one.name: str(one.origin) for one in find(NodeSettings, file, {"data": {"c": "/c"}}).each()}
    assert {name: origin for name, origin in data.items() if name.startswith("data.")} == {"data.c": "command line"}


def test_what_is_shown_is_a_file_with_the_same_settings(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('seeds = ["a", "b"]\n[data]\n"a.b" = "\\"#\\t"\nc = { path = "/c", target = ["x", "y"] }\n')
    found = find(NodeSettings, file)
    shown = tmp_path / "shown.toml"
    shown.write_text("".join(f"{one.name} = {toml(one.value)}  # {one.origin}\n" for one in found.each()))
    assert load(NodeSettings, shown) == found.settings


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("POTLUCK_THREADS", "many", "threads"),
        ("POTLUCK_LOG_LEVEL", "LOUD", "log_level"),
        ("POTLUCK_LISTEN", "0.0.0.0", "listen"),
        ("POTLUCK_LISTEN__INSECURE", "perhaps", "listen.insecure"),
        ("POTLUCK_LISTEN__PROT", "1", "prot"),
        ("POTLUCK_THREADS__PORT", "1", "node.toml:1), not a table: threads.port cannot be in it"),
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


def test_a_coordinator_beyond_loopback_is_one_of_a_closed_cluster() -> None:
    beyond = GatewayListen(host="0.0.0.0")
    for closed in (CoordinatorSettings(listen=beyond), CoordinatorSettings(closed=True)):
        assert is_closed(closed)
        check_coordinator(closed)
        with pytest.raises(InvalidSettings, match=r"broker at b:1 cannot be used .* mosquitto of its own"):
            check_coordinator(replace(closed, seeds=("b:1",)))
        for mode in ("external", "embedded"):
            with pytest.raises(InvalidSettings, match=f"broker.mode cannot be {mode}"):
                check_coordinator(replace(closed, broker=BrokerSettings(mode=mode)))
    for listen in (GatewayListen(), GatewayListen(host="0.0.0.0", insecure=True)):
        opened = CoordinatorSettings(listen=listen, seeds=("b:1",), broker=BrokerSettings(mode="external"))
        assert not is_closed(opened)
        check_coordinator(opened)


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
