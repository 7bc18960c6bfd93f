"""All targets, by name."""

from __future__ import annotations

from fuzz import of_files, of_http, of_models, of_texts, of_wire
from fuzz.judging import Target

TARGETS: dict[str, Target] = {
    target.name: target for part in (of_wire, of_http, of_files, of_texts, of_models) for target in part.TARGETS
}
