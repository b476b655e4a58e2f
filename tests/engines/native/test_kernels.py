"""The compiled kernels against the same arithmetic in PyTorch, and the tile products against float ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import write_model
from tunesmith.core.errors import UsageError
from tunesmith.engines.native import kernels as native
from tunesmith.engines.native.network import ops, products
from tunesmith.engines.native.network.attention import Layout
from tunesmith.engines.native.network.weights import load_network

DTYPES = [torch.float32, torch.bfloat16]
needs_kernels = pytest.mark.usefixtures("compiled_kernels")

BOTH = pytest.mark.parametrize("dtype", DTYPES)
F32, BF16 = DTYPES
# Sizes that fit whole registers and tiles, and some that do not.
PAGED = pytest.mark.parametrize(("dtype", "prefix", "group", "size", "page"), [
    (F32, 0, 2, 8, 16), (F32, 21, 3, 64, 32), (F32, 64, 1, 40, 48), (BF16, 21, 2, 8, 16), (BF16, 0, 3, 64, 32),
    (BF16, 64, 3, 64, 32), (BF16, 21, 5, 32, 32), (BF16, 64, 1, 40, 48),
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
@pytest.mark.parametrize(("dtype", "width"), [(F32, 1), (BF16, 7), (F32, 16), (F32, 33), (BF16, 33), (BF16, 576)])
def test_norms(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int) -> None:
    x, y, weight = _random(dtype, 5, width), _random(dtype, 5, width, seed=1), _random(dtype, width, seed=2)
    above, gradient = _random(dtype, 5, width, seed=3), _random(dtype, 5, width, seed=4)

    def run() -> list[Tensor]:
        total, out, scale = ops.add_norm(x, y, weight, 1e-5, 1.0)
        alone = ops.add_norm(x, None, weight, 1e-5)[1]
        with_above, again = ops.norm_backward(gradient, total, weight, scale, above, 1.0, again=True)
        assert again is not None
        assert torch.equal(again, out), "a backward pass makes the output again to the bit"
        without, none = ops.norm_backward(gradient, total, weight, scale, None)
        assert none is None
        return [total, out, scale, alone, with_above, without]

    for one, other in zip(*_both(monkeypatch, run), strict=True):
        _same(one, other)


@needs_kernels
@pytest.mark.parametrize(("dtype", "width"), [(F32, 1), (BF16, 15), (F32, 15), (BF16, 64)])
def test_gated_with_large_values(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int) -> None:
    gate_up, gradient = _random(dtype, 4, 2 * width) * 30, _random(dtype, 4, width, seed=1)

    def run() -> list[Tensor]:
        out, (back, again) = ops.gated(gate_up), ops.gated_backward(gradient, gate_up, again=True)
        assert again is not None
        assert torch.equal(again, out), "a backward pass makes the output again to the bit"
        assert torch.equal(back, ops.gated_backward(gradient, gate_up)[0])
        return [out, back]

    for one, other in zip(*_both(monkeypatch, run), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=0.15)


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "prefix", "longest"), [(F32, 0, 1), (BF16, 0, 19), (F32, 5, 16), (F32, 17, 33), (BF16, 17, 33)]
)
def test_softmax(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, prefix: int, longest: int) -> None:
    heads, rows, group = 2, 3, 2
    scores = _random(dtype, heads, rows * group * longest, prefix, seed=1) * 20
    own = _random(dtype, heads * rows, group * longest, longest) * 20
    d_shared, d_own = _random(dtype, *scores.shape, seed=2), _random(dtype, *own.shape, seed=3)

    def run() -> list[Tensor]:
        first, second = scores.clone() if prefix else None, own.clone()
        ops.softmax_(first, second, 0.125)
        to_first, to_second = d_shared.clone() if prefix else None, d_own.clone()
        ops.softmax_backward_(first, second, to_first, to_second, 0.125)
        return [x for x in (first, second, to_first, to_second) if x is not None]

    compiled, portable = _both(monkeypatch, run)
    for one, other in zip(compiled, portable, strict=True):
        _same(one, other)
    total = sum(x.float().sum() for x in compiled[: 2 if prefix else 1])
    assert float(total) == pytest.approx(heads * rows * group * longest, rel=0.01), "every row is a distribution"


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
@pytest.mark.parametrize(
    ("dtype", "prefix", "lengths"), [(F32, 0, (3,)), (BF16, 4, (2, 5, 1)), (F32, 4, (2, 5, 1)), (BF16, 3, (4, 4))]
)
def test_tokens_are_copied_to_blocks_and_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype, prefix: int, lengths: tuple[int, ...]
) -> None:
    network = load_network(write_model(tmp_path / "m"), dtype)
    count = prefix + sum(lengths)
    layout = Layout(prefix, lengths, torch.arange(count), network)
    qkv = _random(dtype, count, sum(network.parts("qkv")))
    mixed = _random(dtype, count, network.parts("qkv")[0], seed=1)

    def run() -> list[Tensor]:
        blocks = layout.split(qkv, 0)
        return [*blocks, layout.join(blocks, 0), *layout.queries(mixed), layout.tokens(*layout.queries(mixed))]

    compiled, portable = _both(monkeypatch, run)
    for one, other in zip(compiled, portable, strict=True):
        _same(one, other)
    assert torch.equal(compiled[-1], mixed), "nothing is lost on the way"
    _same(compiled[6], qkv)


@needs_kernels
@BOTH
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    scores, labels = _random(dtype, 6, 301) * 8, torch.arange(6) * 50
    share = torch.tensor([0.5, 0.25, 0.0, 1.0, 0.125, 0.1])

    def run() -> list[Tensor]:
        made = scores.clone()
        return [ops.cross_entropy_(made, labels, share), made, ops.cross_entropy_(scores.clone(), labels, None)]

    compiled, portable = _both(monkeypatch, run)
    torch.testing.assert_close(compiled[0], portable[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled[2], portable[2], rtol=1e-3, atol=1e-4)
    _same(compiled[1], portable[1])


@needs_kernels
@PAGED
def test_a_decoding_step(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, prefix: int, group: int, size: int, page: int
) -> None:
    rows, kv, behind = 14, 2, slice(1, 14)  # more rows than one block of tiles holds
    qkv, angles = _random(dtype, rows, kv * (group + 2) * size), torch.randn(rows, size // 2)
    table = torch.tensor(
        [[4, 0, 0], [9, 0, 0], [2, 7, 3], [8, 1, 0], *([10 + 2 * row, 11 + 2 * row, 0] for row in range(10))]
    )
    lengths = torch.tensor([5, 0, 2 * page + 1, page, *range(page - 5, page + 5)])
    shapes = ops.page_shapes(kv, page, size, dtype)
    shared = [_random(dtype, kv, prefix, size, seed=seed) for seed in (3, 4)]

    def run() -> list[Tensor]:
        places = ops.Places(table, lengths.clone(), kv, group, size, page)
        keys, values = (_random(dtype, 30, *shape, seed=seed) for seed, shape in enumerate(shapes))
        q = ops.decode_split(qkv, angles.cos(), angles.sin(), keys, values, places)
        out = torch.zeros(rows, kv * group * size, dtype=dtype)
        early = _in_pages(shared[0], shared[1], page) if prefix else None
        ops.decode_mix(q, early, keys, values, places, behind, out, 0.3)
        assert not out[0].any(), "a row of another group"
        return [q, keys, values, out]

    compiled, portable = _both(monkeypatch, run)
    for one, other in zip(compiled, portable, strict=True):
        _same(one, other)
    q, keys, values, out = compiled
    plain = ops.places_of(keys, values)
    for head in range(kv * group):  # row 2 by hand, in three pages
        pages = [[each[number, head // group] for number in (2, 7, 3)] for each in plain]
        own = (torch.cat(each)[: 2 * page + 2] for each in pages)
        k, v = (torch.cat((early[head // group], one)).float() for early, one in zip(shared, own, strict=True))
        weights = torch.softmax(q[head // group, 2, head % group].float() @ k.t() * 0.3, 0)
        _same(out[2, head * size : (head + 1) * size], (weights @ v).to(dtype))


@needs_kernels
@BOTH
def test_decoding_a_row_does_not_depend_on_other_rows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """To the last bit, by any number of threads, and whatever another row left behind it in its page."""
    rows, kv, group, size, page = 25, 2, 3, 64, 32
    q = _random(dtype, kv, rows, group, size)
    keys, values = (_random(dtype, rows, *each, seed=1) for each in ops.page_shapes(kv, page, size, dtype))
    early = _in_pages(_random(dtype, kv, 37, size, seed=2), _random(dtype, kv, 37, size, seed=3), page)

    def mixed(chosen: range, threads: int = 1) -> Tensor:
        monkeypatch.setattr(ops, "_threads", lambda: threads)
        table = torch.tensor([[row] for row in chosen])
        places = ops.Places(table, torch.tensor([row % page for row in chosen]), kv, group, size, page)
        mine, out = (
            q[:, chosen.start : chosen.stop].contiguous(),
            torch.empty(len(chosen), kv * group * size, dtype=dtype),
        )
        ops.decode_mix(mine, early, keys, values, places, slice(0, len(chosen)), out, 0.2)
        return out

    every = mixed(range(rows))
    assert torch.equal(every, mixed(range(rows), threads=3))
    for row in (0, 7, 24):
        assert torch.equal(every[row], mixed(range(row, row + 1))[0])
    # What lies behind each row's places is not read.
    after = torch.arange(page)[None] > (torch.arange(rows) % page)[:, None]
    plain_k, plain_v = ops.places_of(keys, values)
    for plain in (plain_k, plain_v):
        plain.masked_fill_(after[:, None, :, None], float("nan"))
    pair = keys.shape[4]
    keys = plain_k.unflatten(3, (-1, pair)).permute(0, 1, 3, 2, 4).contiguous()
    values = plain_v.unflatten(2, (-1, pair)).transpose(3, 4).contiguous()
    assert torch.equal(every, mixed(range(rows)))


@needs_kernels
@PAGED
def test_a_prompt_in_parts(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, prefix: int, group: int, size: int, page: int
) -> None:
    """On tiles the same bits wherever it is divided, and whatever was left behind it in its pages."""
    tokens, kv, first = 75, 2, 3  # tokens of another row come first
    qkv, angles = _random(dtype, first + tokens, kv * (group + 2) * size), torch.randn(first + tokens, size // 2)
    pages = torch.randperm(12, generator=torch.Generator().manual_seed(1))[: tokens // page + 1]
    shared = [_random(dtype, kv, prefix, size, seed=seed) for seed in (3, 4)]
    early = _in_pages(shared[0], shared[1], page) if prefix else None

    def run(*cuts: int, prompt: bool = True) -> Tensor:
        keys, values = (
            torch.full((13, *each), float("nan"), dtype=dtype) for each in ops.page_shapes(kv, page, size, dtype)
        )
        parts = []
        for start, end in zip((0, *cuts), (*cuts, tokens), strict=True):
            rows = [*range(first), *range(first + start, first + end)]
            table = torch.full((len(rows), len(pages)), 12)
            table[first:] = pages
            lengths = torch.tensor([*range(first), *range(start, end)])
            places = ops.Places(table, lengths, kv, group, size, page)
            q = ops.decode_split(qkv[rows], angles[rows].cos(), angles[rows].sin(), keys, values, places)
            out = torch.zeros(len(rows), kv * group * size, dtype=dtype)
            ops.decode_mix(q, early, keys, values, places, slice(first, len(rows)), out, 0.3, prompt=prompt)
            assert not out[:first].any(), "another row"
            parts.append(out[first:])
        return torch.cat(parts)

    whole = run()
    _same(whole, run(prompt=False))
    parts = run(1, 33, 34, 70)
    _same(whole, parts)
    if dtype == torch.bfloat16 and native.library().tiles() and (size % 32, page) == (0, 32):
        assert torch.equal(whole, parts)
        monkeypatch.setattr(ops, "_threads", lambda: 3)
        assert torch.equal(whole, run())
    compiled, portable = _both(monkeypatch, lambda: run(40))
    _same(compiled, portable)


@needs_kernels
@BOTH
def test_the_largest_score_and_disallowed_tokens(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    scores = _random(dtype, 4, 100)
    scores[1] = 2.0
    scores[2, [7, 90]] = 50.0
    scores[3] = float("-inf")
    bits = torch.tensor([[0b101, -1, 0, 0], [-1, 1 << 31 - 1, 7, 0]], dtype=torch.int32)

    def run() -> tuple[Tensor, Tensor]:
        made = scores[:3].clone()
        ops.forbid_(made, torch.tensor([2, 0]), bits)
        return ops.largest(scores), made

    for largest, masked in _both(monkeypatch, run):
        assert largest[1:].tolist() == [0, 7, 0], "the first of equal ones"
        assert largest[0] == scores[0].argmax()
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
work = lambda: ops.gated(torch.ones(64, 32))
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
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    made = native._built()
    assert made is not None
    assert native.slowness() is None
    assert made.stem == native.identity(), "of this machine's compiler and processor"
    written = made.stat().st_mtime_ns
    assert native._built() == made
    assert made.stat().st_mtime_ns == written
    assert [*(tmp_path / "kernels").iterdir()] == [made]
