"""One vLLM server: the check that it runs the base, and the adapters that it loads. And several that answer as one: the
least busy one gets a request, and another one if it fails.

It runs the base if its tokens and log-probabilities of a fixed text agree with the base's. It runs an adapter if the
adapter's log-probabilities differ from the base's.
"""

from __future__ import annotations

import json
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.system.files import cache_folder, write_atomic
from tunesmith.engines.hf.libraries import transformers
from tunesmith.engines.vllm.http import NotThere, Returned, Server, ServerError, Unavailable
from tunesmith.models.base import Base, loading
from tunesmith.models.rendering import Renderer

Item = TypeVar("Item")
Result = TypeVar("Result")
# The server takes options that a request leaves out from the model's generation_config.json, so leave none out.
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_COMPLETIONS = "/v1/completions"
_CHECKING = 16  # requests at once
# Words, numbers, code and other scripts, in which tokenizers and models differ.
TEXT = (
    'The quick brown fox jumps over 13 lazy dogs, then writes {"on": true, "n": 2048} into a file.\n'
    "def area(r):\n    return 3.14159 * r ** 2\n\nÄpfel fallen nicht weit vom Stamm; 水は低きに流れる。 "
    "Water boils at one hundred degrees Celsius, and the capital of France is Paris."
)
# Largest accepted mean difference in nats. Two bf16 computations of one model differ less; two models differ several
# times as much.
TOLERANCE = 0.15


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

    def choices(self, body: Mapping[str, Any], adapter: str | None) -> Iterator[dict[str, Any]]:
        """The choices that answer a completion request: one, or with `stream` one for each event, of which the last has
        a finish_reason. adapter: its name on the server; None for the base."""
        self.check()
        began = time.monotonic()
        try:
            yield from self._choices(body, adapter, self._returned)
        except NotThere as error:  # raised before the first event
            self._restore(adapter, error, began)
            yield from self._choices(body, adapter, None)

    def load(self, adapter: str) -> None:
        """Make the server load one of folders, if it has not yet, and check that it answers otherwise than the base."""
        self.check()
        with self._lock:
            self._register(adapter)

    def _choices(self, body: Mapping[str, Any], adapter: str | None, returned: Returned) -> Iterator[dict[str, Any]]:
        named, finish = {**body, "model": adapter or self._model}, None
        if body.get("stream"):
            events = self._http.stream(_COMPLETIONS, named, returned)
        else:
            answer = self._http.ask(_COMPLETIONS, named, returned)
            if not isinstance(answer, dict):
                what = "the vLLM server, or what stands before it, gave an answer that is not a JSON object"
                raise Unavailable(what, where=self.url, fix="look at the server's own log")
            events = iter([answer])
        for event in events:
            for choice in event.get("choices", ()):
                if (finish := choice.get("finish_reason") or finish) is not None:
                    self._check_end(finish)
                yield choice
        self._check_end(finish)

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
        bases = [model for model in self._listed() if not model.get("parent")]
        if not bases:
            raise Refused("the vLLM server lists no base model", where=self.url)
        self._model = str(bases[0]["id"])
        length = int(bases[0].get("max_model_len") or 0)
        if not 0 < length <= self._base.context_length:
            raise self._other_model(f"its context length is {length}, the base's {self._base.context_length}")
        self.context_length = length
        ids = text_ids(self._renderer)
        asked = {"model": self._model, "prompt": TEXT, "add_special_tokens": False}
        if self._part("tokens", "/tokenize", asked) != ids:
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
        return list(self._part("data", "/v1/models"))

    def _part(self, key: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """A part of what every vLLM server answers."""
        try:
            return self._http.ask(path, body)[key]
        except (NotThere, KeyError, TypeError) as error:
            raise Refused("the server does not speak vLLM's API", where=self.url, fix="name a vLLM server") from error

    def _register(self, there: str) -> None:
        folder = self.folders[there]
        listed = {str(model["id"]): model.get("root") for model in self._listed()}
        if there in listed and listed[there] != folder:
            self._http.ask("/v1/unload_lora_adapter", {"lora_name": there})
        if listed.get(there) != folder:
            try:
                self._http.ask("/v1/load_lora_adapter", {"lora_name": there, "lora_path": folder})
            except NotThere as error:
                what = "does not load adapters while it runs"
                fix = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
                if error.model:
                    what = "cannot read the adapter's files"
                    fix = f"name a folder in engine.adapters that both see; it was {folder}"
                raise Refused(f"the vLLM server {what}: {error.said}", where=self.url, fix=fix) from error
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
                raise error
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
    listed = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
    score = float(listed[0].get(f"token_id:{token}", math.nan))
    if not math.isfinite(score):
        raise TunesmithError(
            "the vLLM server returned no finite log-probability of a token",
            fix="look at the server's own log; vLLM 0.32 was tested",
        )
    return score


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


def text_ids(renderer: Renderer) -> list[int]:
    """The fixed text in the base's tokens."""
    return list(renderer.tokenizer.encode(TEXT, add_special_tokens=False))


def places(ids: Sequence[int]) -> range:
    """The indices of ids that are compared: about two dozen, evenly spread."""
    return range(1, len(ids), max(1, len(ids) // 24))


@torch.inference_mode()
def expected_scores(base: Base, ids: Sequence[int]) -> list[float]:
    """The base's log-probabilities of the ids at places(). Computed once for a base and kept in the cache."""
    kept = cache_folder() / "fingerprints" / f"{base.digest.removeprefix('sha256:')}.json"
    if kept.is_file():
        known = json.loads(kept.read_bytes())
        if known["ids"] == list(ids):
            return [float(score) for score in known["scores"]]
    scores = _logits(base, ids).float().log_softmax(-1)
    each = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()  # of every id but the first
    chosen = [float(each[place - 1]) for place in places(ids)]
    write_atomic(kept, json.dumps({"ids": list(ids), "scores": chosen}).encode())
    return chosen


@loading()
def _logits(base: Base, ids: Sequence[int]) -> Tensor:
    """Logits at every id but the last, by transformers' module in fp32. On the CPU: a GPU's memory is vLLM's."""
    load = transformers().AutoModelForCausalLM.from_pretrained
    module = load(base.folder, dtype=torch.float32, local_files_only=True, use_safetensors=True).eval()
    logits: Tensor = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean difference of two models' log-probabilities of the same tokens, in nats."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0  # seconds between two checks of a server that failed


class Pool:
    """Shares requests over servers. Thread-safe.

    A request goes to each server at most once, and `restarts` times more, for servers that are started again. A server
    that failed is checked in the background until it may be used again.
    """

    def __init__(self, servers: Sequence[ModelServer], progress: Progress, restarts: int = 0) -> None:
        """Checks all servers. Raises Refused where one runs another model, Unavailable where none can be reached."""
        self._servers, self._progress = servers, progress
        self._tries = len(servers) + restarts
        self._busy = dict.fromkeys(servers, 0)  # requests under way
        self._lock = threading.Lock()
        self._checking = False  # whether a thread checks failed servers
        self._told: dict[ModelServer, str | None] = {}  # each server's problem, as it was last reported
        self._each(servers, ModelServer.check)

    @property
    def context_length(self) -> int:
        """Most tokens a prompt and its answer may have together: the shortest of the servers that were checked."""
        return min(server.context_length for server in self._servers if server.context_length)

    def choices(self, body: Mapping[str, Any], adapter: str | None) -> Iterator[dict[str, Any]]:
        """The choices that answer a completion request, as ModelServer gives them. Only what failed before its first
        choice is sent to another server."""
        failed: list[ModelServer] = []
        begun = False
        while True:
            with self._chosen(failed) as server:
                try:
                    for choice in server.choices(body, adapter):
                        begun = True
                        yield choice
                    return
                except (Unavailable, Refused) as error:
                    self._failed(server, error)
                    failed.append(server)
                    if begun or len(failed) == self._tries:
                        raise

    def load(self, adapter: str, folder: str) -> None:
        """Load an adapter on all servers that can be used; the others load it when a request needs it there."""
        for server in self._servers:
            server.folders[adapter] = folder
        usable = [server for server in self._servers if server.usable]
        self._each(usable or self._servers, lambda server: server.load(adapter))

    def _each(self, servers: Sequence[ModelServer], do: Callable[[ModelServer], None]) -> None:
        """Do something on servers, and use those no longer that give no answer. Raises Unavailable where none does."""
        problems: list[Unavailable] = []
        for server in servers:
            try:
                do(server)
            except Unavailable as error:
                self._failed(server, error)
                problems.append(error)
        if len(problems) == len(servers):
            raise problems[-1]

    @contextmanager
    def _chosen(self, failed: Sequence[ModelServer]) -> Iterator[ModelServer]:
        """The server for a request: one that can be used, that did not fail it before, with the fewest requests."""
        with self._lock:
            server = min(self._servers, key=lambda one: (not one.usable, one in failed, self._busy[one]))
            self._busy[server] += 1
        try:
            yield server
        finally:
            with self._lock:
                self._busy[server] -= 1

    def _failed(self, server: ModelServer, error: TunesmithError) -> None:
        """Use a server no longer, until a thread has checked it."""
        server.fail()
        if len(self._servers) == 1:
            return  # the next request checks it
        self._tell(server, f"{error.what}; the other servers answer")
        with self._lock:
            start, self._checking = not self._checking, True
        if start:
            threading.Thread(target=_check_again, args=(weakref.ref(self),), daemon=True).start()

    def check_failed(self) -> bool:
        """Check the servers that failed. Returns whether all can be used."""
        for server in self._servers:
            try:
                server.check()
            except TunesmithError as error:
                self._tell(server, f"{error.what}; it is not used")
            else:
                self._tell(server, None)
        with self._lock:
            self._checking = not all(server.usable for server in self._servers)
            return not self._checking

    def _tell(self, server: ModelServer, problem: str | None) -> None:
        """Report a server's problem, or that it has none any more; once."""
        with self._lock:
            before = self._told.get(server)
            self._told[server] = problem
        if problem != before:
            self._progress.say(f"vLLM at {server.url}: {problem or 'it answers again'}")


def _check_again(weak: weakref.ref[Pool]) -> None:
    """Check the servers of a pool that failed, until all can be used, the pool is gone or the process ends."""
    wait, usable = _FIRST_WAIT, False
    while not usable:
        time.sleep(wait)
        if (pool := weak()) is None:
            return
        try:
            usable = pool.check_failed()
        except RuntimeError:
            if not threading.main_thread().is_alive():
                return  # no thread can be started any more
            raise
        del pool
        wait = min(2 * wait, _LONGEST_WAIT)
