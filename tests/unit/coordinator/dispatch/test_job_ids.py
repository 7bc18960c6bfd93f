"""A job is found by its id, or by a beginning that only its id has."""

from __future__ import annotations

import pytest

from coordinator.dispatch.jobstore import meant
from potluck.errors import InvalidRequest, NotFound

KNOWN = ("4be1c06f2a9d", "4be1", "4c00aa11bb22", "77ab03c51e20")


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("77ab03c51e20", "77ab03c51e20"),
        ("7", "77ab03c51e20"),
        ("4be1", "4be1"),  # a whole id is found, even if another id begins with it
        ("4be1c", "4be1c06f2a9d"),
    ],
)
def test_as_much_of_an_id_as_no_other_has_is_enough(written: str, found: str) -> None:
    assert meant(written, KNOWN) == found


def test_what_several_begin_with_is_refused_and_they_are_named() -> None:
    with pytest.raises(InvalidRequest, match="3 jobs begin with '4': 4be1c06f2a9d, 4be1, 4c00aa11bb22: write more"):
        meant("4", KNOWN)


@pytest.mark.parametrize("written", ["", "x", "77ab03c51e200", "7ab"])
def test_what_none_begins_with_is_not_found(written: str) -> None:
    with pytest.raises(NotFound, match="there is no job"):
        meant(written, KNOWN)
