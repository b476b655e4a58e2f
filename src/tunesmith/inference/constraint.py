"""Answers that must fit a JSON Schema: at each step only the tokens that can still lead to a fitting answer are left.

llguidance computes which those are; keys come in the schema's own order, one space may follow a comma or colon.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from tunesmith.core.errors import UsageError

# Whitespace as json.dumps writes it, with or without; unbounded, a model could go on with it for ever.
# Not by whitespace_pattern: releases of llguidance read " ?" as any number of spaces.
_JSON = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}}


class Constraints:
    """Makes guides for one model's tokens. vocabulary: how many logits a step has."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokens: LLTokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary)
        self._vocabulary = vocabulary
        self._matcher = cache(self._fresh)

    def guide(self, schema: str) -> LLMatcher:
        """A matcher at the start of an answer. Raises UsageError for a schema that cannot be followed."""
        return self._matcher(schema).deep_copy()

    def mask(self, guides: list[LLMatcher | None], scores: Tensor) -> Tensor:
        """Scores [B, vocabulary] with the tokens that a row's guide forbids at minus infinity."""
        allowed = np.ones((len(guides), self._vocabulary), dtype=bool)
        for row, guide in enumerate(guides):
            if guide is not None:
                bits = np.frombuffer(guide.compute_bitmask(), dtype=np.uint8)
                allowed[row] = np.unpackbits(bits, bitorder="little")[: self._vocabulary]
        return scores.masked_fill(torch.from_numpy(~allowed), float("-inf"))

    def _fresh(self, schema: str) -> LLMatcher:
        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_json_schema(json.loads(schema) | _JSON))
        if matcher.is_error():
            raise UsageError(
                f"answers cannot be held to this schema: {matcher.get_error()}",
                where="task.schema",
                fix="simplify it, or set constrain: false",
            )
        return matcher


def follow(guides: list[LLMatcher | None], tokens: list[int]) -> None:
    """Tell each row's guide which token its row was given."""
    for guide, token in zip(guides, tokens, strict=True):
        if guide is not None and not guide.is_stopped():
            guide.consume_token(token)
