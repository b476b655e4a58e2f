"""Rows of a batch computed end to end, without padding, and with their common prefix computed once.

Everything but attention treats tokens one by one, so the rows can simply follow each other, as one row whose
`position_ids` restart. For attention the rows are put side by side, and each reads the prefix and itself. This is an
attention implementation for transformers' AttentionInterface, so that the families' own masks (sliding windows, chunks)
hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tunesmith.engines.batch import Batch, Packed, lay_out, read_lengths
from tunesmith.engines.hf import libraries
from tunesmith.models.rendering import Rendered

FLASH = "flash_attention_2"
_NAME = "tunesmith_packed"
# Tokens of the prefix and the longest row, during a forward pass of packed rows: the mask of more is never read, and
# would take the square of all tokens.
_read: ContextVar[int | None] = ContextVar("read", default=None)


def outputs(module: Any, batch: Batch) -> Tensor:
    """What a module gives [N, vocabulary] at the places of a batch that predict a label. `enable` has returned True for
    the module."""
    packed = Packed(batch, module.device)
    given = _bounds(batch, module.device) if module.config._attn_implementation == FLASH else {"packed": packed}
    before = _read.set(packed.prefix + packed.padded.shape[1])
    try:
        logits: Tensor = module(
            input_ids=packed.ids,
            position_ids=packed.positions,
            use_cache=False,
            logits_to_keep=packed.predicts,
            **given,
        ).logits
    finally:
        _read.reset(before)
    return logits[0]


def _bounds(batch: Batch, device: torch.device) -> dict[str, Any]:
    """What transformers' flash attention reads of rows that follow each other: where each begins and the last one ends.
    Without it, every layer would look for the places where the positions restart."""
    rows = read_lengths(batch).sort(descending=True).values
    ends = functional.pad(rows.cumsum(0), (1, 0)).to(device, torch.int32)
    longest = int(rows[0])
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def enable(module: Any, rows: Sequence[Rendered], exact: float) -> bool:
    """Whether packed rows get the same logits as each alone. If so, the module is changed such that `outputs` works
    with it.

    exact: largest error, as a share of how much the logits change if each row reads the ones before it. Flash attention
    knows no common prefix.
    """
    before = module.config._attn_implementation
    if before not in ("sdpa", FLASH):
        return False

    def logits(ids: Tensor, places: Tensor) -> Tensor:
        given: Tensor = module(input_ids=ids.to(module.device), use_cache=False).logits
        return given[0, places.to(module.device)]

    probe, each = lay_out(rows, share=before != FLASH), [lay_out([row]) for row in rows]
    packed = Packed(probe)
    alone = torch.cat([logits(one.ids[None], one.predicts) for one in each])
    most = exact * float((logits(packed.ids, packed.predicts) - alone).abs().max())  # as if each row read those before
    if before == "sdpa":
        module.set_attn_implementation(_register())
    with suppress(Exception):  # each family fails in its own way where it does not know the arguments
        if float((outputs(module, probe) - alone).abs().max()) <= most:
            return True
    if before == "sdpa":
        module.set_attn_implementation(before)
    return False


class _Picked(torch.autograd.Function):
    """index_select at places of which none comes twice. torch's own backward pass adds number by number on a CPU."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(given)
        return given.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.count, *gradient.shape[1:]).index_copy_(0, places, gradient), None


@cache
def _register() -> str:
    """The name of the attention implementation that knows the argument `packed` of a forward pass. Without the argument
    it is `sdpa`."""
    transformers = libraries.transformers()
    # sdpa is looked up here, because torch.compile follows what an attention calls.
    transformers.AttentionInterface.register(_NAME, partial(_attention, transformers.AttentionInterface()["sdpa"]))
    transformers.AttentionMaskInterface.register(_NAME, _mask)
    return _NAME


def _mask(*, q_length: int, kv_length: int, **options: Any) -> Tensor | None:
    """What transformers' SDPA reads, but for packed rows only the part of the prefix and the longest row."""
    size = _read.get()
    if size is not None:
        q_length = kv_length = size
    mask: Tensor | None = libraries.transformers().masking_utils.sdpa_mask(
        q_length=q_length, kv_length=kv_length, **options
    )
    return mask


def _attention(
    sdpa: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: Packed | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query, key and value are [1, heads, T, size], the result [1, T, heads, size].

    attention_mask: [1, 1, S, S] for the S tokens of the prefix and the longest row, which hold for every row.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mixed: Tensor = sdpa(module, query, key, value, mask, **options)[0]
        return mixed

    if packed is None or len(packed.padded) == 1:
        return attend(query, key, value, attention_mask), None
    assert attention_mask is not None
    prefix, (rows, longest), mask = packed.prefix, packed.padded.shape, attention_mask

    def side_by_side(tensor: Tensor) -> Tensor:
        tokens = tensor[0].transpose(0, 1)
        padded = tokens.new_zeros(rows * longest, *tokens.shape[1:]).index_copy(0, packed.real, tokens)
        return padded.view(rows, longest, *tokens.shape[1:]).transpose(1, 2)

    parts = (each.split([prefix, each.shape[2] - prefix], 2) for each in (query, key, value))
    (first_query, query), (first_key, key), (first_value, value) = parts

    # Recomputed in the backward pass: a copy of a long prefix for each row and layer would take too much memory.
    def attend_rows(query: Tensor, *keys_and_values: Tensor) -> Tensor:
        keys, values = (
            torch.cat([first.expand(rows, -1, -1, -1), side_by_side(rest)], 2)
            for first, rest in zip(keys_and_values[:2], keys_and_values[2:], strict=True)
        )
        mixed = attend(side_by_side(query), keys, values, mask[:, :, prefix:]).flatten(0, 1)
        kept: Tensor = _Picked.apply(mixed, packed.real)
        return kept[None]

    given_parts = (query, first_key, first_value, key, value)
    given: Tensor = checkpoint(attend_rows, *given_parts, use_reentrant=False, preserve_rng_state=False)
    if prefix:
        given = torch.cat([attend(first_query, first_key, first_value, mask[:, :, :prefix, :prefix]), given], 1)
    return given, None
