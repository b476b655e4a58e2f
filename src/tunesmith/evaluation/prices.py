"""Computes costs from measured runs and the prices in the project file."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunesmith.candidates.settings import TokenPrice
from tunesmith.evaluation.scores import rounded
from tunesmith.evaluation.settings import PriceSettings
from tunesmith.records.evaluation import AnswerPrice
from tunesmith.records.training import BreakEven


def price_of(
    n: int, took: Sequence[float], prices: PriceSettings | None, tokens: TokenPrice | None, *, remote: bool
) -> AnswerPrice:
    """What 1,000 answers take and, where there are prices, cost.

    n: answers that took so many tokens of prompts, tokens of answers, and seconds.

    remote: an endpoint answers, which charges by the token, not by this machine's time.
    """
    prompt, completion, spent = (rounded(1000.0 / n * each) for each in took)
    money = None
    if remote and tokens is not None:
        money = rounded(tokens.of(prompt, completion))
    elif not remote and prices is not None:
        money = rounded(spent / 3600.0 * prices.machine_hour)
    return AnswerPrice(
        prompt_tokens_per_1000=prompt,
        completion_tokens_per_1000=completion,
        seconds_per_1000=spent,
        money_per_1000=money,
    )


def break_even(own: AnswerPrice, spent: float | None, rival: AnswerPrice) -> BreakEven | None:
    """From how many requests on a candidate is cheaper than its rival, its training paid; None where a price is not
    stated. spent: on its training."""
    mine, theirs = own.money_per_1000, rival.money_per_1000
    if mine is None or theirs is None or spent is None:
        return None
    saved = theirs - mine
    # Rounded first: 10 / 0.2 is 50.000000000000007 thousand.
    requests = math.ceil(round(spent / saved * 1000.0, 6)) if rounded(saved) > 0 else None
    return BreakEven(training=spent, saved_per_1000=rounded(saved), requests=requests)
