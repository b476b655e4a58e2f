"""Element-wise operations and decoding's attention, by the compiled kernels if they fit the tensors, else in PyTorch.

Each function does the same arithmetic on both paths: computed in fp32, results in the input's dtype. None of them
records gradients; network.py and attention.py build differentiable functions from them.

Shapes: T tokens, M width, H query heads, K key/value heads, G query heads for each of those, D head size.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.engines.decoding import constraint
from tunesmith.engines.native import kernels as native

_GATHERED_ROWS = 64  # rows whose keys and values decode_mix gathers at once, in PyTorch


def kernel_for(name: str, x: Tensor) -> Any:
    """The compiled kernel of that name for tensors like x; None if there is none."""
    library = native.library() if x.dtype == torch.bfloat16 else None
    return None if library is None else getattr(library, name)


_threads = torch.get_num_threads


def call(kernel: Any, *given: Any) -> None:
    """Run a kernel with contiguous tensors (None: a null pointer), structures and numbers, on this thread's threads."""
    kernel(*map(_native, given), _threads())


def ran(name: str, x: Tensor, *given: Any) -> bool:
    """Call the compiled kernel of that name for tensors like x. False where there is none: PyTorch has to compute."""
    if (kernel := kernel_for(name, x)) is not None:
        call(kernel, *given)
    return kernel is not None


_KINDS: dict[type, Any] = {type(None): native.POINTER, bool: ctypes.c_bool, int: native.INT64, float: native.FLOAT}


def _native(value: Any) -> Any:
    if isinstance(value, Tensor):
        return native.POINTER(value.data_ptr())
    return _KINDS.get(type(value), ctypes.byref)(value)


def add_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, epsilon: float, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """x + y (x itself if y is None), its RMSNorm with weight + offset, both [..., M], and 1 / rms [rows, 1]."""
    width = x.shape[-1]
    kernel = kernel_for("add_norm", x)
    if kernel is None:
        total = x if y is None else x + y
        wide = total.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        normal = (wide * scale).to(x.dtype)
        return total, normal * (weight + offset if offset else weight), scale.view(-1, 1)
    x, rows = x.contiguous(), x.numel() // width
    y, into = (None, None) if y is None else (y.contiguous(), torch.empty_like(x))
    out, scale = torch.empty_like(x), torch.empty(rows, 1)
    call(kernel, x, y, weight, into, out, scale, rows, width, float(epsilon), float(offset))
    return x if into is None else into, out, scale


def norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    sum_gradient: Tensor | None,
    offset: float = 0.0,
    *,
    again: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the RMSNorm's input x, plus sum_gradient, the gradient that reaches x without passing the norm.

    again: also return the norm's output, computed again and equal to the bit."""
    width = x.shape[-1]
    kernel = kernel_for("norm_backward", x)
    if kernel is None:
        factor = scale.view(*x.shape[:-1], 1)
        normal = x.float() * factor
        inner = gradient.float() * (weight.float() + offset)
        result = factor * (inner - normal * (inner * normal).mean(-1, keepdim=True))
        output = normal.to(x.dtype) * (weight + offset if offset else weight) if again else None
        return (result if sum_gradient is None else result + sum_gradient.float()).to(x.dtype), output
    gradient, out = gradient.contiguous(), torch.empty_like(x)
    output = torch.empty_like(x) if again else None
    sum_gradient = None if sum_gradient is None else sum_gradient.contiguous()
    call(kernel, gradient, x, weight, scale, sum_gradient, out, output, x.numel() // width, width, float(offset))
    return out, output


def gated(gate_up: Tensor, *, gelu: bool = False) -> Tensor:
    """silu(gate) * up: [T, 2 F] -> [T, F]. gelu: GELU's tanh approximation instead of SiLU, always in PyTorch."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if not gelu and ran("gated", gate_up, gate_up.contiguous(), out, out.numel() // width, width):
        return out
    gate, other = gate_up.chunk(2, -1)
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * other


def gated_backward(
    gradient: Tensor, gate_up: Tensor, *, gelu: bool = False, again: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradient [T, 2 F] of gated's input. again: also gated's output, computed again and equal to the bit."""
    width, result = gradient.shape[-1], torch.empty_like(gate_up)
    kernel = None if gelu else kernel_for("gated_backward", gate_up)
    if kernel is not None:
        gradient = gradient.contiguous()
        output = torch.empty_like(gradient) if again else None
        call(kernel, gradient, gate_up, result, output, gradient.numel() // width, width)
        return result, output
    (gate, other), (to_gate, to_up) = gate_up.chunk(2, -1), result.chunk(2, -1)
    if gelu:
        torch.mul(gradient, F.gelu(gate, approximate="tanh"), out=to_up)
        to_gate.copy_(torch.ops.aten.gelu_backward(gradient * other, gate, approximate="tanh"))
    else:
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        torch.mul(gradient, silu, out=to_up)
        torch.mul(gradient * other, sigmoid + silu * (1 - sigmoid), out=to_gate)
    return result, gated(gate_up, gelu=gelu) if again else None


def softmax_(
    shared: Tensor | None, own: Tensor, scale: float, window: int | None = None, cap: float | None = None
) -> None:
    """Turn attention scores into weights, in place.

    own [..., R * L, L] is causal: row r sees r % L + 1 places. shared [..., R * L, P] is seen whole. A row of both is
    one distribution. window: a row sees only so many places, the last of which is its own. cap: scores are capped by
    cap_. A window or a cap is computed in PyTorch.
    """
    longest = own.shape[-1]
    cut = 0 if shared is None else shared.shape[-1]
    if window is not None and cut + longest <= window:
        window = None
    given = (shared, own, own.numel() // longest, cut, longest, float(scale))
    if window is None and cap is None and ran("softmax", own, *given):
        return
    scores = own if shared is None else torch.cat((shared.view(*own.shape[:-1], cut), own), -1)
    hidden = torch.ones(longest, cut + longest, dtype=torch.bool)
    hidden = hidden.triu(cut + 1) if window is None else hidden.triu(cut + 1) | hidden.tril(cut - window)
    scores = cap_(scores.float() * scale, cap).masked_fill_(hidden.repeat(own.shape[-2] // longest, 1), float("-inf"))
    weights = torch.softmax(scores, -1)
    own.copy_(weights[..., cut:])
    if shared is not None:
        shared.copy_(weights[..., :cut].reshape(shared.shape))


def cap_(scores: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(scores / cap), in place; scores unchanged if cap is None."""
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def softmax_backward_(
    shared: Tensor | None, own: Tensor, shared_gradient: Tensor | None, own_gradient: Tensor, scale: float
) -> None:
    """Turn gradients of attention weights, shared_gradient and own_gradient, into gradients of scores, in place."""
    longest, cut = own.shape[-1], 0 if shared is None else shared.shape[-1]
    given = (shared, own, shared_gradient, own_gradient, own.numel() // longest, cut, longest, float(scale))
    if ran("softmax_backward", own, *given):
        return
    dot = (own.float() * own_gradient.float()).sum(-1, keepdim=True)
    if shared is not None and shared_gradient is not None:
        flat = dot.view(*shared.shape[:-1], 1)
        flat += (shared.float() * shared_gradient.float()).sum(-1, keepdim=True)
        shared_gradient.copy_(shared.float() * (shared_gradient.float() - flat) * scale)
    own_gradient.copy_(own.float() * (own_gradient.float() - dot) * scale)


def cross_entropy_(scores: Tensor, labels: Tensor, share: Tensor | None) -> Tensor:
    """Negative log-likelihoods [N], fp32, of labels [N] under logits scores [N, V].

    share [N]: weights of the labels; scores then become the gradient of the weighted sum of losses, in place.
    """
    loss = torch.empty(len(scores))
    if ran("cross_entropy", scores, scores, labels, loss, *scores.shape, share):
        return loss
    wide = scores.float()
    normaliser = torch.logsumexp(wide, -1, keepdim=True)
    loss = (normaliser - wide.gather(1, labels[:, None]))[:, 0]
    if share is not None:
        wide = wide.sub_(normaliser).exp_()
        wide.scatter_add_(1, labels[:, None], wide.new_full((len(labels), 1), -1.0))
        scores.copy_(wide.mul_(share[:, None]))
    return loss


class Places:
    """Where the B tokens of a decoding pass keep their keys and values: in their row's pages (see page_shapes).

    table: [B, most pages] the numbers of each row's pages, in order. lengths: [B] filled places of each row.
    """

    def __init__(self, table: Tensor, lengths: Tensor, kv: int, group: int, size: int, page: int) -> None:
        self.table, self.lengths, self.page, self.group = table, lengths, page, group
        self._lengths: list[int] = lengths.tolist()  # at first
        self._grown = 0
        self.native = native.RowPages(len(lengths), kv, group, size, page, table.shape[1], max(self._lengths))
        self.native.table, self.native.length = table.data_ptr(), lengths.data_ptr()

    def filled(self, rows: slice) -> int:
        """Number of filled places of the longest of rows."""
        return max(self._lengths[rows]) + self._grown

    def grow(self) -> None:
        """Count one more filled place in each row."""
        self.lengths += 1
        self.native.longest += 1
        self._grown += 1

    def gather(self, keys: Tensor, values: Tensor, rows: slice, seen: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `seen` places of rows, copied to the usual layout: [B, K, seen, D] each."""
        pages = self.table[rows, : -(-seen // self.page)]
        plain = (x.unflatten(0, pages.shape) for x in places_of(keys[pages.flatten()], values[pages.flatten()]))
        k, v = (x.transpose(1, 2).flatten(2, 3)[:, :, :seen] for x in plain)
        return k, v


class PrefixPages(NamedTuple):
    """One layer's keys and values of a prefix that rows share, length places of each, in pages (see page_shapes)."""

    keys: Tensor
    values: Tensor
    length: int


def page_shapes(kv: int, page: int, size: int, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layout of K heads' keys and values in a page: keys [K, D / c, page, c] and values [K, page / c, D, c].

    c numbers (packing) make up 32 bits. So the keys of neighbouring places are next to each other in memory, and so are
    the values of neighbouring dimensions.
    """
    packing = 4 // dtype.itemsize
    return (kv, size // packing, page, packing), (kv, page // packing, size, packing)


def places_of(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Pages copied to the usual layout: keys and values [pages, K, page, D]."""
    return keys.permute(0, 1, 3, 2, 4).flatten(3), values.permute(0, 1, 2, 4, 3).flatten(2, 3)


def decode_split(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, places: Places) -> Tensor:
    """The rotated queries [K, B, G, D] of B tokens, qkv [B, (H + 2 K) * D], whose keys and values go to their pages."""
    rows, kv, group, size = len(qkv), keys.shape[1], places.group, values.shape[3]
    q = qkv.new_empty(kv, rows, group, size)
    places.native.stride = keys.stride(0)
    if ran("decode_split", qkv, places.native, qkv.contiguous(), cos, sin, q, keys, values):
        return q
    q, k, v = qkv.unflatten(-1, (-1, size)).split((kv * group, kv, kv), 1)
    pages = places.table.gather(1, (places.lengths // places.page)[:, None])[:, 0]
    within, packing = places.lengths % places.page, keys.shape[4]
    keys[pages, :, :, within] = rotate(k, cos, sin).unflatten(2, (-1, packing))
    values[pages, :, within // packing, :, within % packing] = v
    return rotate(q, cos, sin).view(rows, kv, group, size).transpose(0, 1).contiguous()


def decode_mix(
    q: Tensor,
    prefix: PrefixPages | None,
    keys: Tensor,
    values: Tensor,
    places: Places,
    rows: slice,
    out: Tensor,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    *,
    prompt: bool = False,
) -> None:
    """Compute attention for some rows of queries q [K, B, G, D] into those rows of out [B, H * D].

    A query sees the prefix that the rows share and the first lengths[b] + 1 places of its own pages, in one
    distribution. window, cap: see softmax_. prompt: the rows are neighbouring tokens of one prompt, in the same pages.
    """
    first, count = rows.start, rows.stop - rows.start
    shared = 0 if prefix is None else prefix.length
    if window is not None and shared + places.filled(rows) < window:
        window = None
    kernel = kernel_for("decode_mix", q) if window is None and cap is None else None
    # A kernel without tiles reads a prompt's pages again for each token.
    if kernel is None or (prompt and not (q.dtype == torch.bfloat16 and native.library().tiles())):
        if count > _GATHERED_ROWS:
            for start in range(first, rows.stop, _GATHERED_ROWS):
                part = slice(start, min(start + _GATHERED_ROWS, rows.stop))
                decode_mix(q, prefix, keys, values, places, part, out, scale, window, cap, prompt=prompt)
            return
        lengths = places.lengths[rows]
        seen = places.filled(rows) + 1
        queries = q[:, rows].float() * scale
        pages_of = slice(first, first + 1) if prompt else rows
        own_k, own_v = (x.float().transpose(0, 1) for x in places.gather(keys, values, pages_of, seen))
        scores = cap_(_grouped(queries, own_k.transpose(-1, -2)), cap)
        order = torch.arange(shared + seen)
        scores = scores.masked_fill((order[:seen] > lengths[:, None])[:, None], float("-inf"))
        shared_v = None
        if prefix is not None:
            shared_k, shared_v = (
                x.transpose(0, 1).flatten(1, 2)[:, None, :shared].float() for x in places_of(*prefix[:2])
            )
            scores = torch.cat((cap_(_grouped(queries, shared_k.transpose(-1, -2)), cap), scores), -1)
        if window is not None:
            outside = order <= (shared + lengths - window)[:, None]
            scores = scores.masked_fill(outside[:, None], float("-inf"))
        weights = torch.softmax(scores, -1)
        mixed = _grouped(weights[..., shared:], own_v)
        if shared_v is not None:
            mixed += _grouped(weights[..., :shared], shared_v)
        out[rows] = mixed.to(q.dtype).transpose(0, 1).reshape(count, -1)
        return
    places.native.stride = keys.stride(0)
    early = (None, None) if prefix is None else prefix[:2]
    call(kernel, places.native, q, *early, keys, values, out, first, count, shared, prompt, float(scale))


def _grouped(x: Tensor, y: Tensor) -> Tensor:
    """x [K, B, G, N] times y [K, B, N, M], or times y [K, 1, N, M], which all rows have: [K, B, G, M]."""
    return x @ y if y.shape[1] > 1 else (x.flatten(1, 2) @ y[:, 0]).unflatten(1, x.shape[1:3])


def forbid_(scores: Tensor, rows: Tensor, bits: Tensor) -> None:
    """As decoding.constraint.forbid_."""
    if not ran("forbid", scores, scores, rows, bits, *bits.shape, scores.shape[1]):
        constraint.forbid_(scores, rows, bits)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] rotated by angles, given as their cos and sin [T, D / 2]. In PyTorch."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
