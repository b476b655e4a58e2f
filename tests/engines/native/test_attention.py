"""Attention in one kernel each way, on processors with tiles: against the path for all others, and against fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.engines.native import kernels as native
from tunesmith.engines.native.network import attention
from tunesmith.engines.native.network.attention import Layout
from tunesmith.engines.native.network.network import Layer, Network, Rotary, Shape
from tunesmith.engines.native.network.products import PackedLinear

_library = native.library()
pytestmark = pytest.mark.usefixtures("compiled_kernels")
needs_tiles = pytest.mark.skipif(_library is not None and not _library.tiles(), reason="no tiles in this processor")

# prefix, lengths, key/value heads, group, head size
CASES = [
    pytest.param(25, (58, 60, 40, 1), 3, 3, 64, id="ragged rows"),
    pytest.param(0, (70, 3, 33), 2, 8, 128, id="no prefix, groups of eight"),
    pytest.param(32, (32, 64), 2, 1, 64, id="nothing to pad"),
    pytest.param(0, (1,), 1, 1, 32, id="one token"),
    pytest.param(40, (7,) * 20, 1, 3, 32, id="more rows than shares"),
    pytest.param(90, (230, 5), 1, 8, 96, id="weights held a chunk at a time"),
]


def _layout(prefix: int, lengths: tuple[int, ...], kv: int, group: int, size: int, **differs: Any) -> Layout:
    shape = Shape(1, kv * group * size, kv * group, kv, size, 1, 1e-5, size**-0.5, score_cap=differs.get("cap"))
    norm, embedding = torch.ones(1), torch.ones(1, 1)
    layer = Layer({}, norm, norm, None, None, window=differs.get("window"))
    rotary = Rotary(10_000 ** -(torch.arange(0, size, 2) / size) * differs.get("turning", 1), 1.0)
    network = Network(shape, embedding, PackedLinear(embedding), False, norm, (layer,), (rotary,))
    own = [torch.arange(prefix, prefix + length) for length in lengths]
    return Layout(prefix, lengths, torch.cat([torch.arange(prefix), *own]), network)


def _inputs(layout: Layout, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """qkv and a gradient of the mixed values."""
    draw = torch.Generator().manual_seed(0)
    heads, size, count = layout.kv * layout.group, layout.shape.head, len(layout.row_of)
    qkv = torch.randn(count, (heads + 2 * layout.kv) * size, generator=draw) * scale
    return qkv.bfloat16(), torch.randn(count, heads * size, generator=draw).bfloat16()


def _both_ways(how: Any, layout: Layout, qkv: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    asked = qkv.clone().requires_grad_()
    out = how.apply(asked, layout, 0)
    out.backward(gradient)
    assert asked.grad is not None
    return out.detach(), asked.grad


def _parts(layout: Layout, to_qkv: Tensor) -> tuple[Tensor, ...]:
    heads = [layout.shape.head * count for count in (layout.kv * layout.group, layout.kv, layout.kv)]
    return to_qkv.float().split(heads, 1)


@needs_tiles
@pytest.mark.parametrize(("prefix", "lengths", "kv", "group", "size"), CASES)
def test_tiles_agree_with_block_products(prefix: int, lengths: tuple[int, ...], kv: int, group: int, size: int) -> None:
    """Within 1% of the values' size of fp32, and no further from it than a bf16 path that rounds more often; each
    token within 3% of the largest token, lest a single one be wrong."""
    layout = _layout(prefix, lengths, kv, group, size)
    qkv, gradient = _inputs(layout)
    wide, to_wide = _both_ways(attention._Attention, layout, qkv.float(), gradient.float())
    other, to_other = _both_ways(attention._Attention, layout, qkv, gradient)
    made, to_made = _both_ways(attention._OnTiles, layout, qkv, gradient)
    triples = zip(
        (made.float(), *_parts(layout, to_made)),
        (other.float(), *_parts(layout, to_other)),
        (wide, *_parts(layout, to_wide)),
        strict=True,
    )
    for ours, theirs, exact in triples:
        error, size_of = (ours - exact).norm(), exact.norm()
        assert error <= 0.01 * size_of + 1e-3
        assert error <= 1.5 * (theirs - exact).norm() + 1e-3
        assert (ours - exact).norm(dim=1).max() <= 0.03 * exact.norm(dim=1).max() + 1e-3

    _by_any_number_of_threads(layout)


def _by_any_number_of_threads(layout: Layout) -> None:
    """Attention on tiles gives the same bits."""
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(_both_ways(attention._OnTiles, layout, *_inputs(layout)))
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert all(map(torch.equal, found[0], each))


@needs_tiles
def test_a_row_does_not_depend_on_other_rows() -> None:
    """And nothing reaches a token from behind it, or from another row."""
    together, alone = _layout(20, (30, 41, 9), 2, 3, 64), _layout(20, (41,), 2, 3, 64)
    qkv, _ = _inputs(together)
    out = attention._OnTiles.apply(qkv, together, 0)
    assert torch.equal(out[50:91], attention._OnTiles.apply(torch.cat((qkv[:20], qkv[50:91])), alone, 0)[20:])
    changed = qkv.clone()
    changed[70:] *= -30
    assert torch.equal(attention._OnTiles.apply(changed, together, 0)[:70], out[:70])


@needs_tiles
def test_large_scores_and_nan() -> None:
    """Scores hundreds apart give weights of exactly 0 and 1; a NaN comes out as one, so that training sees it."""
    layout = _layout(10, (40, 33), 1, 2, 64, turning=0)  # else rounding the turned keys chooses other values
    qkv, gradient = _inputs(layout, 40.0)
    made, to_made = _both_ways(attention._OnTiles, layout, qkv, gradient)
    wide, _ = _both_ways(attention._Attention, layout, qkv.float(), gradient.float())
    assert made.isfinite().all()
    assert to_made.isfinite().all()
    assert (made.float() - wide).norm() <= 0.01 * wide.norm()
    qkv[30] = float("nan")
    made, to_made = _both_ways(attention._OnTiles, layout, qkv, gradient)
    assert made[30:50].isnan().all()
    assert made[:10].isfinite().all()
    assert made[50:].isfinite().all(), "another row"
    assert to_made[:10].isnan().any(), "through the prefix it reaches what all rows share"


@needs_tiles
def test_when_tiles_are_used() -> None:
    one = (8, (12,), 1, 2, 32)
    qkv, _ = _inputs(_layout(*one))
    assert _layout(*one).on_tiles(qkv, 0)
    assert _layout(*one, window=20).on_tiles(qkv, 0), "a window wider than all there is"
    assert not _layout(*one, window=19).on_tiles(qkv, 0)
    assert not _layout(*one, cap=30.0).on_tiles(qkv, 0)
    assert not _layout(*one).on_tiles(qkv.float(), 0)
    assert not _layout(8, (12,), 1, 2, 48).on_tiles(qkv, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_after_the_end_of_a_row_hold_zeros(dtype: torch.dtype) -> None:
    layout = _layout(4, (2, 5, 1), 2, 3, 8)
    qkv, gradient = (each.to(dtype) for each in _inputs(layout))
    torch.use_deterministic_algorithms(True)  # new memory is then full of NaN
    try:
        blocks, (_, gradients) = layout.split(qkv, 0), layout.queries(gradient)
    finally:
        torch.use_deterministic_algorithms(False)
    for each in (*blocks[3:], gradients):
        slots = each.view(2, 3, -1, 5, 8)
        assert slots.isfinite().all()
        assert not slots[:, 0, :, 2:].any()
        assert not slots[:, 2, :, 1:].any()
        assert slots[:, 1].any()
