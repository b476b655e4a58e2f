"""Structured outputs: decoding that allows only tokens which can still lead to an answer that fits a JSON Schema or a
Lark grammar.

llguidance computes the allowed tokens. With a schema, keys come in its order; one space may follow a comma or colon.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.engines.json_text import restricted
from tunesmith.engines.native.network import ops
from tunesmith.engines.protocol import Generation

_KEPT = 64  # grammars of requests; few are asked twice


class Constraints:
    """Creates guides for one tokenizer. vocabulary: number of logits."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokens: LLTokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary)
        self._of_schema, self._of_grammar = cache(self._by_schema), lru_cache(_KEPT)(self._new_matcher)

    def guide(self, request: Generation) -> Guide:
        """A guide for an answer to a request with a schema or grammar, at its start.

        Raises UsageError for one that llguidance does not support, or that is too large.
        """
        if request.grammar is not None:
            return Guide(self._of_grammar(request.grammar, request.own_grammar).deep_copy(), request.own_grammar)
        assert request.schema is not None
        return Guide(self._of_schema(request.schema).deep_copy())

    def token_bytes(self, token: int) -> bytes:
        """A token's bytes. A character may be split over several tokens."""
        return bytes(self._tokens.decode_bytes([token]))

    def _by_schema(self, schema: str) -> LLMatcher:
        return self._new_matcher(LLMatcher.grammar_from_json_schema(restricted(json.loads(schema))))

    def _new_matcher(self, grammar: str, own: bool = False) -> LLMatcher:
        matcher = LLMatcher(self._tokens, grammar)
        if matcher.is_error():
            raise _unsupported(matcher, own)
        return matcher


class Guide:
    """Restricts one answer to its schema or grammar. own: whether the grammar was made from the request's messages."""

    def __init__(self, matcher: LLMatcher, own: bool = False) -> None:
        self.matcher, self._own = matcher, own

    def follow(self, token: int) -> None:
        """Advance by the answer's next token. Raises UsageError if the schema turns out too complex."""
        self.check()
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
            self.check()

    def check(self) -> None:
        """Raise UsageError if the allowed tokens could not be computed: llguidance then allows the end token alone."""
        if self.matcher.is_error():
            raise _unsupported(self.matcher, self._own)


def mask_disallowed_(scores: Tensor, guides: Sequence[Guide | None]) -> None:
    """Set the logits [N, vocabulary] of tokens that a row's guide does not allow to minus infinity, in place."""
    guided = [(row, guide.matcher) for row, guide in enumerate(guides) if guide is not None]
    if not guided:
        return
    bits = allocate_token_bitmask(len(guided), scores.shape[1])
    fill_next_token_bitmask_par(_threads(), [(matcher, number) for number, (_, matcher) in enumerate(guided)], bits)
    rows = torch.tensor([row for row, _ in guided])
    ops.forbid_(scores, rows, torch.from_numpy(bits))


@cache
def _threads() -> LLExecutor:
    return LLExecutor(torch.get_num_threads())


def _unsupported(matcher: LLMatcher, own: bool) -> UsageError:
    said = matcher.get_error().partition("\n")[0][:300]
    if own:
        return UsageError(
            f"answers cannot be held to the words of this request: {said}",
            where="messages",
            fix="shorten the user turns, from which fields of the answer are copied",
        )
    return UsageError(
        f"answers cannot be held to this schema or grammar: {said}",
        where="constrain",
        fix="simplify task.schema or task.grammar, or set constrain: false",
    )
