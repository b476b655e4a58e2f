"""The embedded engine: a base model and its adapters in this process, on CPU."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress, Task
from tunesmith.inference.constraint import Constraints
from tunesmith.inference.decoder import Prefix, Sampling, compute_prefix, decode, shared_length
from tunesmith.inference.engine import Completion, Generation, Question
from tunesmith.models import runtime
from tunesmith.models.adapter import adapted_linear, read_adapter
from tunesmith.models.attention import shared_prefix_attention
from tunesmith.models.base import BaseModel
from tunesmith.models.batch import label_count, lay_out
from tunesmith.models.network import Linear, forward, frozen_linear, logits
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weights import load_network

_MOST_ROWS = 64
_CACHE_BYTES = 1 << 30
_PREFIXES_KEPT = 8
_WORTH_KEEPING = 16  # tokens; a shorter common beginning is cheaper to compute than to look up
_UNFINISHED = "�"  # what bytes of a character decode to before its last one has come


class EmbeddedEngine:
    """Implements inference.engine.Engine."""

    def __init__(self, base: BaseModel) -> None:
        runtime.prepare()
        self._base = base
        self._renderer = Renderer(base.folder)
        self._network = load_network(base.folder)
        self._adapters: dict[str, Linear] = {}
        self._prefixes: OrderedDict[tuple[str | None, tuple[int, ...]], Prefix] = OrderedDict()
        self._last: dict[str | None, list[int]] = {}
        self._turn = threading.RLock()

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self._renderer.tokenizer, self._network.shape.vocabulary)

    @property
    def base(self) -> str:
        """Digest of the base record."""
        return self._base.digest

    @property
    def context_length(self) -> int:
        """Most tokens a prompt and its answer may have together."""
        return self._base.context_length

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The template's control tokens as text."""
        return self._renderer.special_tokens

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make a PEFT folder answerable under name; reading it again replaces it."""
        linear = adapted_linear(self._network, read_adapter(folder, self._network, self._base))
        with self._turn:
            self._adapters[name] = linear
            for key in [key for key in self._prefixes if key[0] == name]:
                del self._prefixes[key]

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt that messages render to, the assistant's opening included."""
        return len(self._renderer.prompt(messages))

    def count_row(self, messages: Sequence[Message]) -> int:
        """Tokens of a training row. Raises Refused for one that cannot be trained on."""
        return len(self._renderer.conversation(messages).ids)

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests; rows of like length are decoded together."""
        prompts = [self._prompt(request) for request in requests]
        answers: list[Completion | None] = [None] * len(requests)
        with progress.task("answering", len(requests)) as task:
            for chosen in self._batches(requests, prompts):
                batch = [requests[place] for place in chosen]
                together = self._decode(batch, [prompts[place] for place in chosen], adapter, task)
                for place, completion in zip(chosen, together, strict=True):
                    answers[place] = completion
        return [answer for answer in answers if answer is not None]

    def stream(self, request: Generation, adapter: str | None = None) -> Iterator[str | Completion]:
        """Pieces of the answer's text as they are decoded; the last item is the whole Completion."""
        prompt = self._prompt(request)
        row = _Row(self._renderer, request, len(prompt), self._limit(request, prompt))
        told = 0
        with self._turn:
            for tokens in self._steps([request], [prompt], adapter, [row]):
                del tokens
                ready = row.settled()
                if len(ready) > told:
                    yield ready[told:]
                    told = len(ready)
        completion = row.completion()
        if len(completion.text) > told:
            yield completion.text[told:]
        yield completion

    @torch.inference_mode()
    def choose(
        self, questions: Sequence[Question], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[list[float]]:
        """For each question the log-probability of each choice, summed over its tokens (end token included)."""
        rows: list[Rendered] = []
        for question in questions:
            prompt = self._renderer.prompt(question.messages)
            for choice in question.choices:
                answer = self._renderer.answer(choice)
                rows.append(Rendered((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer)))
        order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
        sums = [0.0] * len(rows)
        with self._turn, progress.task("scoring choices", len(rows)) as task:
            for start in range(0, len(order), _MOST_ROWS):
                chosen = order[start : start + _MOST_ROWS]
                for place, total in zip(chosen, self._likelihoods([rows[p] for p in chosen], adapter), strict=True):
                    sums[place] = total
                task.advance(len(chosen))
        scored = iter(sums)
        return [[next(scored) for _ in question.choices] for question in questions]

    def _likelihoods(self, rows: Sequence[Rendered], adapter: str | None) -> list[float]:
        batch, network = lay_out(rows), self._network
        hidden = forward(network, batch.ids, self._linear(adapter), shared_prefix_attention(batch, network))
        scores = logits(network, hidden[batch.predicts]).float()
        each = scores.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
        return [float(part.sum()) for part in each.split([label_count(row) for row in rows])]

    def _decode(
        self, requests: Sequence[Generation], prompts: Sequence[list[int]], adapter: str | None, task: Task
    ) -> list[Completion]:
        rows = [
            _Row(self._renderer, request, len(prompt), self._limit(request, prompt))
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        done = 0
        with self._turn:
            for _ in self._steps(requests, prompts, adapter, rows):
                ended = sum(row.ended for row in rows)
                task.advance(ended - done)
                done = ended
        return [row.completion() for row in rows]

    def _steps(
        self, requests: Sequence[Generation], prompts: Sequence[list[int]], adapter: str | None, rows: list[_Row]
    ) -> Iterator[None]:
        """Decode a batch into rows, one yield a step."""
        samplings = [Sampling(request.temperature, request.top_p, request.seed) for request in requests]
        linear = self._linear(adapter)
        prefix = self._shared_prefix(prompts, adapter, linear)
        limits = [row.limit for row in rows]
        held = any(request.schema for request in requests)
        guides = [self._constraints.guide(request.schema) if request.schema else None for request in requests]
        steps = decode(
            self._network,
            linear,
            prompts,
            limits,
            samplings,
            self._renderer.stop_ids,
            prefix,
            guides,
            self._constraints if held else None,
        )
        told = next(steps)
        while True:
            ended = {row for row, token in told if rows[row].take(token)}
            yield
            try:
                told = steps.send(ended)
            except StopIteration:
                return

    def _shared_prefix(self, prompts: Sequence[list[int]], adapter: str | None, linear: Linear) -> Prefix | None:
        """The longest beginning worth sharing: among these prompts, or with the request before them."""
        compared = [*prompts, self._last[adapter]] if len(prompts) == 1 and adapter in self._last else prompts
        self._last[adapter] = prompts[-1]
        length = shared_length(compared) if len(compared) > 1 else 0
        kept = [
            key
            for key in self._prefixes
            if key[0] == adapter and all(key[1] == tuple(p[: len(key[1])]) for p in prompts)
        ]
        usable = [key for key in kept if all(len(prompt) > len(key[1]) for prompt in prompts)]
        best = max(usable, key=lambda key: len(key[1]), default=None)
        if best is not None and len(best[1]) >= length:
            self._prefixes.move_to_end(best)
            return self._prefixes[best]
        if length < _WORTH_KEEPING:
            return None
        prefix = compute_prefix(self._network, linear, prompts[0][:length])
        self._prefixes[adapter, prefix.ids] = prefix
        while len(self._prefixes) > _PREFIXES_KEPT:
            self._prefixes.popitem(last=False)
        return prefix

    def _batches(self, requests: Sequence[Generation], prompts: Sequence[list[int]]) -> Iterator[list[int]]:
        """Places of requests to decode together: longest first, as many as the cache has room for."""
        shape = self._network.shape
        place_bytes = 2 * shape.layers * shape.kv_heads * shape.head * self._network.embedding.element_size()
        order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
        start = 0
        while start < len(order):
            length = len(prompts[order[start]])
            row = (length + requests[order[start]].max_tokens) * place_bytes
            scores = shape.heads * length * length * 4  # of the prefill's attention, in fp32
            many = max(1, min(_MOST_ROWS, _CACHE_BYTES // row, _CACHE_BYTES // scores))
            yield order[start : start + many]
            start += many

    def _prompt(self, request: Generation) -> list[int]:
        prompt = self._renderer.prompt(request.messages)
        if len(prompt) >= self.context_length:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and leaves no room for an answer: the model's context length is "
                f"{self.context_length}",
                where="messages",
                fix="shorten the request, or give fewer shots or retrieved examples",
            )
        return prompt

    def _limit(self, request: Generation, prompt: Sequence[int]) -> int:
        return max(1, min(request.max_tokens, self.context_length - len(prompt)))

    def _linear(self, adapter: str | None) -> Linear:
        if adapter is None:
            return frozen_linear(self._network)
        if adapter not in self._adapters:
            raise Refused(f"adapter {adapter} is not loaded", fix="load it before asking it")
        return self._adapters[adapter]


class _Row:
    """One answer under way."""

    def __init__(self, renderer: Renderer, request: Generation, prompt_tokens: int, limit: int) -> None:
        self._renderer, self._stops = renderer, request.stop
        self._prompt_tokens, self.limit = prompt_tokens, limit
        self._ids: list[int] = []
        self._stopped = False
        self._cut: str | None = None  # the text before a stop text

    @property
    def ended(self) -> bool:
        """Whether no more tokens will come."""
        return self._stopped or len(self._ids) >= self.limit

    def take(self, token: int | None) -> bool:
        """Take the next token, None for an end token; whether a stop text ends the row here."""
        if token is None:
            self._stopped = True
            return True
        self._ids.append(token)
        if self._stops:
            text = self._renderer.text(self._ids)
            found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
            if found:
                self._cut, self._stopped = text[: min(found)], True
        return self._stopped

    def settled(self) -> str:
        """The text that later tokens can no longer change."""
        text = self._cut if self._cut is not None else self._renderer.text(self._ids)
        if self._stopped:
            return text
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        held = max(
            (length for stop in self._stops for length in range(1, longest + 1) if text.endswith(stop[:length])),
            default=0,
        )
        return text[: len(text) - held].rstrip(_UNFINISHED)

    def completion(self) -> Completion:
        """The whole answer."""
        text = self._cut if self._cut is not None else self._renderer.text(self._ids)
        return Completion(text, "stop" if self._stopped else "length", self._prompt_tokens, len(self._ids))
