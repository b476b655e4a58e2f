"""Detects the language of texts, and finds those in another language than nearly all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tunesmith.core.errors import UsageError

_SURE = 0.95
_LETTERS = 25  # in shorter texts the language cannot be detected
_COMMON = 0.05  # a language with at least this share of the texts belongs to the dataset


def other_languages(texts: Sequence[str]) -> tuple[dict[int, str], dict[str, int]]:
    """(index -> language of the texts in an uncommon language, language -> number of texts).

    Languages are ISO 639-1 codes by py3langid (Lui, Baldwin, "langid.py", ACL 2012). Short texts and uncertain results
    count as "?". Raises UsageError where the extra `quality` is not installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UsageError(f"detecting languages needs {error.name}", fix='pip install "tunesmith[quality]"') from error
    judge = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    told = []
    for text in texts:
        language, sure = judge.classify(text) if sum(map(str.isalpha, text)) >= _LETTERS else ("?", 1.0)
        told.append(language if sure >= _SURE else "?")
    counts = Counter(told)
    known = sum(many for language, many in counts.items() if language != "?")
    own = {language for language, many in counts.items() if many >= _COMMON * known}
    return {place: one for place, one in enumerate(told) if one not in own | {"?"}}, dict(sorted(counts.items()))
