"""cluster.toml: what is written can be read, and nothing gets in that could mislead whoever uses it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from potluck.errors import InvalidRequest, InvalidSettings
from potluck.security import cluster_file
from potluck.security.cluster_file import ClusterFile

GOOD = ClusterFile(
    cluster="attic",
    cluster_id="00c0ffee00c0ffee",
    brokers=("10.0.0.7:8883", "[fe80::1]:8883"),
    http=("attic.lan:7814",),
    identity="node:kitchen-5f2a",
)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    where = tmp_path / "identity"
    cluster_file.write(where, GOOD)
    assert cluster_file.read(where) == GOOD
    assert stat.S_IMODE(where.stat().st_mode) == 0o700
    later = replace(GOOD, http=("attic.lan:9000",))
    cluster_file.write(where, later)
    assert cluster_file.read(where) == later
    assert [path.name for path in where.iterdir()] == [cluster_file.NAME]


def test_fields_of_later_versions_are_left_alone(tmp_path: Path) -> None:
    cluster_file.write(tmp_path, GOOD)
    with (tmp_path / cluster_file.NAME).open("a") as file:
        file.write('colour = "red"\n')
    assert cluster_file.read(tmp_path) == GOOD


@pytest.mark.parametrize(
    "wrong",
    [
        {"cluster": "a/b"},
        {"cluster": "#"},
        {"cluster_id": "no\nid"},
        {"cluster_id": ""},
        {"brokers": ()},
        {"brokers": ("10.0.0.7",)},
        {"brokers": ("mqtt://10.0.0.7:8883",)},
        {"http": ("user@host:7814",)},
        {"http": ("host:7814/v1/join?",)},
        {"http": ("host:99999",)},
        {"http": ("host:1",) * 17},
        {"identity": "kitchen"},
        {"identity": "node:a/b"},
    ],
)
def test_what_no_cluster_has_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        cluster_file.ClusterFile(**(asdict(GOOD) | wrong))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"cluster = ",
        b"\xff\xfe",
        b'cluster = "attic"\n',
        b'cluster = 3\ncluster_id = "1"\nbrokers = ["a:1"]\nhttp = ["a:1"]\nidentity = "node:a"\n',
        b'cluster = "attic"\ncluster_id = "1"\nbrokers = "a:1"\nhttp = ["a:1"]\nidentity = "node:a"\n',
        b'cluster = "attic"\ncluster_id = "1"\nbrokers = ["a"]\nhttp = ["a:1"]\nidentity = "node:a"\n',
        b"#" * (cluster_file.LIMIT_BYTES + 1),
    ],
)
def test_a_damaged_file_says_what_to_do(tmp_path: Path, text: bytes) -> None:
    (tmp_path / cluster_file.NAME).write_bytes(text)
    with pytest.raises(InvalidSettings, match="join the cluster again"):
        cluster_file.read(tmp_path)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="join the cluster again"):
        cluster_file.read(tmp_path)


@given(st.binary(max_size=300))
def test_no_file_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    where = tmp_path_factory.mktemp("file")
    (where / cluster_file.NAME).write_bytes(text)
    with pytest.raises(InvalidSettings):
        cluster_file.read(where)
