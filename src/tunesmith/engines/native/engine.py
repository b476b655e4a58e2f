"""The embedded engine: a base model and its adapters in this process."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.answers import Answer, choice_rows, prompt_within, spelt
from tunesmith.engines.batch import common_prefix, label_count, lay_out
from tunesmith.engines.constraint import Constraints
from tunesmith.engines.native import runtime
from tunesmith.engines.native.adapters.adapter import PackedAdapter, adapted_linear, pack, read_adapter
from tunesmith.engines.native.adapters.whole import read_whole
from tunesmith.engines.native.decoding.decoder import Batch
from tunesmith.engines.native.decoding.rows import Prefix, Row, Sampling, Score
from tunesmith.engines.native.decoding.scheduler import Scheduler
from tunesmith.engines.native.network.attention import shared_prefix_attention
from tunesmith.engines.native.network.network import forward, frozen_linear, logits
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.protocol import Completion, Generation, Question, Streamed, TokenScore
from tunesmith.models.base import Base
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weight_files import has_whole_model

_SCORED_TOGETHER = 64  # rows of multiple-choice questions, of
_SCORED_TOKENS = 1 << 15  # tokens at most where there are several; and
_SCORED_LABELS = 512  # labels whose scores for the whole vocabulary are there at once
_PREFIXES_KEPT = 8
_WHOLE_KEPT = 3  # models trained in full, beside the base: a champion, its canary, one more
_WORTH_KEEPING = 16  # tokens; a shorter common beginning is cheaper to compute than to look up


class NativeEngine:
    """Implements inference.engine.Engine."""

    def __init__(self, base: Base, weights: Mapping[str, Tensor] | None = None) -> None:
        """weights: of a model that was trained in full, in place of the base's."""
        runtime.prepare()
        self._base = base
        self._renderer = Renderer(base.folder)
        self._network = load_network(base.folder) if weights is None else load_network(base.folder, weights=weights)
        self._adapters: dict[str, PackedAdapter] = {}
        self._whole: OrderedDict[str, NativeEngine] = OrderedDict()  # by name; the one last asked at the end
        self._prefixes: OrderedDict[tuple[PackedAdapter | None, tuple[int, ...]], Prefix] = OrderedDict()
        self._last: dict[PackedAdapter | None, list[int]] = {}
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

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make a training's folder answerable under name; reading it again replaces it for what is asked from then on.

        Of models trained in full, those that were asked longest ago make room.
        """
        if has_whole_model(folder):
            own = NativeEngine(self._base, read_whole(folder, self._base, self._network.tied))
            with self._turn:
                self._whole.pop(name, None)
                self._whole[name] = own
                while len(self._whole) > _WHOLE_KEPT:
                    self._whole.popitem(last=False)
            return
        packed = pack(self._network, read_adapter(folder, self._network, self._base))
        runtime.release_threads()
        with self._turn:
            before = self._adapters.get(name)
            self._adapters[name] = packed
            self._last.pop(before, None)
            for key in [key for key in self._prefixes if before is not None and key[0] is before]:
                del self._prefixes[key]

    def holds(self, name: str) -> bool:
        """Whether name can be asked for."""
        with self._turn:
            return name in self._adapters or name in self._whole

    def _own(self, name: str | None) -> NativeEngine | None:
        """The engine of a model that was trained in full; None for an adapter and for the base."""
        with self._turn:
            if name is None or name not in self._whole:
                return None
            self._whole.move_to_end(name)
            return self._whole[name]

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests, decoded together with whatever other threads ask."""
        if (own := self._own(adapter)) is not None:
            return own.generate(requests, progress=progress)
        told: SimpleQueue[Streamed | None] = SimpleQueue()
        answers = [Answer(self._renderer, request, self._spell, told, streams=False) for request in requests]
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
        answer = Answer(self._renderer, request, self._spell, told, streams=True)
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
        rows = choice_rows(self._renderer, questions)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
        sums = [0.0] * len(rows)
        with progress.task("scoring choices", len(rows)) as task:
            for chosen in _together(order, [len(row.ids) for row in rows]):
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
        network, packed = self._network, self._packed(adapter)
        batch = lay_out(rows)
        linear = frozen_linear(network) if packed is None else adapted_linear(network, packed)
        hidden = forward(network, batch.ids, linear, shared_prefix_attention(batch, network))
        pieces = []
        for part, labels in zip(
            hidden[batch.predicts].split(_SCORED_LABELS), batch.labels.split(_SCORED_LABELS), strict=True
        ):
            scores = logits(network, part).float()
            pieces.append(scores.log_softmax(-1).gather(1, labels[:, None])[:, 0])
        each = torch.cat(pieces)
        return [float(part.sum()) for part in each.split([label_count(row) for row in rows])]

    @contextlib.contextmanager
    def _under_way(self, rows: Sequence[Row]) -> Iterator[None]:
        """Have rows decoded while this lasts, the longest prompts first: those that are read together are alike."""
        self._scheduler.submit(sorted(rows, key=lambda row: -len(row.ids)))
        try:
            yield
        finally:
            self._scheduler.leave(rows)

    def _rows(self, requests: Sequence[Generation], answers: Sequence[Answer], adapter: str | None) -> list[Row]:
        prompts = [prompt_within(self._renderer, request, self.context_length) for request in requests]
        with self._turn:
            packed = self._packed(adapter)
            prefix = self._shared_prefix(prompts, packed)
        shared = 0 if prefix is None else len(prefix.ids)
        rows = []
        for request, prompt, answer in zip(requests, prompts, answers, strict=True):
            answer.prompt_tokens = len(prompt)
            rows.append(
                Row(
                    ids=prompt[shared:],
                    prefix=prefix,
                    adapter=packed,
                    limit=max(1, min(request.max_tokens, self.context_length - len(prompt))),
                    sampling=Sampling(request.temperature, request.top_p, request.seed),
                    listener=answer,
                    guide=None if request.schema is None else self._constraints.guide(request.schema),
                    top=request.top_logprobs,
                )
            )
        return rows

    def _shared_prefix(self, prompts: Sequence[list[int]], adapter: PackedAdapter | None) -> Prefix | None:
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

    def _spell(self, token: int, score: Score) -> TokenScore:
        return spelt(self._constraints, token, score)

    def _packed(self, adapter: str | None) -> PackedAdapter | None:
        if adapter is None:
            return None
        if adapter not in self._adapters:
            raise Refused(f"adapter {adapter} is not loaded", fix="load it before asking it")
        return self._adapters[adapter]


def _together(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows in order, the shortest first, as many together as may be scored at once."""
    some: list[int] = []
    for place in order:
        if some and (len(some) == _SCORED_TOGETHER or lengths[place] * (len(some) + 1) > _SCORED_TOKENS):
            yield some
            some = []
        some.append(place)
    if some:
        yield some
