"""Names that become file names and parts of labels: one plain spelling each, so that no two look alike."""

from __future__ import annotations

import re

from tunesmith.core.errors import UsageError

# Lower-case ASCII alone: no case folding, no Unicode twins, no separators, nothing a shell or a path reads specially.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_RULE = "use 1 to 63 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit, without '..'"


def check_name(text: str, what: str) -> str:
    """The name as given. what: how messages call it ("version name"). Raises UsageError for any other spelling."""
    if not _NAME.fullmatch(text) or ".." in text:
        raise UsageError(f"{text[:80]!r} is not a {what}", fix=_RULE)
    return text
