"""A logistic regression that tells two kinds of answers apart, each judged by a model that never saw its group.

It sees an answer's form and its usual words, but not its topic. Words that only some answers hold, and words of the
request, are content. They are replaced by a mark of their shape, after the text distortion of Stamatatos (2017, EACL).
What stays are words that answers to many requests share, their order in pairs, punctuation, the first and the last
words, and counts of the text's form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import regex

from tunesmith.core.digests import digest_of
from tunesmith.core.text.folding import visible
from tunesmith.evaluation.stats.statistics import Floats

_USUAL: Final = 0.05  # share of the groups whose answers must hold a word or a pair for it to count as style
_FEWEST: Final = 3  # such groups
_MOST: Final = 1_500  # words and pairs
_LONGEST: Final = 4_000  # characters of an answer that are read
_START, _END, _LINE = "⟨start⟩", "⟨end⟩", "⟨line⟩"
_WORD, _NUMBER, _NAME = "⟨word⟩", "⟨number⟩", "⟨name⟩"
# Words; single characters of scripts without spaces between words; emoji; punctuation; line ends.
_TOKEN: Final = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|[\p{L}\p{M}]+(?:['’][\p{L}\p{M}]+)*"
    r"|\p{N}+|\n+|[^\s\p{L}\p{M}\p{N}]",
    regex.V1,
)
_SENTENCE: Final = regex.compile(r"[.!?…。！？]+(?=\s|$)")
_LIST: Final = regex.compile(r"(?m)^\s*(?:[-*•]|\d+[.)])\s+\S")
_MASKS: Final = frozenset({_WORD, _NUMBER, _NAME, _START, _END})
_EMOJI: Final = regex.compile(r"\p{Extended_Pictographic}")
_MARKUP: Final = regex.compile(r"\*\*|__|`|(?m:^#+ )")


class Answer(NamedTuple):
    """A text as the classifier reads it. tokens: (shape, word) in order, the word masked where the request has it."""

    tokens: tuple[tuple[str, str], ...]
    form: tuple[float, ...]


class Vocabulary(NamedTuple):
    """The words that count as style, and the columns of words and pairs."""

    usual: frozenset[str]
    columns: dict[str, int]

    @property
    def names(self) -> list[str]:
        """What each column is, for people: the form first."""
        return [*FORM, *(f'"{name}"' for name in self.columns)]


def words_of(text: str) -> frozenset[str]:
    """The words of a request, in one spelling."""
    return frozenset(visible(token) for token in _TOKEN.findall(text) if token[0].isalpha())


def read_answer(text: str, asked: frozenset[str]) -> Answer:
    """A text as the classifier reads it. asked: the words of its request, as `words_of` gives them."""
    tokens = []
    for token in _TOKEN.findall(text[:_LONGEST].strip()):
        word = visible(token) or token
        if token[0] == "\n":
            tokens.append((_LINE, _LINE))
        elif token[0].isnumeric():
            tokens.append((_NUMBER, _NUMBER))
        elif not token[0].isalpha():
            tokens.append((word, word))
        else:
            shape = _NAME if token[0].isupper() else _WORD
            tokens.append((shape, shape if word in asked else word))
    return Answer(tuple(tokens), tuple(form(text).values()))


def find_vocabulary(answers: Sequence[Answer], groups: Sequence[str]) -> Vocabulary:
    """The words and pairs that answers of enough different groups hold. groups: one for each answer."""
    least = max(_FEWEST, math.ceil(_USUAL * len(set(groups))))
    words = [{word for kind, word in each.tokens if kind in (_WORD, _NAME)} - {_WORD, _NAME} for each in answers]
    usual = frozenset(_in_many(words, groups, least))
    terms = _in_many([_terms(each, usual) for each in answers], groups, least)
    chosen = sorted(terms, key=lambda term: (-terms[term], term))[:_MOST]
    return Vocabulary(usual, {term: place for place, term in enumerate(sorted(chosen))})


def features(answers: Sequence[Answer], vocabulary: Vocabulary) -> Floats:
    """float64[answers, columns]: the form as numbers, then 1 for each word and pair that an answer holds."""
    columns = np.zeros((len(answers), len(FORM) + len(vocabulary.columns)))
    for row, answer in enumerate(answers):
        columns[row, : len(FORM)] = answer.form
        places = (vocabulary.columns.get(term) for term in _terms(answer, vocabulary.usual))
        columns[row, [len(FORM) + place for place in places if place is not None]] = 1.0
    return columns


def form(text: str) -> dict[str, float]:
    """The numbers of a text's form. Counts are logarithms: twice as long is the same step for any answer."""
    text = text[:_LONGEST].strip()
    words = sum(token[0].isalpha() for token in _TOKEN.findall(text))
    letters = sum(each.isalpha() for each in text)
    marks = sum(not each.isalnum() and not each.isspace() for each in text)
    return {
        "length in characters": math.log1p(len(text)),
        "words in a sentence": math.log1p(words / max(1, len(_SENTENCE.findall(text)))),
        "number of lines": math.log1p(text.count("\n")),
        "list items": math.log1p(len(_LIST.findall(text))),
        "share of capital letters": sum(each.isupper() for each in text) / max(1, letters),
        "share of punctuation": marks / max(1, len(text)),
        "question marks": math.log1p(text.count("?")),
        "exclamation marks": math.log1p(text.count("!")),
        "digits": math.log1p(sum(each.isdigit() for each in text)),
        "emoji": math.log1p(len(_EMOJI.findall(text))),
        "bold, headings and code": math.log1p(len(_MARKUP.findall(text))),
        "ends with punctuation": float(text[-1:] in tuple(".!?…。！？")),
    }


FORM: Final = tuple(form(""))  # the names of these numbers


def _in_many(terms: Sequence[set[str]], groups: Sequence[str], least: int) -> dict[str, int]:
    """Term -> how many groups hold it, of those that at least so many do. groups: one for each set of terms."""
    together: dict[str, set[str]] = {}
    for own, group in zip(terms, groups, strict=True):
        together.setdefault(group, set()).update(own)
    counts = Counter(term for own in together.values() for term in own)
    return {term: count for term, count in counts.items() if count >= least}


def _terms(answer: Answer, usual: frozenset[str]) -> set[str]:
    """The distorted answer's words and punctuation, and pairs of neighbours; pairs of two masked words say nothing."""
    masked = [word if kind not in (_WORD, _NAME) or word in usual else kind for kind, word in answer.tokens]
    kept = [_START, *masked, _END]
    pairs = {f"{left} {right}" for left, right in pairwise(kept) if left not in _MASKS or right not in _MASKS}
    return pairs | set(masked) - {_WORD, _NAME}


_FOLDS: Final = 5
_PENALTY: Final = 1.0  # of the squared weights, as scikit-learn's C = 1
_STEPS: Final = 200
TOP: Final = 8  # features that are named for each side


class Told(NamedTuple):
    """For each set of answers, the probability that each is the house's; and the features that decided most.

    by_form: the same for references and base answers, from the form alone. house, base: features of either side.
    """

    probabilities: Mapping[str, Floats]
    by_form: Mapping[str, Floats]
    house: tuple[str, ...]
    base: tuple[str, ...]


def cross_fitted(sets: Mapping[str, Sequence[Answer]], house: str, base: str, groups: Sequence[str]) -> Told:
    """Judge every answer by a model that was fitted to the house's and the base's answers of other groups.

    sets: name -> answers, one for each row. house, base: the sets that are told apart. groups: one for each row.
    """
    fold = _folds(groups)
    probabilities = {name: np.zeros(len(groups)) for name in sets}
    by_form = {name: np.zeros(len(groups)) for name in (house, base)}
    weights: dict[str, float] = {}
    for number in range(_FOLDS):
        inside, outside = (np.flatnonzero(each).tolist() for each in (fold == number, fold != number))
        if not inside:
            continue
        answers = [sets[name][row] for name in (house, base) for row in outside]
        labels = np.repeat([1.0, 0.0], len(outside))
        vocabulary = find_vocabulary(answers, [groups[row] for row in outside] * 2)
        seen = features(answers, vocabulary)
        whole, found_weights = _fitted(seen, labels, vocabulary, slice(None))
        plain, _ = _fitted(seen, labels, vocabulary, slice(len(FORM)))
        for name, own in sets.items():
            probabilities[name][inside] = whole([own[row] for row in inside])
        for name, told in by_form.items():
            told[inside] = plain([sets[name][row] for row in inside])
        for feature, weight in zip(vocabulary.names, found_weights.tolist(), strict=True):
            weights[feature] = weights.get(feature, 0.0) + weight
    ranked = sorted(weights, key=lambda name: (-round(weights[name], 6), name))
    return Told(
        probabilities,
        by_form,
        tuple(name for name in ranked[:TOP] if weights[name] > 0),
        tuple(name for name in ranked[::-1][:TOP] if weights[name] < 0),
    )


def _folds(groups: Sequence[str]) -> np.ndarray:
    """The fold of each row: whole groups, in an order that only their names decide, dealt one after another."""
    ordered = sorted(set(groups), key=lambda group: digest_of(["style", group]))
    place = {group: number % _FOLDS for number, group in enumerate(ordered)}
    return np.array([place[group] for group in groups])


def _fitted(
    seen: Floats, labels: Floats, vocabulary: Vocabulary, columns: slice
) -> tuple[Callable[[Sequence[Answer]], Floats], Floats]:
    """The model of least penalised loss: it gives the probability that each answer is the house's. And its weights.

    Columns have unit variance, so that the penalty treats them alike.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    mean, scale = seen.mean(axis=0), seen.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    rows = ((seen - mean) / scale)[:, columns]
    sign = 2.0 * labels - 1.0

    def loss(point: Floats) -> tuple[float, Floats]:
        margin = sign * (rows @ point[:-1] + point[-1])
        slope = -sign * expit(-margin)
        value = float(np.logaddexp(0.0, -margin).sum() + 0.5 * _PENALTY * point[:-1] @ point[:-1])
        return value, np.append(rows.T @ slope + _PENALTY * point[:-1], slope.sum())

    best = minimize(loss, np.zeros(rows.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}).x

    def probability(answers: Sequence[Answer]) -> Floats:
        scaled = ((features(answers, vocabulary) - mean) / scale)[:, columns]
        return np.asarray(expit(scaled @ best[:-1] + best[-1]), dtype=np.float64)

    return probability, best[:-1]
