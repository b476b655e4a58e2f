"""Answers that must fit a JSON Schema: at each step only the tokens that can still lead to a fitting answer are left.

llguidance computes which those are; keys come in the schema's own order, one space may follow a comma or colon.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.engines.native.network import ops

# Whitespace as json.dumps writes it, with or without; unbounded, a model could go on with it for ever.
# Not by whitespace_pattern: releases of llguidance read " ?" as any number of spaces.
_JSON = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}}


class Constraints:
    """Makes guides for one model's tokens. vocabulary: how many logits a step has."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokens: LLTokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary)
        self._matcher = cache(self._fresh)

    def guide(self, schema: str) -> Guide:
        """What holds one answer, from its start. Raises UsageError for a schema that cannot be followed."""
        return Guide(self._matcher(schema).deep_copy())

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for; a character may be spread over several."""
        return bytes(self._tokens.decode_bytes([token]))

    def _fresh(self, schema: str) -> LLMatcher:
        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_json_schema(json.loads(schema) | _JSON))
        if matcher.is_error():
            raise _cannot(matcher)
        return matcher


class Guide:
    """Holds one answer to its schema."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def follow(self, token: int) -> None:
        """The answer goes on with this token. Raises UsageError where the schema turns out too hard to follow."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
            if self.matcher.is_error():
                raise _cannot(self.matcher)


def hold_(scores: Tensor, guides: Sequence[Guide | None]) -> None:
    """Put the scores [N, vocabulary] of tokens that may not come next in a row to minus infinity; None: any may."""
    held = [(place, guide.matcher) for place, guide in enumerate(guides) if guide is not None]
    if not held:
        return
    bits = allocate_token_bitmask(len(held), scores.shape[1])
    fill_next_token_bitmask_par(_threads(), [(matcher, number) for number, (_, matcher) in enumerate(held)], bits)
    places = torch.tensor([place for place, _ in held])
    ops.forbid_(scores, places, torch.from_numpy(bits))


@cache
def _threads() -> LLExecutor:
    return LLExecutor(torch.get_num_threads())


def _cannot(matcher: LLMatcher) -> UsageError:
    return UsageError(
        f"answers cannot be held to this schema: {matcher.get_error()}",
        where="task.schema",
        fix="simplify it, or set constrain: false",
    )
