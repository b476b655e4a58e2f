"""How many requests a user may be sending, and how much memory their bodies may take."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from tunesmith.server import limits
from tunesmith.server.errors import ApiError, busy_for_user
from tunesmith.server.settings import ServerSettings


class Arriving:
    """The requests that are authenticated and not yet in a queue, by user. Used from one event loop."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._requests: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    @contextlib.contextmanager
    def one(self, user: str, held: int) -> Iterator[Callable[[int], None]]:
        """Count a request until the end of the block. held: the user's requests that already wait or are answered.

        Yields what counts the bytes of its body. Raises ApiError 429 if the user has too many requests, and from that
        if the bodies that are being read become too large together.
        """
        if self._requests[user] + held >= self._settings.per_user:
            raise busy_for_user(self._settings.per_user)
        self._requests[user] += 1
        counted = 0

        def count(size: int) -> None:
            nonlocal counted
            counted += size
            self._bytes[user] += size
            most = self._settings.body_bytes
            if self._bytes[user] > limits.BODIES_OF_USER * most or self._bytes.total() > limits.BODIES * most:
                raise _too_much()

        try:
            yield count
        finally:
            self._requests[user] -= 1
            self._bytes[user] -= counted


def _too_much() -> ApiError:
    return ApiError(
        429,
        "Too many large bodies are being sent at once. Try again shortly.",
        code="rate_limit_exceeded",
        headers={"Retry-After": "1", "Connection": "close"},
    )
