"""The registry: versions that never change, names that help, and all of it after a restart."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.journal import Journal
from coordinator.serving.registry import Registry
from potluck.errors import InvalidRequest, NotFound
from potluck.messages import BlobRef, DataFormat, Dataset, DataShard, ImageOptions, Signature, TensorSpec


def blob(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size=number, holders=("http://somewhere",))


def dataset(name: str, count: int) -> Dataset:
    shards = (DataShard(blob=blob(count), count=count),)
    return Dataset(name=name, format=DataFormat(kind="images", classes=("a", "b")), count=count, shards=shards)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal")
    yield opened
    opened.close()


def test_versions_count_up_and_the_same_bytes_keep_theirs(journal: Journal) -> None:
    registry = Registry(journal)
    assert [registry.add_model("m", blob(n), now=1.0).version for n in (1, 2, 1)] == [1, 2, 1]
    assert registry.model("m").version == 2
    assert registry.model("m:1").model == BlobRef(sha256=blob(1).sha256, size=1)  # holders are nobody's business here
    assert [(info.name, info.version) for info in registry.models()] == [("m", 1), ("m", 2)]


def test_everything_is_there_again_after_a_restart(journal: Journal) -> None:
    registry = Registry(journal)
    registry.add_model(
        "m", blob(1), now=1.0, image=ImageOptions(height=8, width=8), classes=("a",), metrics={"loss": 0.5}
    )
    signature = Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),), outputs=())
    registry.describe("m:1", signature)
    registry.describe("m:1", Signature(inputs=(), outputs=()))  # what was learnt first stays
    registry.add_dataset("d", blob(9), dataset("other", 3))
    again = Registry(journal)
    assert again.models() == registry.models()
    assert again.model("m").signature == signature
    assert again.dataset("d").name == "d"
    assert again.manifest("d").sha256 == blob(9).sha256
    assert again.datasets() == registry.datasets()


def test_a_data_set_is_replaced_by_the_next_of_its_name(journal: Journal) -> None:
    registry = Registry(journal)
    registry.add_dataset("d", blob(1), dataset("d", 3))
    registry.add_dataset("d", blob(2), dataset("d", 4))
    assert registry.dataset("d").count == 4
    assert [info.count for info in registry.datasets()] == [4]


def test_names_that_are_not_there(journal: Journal) -> None:
    registry = Registry(journal)
    registry.add_model("digits", blob(1), now=1.0)
    with pytest.raises(NotFound, match="did you mean 'digits'"):
        registry.model("digit")
    with pytest.raises(NotFound, match="potluck models"):
        registry.model("zebra")
    with pytest.raises(NotFound, match="no version '7'"):
        registry.model("digits:7")
    with pytest.raises(NotFound, match="data set"):
        registry.dataset("none")


@pytest.mark.parametrize("name", ["", "a b", "a:1", "../x", "ä", "x" * 200, "a\n"])
def test_names_that_cannot_be(journal: Journal, name: str) -> None:
    with pytest.raises(InvalidRequest, match="model name"):
        Registry(journal).add_model(name, blob(1), now=1.0)
