"""The privacy scan's part of a dataset record: findings by field, detection recall, and a bound on what remains."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files

from pydantic import BaseModel

from tunesmith.core.messages import Message
from tunesmith.data.privacy.detection_recall import measure, recorded, remaining_values, require_few_remaining
from tunesmith.data.privacy.entities import scan_model
from tunesmith.data.privacy.scan import Scanner
from tunesmith.data.settings import Privacy
from tunesmith.records.dataset import AnnotatedText, DetectionError, PrivacyScan

PATTERNS = "patterns"


def privacy_evidence(
    scanner: Scanner,
    settings: Privacy,
    found: Counter[str],
    fields: Counter[tuple[str, str]],
    conversations: Sequence[Sequence[Message]],
) -> PrivacyScan:
    """The scan's setup, findings and measured error.

    found: entity -> values found. fields: (role, entity) -> findings. conversations: kept rows, in a fixed order, into
    which synthetic values are inserted. Raises Refused where more values may remain than the settings allow.
    """
    by_role: dict[str, dict[str, int]] = {}
    for (role, entity), number in sorted(fields.items()):
        by_role.setdefault(role, {})[entity] = number
    entities, model = scanner.finder.entities, scan_model(scanner.finder)
    measured = measure(scanner, settings, conversations)
    left = remaining_values(settings, found, measured, entities)
    require_few_remaining(settings, left)
    return PrivacyScan(
        entities=tuple(entities),
        model=model,
        fields=by_role,
        reference=reference(model.package if model else None, entities),
        synthetic={entity: recorded(one) for entity, one in measured.items()},
        left=left,
    )


def reference(model: str | None, entities: Sequence[str]) -> AnnotatedText | None:
    """The setup's figures on annotated text, for entities that the text contains; None for an unknown model."""
    shipped = _shipped()
    setup = shipped.setups.get(model or PATTERNS)
    if setup is None:
        return None
    known = {entity: error for entity, error in setup.entities.items() if entity in entities}
    return AnnotatedText(text=shipped.text, command=shipped.command, entities=known)


class _Setup(BaseModel):
    entities: dict[str, DetectionError]


class _Shipped(BaseModel):
    text: str
    command: str
    setups: dict[str, _Setup]


@functools.cache
def _shipped() -> _Shipped:
    path = files("tunesmith.data.privacy") / "reference.json"
    return _Shipped.model_validate_json(path.read_bytes())
