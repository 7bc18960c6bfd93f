"""The registry: versions that never change, helpful names, and the same after a restart."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.journal import Journal
from coordinator.registry import TAGS_LIMIT, DatasetForgotten, ModelAdded, Registry, pixel_scale
from potluck.errors import InvalidRequest, NotFound, Unavailable
from potluck.wire.questions import ModelInfo
from potluck.wire.values import BlobRef, DataFormat, Dataset, DataShard, ImageOptions, Signature, TensorSpec


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
    assert registry.model("m:1").model == BlobRef(sha256=blob(1).sha256, size=1)  # the registry stores no holders
    assert [(info.name, info.version) for info in registry.models()] == [("m", 1), ("m", 2)]


def test_everything_is_there_again_after_a_restart(journal: Journal) -> None:
    registry = Registry(journal)
    registry.add_model(
        "m", blob(1), now=1.0, image=ImageOptions(height=8, width=8), classes=("a",), metrics={"loss": 0.5}
    )
    signature = Signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),), outputs=())
    registry.describe("m:1", signature)
    registry.describe("m:1", Signature(inputs=(), outputs=()))  # the first signature stays
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


def test_an_alias_is_one_version_until_it_is_given_to_another(journal: Journal) -> None:
    registry = Registry(journal)
    for number in (1, 2):
        registry.add_model("m", blob(number), now=1.0)
    assert registry.set_alias("m:1", "prod").aliases == ("prod",)
    assert registry.model("m:prod").version == 1
    assert registry.version_of("m:prod") == "m:1"
    assert [registry.version_of(model) for model in ("m", "m:2", "m:none", "n:prod")] == [
        "m",
        "m:2",
        "m:none",
        "n:prod",
    ]
    assert registry.set_alias("m", "prod").version == 2
    assert [info.aliases for info in registry.models()] == [(), ("prod",)]
    assert registry.set_alias("m:prod", "next").aliases == ("next", "prod")
    assert registry.remove_alias("m:prod").aliases == ("next",)
    with pytest.raises(NotFound, match="no version 'prod': it has 1, 2, next"):
        registry.model("m:prod")
    with pytest.raises(InvalidRequest, match="'m:2' is not an alias"):
        registry.remove_alias("m:2")
    assert Registry(journal).models() == registry.models()


def test_tags_are_set_and_taken_away(journal: Journal) -> None:
    registry = Registry(journal)
    registry.add_model("m", blob(1), now=1.0, tags={"team": "a", "stage": "new"})
    assert registry.tag("m:1", {"team": "b"}, ["stage", "nothing"]).tags == {"team": "b"}
    assert registry.add_model("m", blob(1), now=2.0, tags={"more": "x"}).tags == {"team": "b", "more": "x"}
    with pytest.raises(InvalidRequest, match="33 tags"):
        registry.add_model("n", blob(2), now=1.0, tags={str(number): "" for number in range(TAGS_LIMIT + 1)})
    assert Registry(journal).models() == registry.models()


def test_the_same_bytes_with_other_classes_are_another_version(journal: Journal) -> None:
    registry = Registry(journal)
    assert registry.add_model("m", blob(1), now=1.0).version == 1
    assert registry.add_model("m", blob(1), now=1.0, classes=("a", "b")).version == 2
    assert registry.add_model("m", blob(1), now=1.0, classes=("a", "b")).version == 2
    assert registry.add_model("m", blob(1), now=1.0).version == 2


def test_numbers_of_deleted_versions_are_not_given_again(journal: Journal) -> None:
    registry = Registry(journal)
    for number in (1, 2):
        registry.add_model("m", blob(number), now=1.0)
    registry.delete_models([registry.model("m:2")])
    assert registry.model("m").version == 1
    assert registry.add_model("m", blob(2), now=1.0).version == 3
    registry.delete_models(registry.versions("m"))
    with pytest.raises(NotFound, match="there is no model 'm'"):
        registry.model("m")
    again = Registry(journal)
    assert again.models() == ()
    assert again.add_model("m", blob(1), now=1.0).version == 4


def test_a_data_set_that_was_removed_is_gone(journal: Journal) -> None:
    registry = Registry(journal)
    registry.add_dataset("d", blob(1), dataset("d", 3))
    registry.remove_dataset("d")
    for known in (registry, Registry(journal)):
        assert known.datasets() == ()
        with pytest.raises(NotFound):
            known.remove_dataset("d")


def test_models_are_listed_in_parts(journal: Journal) -> None:
    registry = Registry(journal)
    for name in ("b", "a", "a.b"):
        for number in range(1, 12):
            registry.add_model(name, blob(number), now=1.0)
    everything = registry.models()
    assert [(info.name, info.version) for info in everything] == [
        (name, version) for name in ("a", "a.b", "b") for version in range(1, 12)
    ]
    for at, info in enumerate(everything):
        assert registry.models(f"{info.name}:{info.version}") == everything[at + 1 :]
    assert registry.models("a:99") == registry.models("a.b") == everything[11:]


def test_who_watches_is_told_of_every_change(journal: Journal) -> None:
    registry = Registry(journal)
    told: list[int] = []
    registry.on_change(lambda: told.append(len(registry.models())))
    registry.add_model("m", blob(1), now=1.0)
    registry.add_model("m", blob(1), now=1.0)  # changes nothing
    registry.delete_models(registry.versions("m"))
    assert told == [1, 0]


def test_a_journal_of_before_there_were_sources(journal: Journal) -> None:
    old = ModelInfo(name="m", version=1, model=blob(1), created_at=1.0, job_id="12ab")
    journal.append("registry", ModelAdded(model=old))
    assert Registry(journal).model("m").source == "job 12ab"


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "set", "take", "tag", "delete"]), st.integers(1, 4), st.integers(1, 3))
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_happens_it_is_the_same_after_a_restart(steps: list[tuple[str, int, int]]) -> None:
    journal = Journal(Path(":memory:"))
    registry, given_numbers = Registry(journal), set[int]()
    for what, number, other in steps:
        model, alias = f"m:{number}", f"a{other}"
        try:
            match what:
                case "add":
                    before = {info.version for info in registry.models()}
                    info = registry.add_model("m", blob(number), now=1.0)
                    if info.version not in before:
                        assert info.version not in given_numbers
                        given_numbers.add(info.version)
                case "set":
                    assert alias in registry.set_alias(model, alias).aliases
                case "take":
                    registry.remove_alias(f"m:{alias}")
                case "tag":
                    registry.tag(model, {alias: str(number)})
                case "delete":
                    registry.delete_models([registry.model(model)])
        except NotFound:
            pass  # nothing to change: as if it was not asked
        registry.check_invariants()
    again = Registry(journal)
    again.check_invariants()
    assert again.models() == registry.models()
    journal.close()


def test_names_that_are_not_there(journal: Journal) -> None:
    registry = Registry(journal)
    registry.add_model("digits", blob(1), now=1.0)
    with pytest.raises(NotFound, match="did you mean 'digits'"):
        registry.model("digit")
    with pytest.raises(NotFound, match="potluck models"):
        registry.model("zebra")
    for version in ("7", "01", "1x", "", "٣", "9" * 40):
        with pytest.raises(NotFound, match=f"no version '{version}'"):
            registry.model(f"digits:{version}")
    with pytest.raises(NotFound, match="data set"):
        registry.dataset("none")


@pytest.mark.parametrize("name", ["", "a b", "a:1", "../x", "ä", "x" * 200, "a\n"])
def test_names_that_cannot_be(journal: Journal, name: str) -> None:
    with pytest.raises(InvalidRequest, match="model name"):
        Registry(journal).add_model(name, blob(1), now=1.0)


def test_a_signature_that_says_more_of_pixels_takes_the_place_of_one_that_does_not(journal: Journal) -> None:
    registry = Registry(journal)
    registry.add_model("m", blob(1), signature=Signature(inputs=(), outputs=()), now=1.0)
    said = Signature(inputs=(), outputs=(), pixel_scale=1.0)
    registry.describe("m", said)
    registry.describe("m", Signature(inputs=(), outputs=(), pixel_scale=0.5))
    assert Registry(journal).model("m").signature == said


def test_what_pixels_in_arrays_are_multiplied_by(journal: Journal) -> None:
    """The same as for files where that is known; none for a model that was trained here on arrays; else unknown."""
    registry = Registry(journal)
    sized = ImageOptions(height=8, width=8)
    assert pixel_scale(registry.add_model("imported", blob(1), now=1.0)) == 0.0
    assert pixel_scale(registry.add_model("sized", blob(1), image=sized, now=1.0)) == 0.0
    said = ImageOptions(height=8, width=8, scale=0.5)
    assert pixel_scale(registry.add_model("said", blob(1), image=said, now=1.0)) == 0.5
    assert pixel_scale(registry.add_model("arrays", blob(1), job_id="j", now=1.0)) == 1.0
    old = registry.add_model("images", blob(1), image=sized, job_id="j", now=1.0)
    assert pixel_scale(old) == 1 / 255, "trained when that was the scale of everything"


def test_a_journal_that_lost_events_is_named(journal: Journal) -> None:
    journal.append("registry", DatasetForgotten(name="pictures"))
    with pytest.raises(
        Unavailable, match=r"events of registry in the journal .* do not fit together \(KeyError\('pictures'\)\)"
    ):
        Registry(journal)
