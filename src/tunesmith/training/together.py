"""Several adapters trained at once on one frozen base: one base in memory, one pass for a step of each of them.

A step of every run that is not over is laid end to end. What works row by row (norms, the gated middle, the base's own
products, the head) is done once for all tokens; attention and low-rank products are each run's own, on its own tokens.
A token's numbers are thus those of a training alone, and each run keeps its own plan, optimiser, checkpoints and end:
its bytes are the same with whomever it was trained (models.products.Frozen.row_by_row says on what that rests).

A pass holds few runs' tokens, so that copies and activations are those of few runs at once; the masters' gradients are
made and used up one run after another, unless steps have several parts. What stays for each run is its masters and
AdamW's moments (see lora.Lora).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import Progress
from tunesmith.models.attention import shared_prefix_attention
from tunesmith.models.batch import Batch
from tunesmith.models.network import Attend, Linear, Network, final, forward, remaking
from tunesmith.models.products import Frozen, Pair, outer
from tunesmith.training.loop import Run, label_shares, label_total, step_tokens
from tunesmith.training.lora import Adapted, Lora, frozen
from tunesmith.training.loss import cross_entropies

# Most tokens of a pass of several runs. Of passes between 192 and 742 tokens, eight runs of 93 tokens a step, none was
# faster beyond what timings vary by; each run more in a pass holds its activations and its copies (see Lora).
TOKENS = 256


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
            for turn, loss, seconds in joint_steps(network, [runs[place] for place in live]):
                place = live[turn]
                try:
                    runs[place].advance(loss, seconds, task)
                except TunesmithError as error:
                    failed[place] = error
                    for master in runs[place].trained.masters:
                        master.grad = None
                    progress.say(f"training {place + 1} of {len(runs)} stops: {error.what}")
                _lora(runs[place]).rest()


def joint_steps(network: Network, runs: Sequence[Run]) -> Iterator[tuple[int, float, float]]:
    """Compute the step that each run is due. Gives a run's place, its loss and its share of the passes' seconds as soon
    as the step's gradients lie on its masters: where it is then advanced, they are gone before the next run's are made.
    """
    steps = [run.due for run in runs]
    labels = [label_total(step) for step in steps]
    losses, seconds = [0.0] * len(runs), [0.0] * len(runs)
    for turn in range(max(map(len, steps))):
        waiting = [place for place, step in enumerate(steps) if turn < len(step)]
        sizes = [steps[place][turn].tokens for place in waiting]
        for first, last in _passes(sizes, min(TOKENS, max(run.settings.tokens for run in runs))):
            now, began = waiting[first:last], time.perf_counter()
            parts = [Part(_lora(runs[place]), steps[place][turn], labels[place]) for place in now]
            found = joint_losses(network, parts)
            torch.stack(found).sum().backward()
            each = (time.perf_counter() - began) / sum(sizes[first:last])
            for place, part, loss in zip(now, parts, found, strict=True):
                began = time.perf_counter()
                part.lora.take_gradients()
                part.lora.rest()
                losses[place] += float(loss.detach())
                seconds[place] += each * part.batch.tokens + time.perf_counter() - began
                if turn == len(steps[place]) - 1:
                    yield place, losses[place], seconds[place]


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
    """Neighbours that have no more than most tokens together (one alone may), as ranges."""
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
        low, again = [one and one.pair.low(own) for one, own in zip(adapted, x.split(sizes), strict=True)], remaking(x)
        ctx.save_for_backward(x if again is None else None, *low)
        ctx.told, ctx.remaking = (product, adapted, sizes), again
        return product.apart(x, sizes, low, _pairs(adapted))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, *low = ctx.saved_tensors
        product, adapted, sizes = ctx.told
        gradient = gradient.contiguous()
        into_low: list[Tensor | None] = []
        for one, lower, above in zip(adapted, low, gradient.split(sizes), strict=True):
            into_low.append(None if one is None else one.pair.into_low(above))
            if one is not None:
                outer(lower, above, one.gc)

        def learn(x: Tensor) -> None:
            for one, own, lowered in zip(adapted, x.split(sizes), into_low, strict=True):
                if one is not None and lowered is not None:
                    outer(lowered, own, one.ga)

        if ctx.remaking is None:
            learn(x)
        else:
            ctx.remaking.ask(learn)
        gx = product.back_apart(gradient, sizes, into_low, _pairs(adapted)) if ctx.needs_input_grad[0] else None
        return gx, None, None, None, None


def _pairs(adapted: Sequence[Adapted | None]) -> list[Pair | None]:
    return [None if one is None else one.pair for one in adapted]
