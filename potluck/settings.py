"""Settings, read once: defaults, then a TOML file, then `POTLUCK_*` environment variables, then flags.

Unknown keys are errors. Timings are settings, so that tests can shorten them. Nothing reads the environment later.
"""

from __future__ import annotations

import difflib
import os
import socket
import tomllib
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from potluck.errors import InvalidSettings
from potluck.wire.values import Name

Port = Annotated[int, Meta(ge=0, le=65535)]
PositiveSeconds = Annotated[float, Meta(gt=0)]
LogLevel = Annotated[str, Meta(pattern=r"(?i)^(debug|info|warning|error)\Z")]


LAMBDA = "lambda"
"""In `allow_code`: allows code inside models. No module can have this name."""
ModuleName = Annotated[str, Meta(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z")]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a settings file."""


class BusTimings(Section, frozen=True):
    """How the bus connects and notices that it is cut off."""

    keepalive_seconds: Annotated[int, Meta(ge=1)] = 10
    connect_timeout_seconds: PositiveSeconds = 5.0
    reconnect_min_seconds: PositiveSeconds = 0.2
    reconnect_max_seconds: PositiveSeconds = 5.0
    plain: bool = False
    """Use only public parts of the MQTT library. That is slower, and always so for unknown versions of the library."""


class Listen(Section, frozen=True):
    """Where a daemon listens; `insecure` allows addresses beyond loopback, without encryption."""

    host: str = "127.0.0.1"
    port: Port = 0
    insecure: bool = False


class HttpSettings(Section, frozen=True):
    """How much of a daemon's HTTP server clients may use: `connections` in all, and from one address."""

    connections: Annotated[int, Meta(ge=2)] = 4096
    connections_per_address: Annotated[int, Meta(ge=1)] = 1024
    idle_seconds: PositiveSeconds = 75.0
    """A connection is closed after this long without a request, or when the client reads nothing of an answer for this long."""
    header_seconds: PositiveSeconds = 20.0
    """The head of a request must be complete this long after its first byte."""


BROKER_PORT = 1883
"""The MQTT port that is registered with IANA."""
GATEWAY_PORT = 7814
"""The coordinator's HTTP port. Neither it nor the 30 ports after it are registered with IANA or used by a well-known program."""


class GatewayListen(Listen, frozen=True):
    """Where the coordinator listens. If another program uses GATEWAY_PORT, the next free port is taken; any other port must be free."""

    port: Port = GATEWAY_PORT


class BrokerSettings(Section, frozen=True):
    """`mode`: `auto` uses a seed's or a discovered broker, else a private mosquitto, else the embedded amqtt."""

    mode: Literal["auto", "external", "mosquitto", "embedded"] = "auto"
    port: Port = BROKER_PORT


class DiscoverySettings(Section, frozen=True):
    """mDNS. It is a hint: `seeds` in `NetworkSettings` work without it."""

    enabled: bool = True
    window_seconds: PositiveSeconds = 3.0


class NetworkSettings(Section, frozen=True):
    """What every daemon and client needs to find the others. `seeds` are brokers' addresses, `host` or `host:port`."""

    cluster: str = "default"
    seeds: tuple[str, ...] = ()
    discovery: DiscoverySettings = DiscoverySettings()
    bus: BusTimings = BusTimings()


class NodeDataSettings(Section, frozen=True):
    """A data set that lives on this node: a folder or file; for tables, also the columns or arrays with targets and items' weights.

    With `least_noise_multiplier` above 0, it is used only for training with at least that much noise.
    """

    path: str
    target: str | tuple[str, ...] | None = None
    sample_weight: str | None = None
    least_noise_multiplier: Annotated[float, Meta(ge=0)] = 0.0


class NodeSettings(NetworkSettings, frozen=True):
    """Settings of the node daemon. Empty `node_id`: made once and kept in `state_dir`."""

    node_id: str = ""
    state_dir: str = ""
    listen: Listen = Listen()
    http: HttpSettings = HttpSettings()
    log_level: LogLevel = "INFO"
    telemetry_seconds: PositiveSeconds = 5.0
    resend_seconds: PositiveSeconds = 1.0
    renew_seconds: PositiveSeconds = 1.0
    engine_idle_seconds: PositiveSeconds = 120.0
    engine_start_seconds: PositiveSeconds = 120.0
    engine_silence_seconds: PositiveSeconds = 20.0
    engine_batch_seconds: PositiveSeconds = 60.0
    """An engine is killed when a replica's batch computes longer than this, and much longer than such batches did before."""
    engine_memory_bytes: Annotated[int, Meta(ge=0)] = 0
    """How much memory an engine may use; 0: what the machine or control group has left when it starts, minus a reserve."""
    blob_limit_bytes: Annotated[int, Meta(ge=1)] = 20 * 2**30
    threads: Annotated[int, Meta(ge=0)] = 0
    """How many threads TensorFlow may use; 0: one per core that the process may run on."""
    allow_code: tuple[ModuleName, ...] = ()
    """Python modules with users' layers, losses and metrics, which engines import; `lambda` allows code inside models."""
    sync_port: Port = 0
    """Where the engine meets others in synchronous training; 0: any free port. Only with `listen.insecure`."""
    give_way_share: Annotated[float, Meta(gt=0, le=1)] = 0.9
    """Training may stand still for at most this share of the time in which a deployment's objective is at risk here."""
    data_retry_seconds: PositiveSeconds = 15.0
    """The pause before unavailable data are tried again; after repeated failures it grows to 20 times as long."""
    data: dict[Name, str | NodeDataSettings] = {}
    """Data sets that live on this node and never leave it, by name: a path, or a table of settings for it."""


class CoordinatorSettings(NetworkSettings, frozen=True):
    """Settings of the coordinator daemon."""

    state_dir: str = ""
    listen: GatewayListen = GatewayListen()
    http: HttpSettings = HttpSettings()
    broker: BrokerSettings = BrokerSettings()
    log_level: LogLevel = "INFO"
    lease_seconds: PositiveSeconds = 10.0
    resend_seconds: PositiveSeconds = 1.0
    node_timeout_seconds: PositiveSeconds = 20.0
    attempts_limit: Annotated[int, Meta(ge=1)] = 3
    """How often a shard may fail with an error (not by a lost node) before its job fails with that error."""
    queue_limit: Annotated[int, Meta(ge=1)] = 1000
    batch_limit: Annotated[int, Meta(ge=1)] = 64
    warm_seconds: PositiveSeconds = 20.0
    """A replica is ready when it has run every batch size up to `batch_limit` once, or after this long."""
    inference_seconds: PositiveSeconds = 30.0
    http_body_limit_bytes: Annotated[int, Meta(ge=1)] = 64 * 2**20
    blob_limit_bytes: Annotated[int, Meta(ge=1)] = 200 * 2**30


class ClientSettings(NetworkSettings, frozen=True):
    """Settings of a client or the command line. `timeout_seconds` limits each question."""

    timeout_seconds: PositiveSeconds = 30.0


UNKNOWN = "Object contains unknown field "
"""The beginning of msgspec's error for an unknown field."""
LISTS = (["seeds"], ["allow_code"])
"""Settings that are lists with commas in the environment."""
S = TypeVar("S", bound=NetworkSettings)


def load(kind: type[S], path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> S:
    """Settings of `kind` from the file at `path`, the environment, and `flags` (dotted keys; None: not given).

    `POTLUCK_LISTEN__PORT=9000` sets `listen.port`; lists are written with commas. Raises InvalidSettings.
    """
    table: dict[str, Any] = {}
    if path is not None:
        table = _read(Path(path))
    for key, text in os.environ.items():
        if key.startswith("POTLUCK_") and len(key) > len("POTLUCK_"):
            keys = key[len("POTLUCK_") :].lower().split("__")
            if keys[0] in kind.__struct_fields__:
                value = [item for item in text.split(",") if item] if keys in LISTS else text
                _put(table, keys, value)
    for dotted, value in (flags or {}).items():
        if value is not None:
            _put(table, dotted.split("."), value)
    try:
        return msgspec.convert(table, kind, strict=False)
    except msgspec.ValidationError as error:
        where = f" in {path}" if path else ""
        raise InvalidSettings(f"settings{where}: {_reason(error, kind)}") from error


def check_listen(listen: Listen) -> None:
    """Raises InvalidSettings for an address beyond loopback without `--insecure`."""
    if not listen.insecure and not is_loopback(listen.host):
        raise InvalidSettings(
            f"listening on {listen.host} opens this machine to the network without encryption or identities: "
            "add --insecure if this network is trusted, or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether `host` means only this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_address(text: str, default_port: int = BROKER_PORT) -> tuple[str, int]:
    """`host`, `host:port`, `[v6]:port` or `mqtt://host:port` as (host, port). Raises InvalidSettings."""
    rest = text.removeprefix("mqtt://").rstrip("/")
    host, port = rest, ""
    if rest.startswith("["):
        host, _, tail = rest[1:].partition("]")
        port = tail.removeprefix(":")
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    if not host or (port and not port.isdecimal()):
        raise InvalidSettings(f"address {text!r}: write it as host or host:port")
    if port and not 0 < int(port) < 65536:
        raise InvalidSettings(f"address {text!r}: a port is a number from 1 to 65535")
    return host, int(port) if port else default_port


def typed(command: str, cluster: str) -> str:
    """A command as the user must type it to reach `cluster`, so that a command in an error or a remark works when it is copied."""
    return command if cluster == NetworkSettings().cluster else f"{command} --cluster {cluster}"


def state_folder(configured: str, daemon: str) -> Path:
    """The daemon's folder, made if needed: the configured one, systemd's StateDirectory, or one below XDG_STATE_HOME (XDG base dir spec)."""
    folder = configured or os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if not folder:
        base = os.environ.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
        folder = str(Path(base) / "potluck" / daemon)
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InvalidSettings(
            f"the state folder {path} cannot be made: {error.strerror}: choose one with --state-dir"
        ) from error
    return path


def short_hostname() -> str:
    """This machine's name for a topic or an mDNS name: lower-case letters, digits and '-', at most 20."""
    name = socket.gethostname().split(".")[0].lower()
    return "".join(sign if sign.isalnum() and sign.isascii() else "-" for sign in name).strip("-")[:20] or "node"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSettings(f"the settings file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"the settings file {path} is not valid TOML: {error}") from error


def _reason(error: msgspec.ValidationError, kind: type[Struct]) -> str:
    """What is wrong, with the setting's name as the file has it."""
    what, _, place = str(error).replace("`", "").partition(" - at $")
    place = place.replace("[...]", ".*").lstrip(".")
    if not what.startswith(UNKNOWN):
        return f"{place}: {what[:1].lower()}{what[1:]}" if place else what
    for key in place.split(".") if place else ():
        found = {field.name: field.type for field in msgspec.structs.fields(kind)}.get(key)
        kind = found if isinstance(found, type) and issubclass(found, Struct) else Struct
    field, known = what.removeprefix(UNKNOWN), kind.__struct_fields__
    close = difflib.get_close_matches(field, known, 1)
    hint = f": did you mean {close[0]}?" if close else f": there are {', '.join(known)}" if known else ""
    return f"there is no setting {f'{place}.{field}' if place else field}{hint}"


def _put(table: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            raise InvalidSettings(f"settings: {key} is {inner!r}, not a table: {'.'.join(keys)} cannot be in it")
        table = inner
    table[keys[-1]] = value
