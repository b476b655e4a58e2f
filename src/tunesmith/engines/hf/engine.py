"""Answers with a base that transformers runs, in this process, under one adapter at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue

import torch

from tunesmith.core.progress import Progress
from tunesmith.engines.batch import label_count, lay_out
from tunesmith.engines.decoding.answers import Answer, prompt_ids
from tunesmith.engines.decoding.sampling import Sampling
from tunesmith.engines.hf.generation import MOST_ROWS, Decoding, Row
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.in_process import InProcessEngine
from tunesmith.engines.protocol import Completion, Generation, Streamed
from tunesmith.engines.weights.whole_model import read_model_file
from tunesmith.models.base import Base
from tunesmith.models.rendering import Rendered
from tunesmith.models.weight_files import MODEL_FILE


class HFEngine(InProcessEngine[str]):
    """Implements engines.protocol.Engine. Requests of several threads are answered one after another.

    An adapter is known by its name in the model.
    """

    choice_rows, choice_tokens = 8, sys.maxsize

    def __init__(self, base: Base, model: Callable[[], HFModel]) -> None:
        """model: the base with its weights, asked for when the first request is to be answered."""
        super().__init__(base)
        self._load = model
        # CUDA graphs belong to the thread that recorded them.
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoding")

    @cached_property
    def _model(self) -> HFModel:
        return self._load()

    @property
    def _vocabulary(self) -> int:
        return self._model.vocabulary

    def _open_whole(self, folder: Path) -> HFEngine:
        read_model_file(folder, self._base, self._model.repeated)  # refuses what does not belong to the base
        model = HFModel(self._base, self._model.settings, weights=folder / MODEL_FILE)
        return HFEngine(self._base, lambda: model)

    def _load_adapter(self, name: str, folder: Path) -> None:
        loaded = self._model.load_adapter(folder)
        before, self._adapters[name] = self._adapters.get(name), loaded
        if before is not None:
            self._model.remove_adapter(before)

    def _generate(self, requests: Sequence[Generation], adapter: str | None, progress: Progress) -> list[Completion]:
        loaded = self._loaded(adapter)
        answers, batches = self._begin(requests)
        with progress.task("answering", len(answers)) as task:
            for batch in batches:
                if self._model.static:
                    self._decoder.submit(self._decode, batch, loaded).result()
                else:
                    self._decode(batch, loaded)
                task.advance(len(batch))
        return _completions(answers)

    def _begin(self, requests: Sequence[Generation]) -> tuple[list[Answer], list[list[Row]]]:
        """The requests' answers, in their order, and batches of rows that give them their tokens."""
        events: SimpleQueue[Streamed | None] = SimpleQueue()
        answers = [self._answer(request, events, streams=False) for request in requests]
        return answers, self._batches([self._row(*each) for each in zip(requests, answers, strict=True)])

    def generate_together(self, requests: Sequence[Generation], loaded: str | None) -> list[Completion]:
        """Answers to this rank's requests, while the other ranks answer theirs. loaded: the adapter's name in the
        model."""
        answers, batches = self._begin(requests)
        for turn in range(self._model.ranks.most(len(batches))):
            self._decode(batches[turn] if turn < len(batches) else [], loaded)
        return _completions(answers)

    def _stream(self, request: Generation, adapter: str | None) -> Iterator[Streamed]:
        events: SimpleQueue[Streamed | None] = SimpleQueue()
        loaded = self._loaded(adapter)
        answer = self._answer(request, events, streams=True)
        row, cancelled = self._row(request, answer), threading.Event()
        self._decoder.submit(self._decode, [row], loaded, cancelled.is_set)
        try:
            while (piece := events.get()) is not None:
                yield piece
            answer.raise_error()
        finally:
            cancelled.set()
        yield answer.completion()

    def _log_probabilities(self, rows: Sequence[Rendered], adapter: str | None) -> list[float]:
        batch = lay_out(rows, share=False)
        with self._model.using(self._loaded(adapter)), torch.inference_mode():
            each = self._model.label_losses(batch).cpu()
        return [-float(part.sum()) for part in each.split([label_count(row) for row in rows])]

    def _row(self, request: Generation, answer: Answer) -> Row:
        prompt = prompt_ids(self._renderer, request, self.context_length)
        answer.prompt_tokens = len(prompt)
        return Row(
            ids=prompt,
            limit=max(1, min(request.max_tokens, self.context_length - len(prompt))),
            sampling=Sampling(request.temperature, request.top_p, request.seed),
            answer=answer,
            guide=self._guide(request),
            top=request.top_logprobs,
            generator=torch.Generator().manual_seed(request.seed),
        )

    def _batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows of similar length together, such that the longest prompt fits the context with the longest answer."""
        most = MOST_ROWS if len(rows) > 1 and self._model.pads else 1
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
        ranks = self._model.ranks
        decoding = Decoding(rows, self._renderer.stop_ids, cancelled, ranks)
        # What inference mode makes of a sharded module's parameters could not be trained on.
        mode = torch.inference_mode if ranks.size == 1 else torch.no_grad
        try:
            with self._model.using(loaded), mode():
                decoding.run(self._model)
        except Exception as error:  # raised in the caller's thread
            if ranks.size > 1:
                raise  # the others wait for this rank
            decoding.end_all(error)
        decoding.end_all()


def _completions(answers: Sequence[Answer]) -> list[Completion]:
    """The answers that have ended. Raises the first one's error."""
    for answer in answers:
        answer.raise_error()
    return [answer.completion() for answer in answers]
