"""Classes of data sets are matched by name, in any order and number."""

from __future__ import annotations

import pytest

from coordinator.plans import labels
from potluck.errors import InvalidRequest
from potluck.wire.questions import ModelInfo
from potluck.wire.values import BlobRef, DataFormat, Dataset


def data(name: str, *classes: str) -> Dataset:
    format = DataFormat(kind="arrays", inputs=("x",), target="y", classes=classes)
    return Dataset(name=name, format=format, count=9, shards=(), class_counts=tuple(range(1, len(classes) + 1)))


def model(*classes: str) -> ModelInfo:
    return ModelInfo(name="m", version=1, model=BlobRef(sha256="0" * 64, size=1), created_at=0.0, classes=classes)


@pytest.mark.parametrize(
    ("classes", "places", "counts"),
    [(("bee", "cat"), (1, 2), (0, 1, 2)), (("cat", "ant", "bee"), (2, 0, 1), (2, 3, 1))],
)
def test_classes_are_mapped_by_name(classes: tuple[str, ...], places: tuple[int, ...], counts: tuple[int, ...]) -> None:
    everything, some = data("all", "ant", "bee", "cat"), data("some", *classes)
    for found in (labels.as_trained_on(some, everything), labels.as_known(some, model("ant", "bee", "cat"))):
        assert found.format.classes == ("ant", "bee", "cat")
        assert found.format.places == places
        assert found.class_counts == counts
        again = labels.counted(found, ("dog", "cat", "bee", "ant"))
        assert again.format.places == tuple((3, 2, 1)[place] for place in places)


def test_what_counts_alike_or_by_numbers_stays_as_it_is() -> None:
    everything, numbers = data("all", "ant", "bee"), data("numbers")
    assert labels.as_trained_on(everything, everything) is everything
    assert labels.as_trained_on(numbers, numbers) is numbers
    assert labels.as_known(numbers, model("ant", "bee")) is numbers
    assert labels.as_known(everything, model()) is everything
    folders = data("folders", "n01", "n02")  # for a model whose classes have names for people
    assert labels.as_known(folders, model("ant", "bee")) is folders


@pytest.mark.parametrize("classes", [("ant", "dog"), ("dog", "elk", "fox"), ("Ant", "bee")])
def test_classes_that_are_unknown_are_named(classes: tuple[str, ...]) -> None:
    other = data("other", *classes)
    unknown = ", ".join(sorted(set(classes) - {"ant", "bee"}))
    with pytest.raises(
        InvalidRequest, match=f"'other' has classes that 'all' does not have: {unknown} .it has ant, bee"
    ):
        labels.as_trained_on(other, data("all", "ant", "bee"))
    with pytest.raises(InvalidRequest, match=f"classes that model m:1 does not know: {unknown}; it knows ant, bee:"):
        labels.as_known(other, model("ant", "bee"))


def test_names_and_numbers_do_not_go_together() -> None:
    for one, other in ((data("a", "ant"), data("b")), (data("a"), data("b", "ant"))):
        with pytest.raises(InvalidRequest, match=r"different classes: .*none"):
            labels.as_trained_on(one, other)
