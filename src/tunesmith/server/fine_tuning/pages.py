"""Pages of lists, as OpenAI's clients ask for them."""

from __future__ import annotations

from tunesmith.server.errors import bad_request


def page_limit(given: str | None, default: int, most: int) -> int:
    """How many items a page may have. Raises ApiError 400 for anything but a whole number from 1 to `most`."""
    if given is None:
        return default
    if not given.isascii() or not given.isdecimal() or len(given) > 6 or not 1 <= int(given) <= most:
        raise bad_request(f"limit must be a whole number from 1 to {most}.", "limit")
    return int(given)
