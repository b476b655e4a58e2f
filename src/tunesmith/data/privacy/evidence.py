"""The privacy scan's part of a dataset record: findings by field, detection recall, and a bound on what remains."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from tunesmith.core.messages import Message
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.data.privacy.detection_recall import as_json, measure, remaining_values, require_few_remaining
from tunesmith.data.privacy.entities import described
from tunesmith.data.privacy.scan import Scanner
from tunesmith.data.settings import Privacy

PATTERNS = "patterns"


def privacy_evidence(
    scanner: Scanner,
    settings: Privacy,
    found: Counter[str],
    fields: Counter[tuple[str, str]],
    conversations: Sequence[Sequence[Message]],
) -> dict[str, Any]:
    """The scan's setup, findings and measured error.

    found: entity -> values found. fields: (role, entity) -> findings. conversations: kept rows, in a fixed order, into
    which synthetic values are inserted. Raises Refused where more values may remain than the settings allow.

    {"entities", "model", "fields": {role: {entity: findings}}, "reference": recall and precision on annotated text,
    "synthetic": the same on synthetic values in these rows, "left": a bound on the missed values}.
    """
    by_role: dict[str, dict[str, int]] = {}
    for (role, entity), number in sorted(fields.items()):
        by_role.setdefault(role, {})[entity] = number
    setup = described(scanner.finder)
    measured = measure(scanner, settings, conversations)
    left = remaining_values(settings, found, measured, scanner.finder.entities)
    require_few_remaining(settings, left)
    return {
        **setup,
        "fields": by_role,
        "reference": reference(setup["model"]["package"] if setup["model"] else None, setup["entities"]),
        "synthetic": as_json(measured),
        "left": left,
    }


def reference(model: str | None, entities: Sequence[str]) -> dict[str, Any] | None:
    """The setup's figures on annotated text, for entities that the text contains; None for an unknown model."""
    shipped = _shipped()
    setup = shipped["setups"].get(model or PATTERNS)
    if setup is None:
        return None
    known = {entity: figures for entity, figures in setup["entities"].items() if entity in entities}
    return {"text": shipped["text"], "command": shipped["command"], "entities": known}


@functools.cache
def _shipped() -> dict[str, Any]:
    path = files("tunesmith.data.privacy") / "reference.json"
    read: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
    return read
