"""Several adapters trained at once on one frozen base: one base in memory, one pass for a step of each of them.

A step of every run that is not over is laid end to end. What works row by row (norms, the gated middle, the base's own
products, the head) is done once for all tokens; attention and low-rank products are each run's own, on its own tokens.
A token's numbers are thus those of a training alone, and each run keeps its own plan, optimiser, checkpoints and end:
its bytes are the same with whomever it was trained (models.products.Frozen.row_by_row says on what that rests).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import Progress
from tunesmith.models.attention import shared_prefix_attention
from tunesmith.models.batch import Batch
from tunesmith.models.network import Attend, Linear, Network, final, forward
from tunesmith.models.products import Frozen, Pair, outer
from tunesmith.training.loop import Run, label_shares, step_tokens
from tunesmith.training.lora import Adapted, Lora, frozen
from tunesmith.training.loss import cross_entropies


class Part(NamedTuple):
    """What one run adds to a pass. divisor: labels of its whole step."""

    lora: Lora
    batch: Batch
    divisor: float


def fit_together(
    network: Network, runs: Sequence[Run], progress: Progress, ended: Callable[[int], None] = lambda _: None
) -> dict[int, TunesmithError]:
    """Train all runs to their ends, as loop.fit trains one; returns the error of each run that failed, by its place.

    ended is told of a run as soon as it is over and its weights are those to be kept. A run's seconds are its share of
    each pass, by tokens.
    """
    failed: dict[int, TunesmithError] = {}
    settled: set[int] = set()
    with progress.task(f"training {len(runs)} adapters", sum(sum(map(step_tokens, run.plan)) for run in runs)) as task:
        task.advance(sum(run.tokens_done for run in runs))
        while True:
            for place, run in enumerate(runs):
                if run.over and place not in settled:
                    run.settle()
                    settled.add(place)
                    ended(place)
            live = [place for place in range(len(runs)) if place not in settled and place not in failed]
            if not live:
                return failed
            began = time.perf_counter()
            losses = joint_gradients(network, [runs[place] for place in live])
            each = (time.perf_counter() - began) / sum(step_tokens(runs[place].due) for place in live)
            for place, loss in zip(live, losses, strict=True):
                try:
                    runs[place].advance(loss, each * step_tokens(runs[place].due), task)
                except TunesmithError as error:
                    failed[place] = error
                    progress.say(f"training {place + 1} of {len(runs)} stops: {error.what}")


def joint_gradients(network: Network, runs: Sequence[Run]) -> list[float]:
    """Leave the gradients of the step that each run is due on its masters; returns their losses."""
    steps = [run.due for run in runs]
    labels = [float(sum(part.labels.numel() for part in step)) for step in steps]
    losses = [0.0] * len(runs)
    for turn in range(max(map(len, steps))):
        waiting = [place for place, step in enumerate(steps) if turn < len(step)]
        sizes = [steps[place][turn].tokens for place in waiting]
        for first, last in _passes(sizes, max(run.settings.tokens for run in runs)):
            now = waiting[first:last]
            parts = [Part(_lora(runs[place]), steps[place][turn], labels[place]) for place in now]
            found = joint_losses(network, parts)
            torch.stack(found).sum().backward()
            for place, part, loss in zip(now, parts, found, strict=True):
                part.lora.take_gradients()
                losses[place] += float(loss.detach())
    return losses


def joint_losses(network: Network, parts: Sequence[Part]) -> list[Tensor]:
    """Each part's summed loss over its divisor, as loop.batch_loss gives it alone."""
    parts = [part._replace(batch=part.batch.on(network.device)) for part in parts]
    sizes = [part.batch.tokens for part in parts]
    ids = torch.cat([part.batch.ids for part in parts])
    hidden = forward(network, ids, _linear(network, [part.lora for part in parts], sizes), _attend(network, parts))
    wanted = [
        (final(network, own[part.batch.predicts]), part.batch.labels, label_shares(part.batch, part.divisor))
        for part, own in zip(parts, hidden.split(sizes), strict=True)
    ]
    return cross_entropies(network.head, wanted, network.shape.logit_cap)


def _lora(run: Run) -> Lora:
    assert isinstance(run.trained, Lora)
    return run.trained


def _passes(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Neighbours that have no more than most tokens together (one alone may), as ranges: memory stays one run's."""
    ranges: list[tuple[int, int]] = []
    first, tokens = 0, 0
    for place, size in enumerate(sizes):
        if place > first and tokens + size > most:
            ranges.append((first, place))
            first, tokens = place, 0
        tokens += size
    return [*ranges, (first, len(sizes))]


def _attend(network: Network, parts: Sequence[Part]) -> Attend:
    each = [shared_prefix_attention(part.batch, network) for part in parts]
    sizes = [part.batch.tokens for part in parts]

    def attend(number: int, qkv: Tensor) -> Tensor:
        return torch.cat([own(number, x) for own, x in zip(each, qkv.split(sizes), strict=True)])

    return attend


def _linear(network: Network, loras: Sequence[Lora], sizes: Sequence[int]) -> Linear:
    anchor = torch.zeros((), requires_grad=True, device=network.device)

    def apply(number: int, group: str, x: Tensor) -> Tensor:
        product = network.layers[number].linear[group]
        adapted = [lora.adapted(number, group) for lora in loras]
        if not any(adapted):
            return frozen(product, x)
        return _JointLinear.apply(x, anchor, product, adapted, sizes)  # type: ignore[no-any-return]

    return apply


class _JointLinear(torch.autograd.Function):
    """As lora's own product, each run's pair on its own tokens; a run without one here has the base's product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, product: Frozen, adapted: Sequence[Adapted | None], sizes: Sequence[int]
    ) -> Tensor:
        low = [one and one.pair.low(own) for one, own in zip(adapted, x.split(sizes), strict=True)]
        ctx.save_for_backward(x, *low)
        ctx.told = (product, adapted, sizes)
        return product.apart(x, sizes, low, _pairs(adapted))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, *low = ctx.saved_tensors
        product, adapted, sizes = ctx.told
        gradient = gradient.contiguous()
        into_low: list[Tensor | None] = []
        for one, own, lower, above in zip(adapted, x.split(sizes), low, gradient.split(sizes), strict=True):
            if one is None:
                into_low.append(None)
                continue
            lowered = one.pair.into_low(above)
            outer(lowered, own, one.ga)
            outer(lower, above, one.gc)
            into_low.append(lowered)
        gx = product.back_apart(gradient, sizes, into_low, _pairs(adapted)) if ctx.needs_input_grad[0] else None
        return gx, None, None, None, None


def _pairs(adapted: Sequence[Adapted | None]) -> list[Pair | None]:
    return [None if one is None else one.pair for one in adapted]
