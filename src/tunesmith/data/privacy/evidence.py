"""What a dataset's record says of its privacy scan: where things were found, how well it finds, what is left."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from tunesmith.core.messages import Message
from tunesmith.data.building.account import Account
from tunesmith.data.privacy.detection_recall import as_json, measure, remaining_values, require_few_remaining
from tunesmith.data.privacy.entities import described
from tunesmith.data.privacy.scan import Scanner
from tunesmith.data.settings import Privacy

PATTERNS = "patterns"


def privacy_evidence(
    scanner: Scanner, settings: Privacy, account: Account, conversations: Sequence[Sequence[Message]]
) -> dict[str, Any]:
    """The scan with its measured error. conversations: kept rows to plant in, in an order that is always the same.

    Raises Refused where more is probably left than the settings allow.

    {"entities", "model", "fields": {role: {entity: findings}}, "reference": recall and precision on annotated text,
    "planted": the same on values planted into these rows, "left": a bound on the values that were missed}.
    """
    fields: dict[str, dict[str, int]] = {}
    for (role, entity), number in sorted(account.fields.items()):
        fields.setdefault(role, {})[entity] = number
    setup = described(scanner.finder)
    measured = measure(scanner, settings, conversations)
    left = remaining_values(settings, account.privacy, measured, scanner.finder.entities)
    require_few_remaining(settings, left)
    return {
        **setup,
        "fields": fields,
        "reference": reference(setup["model"]["package"] if setup["model"] else None, setup["entities"]),
        "planted": as_json(measured),
        "left": left,
    }


def reference(model: str | None, entities: Sequence[str]) -> dict[str, Any] | None:
    """Figures on annotated text for this setup, of the entities that the text holds; None for a model without any."""
    shipped = _shipped()
    setup = shipped["setups"].get(model or PATTERNS)
    if setup is None:
        return None
    known = {entity: figures for entity, figures in setup["entities"].items() if entity in entities}
    return {"text": shipped["text"], "command": shipped["command"], "entities": known}


@functools.cache
def _shipped() -> dict[str, Any]:
    path = files("tunesmith.data.privacy") / "reference.json"
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read
