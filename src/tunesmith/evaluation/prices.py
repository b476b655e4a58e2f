"""Computes costs from measured runs and the prices in the project file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tunesmith.candidates.settings import TokenPrice
from tunesmith.evaluation.scores import rounded
from tunesmith.evaluation.settings import PriceSettings


def money_of(
    per_1000: Mapping[str, float], prices: PriceSettings | None, tokens: TokenPrice | None, *, remote: bool
) -> float | None:
    """The cost of 1,000 requests; None without a price.

    per_1000: prompt_tokens_per_1000, completion_tokens_per_1000, seconds_per_1000. remote: an endpoint answers, which
    charges by the token, not by this machine's time.
    """
    if remote:
        if tokens is None:
            return None
        prompt, answer = per_1000["prompt_tokens_per_1000"], per_1000["completion_tokens_per_1000"]
        return rounded((prompt * tokens.prompt + answer * tokens.answer) / 1e6)
    return None if prices is None else rounded(per_1000["seconds_per_1000"] / 3600.0 * prices.machine_hour)


def break_even(own: Mapping[str, Any], rival: Mapping[str, Any]) -> dict[str, Any] | None:
    """From how many requests on the one in focus is cheaper than its rival, its training paid.

    own, rival: what the evaluation states of each. {"training", "saved_per_1000", "requests"}; requests is None where
    it saves nothing and its training is never paid off. None where a price is not stated.
    """
    mine, theirs = own["price"].get("money_per_1000"), rival["price"].get("money_per_1000")
    spent = own.get("training", {}).get("money", 0.0) if own["tuned"] else 0.0
    if mine is None or theirs is None or spent is None:
        return None
    saved = theirs - mine
    # Rounded first: 10 / 0.2 is 50.000000000000007 thousand.
    requests = math.ceil(round(spent / saved * 1000.0, 6)) if rounded(saved) > 0 else None
    return {"training": spent, "saved_per_1000": rounded(saved), "requests": requests}
