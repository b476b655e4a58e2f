"""Talking to a vLLM server: one JSON request or a stream of events, tried again where that can help, and every failure
told as what it is."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.engines.settings import VllmSettings

_BUSY = frozenset((429, 502, 503, 504))
_FIRST_WAIT = 0.25  # seconds; doubled with every try
_START = "start it: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE-FOLDER --enable-lora --max-lora-rank RANK"


class NotThere(Exception):
    """The server knows no such path or model. what: its own words; model: whether it was a model that was asked for."""

    def __init__(self, what: str, *, model: bool) -> None:
        super().__init__(what)
        self.what, self.model = what, model


class Server:
    """A vLLM server's HTTP side. Thread-safe."""

    def __init__(self, settings: VllmSettings) -> None:
        self._url = settings.url.rstrip("/").removesuffix("/v1")
        self._retries = settings.retries
        self._key_env = settings.key_env
        headers = {}
        if settings.key_env is not None:
            if not os.environ.get(settings.key_env):
                raise UsageError(f"${settings.key_env} is not set", where="engine.key_env", fix="put the API key there")
            headers["Authorization"] = f"Bearer {os.environ[settings.key_env]}"
        most = settings.concurrency
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(settings.answer_seconds, connect=settings.connect_seconds, pool=None),
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
            trust_env=False,  # rows may be private: no proxy that an environment names
        )
        self._answer_seconds = settings.answer_seconds

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, returned: Callable[[float], None] | None = None
    ) -> Any:
        """The answer to a GET, or with a body to a POST: JSON where it is JSON, else its text.

        returned: called with the time of the failure before a request is sent again to a server that was away, which
        may not be the same one any more. Raises NotThere, UsageError for a request the server does not take, Refused
        for a key it does not take, TunesmithError for everything else.
        """
        with self._open("GET" if body is None else "POST", path, body, returned) as response:
            text = response.read()
        try:
            return json.loads(text)
        except ValueError:
            return text.decode(errors="replace")

    def stream(
        self, path: str, body: Mapping[str, Any], returned: Callable[[float], None] | None = None
    ) -> Iterator[Mapping[str, Any]]:
        """The events of a streamed answer. Leaving early ends the request. Raises as ask does."""
        with self._open("POST", path, body, returned) as response:
            try:
                for line in response.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        event = json.loads(data)
                        if "error" in event:
                            raise self._failed(str(event["error"].get("message", event["error"])))
                        yield event
            except httpx.TimeoutException as error:
                raise self._late() from error
            except (httpx.TransportError, ValueError) as error:
                raise self._failed(f"the stream broke off: {error}") from error

    @contextlib.contextmanager
    def _open(
        self, method: str, path: str, body: Mapping[str, Any] | None, returned: Callable[[float], None] | None
    ) -> Iterator[httpx.Response]:
        failed_at: float | None = None
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
            try:
                if failed_at is not None and returned is not None:
                    returned(failed_at)
                response = self._client.send(
                    self._client.build_request(method, self._url + path, json=body), stream=True
                )
            except httpx.ReadTimeout as error:
                raise self._late() from error
            except httpx.TransportError as error:
                failed_at = time.monotonic()
                if attempt == self._retries:
                    raise TunesmithError(
                        f"the vLLM server cannot be reached: {error or type(error).__name__}",
                        where=self._url,
                        fix=_START,
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
        said, kind = text[:500], ""
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            given = json.loads(text)
            told = given.get("error", given)
            said, kind = str(told.get("message") or told.get("detail") or said)[:500], str(told.get("type", ""))
        status = response.status_code
        if status in (401, 403):
            fix = f"put the right key into ${self._key_env}" if self._key_env else "name its variable in engine.key_env"
            return Refused("the vLLM server does not accept the API key", where=self._url, fix=fix)
        if status == 404:
            return NotThere(said, model="NotFound" in kind)
        if status in (400, 413, 422):
            return UsageError(f"the vLLM server does not take the request: {said}", where=self._url)
        return self._failed(f"status {status}: {said}")

    def _failed(self, said: str) -> TunesmithError:
        return TunesmithError(f"the vLLM server failed: {said}", where=self._url, fix="look at the server's own log")

    def _late(self) -> TunesmithError:
        return TunesmithError(
            f"the vLLM server gave no answer within {self._answer_seconds:g} s",
            where=self._url,
            fix="raise engine.answer_seconds, or lower engine.concurrency",
        )
