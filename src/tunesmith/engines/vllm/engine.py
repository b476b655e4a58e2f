"""The vLLM engine: a base model and its adapters on servers, over vLLM's OpenAI-compatible HTTP API.

The Renderer turns conversations into token ids here, so the servers' template is never used.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.digests import digest_file, digest_of
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.system.files import cache_folder, write_atomic
from tunesmith.core.system.http_clients import api_key
from tunesmith.engines.decoding.answers import choice_rows, prompt_ids
from tunesmith.engines.protocol import Completion, Generation, Question, loaded, restricted
from tunesmith.engines.settings import VllmSettings
from tunesmith.engines.vllm.http import Server
from tunesmith.engines.vllm.model_server import NEUTRAL, ModelServer, Pool, concurrently, log_probability, scoring
from tunesmith.engines.vllm.process import start_servers, stop_servers
from tunesmith.models.base import Base
from tunesmith.models.rendering import Renderer
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE, has_whole_model, read_adapter_file


class VllmEngine:
    """Implements engines.protocol.Engine. base: digest of the base record."""

    follows_grammars = False  # schemas only

    def __init__(self, base: Base, settings: VllmSettings, progress: Progress = SILENT) -> None:
        """Starts servers where the settings say so, and checks them. progress: told of those that fail, and of those
        that answer again."""
        self._base, self.base, self._renderer = base, base.digest, Renderer(base.folder)
        self._processes = start_servers(base.folder, settings, progress)
        weakref.finalize(self, stop_servers, self._processes)  # when this process exits, too
        key = api_key(settings.key_env, "engine.key_env")
        servers = [
            *(ModelServer(Server(url, settings, key), base, self._renderer) for url in settings.addresses),
            *(ModelServer(each.connect(settings), base, self._renderer, each.wait) for each in self._processes),
        ]
        self._pool = Pool(servers, progress, restarts=1 if self._processes else 0)
        self._at_once = settings.concurrency * len(servers)
        self._folder = Path(settings.adapters).expanduser() if settings.adapters else cache_folder() / "vllm"
        self._known: dict[str, str] = {}  # an adapter's name here -> its name on the servers, also that of its folder

    @property
    def context_length(self) -> int:
        """Most tokens a prompt and its answer may have together: the base's, or fewer if a server is set so."""
        return self._pool.context_length

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a PEFT folder under name.

        The files are copied to a folder that the servers read, and stay there, since they may read them again. The name
        on the servers is a digest of the files, so it never refers to other weights.
        """
        if has_whole_model(folder):
            raise Refused(
                "a vLLM server runs the base with adapters, and this model was trained in full",
                where="engine",
                fix="leave engine out; or export it as merged, and start another server with that folder",
            )
        read_adapter_file(folder, base=self._base.digest, fingerprint=self._base.fingerprint)
        there = "tunesmith-" + digest_of([digest_file(folder / file) for file in (CONFIG_FILE, ADAPTER_FILE)])[7:39]
        for file in (CONFIG_FILE, ADAPTER_FILE):
            kept = self._folder / there / file
            if not kept.is_file() or digest_file(kept) != digest_file(folder / file):
                write_atomic(kept, (folder / file).read_bytes())
        self._pool.load(there, os.path.abspath(self._folder / there))
        self._known[name] = there

    def holds(self, name: str) -> bool:
        """Whether name is loaded."""
        return name in self._known

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests. Sends each server at most settings.concurrency requests at once."""
        there = loaded(self._known, adapter)
        asked = [(request, self._body(request)) for request in requests]

        def answer(one: tuple[Generation, Mapping[str, Any]]) -> Completion:
            request, body = one
            with _blamed(request):
                (choice,) = self._pool.choices(body, there)
            return self._completion(choice["text"], choice, body, choice["token_ids"])

        return concurrently(answer, asked, self._at_once, "answering", progress)

    def stream(self, request: Generation, adapter: str | None = None) -> Iterator[str | Completion]:
        """Pieces of the answer's text as they arrive; the last item is the whole Completion."""
        body = self._body(request)
        text, last = "", dict[str, Any]()
        ids: list[int] = []
        with _blamed(request):
            for choice in self._pool.choices({**body, "stream": True}, loaded(self._known, adapter)):
                ids += choice.get("token_ids") or ()
                last = choice if choice["finish_reason"] else last
                if choice["text"]:
                    text += choice["text"]
                    yield choice["text"]
        yield self._completion(text, last, body, ids)

    def choose(
        self, questions: Sequence[Question], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[list[float]]:
        """For each question the log-probability of each choice, summed over its tokens (end token included)."""
        rows = choice_rows(self._renderer, questions)
        lengths = [sum(row.trained) for row in rows]
        asked = [
            (row.ids[:place], row.ids[place])  # ids so far, the id that follows
            for row, length in zip(rows, lengths, strict=True)
            for place in range(len(row.ids) - length, len(row.ids))
        ]

        there = loaded(self._known, adapter)

        def score(place: tuple[Sequence[int], int]) -> float:
            (choice,) = self._pool.choices(scoring(*place), there)
            return log_probability(choice, place[1])

        scored = iter(concurrently(score, asked, self._at_once, "scoring choices", progress))
        sums = iter([sum(next(scored) for _ in range(length)) for length in lengths])
        return [[next(sums) for _ in question.choices] for question in questions]

    # Requests and answers

    def _body(self, request: Generation) -> dict[str, Any]:
        if request.top_logprobs is not None:
            raise UsageError("the vLLM engine reports no log-probabilities", where="logprobs")
        prompt = prompt_ids(self._renderer, request, self.context_length)
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": max(1, min(request.max_tokens, self.context_length - len(prompt))),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stop": list(request.stop),
            "stop_token_ids": sorted(self._renderer.stop_ids),
            "return_token_ids": True,
            **NEUTRAL,
        }
        if request.constrained_by == "tools":
            raise UsageError(
                "the vLLM engine cannot hold answers to calls of functions",
                where="tool_choice",
                fix="send tool_choice: auto, without strict and parallel_tool_calls: false",
            )
        if request.grammar is not None and request.schema is None:
            raise UsageError(
                "the vLLM engine cannot hold answers to a grammar: constrain: {copy} needs an engine in this process",
                where="constrain",
                fix="leave `engine:` out, or set constrain: true",
            )
        if request.schema is not None:
            schema = json.loads(request.schema)
            if request.constrained_by == "response_format.json_schema" and "allOf" in schema:
                # Only two schemas together are written so. A server's backend may read allOf as any JSON (xgrammar).
                raise UsageError(
                    "the vLLM engine cannot hold answers to the version's own schema and another one at once",
                    where="response_format",
                    fix="leave response_format out: the version's own schema is held in any case",
                )
            body["structured_outputs"] = {"json": restricted(schema)}
        return body

    def _completion(
        self, text: str, last: Mapping[str, Any], body: Mapping[str, Any], ids: Sequence[int]
    ) -> Completion:
        """The answer. last: the choice with its finish_reason, and with the stop text or the token that ended it."""
        tokens = len(ids) - (1 if ids and ids[-1] in self._renderer.stop_ids else 0)
        by_stop_text = isinstance(last.get("stop_reason"), str)
        ended: Literal["stop", "length"] = "stop" if last["finish_reason"] == "stop" else "length"
        return Completion(text, ended, len(body["prompt"]), tokens, by_stop_text=by_stop_text)


@contextlib.contextmanager
def _blamed(request: Generation) -> Iterator[None]:
    """Say that a server which rejects a request rejects the schema that the request brought."""
    try:
        yield
    except UsageError as error:
        if request.constrained_by == "constrain":
            raise
        raise UsageError(error.what, where=request.constrained_by, fix="simplify it") from error
