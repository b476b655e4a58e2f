"""The rule for names that become parts of paths: plain ASCII, so that no two names look alike."""

from __future__ import annotations

import re

from tunesmith.core.errors import UsageError

# Lower-case ASCII only: no case folding, no look-alike letters, no separators, nothing special to a shell or a path.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_RULE = "use 1 to 63 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit, without '..'"


def check_name(text: str, what: str) -> str:
    """The name as given. what: its kind, for the message ("version name"). Raises UsageError for a bad name."""
    if not _NAME.fullmatch(text) or ".." in text:
        raise UsageError(f"{text[:80]!r} is not a {what}", fix=_RULE)
    return text
