"""The compiled kernels against the same arithmetic in PyTorch, and the tile products against float ones.

Those of a training are compared with PEFT's and PyTorch's gradients in tests/engines/test_training.py, on both paths.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.core.errors import UsageError
from tunesmith.engines.native import kernels as native
from tunesmith.engines.native.network import attention, ops, products
from tunesmith.engines.native.network.attention import Layout
from tunesmith.engines.native.network.network import Layer, Network, Rotary, Shape
from tunesmith.engines.native.network.products import PackedLinear

BF16 = torch.bfloat16
needs_kernels = pytest.mark.usefixtures("compiled_kernels")

# Sizes that fit whole registers and tiles, and some that do not.
PAGED = pytest.mark.parametrize(("prefix", "group", "size", "page"), [
    (0, 2, 8, 16), (21, 2, 8, 16), (0, 3, 64, 32), (21, 3, 64, 32), (64, 3, 64, 32), (21, 5, 32, 32), (64, 1, 40, 48),
])  # fmt: skip


def _both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> tuple[Any, Any]:
    compiled = run()
    monkeypatch.setattr(native, "library", lambda: None)
    return compiled, run()


def _same(one: Tensor, other: Tensor) -> None:
    close = {torch.float32: (2e-5, 2e-6), torch.bfloat16: (2e-2, 2e-2), torch.long: (0, 0)}[one.dtype]
    torch.testing.assert_close(one, other, rtol=close[0], atol=close[1])


def _random(dtype: torch.dtype, *size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _in_pages(k: Tensor, v: Tensor, page: int) -> ops.PrefixPages:
    """Keys and values [K, P, D] copied to pages, the last one filled up with zeros."""
    length, packing = k.shape[1], 4 // k.dtype.itemsize
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, -length % page)) for x in (k, v))
    k, v = (x.unflatten(1, (-1, page)).transpose(0, 1) for x in (k, v))
    keys = k.unflatten(3, (-1, packing)).permute(0, 1, 3, 2, 4)
    return ops.PrefixPages(keys.contiguous(), v.unflatten(2, (-1, packing)).transpose(3, 4).contiguous(), length)


@needs_kernels
def test_results_written_past_the_caches() -> None:
    """Over a megabyte: written past them."""
    gate_up, gradient = _random(torch.bfloat16, 700, 2 * 800), _random(torch.bfloat16, 700, 800, seed=1)
    there, (back, again) = ops.gated(gate_up), ops.gated_backward(gradient, gate_up, again=True)
    assert again is not None
    assert torch.equal(again, there)
    for first in range(0, 700, 100):
        part = slice(first, first + 100)
        assert torch.equal(there[part], ops.gated(gate_up[part]))
        assert torch.equal(back[part], ops.gated_backward(gradient[part], gate_up[part])[0])
    product = products.PackedLinear(_random(torch.bfloat16, 960, 64))
    x = _random(torch.bfloat16, 700, 64)
    assert torch.equal(product(x)[64:96], product(x[64:96]))


@needs_kernels
@PAGED
def test_a_prompt_in_parts(monkeypatch: pytest.MonkeyPatch, prefix: int, group: int, size: int, page: int) -> None:
    """On tiles the same bits wherever it is divided, and whatever was left behind it in its pages. Also token by token,
    as a decoding step computes it."""
    tokens, kv, first = 75, 2, 3  # tokens of another row come first
    qkv, angles = _random(BF16, first + tokens, kv * (group + 2) * size), torch.randn(first + tokens, size // 2)
    pages = torch.randperm(12, generator=torch.Generator().manual_seed(1))[: tokens // page + 1]
    shared = [_random(BF16, kv, prefix, size, seed=seed) for seed in (3, 4)]
    early = _in_pages(shared[0], shared[1], page) if prefix else None

    def run(*cuts: int, prompt: bool = True) -> Tensor:
        keys, values = (
            torch.full((13, *each), float("nan"), dtype=BF16) for each in ops.page_shapes(kv, page, size, BF16)
        )
        parts = []
        for start, end in zip((0, *cuts), (*cuts, tokens), strict=True):
            rows = [*range(first), *range(first + start, first + end)]
            table = torch.full((len(rows), len(pages)), 12)
            table[first:] = pages
            lengths = torch.tensor([*range(first), *range(start, end)])
            places = ops.Places(table, lengths, kv, group, size, page)
            q = ops.decode_split(qkv[rows], angles[rows].cos(), angles[rows].sin(), keys, values, places)
            out = torch.zeros(len(rows), kv * group * size, dtype=BF16)
            ops.decode_mix(q, early, keys, values, places, slice(first, len(rows)), out, 0.3, prompt=prompt)
            assert not out[:first].any(), "another row"
            parts.append(out[first:])
        return torch.cat(parts)

    whole = run()
    _same(whole, run(prompt=False))
    parts = run(1, 33, 34, 70)
    _same(whole, parts)
    if native.library().tiles() and (size % 32, page) == (0, 32):
        assert torch.equal(whole, parts)
        monkeypatch.setattr(ops, "_threads", lambda: 3)
        assert torch.equal(whole, run())
    compiled, portable = _both(monkeypatch, lambda: run(40))
    _same(compiled, portable)


@needs_kernels
def test_disallowed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = _random(BF16, 3, 100)
    bits = torch.tensor([[0b101, -1, 0, 0], [-1, 1 << 31 - 1, 7, 0]], dtype=torch.int32)

    def run() -> Tensor:
        made = scores.clone()
        ops.forbid_(made, torch.tensor([2, 0]), bits)
        return made

    for masked in _both(monkeypatch, run):
        allowed = [[*range(32), 62, 64, 65, 66], list(range(100)), [0, 2, *range(32, 64)]]
        assert [row.isfinite().nonzero()[:, 0].tolist() for row in masked] == allowed


@pytest.mark.parametrize(("rows", "out", "into", "plain"), [
    (1, 32, 32, False), (31, 96, 320, False), (32, 256, 320, False), (77, 64, 4160, False), (1, 64, 4160, False),
    (77, 32, 32, False), (77, 256, 320, False), (31, 96, 320, True), (32, 64, 4160, True),
])  # fmt: skip
def test_products_with_and_without_factors(rows: int, out: int, into: int, plain: bool) -> None:
    """On processors with tiles this is their test; elsewhere of their stand-in. 4160 is deeper than a group."""
    weight, bias = _random(torch.bfloat16, out, into) / into**0.5, _random(torch.bfloat16, out, seed=1)
    product = products.PackedLinear(weight, bias, plain=plain)
    pair = products.LowRankFactors(
        _random(torch.bfloat16, 32, into, seed=2) / into**0.5, _random(torch.bfloat16, 32, out, seed=3)
    )
    x, gradient = _random(torch.bfloat16, rows, into, seed=4), _random(torch.bfloat16, rows, out, seed=5)
    assert torch.equal(product.weight, weight)
    wide = x.float() @ weight.float().t() + bias.float()
    torch.testing.assert_close(product(x).float(), wide, rtol=2e-2, atol=2e-2)
    low, up = pair.low(x), pair.low_gradient(gradient)
    torch.testing.assert_close(low.float(), x.float() @ pair.a.float().t(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(product(x, low, pair).float(), wide + low.float() @ pair.c.float(), rtol=2e-2, atol=0.1)
    back = gradient.float() @ weight.float()
    torch.testing.assert_close(product.input_gradient(gradient).float(), back, rtol=2e-2, atol=2e-2)
    both = back + up.float() @ pair.a.float()
    torch.testing.assert_close(product.input_gradient(gradient, up, pair).float(), both, rtol=2e-2, atol=0.1)


@pytest.mark.parametrize(
    ("rows", "rank", "width"),
    [(1, 32, 32), (31, 96, 160), (64, 512, 832), (77, 96, 160), (300, 512, 832), (300, 32, 32)],
)
def test_the_gradient_of_a_factor(rows: int, rank: int, width: int) -> None:
    low, x = _random(torch.bfloat16, rows, rank), _random(torch.bfloat16, rows, width, seed=1)
    out = torch.full((rank, width), float("nan"), dtype=torch.bfloat16)
    products.outer(low, x, out)
    torch.testing.assert_close(out.float(), low.float().t() @ x.float(), rtol=1e-2, atol=1e-2)


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_release_threads_ends_the_workers() -> None:
    """Helpers of a thread that does not compute any more would keep those of another from waiting awake."""
    script = """
import os, time, torch
from tunesmith.engines.native.network import ops
from tunesmith.engines.native import runtime
torch.set_num_threads(3)
count = lambda: len(os.listdir("/proc/self/task"))
work = lambda: ops.gated(torch.ones(64, 32, dtype=torch.bfloat16))
before, made = count(), work()
during = count()
runtime.release_threads()
until = time.monotonic() + 300
while (after := count()) > before and time.monotonic() < until:
    time.sleep(0.01)  # they are told to end, and end when a core is free
assert torch.equal(work(), made)
print(during - before, after - before, count() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "0", "2"]


@pytest.mark.slow
@needs_kernels
def test_a_limit_on_threads_changes_no_result() -> None:
    """OpenMP may give fewer; a deep product, summed group by group, keeps sums for every panel that a thread has."""
    script = """
import hashlib, torch
from tunesmith.engines.native.network.products import PackedLinear
torch.set_num_threads(4)
drawn = lambda *size: torch.randn(*size, generator=torch.Generator().manual_seed(0)).bfloat16()
product = PackedLinear(drawn(8192, 1024))
found = product.input_gradient(drawn(70, 8192)), product(drawn(70, 1024))
print([hashlib.sha256(each.view(torch.int16).numpy().tobytes()).hexdigest() for each in found])
"""

    def told(**environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert told(OMP_THREAD_LIMIT="1") == told()


def test_which_kernels_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is said where there are none, though nobody chose that."""

    def found(**environment: str) -> tuple[str, str | None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            loaded = native._loaded.__wrapped__()  # as a new process finds it
            patch.setattr(native, "_loaded", lambda: loaded)
            return native.identity(), native.slowness()

    assert found(TUNESMITH_KERNELS="portable") == ("portable", None)
    identity, slow = found(CXX="false")
    assert identity == "portable"
    assert slow is not None
    assert slow.startswith("false could not compile the kernels: training and answering will be several times slower")
    (tmp_path / "damaged.so").write_bytes(b"no library")
    with monkeypatch.context() as patch:
        patch.setattr(native, "_built", lambda: tmp_path / "damaged.so")
        assert found()[0] == "portable"
    with monkeypatch.context() as patch:
        patch.delenv("CXX", raising=False)
        patch.setattr(native.shutil, "which", lambda _: None)
        identity, slow = found()
        assert identity == "portable", "a missing compiler is no error"
        assert slow is not None
        assert "no C++ compiler was found" in slow
        assert "apt install g++" in slow
    with pytest.raises(UsageError, match="fast"):
        found(TUNESMITH_KERNELS="fast")


@pytest.mark.slow
@needs_kernels
def test_a_library_is_compiled_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = native._built()
    assert (native.slowness(), kept.stem) == (None, native.identity()), "of this machine's compiler and processor"
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", ["-O0" if flag == "-O3" else flag for flag in native._FLAGS])
    made = native._built()
    assert made.stem != kept.stem, "flags are a part of the name"
    written = made.stat().st_mtime_ns
    assert (native._built(), made.stat().st_mtime_ns) == (made, written)
    assert [*(tmp_path / "kernels").iterdir()] == [made]


# Attention in one kernel each way, on processors with tiles: against the path for all others, and against fp32


_library = native.library()
needs_tiles = pytest.mark.skipif(_library is None or not _library.tiles(), reason="no tiles in this processor")

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
    def fits(layout: Layout, like: Tensor) -> bool:
        return attention.fits_tiles(layout.shape, layout.layers[0].window, layout.prefix + layout.longest, like)

    one = (8, (12,), 1, 2, 32)
    qkv, _ = _inputs(_layout(*one))
    assert fits(_layout(*one), qkv)
    assert fits(_layout(*one, window=20), qkv), "a window wider than all there is"
    assert not fits(_layout(*one, window=19), qkv)
    assert not fits(_layout(*one, cap=30.0), qkv)
    assert not fits(_layout(*one), qkv.float())
    assert not fits(_layout(8, (12,), 1, 2, 48), qkv)


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
