"""What the engines that compute in this process have in common."""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeVar

from torch import Tensor

from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.batch import Batch, label_count, lay_out
from tunesmith.engines.decoding.answers import Answer, DecodedRow, choice_rows, prompt_ids
from tunesmith.engines.decoding.constraint import Constraints
from tunesmith.engines.protocol import Completion, Engine, Generation, Loaded, Question, Streamed
from tunesmith.models.base import Base
from tunesmith.models.rendering import Renderer
from tunesmith.models.weight_files import has_whole_model

_WHOLE_KEPT = 3  # models trained in full: a champion, its canary, one more
Row = TypeVar("Row", bound=DecodedRow)


class InProcessEngine(ABC, Generic[Loaded]):
    """Renders requests, holds loaded adapters and models trained in full, and scores multiple-choice questions in
    batches. Implements engines.protocol.Engine.

    base: digest of the base record. context_length: most tokens that a prompt and its answer may have together.
    choice_rows, choice_tokens: the most rows, and the most tokens of several rows, in one forward pass of choose().
    shares_prefix: whether it computes their common prefix once.
    """

    follows_grammars = True
    choice_rows: int
    choice_tokens: int
    shares_prefix: bool

    def __init__(self, base: Base) -> None:
        self._base, self.base, self.context_length = base, base.digest, base.context_length
        self._renderer = Renderer(base.folder)
        self._adapters: dict[str, Loaded] = {}  # by the caller's name
        self._whole: OrderedDict[str, Engine] = OrderedDict()  # models trained in full, most recently used last
        self._lock = threading.Lock()  # guards both

    @property
    @abstractmethod
    def _vocabulary(self) -> int:
        """How many logits a step has."""

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a training's folder under name. Loading a name again replaces it for later requests.

        Of models trained in full, only the most recently used are kept. Raises Refused for files of another base, and
        for those that do not fit it.
        """
        if not has_whole_model(folder):
            self._load_adapter(name, folder)
            return
        engine = self._open_whole(folder)
        with self._lock:
            self._whole.pop(name, None)
            self._whole[name] = engine
            while len(self._whole) > _WHOLE_KEPT:
                self._whole.popitem(last=False)

    def unload(self, name: str) -> None:
        """Forget a model that was trained in full. Adapters stay."""
        with self._lock:
            self._whole.pop(name, None)

    def holds(self, name: str) -> bool:
        """Whether name is loaded."""
        return name in self._adapters or name in self._whole

    def generate(
        self, requests: Sequence[Generation], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers in the order of requests."""
        if (whole := self._whole_engine(adapter)) is not None:
            return whole.generate(requests, progress=progress)
        return self._generate(requests, adapter, progress)

    def stream(self, request: Generation, adapter: str | None = None) -> Iterator[Streamed]:
        """Pieces of the answer's text as they are decoded; the last item is the whole Completion."""
        whole = self._whole_engine(adapter)
        yield from self._stream(request, adapter) if whole is None else whole.stream(request)

    @abstractmethod
    def _load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter's folder under name, in place of an adapter of that name."""

    @abstractmethod
    def _open_whole(self, folder: Path) -> Engine:
        """An engine that answers with a model that was trained in full."""

    @abstractmethod
    def _generate(self, requests: Sequence[Generation], adapter: str | None, progress: Progress) -> list[Completion]:
        """Answers in the order of requests, by the base or an adapter."""

    @abstractmethod
    def _stream(self, request: Generation, adapter: str | None) -> Iterator[Streamed]:
        """An answer in pieces, by the base or an adapter."""

    def _whole_engine(self, name: str | None) -> Engine | None:
        """The engine of a model that was trained in full; None if name is an adapter or the base."""
        with self._lock:
            if name is None or name not in self._whole:
                return None
            self._whole.move_to_end(name)
            return self._whole[name]

    def choose(
        self, questions: Sequence[Question], adapter: str | None = None, progress: Progress = SILENT
    ) -> list[list[float]]:
        """For each question the log-probability of each choice, summed over its tokens (end token included)."""
        if (whole := self._whole_engine(adapter)) is not None:
            return whole.choose(questions, progress=progress)
        rows = choice_rows(self._renderer, questions)
        sums: dict[int, float] = {}
        with progress.task("scoring choices", len(rows)) as task:
            for chosen in self._choice_batches([len(row.ids) for row in rows]):
                losses = self._label_losses(lay_out([rows[row] for row in chosen], share=self.shares_prefix), adapter)
                each = losses.split([label_count(rows[row]) for row in chosen])
                sums |= {row: -float(own.sum()) for row, own in zip(chosen, each, strict=True)}
                task.advance(len(chosen))
        every = itertools.count()
        return [[sums[next(every)] for _ in question.choices] for question in questions]

    @abstractmethod
    def _label_losses(self, batch: Batch, adapter: str | None) -> Tensor:
        """The negative log-likelihood of each label [N] of a batch, fp32, on the CPU."""

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self._renderer.tokenizer, self._vocabulary, self._renderer.stop_ids)

    def _begin(
        self, row: Callable[..., Row], requests: Sequence[Generation], *, streams: bool = False
    ) -> tuple[SimpleQueue[Streamed | None], list[Answer], list[Row]]:
        """The events of all requests' answers, the answers, and the rows to decode for them."""
        events: SimpleQueue[Streamed | None] = SimpleQueue()
        answers, rows = list[Answer](), list[Row]()
        for request in requests:
            ids = prompt_ids(self._renderer, request, self.context_length)
            free = request.schema is None and request.grammar is None  # any text may be given
            limit = max(1, min(request.max_tokens, self.context_length - len(ids)))
            answers.append(Answer(self._renderer, request, len(ids), self._token_bytes, events, streams=streams))
            guide = None if free else self._constraints.guide(request)
            rows.append(row(request=request, ids=ids, limit=limit, listener=answers[-1], guide=guide))
        return events, answers, rows

    def _token_bytes(self, token: int) -> bytes:
        return self._constraints.token_bytes(token)

    def _choice_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of rows in batches for one forward pass each, shortest rows first. lengths: of all rows."""
        batches: list[list[int]] = [[]]
        for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
            count = len(batches[-1])
            if count and (count == self.choice_rows or lengths[place] * (count + 1) > self.choice_tokens):
                batches.append([])
            batches[-1].append(place)
        return batches
