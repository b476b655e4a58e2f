"""What the style classifier sees of an answer: its form and its usual words, but not its topic.

Words that only some answers hold, and words of the request, are content. They are replaced by a mark of their shape,
after the text distortion of Stamatatos (2017, EACL). What stays are words that answers to many requests share, their
order in pairs, punctuation, the first and the last words, and counts of the text's form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import regex

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
FORM: Final = (
    "length in characters",
    "words in a sentence",
    "number of lines",
    "list items",
    "share of capital letters",
    "share of punctuation",
    "question marks",
    "exclamation marks",
    "digits",
    "emoji",
    "bold, headings and code",
    "ends with punctuation",
)
_EMOJI: Final = regex.compile(r"\p{Extended_Pictographic}")
_MARKUP: Final = regex.compile(r"\*\*|__|`|(?m:^#+ )")


@dataclass(frozen=True, slots=True)
class Answer:
    """A text as the classifier reads it. tokens: (shape, word) in order, the word masked where the request has it."""

    tokens: tuple[tuple[str, str], ...]
    form: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
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
    return Answer(tuple(tokens), tuple(form(text)))


def find_vocabulary(answers: Sequence[Answer], groups: Sequence[str]) -> Vocabulary:
    """The words and pairs that answers of enough different groups hold. groups: one for each answer."""
    least = max(_FEWEST, math.ceil(_USUAL * len(set(groups))))
    words = [{word for kind, word in each.tokens if kind in (_WORD, _NAME)} - {_WORD, _NAME} for each in answers]
    usual = frozenset(_in_many(words, groups, least))
    found = _in_many([_terms(each, usual) for each in answers], groups, least)
    chosen = sorted(found, key=lambda term: (-found[term], term))[:_MOST]
    return Vocabulary(usual, {term: place for place, term in enumerate(sorted(chosen))})


def features(answers: Sequence[Answer], vocabulary: Vocabulary) -> Floats:
    """float64[answers, columns]: the form as numbers, then 1 for each word and pair that an answer holds."""
    found = np.zeros((len(answers), len(FORM) + len(vocabulary.columns)))
    for row, answer in enumerate(answers):
        found[row, : len(FORM)] = answer.form
        places = (vocabulary.columns.get(term) for term in _terms(answer, vocabulary.usual))
        found[row, [len(FORM) + place for place in places if place is not None]] = 1.0
    return found


def form(text: str) -> list[float]:
    """The numbers of FORM. Counts are logarithms, since twice as long is the same step for short and long answers."""
    text = text[:_LONGEST].strip()
    words = sum(token[0].isalpha() for token in _TOKEN.findall(text))
    letters = sum(each.isalpha() for each in text)
    marks = sum(not each.isalnum() and not each.isspace() for each in text)
    counts = {
        "length in characters": len(text),
        "words in a sentence": words / max(1, len(_SENTENCE.findall(text))),
        "number of lines": text.count("\n"),
        "list items": len(_LIST.findall(text)),
        "question marks": text.count("?"),
        "exclamation marks": text.count("!"),
        "digits": sum(each.isdigit() for each in text),
        "emoji": len(_EMOJI.findall(text)),
        "bold, headings and code": len(_MARKUP.findall(text)),
    }
    shares = {
        "share of capital letters": sum(each.isupper() for each in text) / max(1, letters),
        "share of punctuation": marks / max(1, len(text)),
        "ends with punctuation": float(text[-1:] in tuple(".!?…。！？")),
    }
    found = {name: math.log1p(count) for name, count in counts.items()} | shares
    return [found[name] for name in FORM]


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
