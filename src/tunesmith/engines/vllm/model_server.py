"""One vLLM server: the check that it runs the base, and the adapters that it loads.

It runs the base if its tokens and log-probabilities of a fixed text agree with the base's. It runs an adapter if the
adapter's log-probabilities differ from the base's.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.vllm.fingerprint import TEXT, TOLERANCE, expected_scores, mean_difference, places, text_ids
from tunesmith.engines.vllm.http import NotThere, Server, ServerError, Unavailable
from tunesmith.models.base import Base
from tunesmith.models.rendering import Renderer

Item = TypeVar("Item")
Result = TypeVar("Result")
# The server takes options that a request leaves out from the model's generation_config.json, so leave none out.
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_COMPLETIONS = "/v1/completions"
_CHECKING = 16  # requests at once


class ModelServer:
    """A server that is checked before its first request, and again after each failure. Thread-safe.

    context_length: most tokens a prompt and its answer may have together, once the server is checked; 0 before.
    folders: an adapter's name on the server -> where the server finds its files.
    """

    def __init__(self, http: Server, base: Base, renderer: Renderer, ready: Callable[[], None] | None = None) -> None:
        """ready: waits until the server has started, and raises Unavailable if it does not."""
        self._http, self._base, self._renderer, self._ready = http, base, renderer, ready
        self.url, self.context_length = http.url, 0
        self._model = ""
        self.folders: dict[str, str] = {}
        self._registered: dict[str, float] = {}  # an adapter's name on the server -> when it was loaded last
        self._lock = threading.RLock()
        self._failed_at, self._checked_at = time.monotonic(), -math.inf
        self._refused_at, self._problem = -math.inf, TunesmithError("")  # the last check that failed

    @property
    def usable(self) -> bool:
        """Whether the last check was passed, and no request has failed since."""
        return self._checked_at > self._failed_at

    def fail(self) -> None:
        """Have the server checked before the next request."""
        self._failed_at = time.monotonic()

    def check(self) -> None:
        """Check the server if it failed since the last check: it may run another model now.

        Threads that wait for the same check share its result. Raises Refused if it runs another model than the base,
        Unavailable if it gives no answer.
        """
        asked = time.monotonic()
        with self._lock:
            if self.usable:
                return
            if self._refused_at > asked:
                raise self._problem
            try:
                if self._ready is not None:
                    self._ready()
                self._check_server()
            except TunesmithError as error:
                self._problem, self._refused_at = error, time.monotonic()
                raise

    def ask(self, body: Mapping[str, Any], adapter: str | None) -> dict[str, Any]:
        """The choice that answers a completion request. adapter: its name on the server; None for the base."""
        self.check()
        began = time.monotonic()
        try:
            given = self._http.ask(_COMPLETIONS, self._named(body, adapter), self._returned)
        except NotThere as error:
            self._restore(adapter, error, began)
            given = self._http.ask(_COMPLETIONS, self._named(body, adapter))
        choice: dict[str, Any] = given["choices"][0]
        self._check_end(choice.get("finish_reason"))
        return choice

    def events(self, body: Mapping[str, Any], adapter: str | None) -> Iterator[dict[str, Any]]:
        """The choices of a streamed answer, one for each event. One of them has a finish_reason."""
        self.check()
        began, finish = time.monotonic(), None
        try:
            for choice in self._choices(self._named(body, adapter), self._returned):
                finish = choice.get("finish_reason") or finish
                yield choice
        except NotThere as error:  # raised before the first event
            self._restore(adapter, error, began)
            for choice in self._choices(self._named(body, adapter), None):
                finish = choice.get("finish_reason") or finish
                yield choice
        self._check_end(finish)

    def load(self, adapter: str) -> None:
        """Make the server load one of folders, if it has not yet, and check that it answers otherwise than the base."""
        self.check()
        with self._lock:
            self._register(adapter)

    def _choices(self, body: Mapping[str, Any], returned: Callable[[float], None] | None) -> Iterator[dict[str, Any]]:
        for event in self._http.stream(_COMPLETIONS, body, returned):
            yield from event.get("choices", ())

    def _named(self, body: Mapping[str, Any], adapter: str | None) -> dict[str, Any]:
        return {**body, "model": adapter or self._model}

    def _returned(self, failed_at: float) -> None:
        self._failed_at = max(self._failed_at, failed_at)
        if self._ready is not None:  # it may start for minutes, and another server may answer meanwhile
            raise Unavailable("the vLLM server cannot be reached", where=self.url)
        self.check()

    def _check_end(self, finish: object) -> None:
        """Raise Unavailable for an answer that did not end by itself: a server that is stopped aborts its requests."""
        if finish not in ("stop", "length"):
            raise Unavailable(
                f"the vLLM server ended an answer as {finish!r}", where=self.url, fix="look at the server's own log"
            )

    def _check_server(self) -> None:
        """Check that the server runs the base. Raises Refused if it runs another model."""
        began = time.monotonic()
        models = self._listed()
        bases = [model for model in models if not model.get("parent")]
        if not bases:
            raise Refused("the vLLM server lists no base model", where=self.url)
        self._model = str(bases[0]["id"])
        length = int(bases[0].get("max_model_len") or 0)
        if not 0 < length <= self._base.context_length:
            raise self._other_model(f"its context length is {length}, the base's {self._base.context_length}")
        self.context_length = length
        ids = text_ids(self._renderer)
        try:
            theirs = self._http.ask("/tokenize", {"model": self._model, "prompt": TEXT, "add_special_tokens": False})[
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

    def _other_model(self, how: str) -> Refused:
        return Refused(
            f"the vLLM server runs another model than the base: {how}",
            where=self.url,
            fix=f"start it with the base's own files, not quantised: vllm serve {self._base.folder}",
        )

    def _listed(self) -> list[dict[str, Any]]:
        try:
            return list(self._http.ask("/v1/models")["data"])
        except (NotThere, KeyError, TypeError) as error:
            raise self._no_vllm() from error

    def _no_vllm(self) -> Refused:
        return Refused("the server does not speak vLLM's API", where=self.url, fix="name a vLLM server")

    def _register(self, there: str) -> None:
        folder = self.folders[there]
        listed = {str(model["id"]): model.get("root") for model in self._listed()}
        if there in listed and listed[there] != folder:
            self._http.ask("/v1/unload_lora_adapter", {"lora_name": there})
        if listed.get(there) != folder:
            try:
                self._http.ask("/v1/load_lora_adapter", {"lora_name": there, "lora_path": folder})
            except NotThere as error:
                what = "cannot read the adapter's files" if error.model else "does not load adapters while it runs"
                fix = (
                    f"name a folder in engine.adapters that both see; it was {folder}"
                    if error.model
                    else "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
                )
                raise Refused(f"the vLLM server {what}: {error.what}", where=self.url, fix=fix) from error
            except (UsageError, ServerError) as error:
                raise Refused(
                    f"the adapter was not loaded: {error.what}",
                    where=self.url,
                    fix="start the server with --enable-lora and a --max-lora-rank that is enough; it takes plain LoRA "
                    "alone: export anything else as merged",
                ) from error
        if self._fixed_scores(there) == self._fixed_scores(self._model):
            raise Refused("the vLLM server answers under the adapter's name exactly as the base does", where=self.url)
        self._registered[there] = time.monotonic()

    def _restore(self, adapter: str | None, error: NotThere, began: float) -> None:
        """Check the server and load the adapter again: a restarted server has lost its adapters."""
        with self._lock:
            if self._registered.get(adapter or "", -math.inf) > began:
                return  # another thread has loaded it since
            self._check_server()
            if adapter is None or not error.model:
                raise Refused(f"the vLLM server has no such model: {error.what}", where=self.url) from error
            self._register(adapter)

    def _fixed_scores(self, model: str) -> list[float]:
        """Log-probabilities of the fixed text at places(), by a model of the server."""
        ids = text_ids(self._renderer)

        def score(place: int) -> float:
            given = self._http.ask(_COMPLETIONS, {**scoring(ids[:place], ids[place]), "model": model})
            return log_probability(given["choices"][0], ids[place])

        return concurrently(score, places(ids), _CHECKING)


def scoring(ids: Sequence[int], token: int) -> dict[str, Any]:
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
        **NEUTRAL,
    }


def log_probability(choice: Mapping[str, Any], token: int) -> float:
    """A token's log-probability in the answer to scoring()."""
    found = float(choice["logprobs"]["top_logprobs"][0][f"token_id:{token}"])
    if not math.isfinite(found):
        raise TunesmithError(
            "the vLLM server returned a log-probability that is not finite", fix="look at the server's own log"
        )
    return found


def concurrently(
    do: Callable[[Item], Result], items: Sequence[Item], at_once: int, title: str = "", progress: Progress = SILENT
) -> list[Result]:
    """The results of do for each item, computed concurrently. The first failure cancels the rest."""
    with (
        progress.task(title, len(items)) as task,
        ThreadPoolExecutor(at_once, thread_name_prefix="tunesmith-vllm") as pool,
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
