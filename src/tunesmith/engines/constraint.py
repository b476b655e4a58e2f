"""Structured outputs: decoding that allows only tokens which can still lead to an answer that fits a JSON Schema.

llguidance computes the allowed tokens. Keys come in the schema's order; one space may follow a comma or colon.
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

# Allows json.dumps' whitespace or none: with unbounded whitespace, a model could go on with it forever.
# whitespace_pattern does not serve: some releases of llguidance read " ?" as any number of spaces.
_JSON = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}}


def restricted(schema: str) -> dict[str, Any]:
    """The JSON Schema with llguidance's options for whitespace. Other libraries (xgrammar) ignore them."""
    return {**json.loads(schema), **_JSON}


class Constraints:
    """Creates guides for one tokenizer. vocabulary: number of logits."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokens: LLTokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary)
        self._matcher = cache(self._new_matcher)

    def guide(self, schema: str) -> Guide:
        """A guide for one answer, at its start. Raises UsageError for a schema that llguidance does not support."""
        return Guide(self._matcher(schema).deep_copy())

    def token_bytes(self, token: int) -> bytes:
        """A token's bytes. A character may be split over several tokens."""
        return bytes(self._tokens.decode_bytes([token]))

    def _new_matcher(self, schema: str) -> LLMatcher:
        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_json_schema(restricted(schema)))
        if matcher.is_error():
            raise _unsupported(matcher)
        return matcher


class Guide:
    """Restricts one answer to its schema."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def follow(self, token: int) -> None:
        """Advance by the answer's next token. Raises UsageError if the schema turns out too complex."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
            if self.matcher.is_error():
                raise _unsupported(self.matcher)


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


def _unsupported(matcher: LLMatcher) -> UsageError:
    return UsageError(
        f"answers cannot be held to this schema: {matcher.get_error()}",
        where="task.schema",
        fix="simplify it, or set constrain: false",
    )
