"""Choosing an answer's next token, and its score. Engines in this process share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_COLDEST = 1e-6  # a lower temperature would still draw nothing but the likeliest token


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's next token is chosen. temperature 0: the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """A token's log-probability under the model, and the likeliest tokens with theirs, in descending order."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Listener(Protocol):
    """Receives a row's tokens. Called by the thread that decodes."""

    def take(self, token: int, score: Score | None) -> bool:
        """Receive the next token; returns whether the row ends with it. score: if the row wants log-probabilities."""
        ...

    def end(self, *, stopped: bool, error: BaseException | None = None) -> None:
        """Learn that no more tokens follow. stopped: an end token ended the row."""


def score_of(logprobs: Tensor, token: int, top: int) -> Score:
    """The score of a token among logprobs [vocabulary], with the top likeliest tokens."""
    values, tokens = logprobs.topk(min(top, logprobs.numel()))
    return Score(float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def sample(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token drawn by its logits from the smallest set of probability top_p (Holtzman et al. 2019), never empty."""
    # Subtract the maximum first: divided by a temperature near zero, other logits could become infinite.
    probabilities = torch.softmax((scores - scores.max()) / max(sampling.temperature, _COLDEST), -1)
    if sampling.top_p >= 1.0:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    probabilities, tokens = probabilities.sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[1:][before[1:] >= sampling.top_p] = 0.0  # the first stays: top_p may be 0 in 32 bits
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
