"""Asks a model behind an OpenAI-compatible URL, with retries and time limits. The key is only in the header."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from tunesmith.candidates.grammars.request_schemas import check_schema
from tunesmith.candidates.settings import EndpointSettings
from tunesmith.core.clock import now
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.messages import Message, ToolCall, tools_of
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.system.http_clients import HttpClients, api_key
from tunesmith.engines.protocol import UNBOUNDED, Completion, Generation, Responder

if TYPE_CHECKING:
    import httpx

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_UNFIT = frozenset({400, 413, 422})  # the request itself is at fault, as where it is longer than the context
_LONGEST_WAIT = 30.0  # seconds between two tries, also where the endpoint asks for more
_LARGEST_ANSWER = 16 << 20


class Endpoint(Responder):
    """Answers by sending requests to an endpoint. Nothing is streamed."""

    context_length = UNBOUNDED

    def __init__(self, settings: EndpointSettings) -> None:
        import httpx

        self._settings = settings
        self._key = api_key(settings.key_env, "endpoint.key_env")
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        certificates = httpx.create_ssl_context()  # read once, and not for each client
        given: Any = {"headers": headers, "verify": certificates, "timeout": settings.timeout}
        self._clients = HttpClients(lambda: httpx.Client(**given, follow_redirects=False), settings.parallel)

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests. Raises TunesmithError where the endpoint gives no answer."""
        del adapter
        with progress.task("asking", len(requests)) as task, ThreadPoolExecutor(self._settings.parallel) as pool:
            given: list[Completion] = []
            for completion in pool.map(self._ask, requests):
                given.append(completion)
                task.advance()
            return given

    def _ask(self, request: Generation) -> Completion:
        body: JsonObject = {
            "model": self._settings.model,
            "messages": [turn.openai() for turn in request.messages],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
        }
        if tools := tools_of(request.messages):
            body["tools"] = tools
        if request.stop:
            body["stop"] = list(request.stop)
        if self._settings.logprobs:
            body["logprobs"] = True
        if request.schema is not None:
            schema = parse_json(request.schema)
            held = {"name": "answer", "schema": schema, **({"strict": True} if _strict(schema) else {})}
            body["response_format"] = {"type": "json_schema", "json_schema": held}
        return self._read(self._posted(body))

    def _posted(self, body: JsonObject) -> Any:
        """The endpoint's response. Retries where it is busy or the connection breaks. Raises UsageError where it takes
        other requests, but not this one."""
        import httpx

        reason, kind = "", TunesmithError
        for turn in range(self._settings.retries + 1):
            wait = min(2.0**turn * 0.25, _LONGEST_WAIT)
            try:
                status, headers, data = self._once(body)
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if status == 200:
                    return data
                reason = f"status {status}: {self._shown(data)}"
                if status not in _AGAIN:
                    kind = UsageError if status in _UNFIT else TunesmithError
                    break
                wait = max(wait, _asked_wait(headers.get("retry-after")))
            if turn < self._settings.retries:
                time.sleep(min(wait, _LONGEST_WAIT))
        fix = "check the endpoint, then run the same command again: finished answers are kept"
        raise self._failed(reason, fix, kind)

    def _once(self, body: JsonObject) -> tuple[int, httpx.Headers, bytes]:
        """One attempt: status, headers and body. Raises TunesmithError for a body over the size limit."""
        url = f"{self._settings.url}/chat/completions"
        with self._clients.one() as client, client.stream("POST", url, json=body) as response:
            pieces, size = [], 0
            for piece in response.iter_bytes():
                size += len(piece)
                if size > _LARGEST_ANSWER:
                    raise self._failed(f"its answer is larger than {_LARGEST_ANSWER} bytes", "check the endpoint")
                pieces.append(piece)
            return response.status_code, response.headers, b"".join(pieces)

    def _read(self, data: bytes) -> Completion:
        try:
            document = parse_json(data)
            choice, usage = document["choices"][0], document["usage"]
            text = _said(choice["message"])
            tokens = [usage["prompt_tokens"], usage["completion_tokens"]]
            if any(type(count) is not int or not 0 <= count < 10**9 for count in tokens):
                raise TypeError("a token count is not a number, or too large")
            confidence = _probability(choice["logprobs"]["content"]) if self._settings.logprobs else None
            # A lone surrogate cannot be stored in a record.
            text.encode()
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise self._failed(
                f"its answer is not a chat completion with usage ({type(error).__name__}: {error})",
                "the endpoint must speak OpenAI's chat completions and report usage",
            ) from error
        return Completion(
            text=text,
            finish="length" if choice.get("finish_reason") == "length" else "stop",
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
            served_by=str(document.get("model") or "")[:120],
            confidence=confidence,
        )

    def _shown(self, data: bytes) -> str:
        """The start of an error's text, with the key removed where the endpoint repeats it."""
        text = data[:2000].decode("utf-8", "replace")
        if self._key:
            text = text.replace(self._key, "[key]")
        return " ".join(text.split())[:300]

    def _failed(self, reason: str, fix: str, kind: type[TunesmithError] = TunesmithError) -> TunesmithError:
        where = f"{self._settings.url}, model {self._settings.model}"
        return kind(f"the endpoint gave no answer: {reason}", where=where, fix=fix)


def _strict(schema: Any) -> bool:
    """Whether OpenAI takes a schema with `strict: true`. It refuses any other, such as one with an optional key."""
    try:
        check_schema(schema, strict=True)
    except ValueError:
        return False
    return True


def _said(message: Any) -> str:
    """The text of an answer, its calls as a row's answer has them. Raises TypeError or KeyError for anything else.

    OpenAI's models that are held to a schema say a refusal in a field of its own.
    """
    calls = message["tool_calls"] or [] if "tool_calls" in message else []
    content = message.get("content") if calls else message["content"]  # some leave it out beside calls
    content = content or message.get("refusal")
    if not isinstance(content, str | None):
        raise TypeError("content is not a text")
    functions = [call["function"] for call in calls]
    if any(not isinstance(one[key], str) for one in functions for key in ("name", "arguments")):
        raise TypeError("a call's name or arguments are not a text")
    made = tuple(ToolCall(id="", name=one["name"], arguments=one["arguments"].strip() or "{}") for one in functions)
    return Message(role="assistant", content=content or "", tool_calls=made).text


def _probability(tokens: Any) -> float:
    """The product of the tokens' probabilities. Raises TypeError for invalid log-probabilities."""
    sums = [token["logprob"] for token in tokens]
    if any(isinstance(each, bool) or not isinstance(each, int | float) or not each <= 1e-3 for each in sums):
        raise TypeError("a log-probability is above 0 or not a number")
    return round(math.exp(min(math.fsum(sums), 0.0)), 6)


def _asked_wait(header: str | None) -> float:
    """The seconds of a Retry-After header, a number or a date (RFC 9110); 0 for an invalid one."""
    if not header:
        return 0.0
    with contextlib.suppress(ValueError):
        seconds = float(header)
        return seconds if 0 <= seconds < 1e9 else 0.0
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(header) - now()).total_seconds())
    return 0.0
