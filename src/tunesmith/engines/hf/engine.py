"""The engine for a base of another family (models.foreign): transformers' own `generate`, in this process.

Rows are decoded together, filled up on the left; which token a row is given is decided here, so that sampling, schemas,
stop texts and limits are those of the embedded engine. What several threads ask is answered in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import Refused
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.answers import Answer, choice_rows, prompt_ids, token_score
from tunesmith.engines.batch import label_count, lay_out
from tunesmith.engines.constraint import Constraints, mask_disallowed_
from tunesmith.engines.hf.model import HFModel, Low, left_padded
from tunesmith.engines.native import runtime
from tunesmith.engines.native.decoding.rows import Row
from tunesmith.engines.protocol import Completion, Generation, Question, Streamed, TokenScore
from tunesmith.engines.sampling import Sampling, Score, sample, score_of
from tunesmith.models.base import Base
from tunesmith.models.rendering import Renderer
from tunesmith.models.weight_files import has_whole_model

_MOST_ROWS = 16
_SCORED_TOGETHER = 8


class HFEngine:
    """Implements inference.engine.Engine."""

    def __init__(self, base: Base) -> None:
        runtime.prepare()
        self._base, self._renderer, self._network = base, Renderer(base.folder), HFModel(base)
        self._adapters: dict[str, dict[str, Low]] = {}
        self._turn = threading.Lock()  # one batch under one adapter at a time

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self._renderer.tokenizer, self._network.vocabulary)

    @property
    def base(self) -> str:
        """Digest of the base record."""
        return self._base.digest

    @property
    def context_length(self) -> int:
        """Most tokens a prompt and its answer may have together."""
        return self._base.context_length

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make a training's folder answerable under name."""
        if has_whole_model(folder):
            raise Refused("for a base of this family there are adapters alone", where=str(folder))
        self._adapters[name] = self._network.read_adapter(folder, self._base)

    def holds(self, name: str) -> bool:
        """Whether name can be asked for."""
        return name in self._adapters

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests."""
        parts = self._parts(adapter)
        told: SimpleQueue[Streamed | None] = SimpleQueue()
        answers = [Answer(self._renderer, request, self._spell, told, streams=False) for request in requests]
        rows = [self._row(request, answer) for request, answer in zip(requests, answers, strict=True)]
        with progress.task("answering", len(rows)) as task:
            for batch in self._batches(rows):
                self._decode(batch, parts)
                task.advance(len(batch))
        for answer in answers:
            answer.raise_error()
        return [answer.completion() for answer in answers]

    def stream(self, request: Generation, adapter: str | None = None) -> Iterator[Streamed]:
        """Pieces of the answer's text as they are decoded; the last item is the whole Completion."""
        parts = self._parts(adapter)
        told: SimpleQueue[Streamed | None] = SimpleQueue()
        answer = Answer(self._renderer, request, self._spell, told, streams=True)
        row, left = self._row(request, answer), threading.Event()
        work = threading.Thread(target=self._decode, args=([row], parts, left.is_set), daemon=True)
        work.start()
        try:
            while (piece := told.get()) is not None:
                yield piece
            answer.raise_error()
        finally:
            left.set()
        yield answer.completion()

    def choose(
        self, questions: Sequence[Question], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[list[float]]:
        """For each question the log-probability of each choice, summed over its tokens (end token included)."""
        parts = self._parts(adapter)
        rows = choice_rows(self._renderer, questions)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
        sums = [0.0] * len(rows)
        with progress.task("scoring choices", len(rows)) as task:
            for start in range(0, len(order), _SCORED_TOGETHER):
                chosen = order[start : start + _SCORED_TOGETHER]
                batch = lay_out([rows[place] for place in chosen], share=False)
                with self._turn, torch.inference_mode():
                    self._network.parts = parts
                    scores = self._network.scores(batch).float().log_softmax(-1)
                each = scores.gather(1, batch.labels[:, None])[:, 0]
                totals = each.split([label_count(rows[place]) for place in chosen])
                for place, total in zip(chosen, totals, strict=True):
                    sums[place] = float(total.sum())
                task.advance(len(chosen))
        every = iter(sums)
        return [[next(every) for _ in question.choices] for question in questions]

    def _parts(self, adapter: str | None) -> dict[str, Low]:
        if adapter is None:
            return {}
        if adapter not in self._adapters:
            raise Refused(f"adapter {adapter} is not loaded", fix="load it before asking it")
        return self._adapters[adapter]

    def _spell(self, token: int, score: Score) -> TokenScore:
        return token_score(self._constraints, token, score)

    def _row(self, request: Generation, answer: Answer) -> Row:
        prompt = prompt_ids(self._renderer, request, self.context_length)
        answer.prompt_tokens = len(prompt)
        return Row(
            ids=prompt,
            prefix=None,
            adapter=None,
            limit=max(1, min(request.max_tokens, self.context_length - len(prompt))),
            sampling=Sampling(request.temperature, request.top_p, request.seed),
            listener=answer,
            guide=None if request.schema is None else self._constraints.guide(request.schema),
            top=request.top_logprobs,
            generator=torch.Generator().manual_seed(request.seed),
        )

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows of like length together, so that no row of a batch goes beyond the context while another goes on."""
        most = _MOST_ROWS if len(rows) > 1 and self._pads() else 1
        batches: list[list[Row]] = []
        for row in sorted(rows, key=lambda row: len(row.ids)):  # the last one has the longest prompt
            limit = max([row.limit, *(one.limit for one in batches[-1])]) if batches else row.limit
            if batches and len(batches[-1]) < most and len(row.ids) + limit <= self.context_length:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    def _pads(self) -> bool:
        with self._turn:
            self._network.parts = {}
            return self._network.pads

    def _decode(self, rows: Sequence[Row], parts: dict[str, Low], left: Callable[[], bool] = lambda: False) -> None:
        """Decode rows to their ends; each row's listener is told of its end and of any error. left: nobody waits."""
        choosing = _Choosing(rows, self._renderer.stop_ids, left)
        try:
            with self._turn, torch.inference_mode():
                self._network.parts = parts
                _generate(self._network.module, rows, choosing)
        except Exception as error:  # noqa: BLE001 - handed to the one that asked, who raises it
            choosing.fail(error)
        choosing.close()


def _generate(module: Any, rows: Sequence[Row], choosing: _Choosing) -> None:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    ids, mask = left_padded([row.ids for row in rows], choosing.filler)
    module.generate(
        ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=max(row.limit for row in rows), pad_token_id=choosing.filler
        ),
        logits_processor=LogitsProcessorList([choosing.choose]),
        stopping_criteria=StoppingCriteriaList([choosing.over]),
    )


class _Choosing:
    """Gives each row of a batch its tokens, by the scores of each step."""

    def __init__(self, rows: Sequence[Row], stop_ids: frozenset[int], left: Callable[[], bool]) -> None:
        self._rows, self._stop_ids, self._left = rows, stop_ids, left
        self._live = dict.fromkeys(range(len(rows)))
        self.filler = min(stop_ids)

    def choose(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor: of scores [B, vocabulary] it leaves the one token that each row is given."""
        left = torch.full_like(scores, float("-inf"))
        for place, row in enumerate(self._rows):
            token = self._given(row, place, scores[place]) if place in self._live else self.filler
            left[place, token] = 0.0
        return left

    def over(self, ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """A stopping criterion: which rows need no more tokens."""
        if self._left():
            self._live.clear()
        return torch.tensor([place not in self._live for place in range(len(ids))])

    def fail(self, error: BaseException) -> None:
        """End every row under way with an error."""
        for place in list(self._live):
            self._end(place, stopped=False, error=error)

    def close(self) -> None:
        """End what is left."""
        for place in list(self._live):
            self._end(place, stopped=False)

    def _end(self, place: int, *, stopped: bool, error: BaseException | None = None) -> None:
        del self._live[place]
        self._rows[place].listener.end(stopped=stopped, error=error)

    def _given(self, row: Row, place: int, scores: Tensor) -> int:
        told = None if row.top is None else scores.float().log_softmax(-1)
        try:
            mask_disallowed_(scores[None], [row.guide])
            token = int(scores.argmax())
            if row.sampling.temperature > 0:
                assert row.generator is not None
                token = sample(scores.float(), row.sampling, row.generator)
            row.given.append(token)
            if token in self._stop_ids:
                self._end(place, stopped=True)
                return token
            if row.guide is not None:
                row.guide.follow(token)
            ended = row.listener.take(token, None if told is None else score_of(told, token, row.top or 0))
        except Exception as error:  # noqa: BLE001 - a schema or a listener: this row's fault alone
            self._end(place, stopped=False, error=error)
            return self.filler
        if ended or len(row.given) >= row.limit:
            self._end(place, stopped=False)
        return token
