"""How much users may send: requests at once, the memory of their bodies, and requests a minute."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.server import limits
from tunesmith.server.errors import ApiError, busy_for_user
from tunesmith.server.limits import ServerSettings

_MINUTE = 60.0
_KEPT = 20_000  # buckets
# Where the headers that tell of the limits are left in the ASGI scope, for RateHeaders.
_SCOPE = "tunesmith.rate"


class _Buckets:
    """Token buckets by key. Each holds `most` requests and fills up within a minute.

    A bucket is the time at which it will be full. One that is full needs no memory.
    """

    def __init__(self, most: int) -> None:
        self.most, self.seconds = most, _MINUTE / most
        self._full_at: dict[str, float] = {}

    def left(self, key: str, now: float) -> float:
        """How many requests may be sent now."""
        return self.most - self.until_full(key, now) / self.seconds

    def until_full(self, key: str, now: float) -> float:
        """Seconds until the bucket is full."""
        return max(0.0, self._full_at.get(key, now) - now)

    def take(self, key: str, now: float) -> None:
        """Count a request."""
        self._full_at[key] = now + self.until_full(key, now) + self.seconds
        if len(self._full_at) > _KEPT:
            self._forget(now)

    def _forget(self, now: float) -> None:
        """Leave out buckets that are full, and where too many are not, those that will be full soonest."""
        latest = sorted(self._full_at.items(), key=lambda item: item[1])[-_KEPT // 2 :]
        self._full_at = {key: at for key, at in latest if at > now}


class Rates:
    """The limits of one server process. Used from its event loop only. clock: seconds, never going back."""

    def __init__(self, settings: ServerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens = _Buckets(settings.token_rate) if settings.token_rate else None
        self._tenants = _Buckets(settings.tenant_rate) if settings.tenant_rate else None
        self._clock = clock

    def take(self, scope: Scope, token: str, tenant: str) -> None:
        """Count a request of a token and its tenant, and leave the headers of the tighter limit in its ASGI scope.

        Raises ApiError 429 where the token or the tenant has none left; then the request counts for neither.
        """
        given = ((self._tokens, token, "token"), (self._tenants, tenant, "tenant"))
        limited = [(buckets, key, what) for buckets, key, what in given if buckets is not None]
        if not limited:
            return
        now = self._clock()
        tightest, key, what = min(limited, key=lambda each: each[0].left(each[1], now))
        allowed = tightest.left(key, now) >= 1
        if allowed:
            for buckets, each, _ in limited:
                buckets.take(each, now)
        left = tightest.left(key, now)
        scope[_SCOPE] = {
            "x-ratelimit-limit-requests": str(tightest.most),
            "x-ratelimit-remaining-requests": str(max(0, math.floor(left + 1e-6))),
            "x-ratelimit-reset-requests": _duration(tightest.until_full(key, now)),
        }
        if not allowed:
            wait, most = math.ceil((1 - left) * tightest.seconds), tightest.most
            message = f"Rate limit reached for this {what}: {most} requests per minute. Try again in {wait} s."
            raise ApiError(429, message, "rate_limit_exceeded", retry=wait)


class RateHeaders:
    """ASGI middleware that puts the headers that Rates left onto the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(scope.get(_SCOPE, {}))
            await send(message)

        await self._app(scope, receive, sending)


def _duration(seconds: float) -> str:
    """As OpenAI writes durations: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


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
                message = "Too many large bodies are being sent at once. Try again shortly."
                raise ApiError(429, message, "rate_limit_exceeded", retry=1, closes=True)

        try:
            yield count
        finally:
            self._requests[user] -= 1
            self._bytes[user] -= counted
