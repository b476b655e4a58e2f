"""HTTP requests to a vLLM server: JSON or a stream of events, with retries, and an error class for each failure."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.system.http_clients import HttpClients
from tunesmith.engines.settings import VllmSettings

_BUSY = frozenset((429, 502, 503, 504))
# Called with the time of the failure before a request is repeated.
Returned = Callable[[float], None] | None
_FIRST_WAIT = 0.25  # seconds before the first retry; doubled for each further one
_START = "start it: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE-FOLDER --enable-lora --max-lora-rank RANK"


class NotThere(Refused):
    """The server has no such path or model. said: the server's message. model: whether a model is missing."""

    def __init__(self, said: str, where: str, *, model: bool) -> None:
        super().__init__(f"the vLLM server has no such {'model' if model else 'path'}: {said}", where=where)
        self.said, self.model = said, model


class Unavailable(TunesmithError):
    """The server gave no answer, or only a part of it. Another server may answer the request."""


class ServerError(Unavailable):
    """The server failed over a request, and says so."""


class Server:
    """Sends requests to a vLLM server. Thread-safe."""

    def __init__(self, url: str, settings: VllmSettings, key: str | None, fix: str = _START) -> None:
        """fix: what to do where the server cannot be reached."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._retries = settings.retries
        self._key_env = settings.key_env
        self._fix = fix
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        certificates = httpx.create_ssl_context()  # read once, and not for each client

        def client() -> httpx.Client:
            return httpx.Client(
                headers=headers,
                verify=certificates,
                timeout=httpx.Timeout(settings.answer_seconds, connect=settings.connect_seconds, pool=None),
                trust_env=False,  # rows may be private, so use no proxy from the environment
            )

        self._clients = HttpClients(client, settings.concurrency)
        self._answer_seconds = settings.answer_seconds

    def ask(self, path: str, body: Mapping[str, Any] | None = None, returned: Returned = None) -> Any:
        """The answer to a GET, or to a POST if there is a body: parsed JSON, or the text of an answer that is not JSON.

        returned: called with the time of the failure before a request is repeated because the server was unreachable.
        It may be another server by then. Raises NotThere, UsageError for a request that the server rejects, Refused for
        a wrong API key, Unavailable for everything else.
        """
        with self._open(path, body, returned) as response:
            text = response.content
        try:
            return parse_json(text)
        except ValueError:
            return text.decode(errors="replace")

    def stream(self, path: str, body: Mapping[str, Any], returned: Returned = None) -> Iterator[Mapping[str, Any]]:
        """The events of a streamed answer. Closing the iterator cancels the request. Raises as ask does."""
        with self._open(path, body, returned, stream=True) as response:
            try:
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        event = parse_json(data)
                        if not isinstance(event, dict):
                            raise ValueError("an event is not a JSON object")
                        if "error" in event:
                            told = event["error"]
                            raise self._failed(str(told.get("message", told) if isinstance(told, dict) else told))
                        yield event
            except httpx.TimeoutException as error:
                raise self._timed_out() from error
            except (httpx.TransportError, ValueError) as error:
                raise self._failed(f"the stream broke off: {error}") from error

    @contextlib.contextmanager
    def _open(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        returned: Returned,
        *,
        stream: bool = False,
    ) -> Iterator[httpx.Response]:
        """The response: read whole, or only its head if it is streamed."""
        method = "GET" if body is None else "POST"
        failed_at: float | None = None
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
            if failed_at is not None and returned is not None:
                returned(failed_at)  # it sends requests itself, so this one holds no client meanwhile
            with self._clients.one() as client:
                try:
                    response = client.send(client.build_request(method, self.url + path, json=body), stream=stream)
                except httpx.ReadTimeout as error:
                    raise self._timed_out() from error
                except httpx.TransportError as error:
                    failed_at = time.monotonic()
                    if attempt == self._retries:
                        raise Unavailable(
                            f"the vLLM server cannot be reached: {error or type(error).__name__}",
                            where=self.url,
                            fix=self._fix,
                        ) from error
                    continue
                with contextlib.closing(response):
                    if response.status_code in _BUSY and attempt < self._retries:
                        continue
                    if response.status_code >= 400:
                        raise self._error(response)
                    yield response
                    return

    def _error(self, response: httpx.Response) -> Exception:
        text = response.read().decode(errors="replace")
        message, kind = text[:500], ""
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            parsed = parse_json(text)
            error = parsed.get("error", parsed)
            message = str(error.get("message") or error.get("detail") or message)[:500]
            kind = str(error.get("type", ""))
        status = response.status_code
        if status in (401, 403):
            fix = f"put the right key into ${self._key_env}" if self._key_env else "name its variable in engine.key_env"
            return Refused("the vLLM server does not accept the API key", where=self.url, fix=fix)
        if status == 404:
            return NotThere(message, self.url, model="NotFound" in kind)
        if status in (400, 413, 422):
            return UsageError(f"the vLLM server rejects the request: {message}", where=self.url)
        return self._failed(f"status {status}: {message}")

    def _failed(self, message: str) -> ServerError:
        return ServerError(f"the vLLM server failed: {message}", where=self.url, fix="look at the server's own log")

    def _timed_out(self) -> Unavailable:
        return Unavailable(
            f"the vLLM server gave no answer within {self._answer_seconds:g} s",
            where=self.url,
            fix="raise engine.answer_seconds, or lower engine.concurrency",
        )
