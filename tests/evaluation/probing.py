"""Rows of two turns."""

from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example, example_id


def row(request: str, answer: str, group: str | None = None) -> Example:
    """A row of two turns, a group of its own."""
    turns = (Message(role="user", content=request), Message(role="assistant", content=answer))
    identifier = example_id(turns, "made")
    return Example(id=identifier, messages=turns, source="made", licence="CC0-1.0", group=group or identifier)
