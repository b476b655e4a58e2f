"""Answers with a base that transformers runs, in this process, under one adapter at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue

import torch

from tunesmith.core.errors import Refused
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.answers import Answer, choice_rows, prompt_ids, token_score
from tunesmith.engines.batch import label_count, lay_out
from tunesmith.engines.constraint import Constraints
from tunesmith.engines.hf.generation import Decoding, Row
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.protocol import Completion, Generation, Question, Streamed, TokenScore
from tunesmith.engines.sampling import Sampling, Score
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weight_files import has_whole_model

_MOST_ROWS = 16  # answers decoded together
_SCORED_TOGETHER = 8  # rows of multiple-choice questions in one forward pass


class HFEngine:
    """Implements engines.protocol.Engine. Requests of several threads are answered one after another."""

    def __init__(self, model: HFModel) -> None:
        self._model, self._base = model, model.base
        self._renderer = Renderer(model.base.folder)
        self._adapters: dict[str, str] = {}  # the caller's name -> the name in the model

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self._renderer.tokenizer, self._model.vocabulary)

    @property
    def base(self) -> str:
        """Digest of the base record."""
        return self._base.digest

    @property
    def context_length(self) -> int:
        """Most tokens that a prompt and its answer may have together."""
        return self._base.context_length

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a training's folder, so that it can answer under this name; an adapter of the same name is replaced.

        Raises Refused for a model trained in full, another base's adapter, and one that does not fit the base's layers.
        """
        if has_whole_model(folder):
            raise Refused(
                "this base is run by transformers' modules, which answer with adapters only, and this model was "
                "trained in full",
                where=str(folder),
            )
        loaded = self._model.load_adapter(folder)
        before, self._adapters[name] = self._adapters.get(name), loaded
        if before is not None:
            self._model.remove_adapter(before)

    def holds(self, name: str) -> bool:
        """Whether an adapter of this name is loaded."""
        return name in self._adapters

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests."""
        events: SimpleQueue[Streamed | None] = SimpleQueue()
        loaded = self._loaded(adapter)
        answers = [Answer(self._renderer, request, self._token_score, events, streams=False) for request in requests]
        rows = [self._row(request, answer) for request, answer in zip(requests, answers, strict=True)]
        with progress.task("answering", len(rows)) as task:
            for batch in self._batches(rows):
                self._decode(batch, loaded)
                task.advance(len(batch))
        for answer in answers:
            answer.raise_error()
        return [answer.completion() for answer in answers]

    def stream(self, request: Generation, adapter: str | None = None) -> Iterator[Streamed]:
        """Pieces of the answer's text as they are decoded; the last item is the whole Completion."""
        events: SimpleQueue[Streamed | None] = SimpleQueue()
        loaded = self._loaded(adapter)
        answer = Answer(self._renderer, request, self._token_score, events, streams=True)
        row, cancelled = self._row(request, answer), threading.Event()
        threading.Thread(target=self._decode, args=([row], loaded, cancelled.is_set), daemon=True).start()
        try:
            while (piece := events.get()) is not None:
                yield piece
            answer.raise_error()
        finally:
            cancelled.set()
        yield answer.completion()

    def choose(
        self, questions: Sequence[Question], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[list[float]]:
        """For each question the log-probability of each choice, summed over its tokens (end token included)."""
        loaded = self._loaded(adapter)
        rows = choice_rows(self._renderer, questions)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
        sums = [0.0] * len(rows)
        with progress.task("scoring choices", len(rows)) as task:
            for start in range(0, len(order), _SCORED_TOGETHER):
                chosen = order[start : start + _SCORED_TOGETHER]
                totals = self._log_probabilities([rows[place] for place in chosen], loaded)
                for place, total in zip(chosen, totals, strict=True):
                    sums[place] = total
                task.advance(len(chosen))
        every = iter(sums)
        return [[next(every) for _ in question.choices] for question in questions]

    def _log_probabilities(self, rows: Sequence[Rendered], loaded: str | None) -> list[float]:
        """The log-probability of each row's labels, summed."""
        batch = lay_out(rows, share=False)
        with self._model.using(loaded), torch.inference_mode():
            logprobs = self._model.logits(batch).float().log_softmax(-1)
        each = logprobs.gather(1, batch.labels[:, None])[:, 0]
        return [float(part.sum()) for part in each.split([label_count(row) for row in rows])]

    def _loaded(self, adapter: str | None) -> str | None:
        """The adapter's name in the model; None for the base."""
        if adapter is None:
            return None
        if adapter not in self._adapters:
            raise Refused(f"adapter {adapter} is not loaded", fix="load it first")
        return self._adapters[adapter]

    def _token_score(self, token: int, score: Score) -> TokenScore:
        return token_score(self._constraints, token, score)

    def _row(self, request: Generation, answer: Answer) -> Row:
        prompt = prompt_ids(self._renderer, request, self.context_length)
        answer.prompt_tokens = len(prompt)
        return Row(
            ids=prompt,
            limit=max(1, min(request.max_tokens, self.context_length - len(prompt))),
            sampling=Sampling(request.temperature, request.top_p, request.seed),
            answer=answer,
            guide=None if request.schema is None else self._constraints.guide(request.schema),
            top=request.top_logprobs,
            generator=torch.Generator().manual_seed(request.seed),
        )

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows of similar length together, such that the longest prompt fits the context with the longest answer."""
        most = _MOST_ROWS if len(rows) > 1 and self._model.pads else 1
        batches: list[list[Row]] = []
        for row in sorted(rows, key=lambda row: len(row.ids)):  # the last row of a batch has its longest prompt
            limit = max([row.limit, *(one.limit for one in batches[-1])]) if batches else row.limit
            if batches and len(batches[-1]) < most and len(row.ids) + limit <= self.context_length:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    def _decode(self, rows: Sequence[Row], loaded: str | None, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Decode rows to their ends. Errors go to the rows' answers, whose callers raise them."""
        decoding = Decoding(rows, self._renderer.stop_ids, cancelled)
        try:
            with self._model.using(loaded), torch.inference_mode():
                decoding.run(self._model.module)
        except Exception as error:  # noqa: BLE001 - raised in the caller's thread
            decoding.end_all(error)
        decoding.end_all()
