"""A base that transformers runs, loaded once: into this process, or by several ranks that hold it together. It answers
under one adapter at a time, and candidates train on it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.engines.batch import Batch
from tunesmith.engines.decoding.answers import DecodedRow
from tunesmith.engines.decoding.constraint import mask_disallowed_
from tunesmith.engines.device import computing_device
from tunesmith.engines.hf import libraries
from tunesmith.engines.hf.loading import model_settings
from tunesmith.engines.hf.model import HFModel, left_padded
from tunesmith.engines.hf.support import check_supported
from tunesmith.engines.hf.trainable import FullTrainable, HFTrainable, LoraTrainable
from tunesmith.engines.in_process import InProcessEngine
from tunesmith.engines.process import prepare_process
from tunesmith.engines.protocol import Completion, Generation, Streamed, loaded
from tunesmith.engines.ranks import ALONE, Ranks
from tunesmith.engines.settings import WeightSettings
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.engines.weights import check_room, read_model_file
from tunesmith.models.base import Base
from tunesmith.models.weight_files import MODEL_FILE


class HFEngine(InProcessEngine[str]):
    """Implements engines.protocol.Engine. Requests of several threads are answered one after another.

    An adapter is known by its name in the model.
    """

    choice_rows, choice_tokens, shares_prefix = 8, sys.maxsize, False

    def __init__(self, base: Base, model: Callable[[], HFModel]) -> None:
        """model: the base with its weights, asked for when the first request is to be answered."""
        super().__init__(base)
        self._load = model
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
        before, self._adapters[name] = self._adapters.get(name), self._model.load_adapter(folder)
        if before is not None:
            self._model.remove_adapter(before)

    def _generate(self, requests: Sequence[Generation], adapter: str | None, progress: Progress) -> list[Completion]:
        return self.generate_together(requests, loaded(self._adapters, adapter), progress)

    def generate_together(
        self, requests: Sequence[Generation], name: str | None, progress: Progress = SILENT
    ) -> list[Completion]:
        """Answers to this rank's requests, while other ranks answer theirs. name: the adapter's in the model."""
        _, answers, rows = self._begin(DecodedRow, requests)
        batches = self._batches(rows)
        with progress.task("answering", len(answers)) as task:
            for turn in range(self._model.ranks.most(len(batches))):
                batch = batches[turn] if turn < len(batches) else []
                self._decode(batch, name)
                task.advance(len(batch))
        return [answer.completion() for answer in answers]

    def _stream(self, request: Generation, adapter: str | None) -> Iterator[Streamed]:
        name, cancelled = loaded(self._adapters, adapter), threading.Event()
        events, (answer,), rows = self._begin(DecodedRow, [request], streams=True)
        self._decoder.submit(self._decode, rows, name, cancelled.is_set)
        try:
            while (piece := events.get()) is not None:
                yield piece
        finally:
            cancelled.set()
        yield answer.completion()

    def _label_losses(self, batch: Batch, adapter: str | None) -> Tensor:
        with self._model.using(loaded(self._adapters, adapter)), torch.inference_mode():
            return self._model.label_losses(batch).cpu()

    def _batches(self, rows: Sequence[DecodedRow]) -> list[list[DecodedRow]]:
        """Rows of similar length together, such that the longest prompt fits the context with the longest answer."""
        most = MOST_ROWS if len(rows) > 1 and self._model.pads else 1
        batches: list[list[DecodedRow]] = []
        for row in sorted(rows, key=lambda row: len(row.ids)):  # the last row of a batch has its longest prompt
            limit = max([row.limit, *(one.limit for one in batches[-1])]) if batches else row.limit
            if batches and len(batches[-1]) < most and len(row.ids) + limit <= self.context_length:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches

    def _decode(
        self, rows: Sequence[DecodedRow], name: str | None, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        """Decode rows to their ends. Errors go to the rows' answers, whose callers raise them."""
        ranks = self._model.ranks
        decoding = Decoding(rows, self._renderer.stop_ids, cancelled, self._model)
        # What inference mode makes of a sharded module's parameters could not be trained on.
        mode = torch.inference_mode if ranks.size == 1 else torch.no_grad
        try:
            with self._model.using(name), mode():
                decoding.run()
        except Exception as error:  # raised in the caller's thread
            if ranks.size > 1:
                raise  # the others wait for this rank
            decoding.end_all(error)
        decoding.end_all()


MOST_ROWS = 16  # answers decoded together


class Decoding:
    """Decodes rows together with transformers' `generate`, which keeps the cache; every token is chosen here, so that
    sampling, schemas, stop texts and limits are the same as in the native engine, and each row has its own. Each row's
    answer receives its tokens, its end and any error."""

    def __init__(
        self, rows: Sequence[DecodedRow], stop_ids: frozenset[int], cancelled: Callable[[], bool], model: HFModel
    ) -> None:
        """cancelled: whether the caller no longer waits for the answers. model: where it is sharded, each of its ranks
        decodes its own rows, or none."""
        self._rows, self._stop_ids, self._cancelled, self._model = rows, stop_ids, cancelled, model
        self._most_unfinished = 1  # rows of a rank, as of the last forward pass
        self._filler = min(stop_ids)
        self._unfinished = set(range(len(rows)))

    def run(self) -> None:
        """Decode all rows to their ends, then compute single tokens for nothing until every rank has done so: a forward
        pass of a sharded module needs all ranks."""
        transformers, module, ranks = libraries.transformers(), self._model.module, self._model.ranks
        if self._rows:
            limit = max(row.limit for row in self._rows)
            ids, mask = left_padded([row.ids for row in self._rows], self._filler, self._model.device)
            how = transformers.GenerationConfig(do_sample=False, max_new_tokens=limit, pad_token_id=self._filler)
            module.generate(
                ids,
                attention_mask=mask,
                generation_config=how,
                synced_gpus=False,
                logits_processor=transformers.LogitsProcessorList([self._choose]),
                stopping_criteria=transformers.StoppingCriteriaList([self._finished]),
            )
        while ranks.size > 1 and self._most_unfinished:
            module(input_ids=torch.tensor([[self._filler]], device=module.device), use_cache=False)
            self._most_unfinished = ranks.most(0)

    def end_all(self, error: BaseException | None = None) -> None:
        """End the rows that are not finished yet."""
        for place in sorted(self._unfinished):
            self._end(place, stopped=False, error=error)

    def _choose(self, _ids: Tensor, logits: Tensor) -> Tensor:
        """A logits processor: leaves one token for each row of logits [B, vocabulary]. Tokens are chosen on the CPU,
        where schemas and random numbers are."""
        device, logits = logits.device, logits.cpu()
        only = torch.full_like(logits, float("-inf"))
        for place, row in enumerate(self._rows):
            token = self._next_token(row, place, logits[place]) if place in self._unfinished else self._filler
            only[place, token] = 0.0
        return only.to(device)

    def _finished(self, ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """A stopping criterion: which rows need no more tokens."""
        if self._cancelled():
            self._unfinished.clear()
        self._most_unfinished = self._model.ranks.most(len(self._unfinished))
        return torch.tensor([place not in self._unfinished for place in range(len(ids))], device=ids.device)

    def _end(self, place: int, *, stopped: bool, error: BaseException | None = None) -> None:
        self._unfinished.remove(place)
        self._rows[place].listener.end(stopped=stopped, error=error)

    def _next_token(self, row: DecodedRow, place: int, logits: Tensor) -> int:
        logprobs = None if row.request.top_logprobs is None else logits.float().log_softmax(-1)
        try:
            mask_disallowed_(logits[None], [row.guide])
            token = row.choose(logits)
            ended = row.append(token, logprobs, self._stop_ids)
        except Exception as error:  # noqa: BLE001 - a bad schema ends this row only; its caller raises the error
            self._end(place, stopped=False, error=error)
            return self._filler
        if ended:
            self._end(place, stopped=token in self._stop_ids)
        return token


_REQUESTS, _ANSWERS = TypeAdapter(list[Generation]), TypeAdapter(list[Completion])


class LoadedHFModel:
    """Implements engines.training_protocol.LoadedModel."""

    def __init__(self, base: Base, device: torch.device | None = None) -> None:
        """The weights are read when they are first needed; for trainings that keep them otherwise, once more. device:
        that computes, by default this process's."""
        prepare_process()
        self._base, self._device = base, device

    @cached_property
    def _model(self) -> HFModel:
        return HFModel(self._base, model_settings(WeightSettings()), device=self._device)

    def engine(self) -> HFEngine:
        """The engine that answers with these weights."""
        model = self._model
        return HFEngine(self._base, lambda: model)

    def trainable(self, settings: WeightSettings, *, seed: int, state_bytes: int) -> HFTrainable:
        """A new adapter on these weights, at its start, or a copy of them to be trained in full.

        Raises Refused or UsageError for settings that this engine or base cannot honour.
        """
        check_supported(settings)
        wanted = model_settings(settings)
        # Neither PiSSA, which takes its start out of the base's weights, nor full training leaves the base as it is.
        keeps = settings.start != "pissa" and settings.method != "full"
        shares = wanted == model_settings(WeightSettings()) and keeps
        model = self._model if shares else HFModel(self._base, wanted, device=self._device)
        return build_trainable(model, settings, seed)


class ShardedHFModel:
    """Implements engines.training_protocol.ShardedModel."""

    def __init__(self, base: Base, ranks: Ranks) -> None:
        """The weights are read when they are first needed, by every rank."""
        prepare_process()
        self._base, self._ranks = base, ranks
        self._model: HFModel | None = None
        self._trained: HFTrainable | None = None
        self._engine = HFEngine(base, self._sharded)

    def _sharded(self) -> HFModel:
        if self._model is None:
            raise TunesmithError("several ranks answer only while they train")
        return self._model

    def engine(self) -> HFEngine:
        """The engine that renders requests. Only answer_together answers them."""
        return self._engine

    def trainable(self, settings: WeightSettings, *, seed: int, state_bytes: int) -> HFTrainable:
        """A new adapter on these weights, at its start, or the weights themselves. Shards the base: there is one only.

        Raises Refused or UsageError for settings that this engine or base cannot honour on several ranks.
        """
        check_supported(settings, ranks=self._ranks.size)
        if self._trained is not None:
            raise TunesmithError("several ranks train one model at a time", fix="start them for each training")
        # PiSSA and DoRA start from what the weights are.
        what = "start: pissa" if settings.start == "pissa" else "dora: true" if settings.dora else None
        wanted = model_settings(settings)
        if what is not None:
            check_room(self._base, what, self._ranks, computing_device(), wanted.dtype)
        self._model = HFModel(self._base, wanted, late=what is None)
        self._trained = build_trainable(self._model, settings, seed, self._ranks)
        return self._trained

    def answer_together(self, requests: Sequence[Generation], model: TrainableModel | None) -> list[Completion]:
        """Rank 0's requests, answered by all ranks with the model in training as it is now; None: by the base.

        Every rank calls this and gets all answers. The requests of other ranks do not count.
        """
        if self._trained is None or (model is not None and model is not self._trained):
            raise TunesmithError("only the model in training answers on several ranks")
        ranks = self._ranks
        asked = _REQUESTS.validate_python(ranks.agree(lambda: _REQUESTS.dump_python(list(requests), mode="json")))
        adapter = self._trained.adapter if model is not None or self._trained.replaces_base else None
        mine = self._engine.generate_together(asked[ranks.rank :: ranks.size], adapter)
        given = list(map(_ANSWERS.validate_python, ranks.gather(_ANSWERS.dump_python(mine, mode="json"))))
        return [given[place % ranks.size][place // ranks.size] for place in range(len(asked))]


def build_trainable(model: HFModel, settings: WeightSettings, seed: int, ranks: Ranks = ALONE) -> HFTrainable:
    """What settings train in a model, at its start. With several ranks, the model is sharded over them."""
    if settings.method == "full":
        return FullTrainable(model, settings, ranks=ranks)
    return LoraTrainable(model, settings, seed=seed, ranks=ranks)
