"""Toxicity detector: the probability that a text insults, threatens or demeans, with the detector's measured error.

The model is that of the package alt-profanity-check: TF-IDF of single words and a calibrated linear SVM, trained on
200,000 annotated comments in English. It knows words, not who speaks of whom. So it also flags quoted and denied
insults, and misses insults in clean words. A score is a reason to look at a row; every count is shown with the figures
of `measured`. The model's files are pickles, which the package itself loads. They are loaded only where their digest is
the pinned one.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from itertools import islice
from typing import Any

from tunesmith.core.errors import Refused, UsageError
from tunesmith.data.pinned_packages import folder_digest, package_folders, require_digest

PACKAGE = "alt-profanity-check"
VERSION = "1.9.1"  # of the package and of the scikit-learn that its model was made with
DIGEST = "sha256:cf0bbab57143e140ddc260a30108b06b24214413a12cf0b987b2008399baaee2"
AT_LEAST = 0.5  # a text with this score or more counts as toxic

_FOLDER = "profanity_check"
_SENTENCE = re.compile(r"(?<=[.!?])\s+|[\r\n]+")
_TOGETHER = 8192


def scores(texts: Sequence[str]) -> list[float]:
    """For each text the score of its worst sentence, in [0, 1]. AT_LEAST and above counts as toxic.

    Raises UsageError where the extra `toxicity` is not installed, Refused where its files are not the pinned ones.
    """
    return [score for score, _ in worst(texts)]


def worst(texts: Sequence[str]) -> list[tuple[float, str]]:
    """For each text (score, sentence) of its worst sentence: in a whole text one insult would be averaged away."""
    rate = _rate()
    best = [(0.0, "")] * len(texts)
    sentences = _sentences(texts)
    while some := list(islice(sentences, _TOGETHER)):
        for (place, sentence), score in zip(some, rate([sentence for _, sentence in some]), strict=True):
            best[place] = max(best[place], (float(score), sentence))
    return best


def detector() -> dict[str, Any]:
    """The detector, for a record: {"package", "version", "digest", "at_least", "measured": see `measured`}."""
    return {
        "package": PACKAGE,
        "version": VERSION,
        "digest": DIGEST,
        "at_least": AT_LEAST,
        "measured": measured(),
    }


@functools.cache
def measured() -> dict[str, Any]:
    """The detector's error on the packaged sentences, half of which are toxic; the others look toxic.

    {"sentences", "toxic", "found": toxic and flagged, "flagged": toxic or not, "recall", "precision", "false_rate": the
    share of the others that is flagged, "kinds": {kind: {"sentences", "flagged"}}}. On data with another share of
    toxic texts the precision differs; it follows from recall, false_rate and that share.
    """
    rows = reference()
    flagged = [score >= AT_LEAST for score in scores([row["text"] for row in rows])]
    toxic = sum(row["toxic"] for row in rows)
    found = sum(row["toxic"] and hit for row, hit in zip(rows, flagged, strict=True))
    kinds: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"sentences": 0, "flagged": 0})
    for row, hit in zip(rows, flagged, strict=True):
        kinds[row["kind"]]["sentences"] += 1
        kinds[row["kind"]]["flagged"] += hit
    return {
        "sentences": len(rows),
        "toxic": toxic,
        "found": found,
        "flagged": sum(flagged),
        "recall": found / toxic,
        "precision": found / sum(flagged) if any(flagged) else None,
        "false_rate": (sum(flagged) - found) / (len(rows) - toxic),
        "kinds": dict(sorted(kinds.items())),
    }


@functools.cache
def reference() -> tuple[dict[str, Any], ...]:
    """The annotated sentences {"text", "toxic", "kind"}; none was chosen or changed for its score."""
    lines = (files("tunesmith.data.quality") / "toxicity_reference.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def _sentences(texts: Sequence[str]) -> Iterator[tuple[int, str]]:
    for place, text in enumerate(texts):
        for sentence in _SENTENCE.split(text):
            if sentence.strip():
                yield place, sentence.strip()


@functools.cache
def _rate() -> Callable[[Sequence[str]], Sequence[float]]:
    folders = package_folders(_FOLDER)
    if not folders:
        raise UsageError(f"looking for toxic texts needs {PACKAGE}", fix='pip install "tunesmith[toxicity]"')
    require_digest(folders[0], folder_digest(folders[0]), DIGEST, f"the package {PACKAGE} {VERSION}")
    from sklearn.exceptions import InconsistentVersionWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", InconsistentVersionWarning)
        try:
            from profanity_check import predict_prob
        except InconsistentVersionWarning as error:
            raise Refused(
                f"the model of {PACKAGE} was made with another scikit-learn than the one installed",
                fix=f"pip install scikit-learn=={VERSION}",
            ) from error
    return predict_prob  # type: ignore[no-any-return]
