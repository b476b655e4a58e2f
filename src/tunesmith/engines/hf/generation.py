"""Decodes a batch of prompts with transformers' `generate`, which keeps the cache; every token is chosen here.

So sampling, schemas, stop texts and limits are the same as in the native engine, and each row has its own.

On a GPU transformers compiles a step for its static cache, once for each number of rows and length of the cache, so
both are rounded up to a few (static_size). It does not compile the pass over the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tunesmith.engines.decoding.answers import Answer
from tunesmith.engines.decoding.constraint import Guide, mask_disallowed_
from tunesmith.engines.decoding.sampling import Sampling, sample, score_of
from tunesmith.engines.hf import libraries
from tunesmith.engines.hf.model import HFModel, left_padded
from tunesmith.engines.ranks import ALONE, Ranks

MOST_ROWS = 16  # answers decoded together
_SHORTEST = 256  # tokens of a static cache


@dataclass(eq=False, slots=True)
class Row:
    """One answer to decode. ids: the prompt. limit: most tokens of the answer. top: how many of the likeliest tokens to
    report at each step; None for no log-probabilities. guide: holds the answer to its schema."""

    ids: Sequence[int]
    limit: int
    sampling: Sampling
    answer: Answer
    guide: Guide | None
    top: int | None
    generator: torch.Generator
    given: list[int] = field(default_factory=list)


class Decoding:
    """Decodes rows together. Each row's answer receives its tokens, its end and any error."""

    def __init__(
        self, rows: Sequence[Row], stop_ids: frozenset[int], cancelled: Callable[[], bool], ranks: Ranks = ALONE
    ) -> None:
        """cancelled: whether the caller no longer waits for the answers. ranks: each of them decodes its own rows, or
        none, with a module that is sharded over them."""
        self._rows, self._stop_ids, self._cancelled, self._ranks = rows, stop_ids, cancelled, ranks
        self._most_unfinished = 1  # rows of a rank, as of the last forward pass
        self._filler = min(stop_ids)
        self._unfinished = dict.fromkeys(range(len(rows)))

    def run(self, model: HFModel) -> None:
        """Decode all rows to their ends, then compute single tokens for nothing until every rank has done so: a forward
        pass of a sharded module needs all ranks."""
        module = model.module
        if self._rows:
            self._generate(model)
        while self._ranks.size > 1 and self._most_unfinished:
            module(input_ids=torch.tensor([[self._filler]], device=module.device), use_cache=False)
            self._most_unfinished = self._ranks.most(0)

    def _generate(self, model: HFModel) -> None:
        transformers = libraries.transformers()
        prompts, limit = [row.ids for row in self._rows], max(row.limit for row in self._rows)
        size, length = static_size(len(prompts), max(map(len, prompts)) + limit, model.base.context_length)
        if (cache := model.static_cache(size, length)) is not None:
            prompts += [prompts[-1]] * (size - len(prompts))  # computed for nothing
        ids, mask = left_padded(prompts, self._filler, model.device)
        how = transformers.GenerationConfig(do_sample=False, max_new_tokens=limit, pad_token_id=self._filler)
        model.module.generate(
            ids,
            attention_mask=mask,
            generation_config=how,
            synced_gpus=False,
            cache=cache,
            logits_processor=transformers.LogitsProcessorList([self._choose]),
            stopping_criteria=transformers.StoppingCriteriaList([self._finished]),
        )

    def end_all(self, error: BaseException | None = None) -> None:
        """End the rows that are not finished yet."""
        for place in list(self._unfinished):
            self._end(place, stopped=False, error=error)

    def _choose(self, _ids: Tensor, logits: Tensor) -> Tensor:
        """A logits processor: leaves one token for each row of logits [B, vocabulary]. Tokens are chosen on the CPU,
        where schemas and random numbers are."""
        device, logits = logits.device, logits.cpu()
        only = torch.full_like(logits, float("-inf"))
        only[len(self._rows) :, self._filler] = 0.0
        for place, row in enumerate(self._rows):
            token = self._next_token(row, place, logits[place]) if place in self._unfinished else self._filler
            only[place, token] = 0.0
        return only.to(device)

    def _finished(self, ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """A stopping criterion: which rows need no more tokens."""
        if self._cancelled():
            self._unfinished.clear()
        self._most_unfinished = self._ranks.most(len(self._unfinished))
        return torch.tensor([place not in self._unfinished for place in range(len(ids))], device=ids.device)

    def _end(self, place: int, *, stopped: bool, error: BaseException | None = None) -> None:
        del self._unfinished[place]
        self._rows[place].answer.end(stopped=stopped, error=error)

    def _next_token(self, row: Row, place: int, logits: Tensor) -> int:
        logprobs = None if row.top is None else logits.float().log_softmax(-1)
        try:
            mask_disallowed_(logits[None], [row.guide])
            if row.sampling.temperature > 0:
                token = sample(logits.float(), row.sampling, row.generator)
            else:
                token = int(logits.argmax())
            row.given.append(token)
            if token in self._stop_ids:
                if row.guide is not None:
                    row.guide.check()
                self._end(place, stopped=True)
                return token
            if row.guide is not None:
                row.guide.follow(token)
            ended = row.answer.take(token, None if logprobs is None else score_of(logprobs, token, row.top or 0))
        except Exception as error:  # noqa: BLE001 - a bad schema ends this row only; its caller raises the error
            self._end(place, stopped=False, error=error)
            return self._filler
        if ended or len(row.given) >= row.limit:
            self._end(place, stopped=False)
        return token


def static_size(rows: int, tokens: int, context: int) -> tuple[int, int]:
    """Rows and tokens of the static cache for a batch of so many rows of at most so many tokens. context: the model's
    longest row. A cache has one row or MOST_ROWS, and is 256 tokens long, a power of two or the context's length."""
    return 1 if rows == 1 else MOST_ROWS, min(context, max(_SHORTEST, 1 << (tokens - 1).bit_length()))
