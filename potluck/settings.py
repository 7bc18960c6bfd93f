"""Every setting, its type and its default. `settings_sources.py` reads them.

Unknown keys are errors. Timings are settings, so that tests can shorten them. Nothing reads the environment later.
"""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from potluck.errors import InvalidSettings
from potluck.wire.values import Name

Port = Annotated[int, Meta(ge=0, le=65535)]
PositiveSeconds = Annotated[float, Meta(gt=0, le=1e9)]
"""At most 30 years: infinity could not be sent, and no clock counts so far."""
LogLevel = Annotated[
    str,
    Meta(
        pattern=r"(?i)^(debug|info|warning|error)\Z", extra_json_schema={"description": "DEBUG, INFO, WARNING or ERROR"}
    ),
]


LAMBDA = "lambda"
"""In `allow_code`: allows code inside models. No module can have this name."""
Sandbox = Literal["off", "auto", "required"]
"""How engines are kept from the machine: not at all; as far as its kernel can, if it has no GPU; wholly, or no engine starts."""
ModuleName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z",
        extra_json_schema={"description": f"the name of a Python module, or {LAMBDA}"},
    ),
]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a settings file."""


class BusTimings(Section, frozen=True):
    """How the bus connects and notices that it is cut off."""

    keepalive_seconds: Annotated[int, Meta(ge=1, le=65535)] = 10
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
    """The port in an open cluster; 0: any free one. This also holds for those below."""
    closed_port: Port = 8883
    """The port for nodes and coordinators in a closed cluster, with TLS."""
    client_port: Port = 8884
    """The port for clients in a closed cluster, with TLS."""


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


class ServiceSettings(Section, frozen=True):
    """What the daemon, its engines and its broker may take as a system service; 0: any. `potluck service install` tells systemd."""

    memory_bytes: Annotated[int, Meta(ge=0)] = 0
    memory_high_bytes: Annotated[int, Meta(ge=0)] = 0
    """Above this, the kernel slows it down and takes memory back; before it ends anything at `memory_bytes`."""
    cpu_percent: Annotated[int, Meta(ge=0)] = 0
    """100 is one core."""


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
    service: ServiceSettings = ServiceSettings()
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
    sandbox: Sandbox = "auto"
    """Whether engines are kept from files, network and system calls that they do not need."""
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
    closed: bool = False
    """A closed cluster also on loopback. Beyond loopback it always is one, unless `listen.insecure`."""
    certificate_days: Annotated[int, Meta(ge=1, le=30)] = 7
    """How long the certificates of a closed cluster's members last. They are renewed at two thirds."""
    client_quota_bytes: Annotated[int, Meta(ge=0)] = 0
    """How much of the blob store one client may fill with blobs that are not registered; 0: half of its room."""
    http: HttpSettings = HttpSettings()
    service: ServiceSettings = ServiceSettings()
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

    credentials: str = ""
    """The folder with the credentials of a closed cluster; empty: looked for; `none`: the cluster is open, without looking."""
    timeout_seconds: PositiveSeconds = 30.0


def is_closed(settings: CoordinatorSettings) -> bool:
    """Whether the cluster of a coordinator with these settings is closed: only members with certificates take part in it."""
    listen = settings.listen
    return settings.closed or not (listen.insecure or is_loopback(listen.host))


def check_listen(listen: Listen) -> None:
    """Raises InvalidSettings for an address beyond loopback without `--insecure`."""
    if not listen.insecure and not is_loopback(listen.host):
        raise InvalidSettings(
            f"listening on {listen.host} opens this machine to the network without encryption or identities: "
            "add --insecure if this network is trusted, or listen on 127.0.0.1"
        )


def check_coordinator(settings: CoordinatorSettings) -> None:
    """Raises InvalidSettings for a closed cluster's coordinator that is to use a broker which is not its own mosquitto."""
    if not is_closed(settings):
        return
    why, instead = "closed is true", "do not set closed"
    if not settings.closed:
        why = f"listen.host is {settings.listen.host}"
        instead = "on a network that is trusted, --insecure (listen.insecure) makes an open one"
    rest = (
        f"a closed cluster has a mosquitto of its own, whose rules the coordinator writes. This one is closed because {why}: "
        f"leave out the broker, or {instead}"
    )
    if settings.seeds:
        raise InvalidSettings(f"the broker at {settings.seeds[0]} cannot be used (--seed, seeds): {rest}")
    if settings.broker.mode in ("external", "embedded"):
        raise InvalidSettings(f"broker.mode cannot be {settings.broker.mode}: {rest}")


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
    if not host or set(host) & set(", /\t\n") or (port and not port.isdecimal()):
        raise InvalidSettings(f"address {text!r}: write it as host or host:port")
    if port and not 0 < int(port) < 65536:
        raise InvalidSettings(f"address {text!r}: a port is a number from 1 to 65535")
    return host, int(port) if port else default_port


def typed(command: str, cluster: str) -> str:
    """A command as the user must type it to reach `cluster`, so that a command in an error or a remark works when it is copied."""
    return command if cluster == NetworkSettings().cluster else f"{command} --cluster {cluster}"


def state_path(configured: str, daemon: str) -> Path:
    """Where the daemon's folder is: the configured one, systemd's StateDirectory, or one below XDG_STATE_HOME (XDG base dir spec)."""
    if folder := configured or os.environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(folder)
    base = os.environ.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
    return Path(base) / "potluck" / daemon


def state_folder(configured: str, daemon: str) -> Path:
    """The folder at `state_path`, made if needed. Raises InvalidSettings."""
    path = state_path(configured, daemon)
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
