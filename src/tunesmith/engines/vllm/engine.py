"""The vLLM engine: a base model and its adapters on a server, over vLLM's OpenAI-compatible HTTP API.

The Renderer turns conversations into token ids here, so the server's template is never used. Two checks verify the
server. It runs the base if its tokens and log-probabilities of a fixed text agree with the base's. It runs an adapter
if the adapter's log-probabilities differ from the base's.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal, TypeVar

from tunesmith.core.digests import digest_file, digest_of
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.files import write_atomic
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.answers import choice_rows, prompt_ids
from tunesmith.engines.json_text import restricted
from tunesmith.engines.protocol import Completion, Generation, Question
from tunesmith.engines.settings import VllmSettings
from tunesmith.engines.vllm.fingerprint import TEXT, TOLERANCE, expected_scores, mean_difference, places, text_ids
from tunesmith.engines.vllm.http import NotThere, Server
from tunesmith.models.base import Base, cache_folder
from tunesmith.models.rendering import Renderer
from tunesmith.models.weight_files import ADAPTER_FILE, CONFIG_FILE, has_whole_model, read_adapter_file

Item = TypeVar("Item")
Result = TypeVar("Result")
_COMPLETIONS = "/v1/completions"
# The server takes options that a request leaves out from the model's generation_config.json, so leave none out.
_NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class VllmEngine:
    """Implements engines.protocol.Engine."""

    def __init__(self, base: Base, settings: VllmSettings) -> None:
        self._base, self._settings = base, settings
        self._renderer = Renderer(base.folder)
        self._server = Server(settings)
        self._folder = Path(settings.adapters).expanduser() if settings.adapters else cache_folder() / "vllm"
        self._known: dict[str, str] = {}  # an adapter's name here -> its name on the server, also that of its folder
        self._registered: dict[str, float] = {}  # an adapter's name on the server -> when it was loaded last
        self._lock = threading.RLock()
        self._model, self._context_length, self._checked_at = "", 0, 0.0
        self._check_server()

    @property
    def base(self) -> str:
        """Digest of the base record."""
        return self._base.digest

    @property
    def context_length(self) -> int:
        """Most tokens a prompt and its answer may have together: the base's, or fewer if the server is set so."""
        return self._context_length

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a PEFT folder under name.

        The files are copied to a folder that the server reads, and stay there, since the server may read them again.
        The name on the server is a digest of the files, so it never refers to other weights.
        """
        if has_whole_model(folder):
            raise Refused(
                "the vLLM server runs the base with adapters, and this model was trained in full",
                where=self._settings.url,
                fix="leave engine out; or export it as merged, and start another server with that folder",
            )
        read_adapter_file(folder, base=self._base.digest, fingerprint=self._base.fingerprint)
        there = "tunesmith-" + digest_of([digest_file(folder / file) for file in (CONFIG_FILE, ADAPTER_FILE)])[7:39]
        for file in (CONFIG_FILE, ADAPTER_FILE):
            kept = self._folder / there / file
            if not kept.is_file() or digest_file(kept) != digest_file(folder / file):
                write_atomic(kept, (folder / file).read_bytes())
        with self._lock:
            self._register(there)
            self._known[name] = there

    def holds(self, name: str) -> bool:
        """Whether name is loaded."""
        return name in self._known

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests. Sends at most settings.concurrency requests at once."""
        bodies = [self._body(request) for request in requests]

        def answer(body: Mapping[str, Any]) -> Completion:
            given = self._ask(body, adapter)
            choice = given["choices"][0]
            return self._completion(choice["text"], choice, body, choice["token_ids"])

        return self._concurrently(answer, bodies, "answering", progress)

    def stream(self, request: Generation, adapter: str | None = None) -> Iterator[str | Completion]:
        """Pieces of the answer's text as they arrive; the last item is the whole Completion."""
        body = self._body(request)
        text, last = "", dict[str, Any]()
        ids: list[int] = []
        for event in self._events({**body, "stream": True}, adapter):
            for choice in event.get("choices", ()):
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

        def score(place: tuple[Sequence[int], int]) -> float:
            return self._score(self._ask(_scoring(*place), adapter), place[1])

        scored = iter(self._concurrently(score, asked, "scoring choices", progress))
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
            **_NEUTRAL,
        }
        if request.grammar is not None and request.schema is None:
            raise UsageError(
                "the vLLM engine cannot hold answers to a grammar: constrain: {copy} needs an engine in this process",
                where="constrain",
                fix="leave `engine:` out, or set constrain: true",
            )
        if request.schema is not None:
            body["structured_outputs"] = {"json": restricted(json.loads(request.schema))}
        return body

    def _completion(
        self, text: str, last: Mapping[str, Any], body: Mapping[str, Any], ids: Sequence[int]
    ) -> Completion:
        """The answer. last: the choice with its finish_reason, and with the stop text or the token that ended it."""
        finish = last.get("finish_reason")
        if finish not in ("stop", "length"):
            raise TunesmithError(
                f"the vLLM server ended an answer as {finish!r}",
                where=self._settings.url,
                fix="look at the server's own log",
            )
        tokens = len(ids) - (1 if ids and ids[-1] in self._renderer.stop_ids else 0)
        by_stop_text = isinstance(last.get("stop_reason"), str)
        ended: Literal["stop", "length"] = "stop" if finish == "stop" else "length"
        return Completion(text, ended, len(body["prompt"]), tokens, by_stop_text=by_stop_text)

    def _score(self, given: Mapping[str, Any], token: int) -> float:
        """A token's log-probability in the answer to _scoring."""
        found = float(given["choices"][0]["logprobs"]["top_logprobs"][0][f"token_id:{token}"])
        if not math.isfinite(found):
            raise TunesmithError(
                "the vLLM server returned a log-probability that is not finite", where=self._settings.url
            )
        return found

    def _fixed_scores(self, model: str) -> list[float]:
        """Log-probabilities of the fixed text at places(), by a model of the server."""
        ids = text_ids(self._renderer)

        def score(place: int) -> float:
            given = self._server.ask(_COMPLETIONS, {**_scoring(ids[:place], ids[place]), "model": model})
            return self._score(given, ids[place])

        return self._concurrently(score, places(ids), "", SILENT)

    def _concurrently(
        self, do: Callable[[Item], Result], items: Sequence[Item], title: str, progress: Progress
    ) -> list[Result]:
        """The results of do for each item, computed concurrently. The first failure cancels the rest."""
        with (
            progress.task(title, len(items)) as task,
            ThreadPoolExecutor(self._settings.concurrency, thread_name_prefix="tunesmith-vllm") as pool,
        ):
            futures = [pool.submit(do, item) for item in items]
            try:
                for done in as_completed(futures):
                    done.result()
                    task.advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [done.result() for done in futures]

    def _ask(self, body: Mapping[str, Any], adapter: str | None) -> Any:
        began = time.monotonic()
        try:
            return self._server.ask(_COMPLETIONS, {**body, "model": self._name(adapter)}, self._check_again)
        except NotThere as error:
            self._restore(adapter, error, began)
            return self._server.ask(_COMPLETIONS, {**body, "model": self._name(adapter)})

    def _events(self, body: Mapping[str, Any], adapter: str | None) -> Iterator[Mapping[str, Any]]:
        began = time.monotonic()
        try:
            yield from self._server.stream(_COMPLETIONS, {**body, "model": self._name(adapter)}, self._check_again)
        except NotThere as error:  # raised before the first event
            self._restore(adapter, error, began)
            yield from self._server.stream(_COMPLETIONS, {**body, "model": self._name(adapter)})

    def _name(self, adapter: str | None) -> str:
        if adapter is None:
            return self._model
        if adapter not in self._known:
            raise Refused(f"adapter {adapter} is not loaded", fix="load it first")
        return self._known[adapter]

    # Verifying the server

    def _check_server(self) -> None:
        """Check that the server runs the base. Raises Refused if it runs another model."""
        where = self._settings.url
        began = time.monotonic()
        models = self._listed()
        bases = [model for model in models if not model.get("parent")]
        if not bases:
            raise Refused("the vLLM server lists no base model", where=where)
        self._model = str(bases[0]["id"])
        length = int(bases[0].get("max_model_len") or 0)
        if not 0 < length <= self._base.context_length:
            raise self._other_model(f"its context length is {length}, the base's {self._base.context_length}")
        self._context_length = length
        ids = text_ids(self._renderer)
        try:
            theirs = self._server.ask("/tokenize", {"model": self._model, "prompt": TEXT, "add_special_tokens": False})[
                "tokens"
            ]
        except NotThere as error:
            raise self._no_vllm() from error
        if theirs != ids:
            raise self._other_model("its tokenizer reads a fixed text differently")
        difference = mean_difference(self._fixed_scores(self._model), expected_scores(self._base, ids))
        if not difference <= TOLERANCE:
            raise self._other_model(
                f"its log-probabilities of a fixed text differ by {difference:.3f} nats on average, "
                f"more than {TOLERANCE}"
            )
        self._checked_at = began

    def _check_again(self, failed_at: float) -> None:
        """Check the server again if it was unreachable since the last check: it may run another model now."""
        with self._lock:
            if self._checked_at < failed_at:
                self._check_server()

    def _other_model(self, how: str) -> Refused:
        return Refused(
            f"the vLLM server runs another model than the base: {how}",
            where=self._settings.url,
            fix=f"start it with the base's own files, not quantised: vllm serve {self._base.folder}",
        )

    def _listed(self) -> list[dict[str, Any]]:
        try:
            return list(self._server.ask("/v1/models")["data"])
        except (NotThere, KeyError, TypeError) as error:
            raise self._no_vllm() from error

    def _no_vllm(self) -> Refused:
        return Refused("the server does not speak vLLM's API", where=self._settings.url, fix="name a vLLM server")

    def _register(self, there: str) -> None:
        """Make the server load the adapter if it has not yet, and check that it answers differently from the base."""
        folder = os.path.abspath(self._folder / there)
        listed = {str(model["id"]): model.get("root") for model in self._listed()}
        if there in listed and listed[there] != folder:
            self._server.ask("/v1/unload_lora_adapter", {"lora_name": there})
        if listed.get(there) != folder:
            try:
                self._server.ask("/v1/load_lora_adapter", {"lora_name": there, "lora_path": folder})
            except NotThere as error:
                what = "cannot read the adapter's files" if error.model else "does not load adapters while it runs"
                fix = (
                    f"name a folder in engine.adapters that both see; it was {folder}"
                    if error.model
                    else "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
                )
                raise Refused(f"the vLLM server {what}: {error.what}", where=self._settings.url, fix=fix) from error
            except TunesmithError as error:
                raise Refused(
                    f"the adapter was not loaded: {error.what}",
                    where=self._settings.url,
                    fix="start the server with --enable-lora and a --max-lora-rank that is enough; it takes plain LoRA "
                    "alone: serve anything else merged (tunesmith export --as merged)",
                ) from error
        if self._fixed_scores(there) == self._fixed_scores(self._model):
            raise Refused(
                "the vLLM server answers under the adapter's name exactly as the base does", where=self._settings.url
            )
        self._registered[there] = time.monotonic()

    def _restore(self, adapter: str | None, error: NotThere, began: float) -> None:
        """Check the server and load the adapter again: a restarted server has lost its adapters."""
        with self._lock:
            if self._registered.get(self._known.get(adapter or "", ""), 0.0) > began:
                return  # another thread has loaded it since
            self._check_server()
            if adapter is None or not error.model:
                raise Refused(f"the vLLM server has no such model: {error.what}", where=self._settings.url) from error
            self._register(self._known[adapter])


def _scoring(ids: Sequence[int], token: int) -> dict[str, Any]:
    """A request for the log-probability that token follows ids.

    It takes one request for each token; the server caches their common prefix. vLLM can also score a whole prompt at
    once (prompt_logprobs). But with LoRA and two concurrent requests, that returns the wrong rows or crashes the server
    (vLLM's issues 16668 and 29955; seen with 0.32.0).
    """
    return {
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": 1,
        "logprob_token_ids": [token],
        "return_tokens_as_token_ids": True,
        **_NEUTRAL,
    }
