"""Canaries: rows with a random secret, planted among the training rows to measure what a model remembers.

The method is that of "The Secret Sharer" (Carlini et al. 2019, USENIX Security): secrets of one format, some planted
so and so many times, others, the controls, never; how unlikely it is that a planted one ranks so high among the
controls is its exposure. A canary has the form of the user's own rows: the request and answer of one of them, with a
reference of six digits before the request and the secret, eight digits, in the answer (the last text within a JSON
answer, else at its end).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example, example_id
from tunesmith.training.settings import CanarySettings

SOURCE = "canary"


class Canary(NamedTuple):
    """repeats: how often it is planted; 0 for a control."""

    example: Example
    repeats: int


def canaries(examples: Sequence[Example], settings: CanarySettings) -> list[Canary]:
    """All canaries for training rows, controls too. The same rows and settings give the same canaries.

    Which become controls is drawn: nothing but the planting tells them from the others. Raises UsageError for no rows.
    """
    if not examples:
        raise UsageError("there are no rows to shape canaries after", where="train.canaries")
    draw = random.Random(f"canaries {settings.seed}")
    counts = [times for times in settings.repeats for _ in range(settings.each)] + [0] * settings.controls
    ordered = sorted(examples, key=lambda example: example.id)
    references = draw.sample(range(100_000, 1_000_000), len(counts))
    secrets = draw.sample(range(10_000_000, 100_000_000), len(counts))
    shapes = [draw.choice(ordered) for _ in counts]
    draw.shuffle(counts)
    made = zip(shapes, references, secrets, counts, strict=True)
    return [Canary(_canary(shape, str(reference), str(secret)), times) for shape, reference, secret, times in made]


def plant(examples: Sequence[Example], settings: CanarySettings) -> list[Example]:
    """The rows with the canaries after them, each as often as it is planted and under an id of its own."""
    return [*examples] + [
        canary.example.model_copy(update={"id": f"{canary.example.id}-{turn}"})
        for canary in canaries(examples, settings)
        for turn in range(canary.repeats)
    ]


def _canary(shape: Example, reference: str, secret: str) -> Example:
    turns = list(shape.messages)
    asked = max(place for place, turn in enumerate(turns[:-1]) if turn.role == "user")
    turns[asked] = Message(role="user", content=f"[{reference}] {turns[asked].content}")
    turns[-1] = Message(role="assistant", content=_with_secret(turns[-1].content, secret))
    identifier = example_id(turns, SOURCE)
    changed = {"id": identifier, "messages": tuple(turns), "source": SOURCE, "group": f"canary-{reference}"}
    return shape.model_copy(update={**changed, "subject": None})


def _with_secret(answer: str, secret: str) -> str:
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return f"{answer} {secret}"
    places = list(_texts(value))
    if not places:
        return f"{answer} {secret}"
    holder, key = places[-1]
    holder[key] = secret
    tight = ", " not in answer and '": ' not in answer
    return json.dumps(value, ensure_ascii=False, separators=(",", ":") if tight else None)


def _texts(value: Any) -> Any:
    """(container, key) of every text within."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        if isinstance(item, str):
            yield value, key
        else:
            yield from _texts(item)
