"""Structured outputs: decoding that allows only tokens which can still lead to an answer that fits a JSON Schema or a
Lark grammar.

llguidance computes the allowed tokens. With a schema, keys come in its order; one space may follow a comma or colon.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.engines.protocol import ConstrainedBy, Generation, restricted

_KEPT = 64  # grammars of requests; few are asked twice
_REQUEST_STATES = 50_000  # of a request's grammar, 1 to 2 KB each; of others llguidance's own limit
_LIMITS = LLParserLimits(max_lexer_states=_REQUEST_STATES, verbose_errors=False)
# Where a schema or grammar comes from -> what it is, and what to do where it cannot be followed.
_AT_FAULT: Mapping[ConstrainedBy, tuple[str, str]] = {
    "constrain": (
        "this schema or grammar",
        "simplify task.schema, task.pattern or task.grammar, or set constrain: false",
    ),
    "messages": ("the words of this request", "shorten the user turns, from which fields of the answer are copied"),
    "response_format.json_schema": ("this response_format", "simplify its schema"),
    "tools": ("calls of these tools", "simplify the tools' parameters, or send tool_choice: auto without strict"),
}


class Constraints:
    """Creates guides for one tokenizer. vocabulary: number of logits. stop_ids: the tokens that end an answer."""

    def __init__(self, tokenizer: Any, vocabulary: int, stop_ids: Collection[int]) -> None:
        ends = sorted(token for token in stop_ids if token < vocabulary)
        # A tokenizer may know a token that the model cannot give, as Gemma 3's text models' do.
        size = max(vocabulary, len(tokenizer))
        self._tokens: LLTokenizer = from_tokenizer(tokenizer, n_vocab=size, eos_token=min(ends, default=None))
        listed = np.isin(np.arange((vocabulary + 31) // 32 * 32), ends)
        self._ends = np.packbits(listed, bitorder="little").view(np.int32)
        self._of_schema, self._of_grammar = cache(self._by_schema), lru_cache(_KEPT)(self._new_matcher)
        self._of_request = lru_cache(_KEPT)(self._by_schema)  # these would grow without end

    def guide(self, request: Generation) -> Guide:
        """A guide for an answer to a request with a schema or grammar, at its start.

        Raises UsageError for one that llguidance does not support, or that is too large.
        """
        by, stated, compiled = request.constrained_by, request.grammar, self._of_grammar
        if stated is None:
            assert request.schema is not None
            stated, compiled = request.schema, self._of_schema if by == "constrain" else self._of_request
        return Guide(compiled(stated, by).deep_copy(), self._ends, self._tokens.vocab_size, by)

    def token_bytes(self, token: int) -> bytes:
        """A token's bytes. A character may be split over several tokens."""
        return bytes(self._tokens.decode_bytes([token]))

    def _by_schema(self, schema: str, by: ConstrainedBy) -> LLMatcher:
        try:
            grammar = LLMatcher.grammar_from_json_schema(restricted(json.loads(schema)))
        except ValueError as error:  # it holds a number that llguidance cannot
            raise _unsupported(str(error), by) from error
        return self._new_matcher(grammar, by)

    def _new_matcher(self, grammar: str, by: ConstrainedBy) -> LLMatcher:
        # llguidance bounds the size of a grammar and the work of a step, and lets other threads run meanwhile. Its
        # longer messages repeat parts of the schema, which may be the candidate's.
        limits = _LIMITS if by in ("response_format.json_schema", "tools") else None
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _unsupported(matcher.get_error(), by)
        return matcher


class Guide:
    """Restricts one answer to its schema or grammar. ends: int32 [V / 32 rounded up], a bit for each token that ends an
    answer, the lowest bit first. tokens: how many the matcher knows, V or more. by: where the schema or grammar comes
    from."""

    def __init__(self, matcher: LLMatcher, ends: np.ndarray, tokens: int, by: ConstrainedBy = "constrain") -> None:
        self.matcher, self._ends, self.tokens, self._by = matcher, ends, tokens, by

    def follow(self, token: int) -> None:
        """Advance by the answer's next token. Raises UsageError if the schema turns out too complex."""
        self.check()
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
            self.check()

    def limit_ends_(self, bits: np.ndarray) -> None:
        """Allow all tokens that end an answer where it may end here, and none of them elsewhere, in place.

        llguidance knows of one of them, and takes another for text if its name is not special. bits: as `ends`.
        """
        if self.matcher.is_accepting() or self.matcher.is_error():
            bits |= self._ends
        else:
            bits &= ~self._ends

    def check(self) -> None:
        """Raise UsageError if the allowed tokens could not be computed: llguidance then allows the end token alone."""
        if self.matcher.is_error():
            raise _unsupported(self.matcher.get_error(), self._by)


def forbid_(scores: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Set the scores [N, V] of tokens that are not allowed in some rows to minus infinity, in place.

    bits: int32 [len(rows), V / 32 rounded up], a bit for each token, the lowest bit first; 1: allowed.
    """
    places = torch.arange(scores.shape[1])
    allowed = bits[:, places // 32] >> (places % 32).to(bits.dtype) & 1
    scores[rows] = scores[rows].masked_fill_(allowed == 0, float("-inf"))


def mask_disallowed_(
    scores: Tensor, guides: Sequence[Guide | None], forbid_: Callable[[Tensor, Tensor, Tensor], None] = forbid_
) -> None:
    """Set the logits [N, vocabulary] of tokens that a row's guide does not allow to minus infinity, in place.

    forbid_: does so for the rows with guides; in PyTorch by default.
    """
    guided = [(row, guide) for row, guide in enumerate(guides) if guide is not None]
    if not guided:
        return
    bits = allocate_token_bitmask(len(guided), guided[0][1].tokens)
    wanted = [(guide.matcher, number) for number, (_, guide) in enumerate(guided)]
    fill_next_token_bitmask_par(_threads(), wanted, bits)
    bits = np.ascontiguousarray(bits[:, : (scores.shape[1] + 31) // 32])
    for allowed, (_, guide) in zip(bits, guided, strict=True):
        guide.limit_ends_(allowed)
    forbid_(scores, torch.tensor([row for row, _ in guided]), torch.from_numpy(bits))


@cache
def _threads() -> LLExecutor:
    return LLExecutor(torch.get_num_threads())


def _unsupported(said: str, by: ConstrainedBy) -> UsageError:
    what, fix = _AT_FAULT[by]
    first = said.partition("\n")[0][:300]
    return UsageError(f"answers cannot be held to {what}: {first}", where=by, fix=fix)
