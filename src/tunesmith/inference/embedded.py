"""The embedded engine: a base model and its adapters in this process, on CPU."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.progress import SILENT, Progress
from tunesmith.inference.constraint import Constraints
from tunesmith.inference.decoder import Batch, Prefix, Row, Sampling, Score
from tunesmith.inference.engine import Completion, Generation, Question, Scored, Streamed, TokenScore
from tunesmith.inference.scheduler import Scheduler
from tunesmith.models import runtime
from tunesmith.models.adapter import Fused, adapted_linear, fuse, read_adapter
from tunesmith.models.attention import shared_prefix_attention
from tunesmith.models.base import BaseModel
from tunesmith.models.batch import common_prefix, label_count, lay_out
from tunesmith.models.network import forward, frozen_linear, logits
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weights import load_network
from tunesmith.models.whole import is_whole, read_whole

_SCORED_TOGETHER = 64  # rows of multiple-choice questions
_PREFIXES_KEPT = 8
_WHOLE_KEPT = 3  # models trained in full, beside the base: a champion, its canary, one more
_WORTH_KEEPING = 16  # tokens; a shorter common beginning is cheaper to compute than to look up


class EmbeddedEngine:
    """Implements inference.engine.Engine."""

    def __init__(self, base: BaseModel, weights: Mapping[str, Tensor] | None = None) -> None:
        """weights: of a model that was trained in full, in place of the base's."""
        runtime.prepare()
        self._base = base
        self._renderer = Renderer(base.folder)
        self._network = load_network(base.folder) if weights is None else load_network(base.folder, weights=weights)
        self._adapters: dict[str, Fused] = {}
        self._whole: OrderedDict[str, EmbeddedEngine] = OrderedDict()  # by name; the one last asked at the end
        self._prefixes: OrderedDict[tuple[Fused | None, tuple[int, ...]], Prefix] = OrderedDict()
        self._last: dict[Fused | None, list[int]] = {}
        self._scheduler = Scheduler(Batch(self._network, self._renderer.stop_ids))
        self._turn = threading.Lock()  # for what is looked up above; arithmetic is the scheduler's

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
        """Make a training's folder answerable under name; reading it again replaces it for what is asked from then on.

        Of models trained in full, those that were asked longest ago make room.
        """
        if is_whole(folder):
            own = EmbeddedEngine(self._base, read_whole(folder, self._base, self._network.tied))
            with self._turn:
                self._whole.pop(name, None)
                self._whole[name] = own
                while len(self._whole) > _WHOLE_KEPT:
                    self._whole.popitem(last=False)
            return
        fused = fuse(self._network, read_adapter(folder, self._network, self._base))
        with self._turn:
            before = self._adapters.get(name)
            self._adapters[name] = fused
            self._last.pop(before, None)
            for key in [key for key in self._prefixes if before is not None and key[0] is before]:
                del self._prefixes[key]

    def holds(self, name: str) -> bool:
        """Whether name can be asked for."""
        with self._turn:
            return name in self._adapters or name in self._whole

    def _own(self, name: str | None) -> EmbeddedEngine | None:
        """The engine of a model that was trained in full; None for an adapter and for the base."""
        with self._turn:
            if name is None or name not in self._whole:
                return None
            self._whole.move_to_end(name)
            return self._whole[name]

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt that messages render to, the assistant's opening included."""
        return len(self._renderer.prompt(messages))

    def count_row(self, messages: Sequence[Message]) -> int:
        """Tokens of a training row. Raises Refused for one that cannot be trained on."""
        return len(self._renderer.conversation(messages).ids)

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests, decoded together with whatever other threads ask."""
        if (own := self._own(adapter)) is not None:
            return own.generate(requests, progress=progress)
        told: SimpleQueue[Streamed | None] = SimpleQueue()
        answers = [_Answer(self._renderer, request, self._scores, told, streams=False) for request in requests]
        rows = self._rows(requests, answers, adapter)
        with progress.task("answering", len(requests)) as task, self._under_way(rows):
            for _ in requests:
                told.get()
                for answer in answers:
                    answer.raise_error()
                task.advance()
        return [answer.completion() for answer in answers]

    def stream(self, request: Generation, adapter: str | None = None) -> Iterator[Streamed]:
        """Pieces of the answer's text as they are decoded; the last item is the whole Completion."""
        if (own := self._own(adapter)) is not None:
            yield from own.stream(request)
            return
        told: SimpleQueue[Streamed | None] = SimpleQueue()
        answer = _Answer(self._renderer, request, self._scores, told, streams=True)
        with self._under_way(self._rows([request], [answer], adapter)):
            while (piece := told.get()) is not None:
                yield piece
            answer.raise_error()
        yield answer.completion()

    def choose(
        self, questions: Sequence[Question], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[list[float]]:
        """For each question the log-probability of each choice, summed over its tokens (end token included)."""
        if (own := self._own(adapter)) is not None:
            return own.choose(questions, progress=progress)
        rows: list[Rendered] = []
        for question in questions:
            prompt = self._renderer.prompt(question.messages)
            for choice in question.choices:
                answer = self._renderer.answer(choice)
                rows.append(Rendered((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer)))
        order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
        sums = [0.0] * len(rows)
        with progress.task("scoring choices", len(rows)) as task:
            for start in range(0, len(order), _SCORED_TOGETHER):
                chosen = order[start : start + _SCORED_TOGETHER]
                scored = self._scheduler.run(
                    lambda batch=[rows[place] for place in chosen]: self._likelihoods(batch, adapter)  # type: ignore[misc]
                )
                for place, total in zip(chosen, scored, strict=True):
                    sums[place] = total
                task.advance(len(chosen))
        every = iter(sums)
        return [[next(every) for _ in question.choices] for question in questions]

    @torch.inference_mode()
    def _likelihoods(self, rows: Sequence[Rendered], adapter: str | None) -> list[float]:
        batch, network, fused = lay_out(rows), self._network, self._fused(adapter)
        linear = frozen_linear(network) if fused is None else adapted_linear(network, fused)
        hidden = forward(network, batch.ids, linear, shared_prefix_attention(batch, network))
        scores = logits(network, hidden[batch.predicts]).float()
        each = scores.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
        return [float(part.sum()) for part in each.split([label_count(row) for row in rows])]

    @contextlib.contextmanager
    def _under_way(self, rows: Sequence[Row]) -> Iterator[None]:
        """Have rows decoded while this lasts, the longest prompts first: those that are read together are alike."""
        self._scheduler.submit(sorted(rows, key=lambda row: -len(row.ids)))
        try:
            yield
        finally:
            self._scheduler.leave(rows)

    def _rows(self, requests: Sequence[Generation], answers: Sequence[_Answer], adapter: str | None) -> list[Row]:
        prompts = [self._prompt(request) for request in requests]
        with self._turn:
            fused = self._fused(adapter)
            prefix = self._shared_prefix(prompts, fused)
        shared = 0 if prefix is None else len(prefix.ids)
        rows = []
        for request, prompt, answer in zip(requests, prompts, answers, strict=True):
            answer.prompt_tokens = len(prompt)
            rows.append(
                Row(
                    ids=prompt[shared:],
                    prefix=prefix,
                    adapter=fused,
                    limit=max(1, min(request.max_tokens, self.context_length - len(prompt))),
                    sampling=Sampling(request.temperature, request.top_p, request.seed),
                    listener=answer,
                    guide=None if request.schema is None else self._constraints.guide(request.schema),
                    top=request.top_logprobs,
                )
            )
        return rows

    def _shared_prefix(self, prompts: Sequence[list[int]], adapter: Fused | None) -> Prefix | None:
        """The beginning to share: of several prompts their longest common one, whatever was asked before, so that they
        are answered in the same way whenever they are asked; of a single one the longest that is there, or what it has
        in common with the one before it."""
        if not prompts:
            return None
        compared = [*prompts, self._last[adapter]] if len(prompts) == 1 and adapter in self._last else prompts
        self._last[adapter] = prompts[-1]
        # Each prompt keeps at least one token of its own.
        length = min(common_prefix(compared), min(map(len, prompts)) - 1) if len(compared) > 1 else 0
        if len(prompts) == 1:
            (prompt,) = prompts
            there = [
                key[1]
                for key in self._prefixes
                if key[0] is adapter and len(key[1]) < len(prompt) and key[1] == tuple(prompt[: len(key[1])])
            ]
            longest = max(map(len, there), default=0)
            length = longest if length < longest + _WORTH_KEEPING else length
        if length < _WORTH_KEEPING:
            return None
        key = (adapter, tuple(prompts[0][:length]))
        if key not in self._prefixes:
            self._prefixes[key] = Prefix(key[1], adapter)
        self._prefixes.move_to_end(key)
        while len(self._prefixes) > _PREFIXES_KEPT:
            self._prefixes.popitem(last=False)
        return self._prefixes[key]

    def _scores(self, token: int, score: Score) -> TokenScore:
        """A token's score, spelt out."""

        def one(token: int, logprob: float, top: tuple[TokenScore, ...] = ()) -> TokenScore:
            data = self._constraints.token_bytes(token)
            return TokenScore(data.decode(errors="replace"), data, logprob, top)

        return one(token, score.logprob, tuple(one(*each) for each in score.top))

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

    def _fused(self, adapter: str | None) -> Fused | None:
        if adapter is None:
            return None
        if adapter not in self._adapters:
            raise Refused(f"adapter {adapter} is not loaded", fix="load it before asking it")
        return self._adapters[adapter]


class _Answer:
    """One answer under way: its text, and what ends it. Told by the thread that decodes (decoder.Listener); read by the
    one that asked, once told says so: a piece of a stream, or None at the end."""

    def __init__(
        self,
        renderer: Renderer,
        request: Generation,
        spell: Callable[[int, Score], TokenScore],
        told: SimpleQueue[Streamed | None],
        *,
        streams: bool,
    ) -> None:
        self._renderer, self._stops, self._spell, self._told = renderer, request.stop, spell, told
        self._streams, self._scored = streams, request.top_logprobs is not None
        self.prompt_tokens = 0
        self._read = renderer.reader()
        self._ids: list[int] = []
        self._text = ""
        self._scores: list[TokenScore] = []
        self._starts: list[int] = []  # where in the text each score's token begins
        self._cut: int | None = None  # where a stop text begins
        self._sent, self._sent_scores = 0, 0
        self._stopped = False
        self._error: BaseException | None = None

    def take(self, token: int, score: Score | None) -> bool:
        """The next token; whether a stop text ends the answer with it."""
        start = len(self._text)
        self._ids.append(token)
        self._text += self._read(token)
        if score is not None:
            self._starts.append(start)
            self._scores.append(self._spell(token, score))
        found = [self._text.find(stop, max(0, start - len(stop) + 1)) for stop in self._stops]
        self._cut = min((place for place in found if place >= 0), default=None)
        if self._streams:
            self._send(self._settled())
        return self._cut is not None

    def end(self, *, stopped: bool, error: BaseException | None = None) -> None:
        """No more will come."""
        self._stopped, self._error = stopped or self._cut is not None, error
        if self._cut is None:  # half a character may stand at the end
            self._text = self._renderer.text(self._ids)
        if self._streams and error is None:
            self._send(len(self._text) if self._cut is None else self._cut)
        self._told.put(None)

    def raise_error(self) -> None:
        """Raise what kept the answer from being given."""
        if self._error is not None:
            raise self._error

    def completion(self) -> Completion:
        """The whole answer."""
        end = len(self._text) if self._cut is None else self._cut
        scores = [score for score, start in zip(self._scores, self._starts, strict=True) if start < max(end, 1)]
        finish = "stop" if self._stopped else "length"
        return Completion(self._text[:end], finish, self.prompt_tokens, len(self._ids), scores=tuple(scores))  # type: ignore[arg-type]

    def _settled(self) -> int:
        """How much of the text later tokens can no longer change."""
        if self._cut is not None:
            return self._cut
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        held = max(
            (length for stop in self._stops for length in range(1, longest + 1) if self._text.endswith(stop[:length])),
            default=0,
        )
        return len(self._text) - held

    def _send(self, end: int) -> None:
        begun = sum(start < end for start in self._starts[self._sent_scores :])
        scores = tuple(self._scores[self._sent_scores : self._sent_scores + begun])
        text = self._text[self._sent : end]
        self._sent, self._sent_scores = max(self._sent, end), self._sent_scores + begun
        if text or scores:
            self._told.put(Scored(text, scores) if self._scored else text)
