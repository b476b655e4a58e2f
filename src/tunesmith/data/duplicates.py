"""Keys and similarity by which rows are compared: exact duplicates and near duplicates.

Exact duplicates have the same answer and, apart from case, spaces, and punctuation at the ends, requests of the same
visible characters (`visible`). Groups, near duplicates and leakage compare folded requests (`fold`), which also lack
accents and look-alike letters: folding makes some different words equal, so it alone makes no exact duplicate.

Near duplicates have a high Jaccard similarity of character trigrams, which also work on requests of a few words. An
exact similarity join finds every near pair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import regex

from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Conversation
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.core.text.folding import fold, visible

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

METHOD = "character trigrams of the words, exact set-similarity join"
_PAIRS_EACH = 100
_WORD = regex.compile(r"\w+")  # unlike those of `re`, its words keep the vowel signs of Thai and Hindi
_SENTENCE_MARKS = " .,;:!?\u2026¿¡\"'\u201c\u201d\u2018\u2019«»"


def normalise(text: str, form: Callable[[str], str] = fold) -> str:
    """The folded text without punctuation at its ends. form: `fold` or `visible`."""
    text = form(text)
    return text.strip(_SENTENCE_MARKS) or text


def request_text(messages: Conversation, form: Callable[[str], str] = fold) -> str:
    """The turns before the answer as one normalised text, without the system turn, which many rows share."""
    return "\n".join(normalise(turn.text, form) for turn in messages[:-1] if turn.role != "system")


def learned_parts(messages: Conversation) -> list[Conversation]:
    """The conversation up to each answer that training learns; for a row of a dataset version the whole one is last."""
    return [messages[: n + 1] for n, turn in enumerate(messages) if turn.role == "assistant" and turn.weight]


def request_key(messages: Conversation, form: Callable[[str], str] = visible) -> str:
    """A key that equal requests share: roles, normalised texts and offered tools, turn by turn."""
    return json.dumps([[turn.role, normalise(turn.text, form), turn.tools or ""] for turn in messages])


def near_text(request: str) -> str:
    """The text whose trigrams are compared: the words of a normalised request, with spaces around each turn.

    The spaces give a turn's first and last letters the same weight as the others. Punctuation does not count, unless a
    turn has no words.
    """
    return "\n".join(f" {' '.join(_WORD.findall(turn)) or turn} " for turn in request.split("\n"))


def answer_key(answer: str) -> str:
    """A key that equal answers share: canonical JSON, or the text of prose without outer spaces."""
    try:
        return canonical(parse_json(answer)).decode() if answer.lstrip().startswith(("{", "[")) else answer.strip()
    except (ValueError, UsageError):
        return answer.strip()


def near_pairs(texts: Sequence[str], threshold: float) -> NDArray[np.int64]:
    """All pairs (i < j) of texts whose trigrams have a Jaccard similarity of at least threshold: int64[pairs, 2],
    sorted.

    texts should be distinct, since n equal texts make n(n - 1) / 2 pairs. Raises Refused for more than _PAIRS_EACH
    pairs per text: then the similarity does not tell rows apart.
    """
    from tunesmith.data.similarity_join import TooMany, similar_pairs

    try:
        return similar_pairs(texts, threshold, _PAIRS_EACH * len(texts))
    except TooMany:
        raise Refused(
            f"the requests are too similar: on average a row has over {_PAIRS_EACH} others near it at {threshold}",
            where="data.duplicates.near",
            fix="move the text that all requests share into a system turn, raise near, or set it to null",
        ) from None
