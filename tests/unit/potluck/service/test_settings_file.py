"""Settings are changed in their file, whose comments and other lines stay."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from potluck.service.settings_file import changed
from potluck.settings import CoordinatorSettings, NodeSettings
from potluck.settings_sources import load

CONFIGS = Path(__file__).parents[4] / "configs"
CHANGES = {"cluster": "attic", "seeds": ["10.0.0.1:2000"], "listen.host": "0.0.0.0", "listen.insecure": True}


@pytest.mark.parametrize(("name", "kind"), [("node", NodeSettings), ("coordinator", CoordinatorSettings)])
def test_the_example_takes_each_change_in_its_place(
    tmp_path: Path, name: str, kind: type[NodeSettings] | type[CoordinatorSettings]
) -> None:
    before = (CONFIGS / f"{name}.toml").read_text()
    after = changed(before, CHANGES)
    file = tmp_path / "s.toml"
    file.write_text(after)
    settings = load(kind, file)
    assert (settings.cluster, settings.seeds) == ("attic", ("10.0.0.1:2000",))
    assert (settings.listen.host, settings.listen.insecure) == ("0.0.0.0", True)
    differ = [line for line in zip(before.splitlines(), after.splitlines(), strict=True) if line[0] != line[1]]
    assert len(differ) == 4


def test_what_is_missing_is_added_to_its_table() -> None:
    text = 'a = 1\n# cluster = "no"\n[ http ]\nhost = "theirs"\n'
    assert tomllib.loads(changed(text, CHANGES)) == {
        "a": 1,
        "cluster": "attic",
        "seeds": ["10.0.0.1:2000"],
        "http": {"host": "theirs"},
        "listen": {"host": "0.0.0.0", "insecure": True},
    }
    assert '# cluster = "no"' in changed(text, CHANGES)


def test_text_with_signs_of_toml_comes_back() -> None:
    odd = 'a "b" \\ [c] # d'
    assert tomllib.loads(changed("", {"cluster": odd})) == {"cluster": odd}
