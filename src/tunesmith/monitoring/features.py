"""What the drift watch compares of a request: the same numbers for served requests and for the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example

Nearest = Callable[[Sequence[Message]], float]


def request_features(messages: Sequence[Message], nearest: Nearest | None) -> dict[str, float]:
    """characters: of the user's turns. nearest: similarity (0 to 1) to the training row most like it, where known."""
    features = {"characters": float(sum(len(message.content) for message in messages if message.role == "user"))}
    if nearest is not None:
        features["nearest"] = nearest(messages)
    return features


def measured_features(examples: Sequence[Example], nearest: Nearest | None) -> dict[str, list[float]]:
    """Feature name -> its value for every example's request, in the order of examples."""
    rows = [request_features(example.request, nearest) for example in examples]
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def last_request(messages: Sequence[Message]) -> str:
    """The text of the last user turn, "" where there is none."""
    return next((message.content for message in reversed(messages) if message.role == "user"), "")
