"""The features of a request that drift monitoring compares, alike for served requests and for the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example

Nearest = Callable[[Sequence[Message]], float]


def request_features(messages: Sequence[Message], nearest: Nearest | None) -> dict[str, float]:
    """characters: length of the user's turns. nearest: similarity (0 to 1) to the closest training row, if known."""
    features = {"characters": float(sum(len(message.content) for message in messages if message.role == "user"))}
    if nearest is not None:
        features["nearest"] = nearest(messages)
    return features


def measured_features(examples: Sequence[Example], nearest: Nearest | None) -> dict[str, list[float]]:
    """Feature name -> its values, one for each example, in the order of examples."""
    rows = [request_features(example.request, nearest) for example in examples]
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def last_request(messages: Sequence[Message]) -> str:
    """The text of the last user turn, "" if there is none."""
    return next((message.content for message in reversed(messages) if message.role == "user"), "")
