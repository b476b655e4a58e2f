"""Flags rows that a person should look at, with the reason. No row is removed because of a flag."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.digests import canonical_lines
from tunesmith.core.errors import UsageError
from tunesmith.core.text.folding import visible
from tunesmith.data.dataset import BALANCED, SPLITS, Dataset, Example, read_lines
from tunesmith.data.duplicates import answer_key, request_text
from tunesmith.data.quality.people import found_people
from tunesmith.data.splitting.groups import connected
from tunesmith.records.dataset import Flag, QualityBody, SimilarRequests
from tunesmith.store.records import Record
from tunesmith.store.store import Store

FLAGS = "flags.jsonl"
REFUSING = "refusing answer"
LONG = "answer much longer than the others"
LONG_REQUEST = "request much longer than the others"
NOISE = "label that the other rows contradict"

LANGUAGE = "another language than the others"
ALIKE = "same meaning as another request"

_SHOWN = 20
_REFUSAL = re.compile(
    r"^\W*(?:i['’]?m sorry|i am sorry|sorry,? but|i apologi[sz]e|unfortunately,? i|as an ai\b"
    r"|i(?:['’]m| am) (?:unable|not able)"
    r"|i (?:cannot|can['’]?t|can not|won['’]?t|do not|don['’]t) (?:help|assist|do that|provide|answer|comply|fulfil))",
    re.IGNORECASE,
)
_TIMES = 10  # much longer: this many times the median
_LEAST_LONG = 200  # characters; shorter texts are never flagged as long
_ROWS_A_LABEL = 5  # as many folds as the cross-validation has
_MOST_LABELS = 1000
_FOLDS = 5
_Rows = Sequence[tuple[str, Example]]  # split and row


def examine_quality(
    store: Store,
    dataset: Dataset,
    *,
    label_noise: bool = False,
    language: bool = False,
    names: bool = False,
    embed: Embed | None = None,
) -> str:
    """Flag a dataset version's rows; returns the digest of a record of kind "quality" with the dataset as its parent.

    label_noise: also look for wrong labels of a classification task, by cleanlab's confident learning (Northcutt,
    Jiang, Chuang, JAIR 70, 2021). It uses out-of-fold probabilities of a linear model of the requests' words.
    language: also look for texts in another language than the others. names: also count the people that the privacy
    scan's model finds. embed: texts -> vectors, to find requests with the same meaning. Raises UsageError where a
    needed extra is not installed or the answers are not labels.
    """
    rows = [(name, example) for name in SPLITS for example in dataset.examples(name)]
    flags = [*_plain_flags(rows), *(_noisy(rows) if label_noise else ())]
    languages = _languages(rows, flags) if language else {}
    clusters = _alike(rows, flags, embed) if embed else []
    asked = {NOISE: label_noise, LANGUAGE: language, ALIKE: embed is not None}
    labels = {key for _, one in rows for key in one.labels}
    flags.sort(key=lambda flag: (flag.flag, flag.id))
    body = QualityBody(
        rows=len(rows),
        flags=Counter(flag.flag for flag in flags),
        looked_for=tuple(sorted([REFUSING, LONG, LONG_REQUEST, *(flag for flag, given in asked.items() if given)])),
        balance={name: Counter(str(getattr(one, name) or "") for _, one in rows) for name in BALANCED}
        | {key: Counter(one.labels.get(key, "") for _, one in rows) for key in labels},
        names=found_people([one.messages for _, one in rows]) if names else None,
        languages=languages if language else None,
        alike=SimilarRequests(clusters=len(clusters), examples=tuple(clusters[:_SHOWN])) if embed else None,
    )
    blob = store.put_bytes(canonical_lines(flag.model_dump() for flag in flags))
    return store.put_record(body.record({"dataset": dataset.digest}, {FLAGS: blob}))


def read_flags(store: Store, record: Record) -> list[Flag]:
    """The flags of a record of kind "quality"."""
    return read_lines(store, record, FLAGS, Flag)


def _languages(rows: _Rows, flags: list[Flag]) -> dict[str, dict[str, int]]:
    """Flag requests and prose answers in another language; returns {"request" or "answer": language -> texts}."""
    counts = {}
    for what, texts in (
        ("request", [request_text(example.messages, visible) for _, example in rows]),
        ("answer", ["" if example.answer.lstrip().startswith(("{", "[")) else example.answer for _, example in rows]),
    ):
        other, counts[what] = other_languages(texts)
        flags += [_flag(*rows[place], LANGUAGE, f"the {what} is in {code}") for place, code in other.items()]
    return counts


def _alike(rows: _Rows, flags: list[Flag], embed: Embed) -> list[tuple[str, ...]]:
    """Flag rows whose request means the same as another one; returns the clusters' ids. Equal requests count once."""
    places: dict[str, int] = {}
    for place, (_, example) in enumerate(rows):
        places.setdefault(request_text(example.messages, visible), place)
    texts = list(places)
    clusters = [[rows[places[texts[one]]] for one in some] for some in alike(texts, embed)]
    for number, some in enumerate(clusters, start=1):
        for split, example in some:
            splits = ", ".join(sorted({name for name, _ in some}))
            flags.append(_flag(split, example, ALIKE, f"cluster {number} of {len(some)} requests in {splits}"))
    return [tuple(example.id for _, example in some) for some in clusters]


def _plain_flags(rows: _Rows) -> Iterator[Flag]:
    answers = [len(example.answer) for _, example in rows]
    requests = [len(request_text(example.messages, visible)) for _, example in rows]
    longest = [max(_LEAST_LONG, _TIMES * median(lengths)) for lengths in (answers, requests)]
    for (split, example), answer, request in zip(rows, answers, requests, strict=True):
        if _REFUSAL.match(example.answer):
            yield _flag(split, example, REFUSING, example.answer[:80])
        if answer > longest[0]:
            yield _flag(split, example, LONG, f"{answer} characters")
        if request > longest[1]:
            yield _flag(split, example, LONG_REQUEST, f"{request} characters")


def _flag(split: str, example: Example, flag: str, detail: str) -> Flag:
    return Flag(id=example.id, split=split, flag=flag, detail=detail)


def _noisy(rows: _Rows) -> Iterator[Flag]:
    try:
        from cleanlab.filter import find_label_issues
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise UsageError(
            f"looking for wrong labels needs {error.name}", fix='pip install "tunesmith[quality]"'
        ) from error
    keys = [answer_key(example.answer) for _, example in rows]
    many = Counter(keys)
    # A label with fewer rows than folds cannot be cross-validated.
    judged = [place for place, key in enumerate(keys) if many[key] >= _ROWS_A_LABEL]
    names = sorted({keys[place] for place in judged})
    if not 2 <= len(names) <= _MOST_LABELS or len(judged) < len(rows) / 2:
        raise UsageError(
            f"the answers are not labels: {len(many)} different ones in {len(rows)} rows",
            fix="look for wrong labels only where the task is classification",
        )
    number = {name: place for place, name in enumerate(names)}
    labels = [number[keys[place]] for place in judged]
    texts = [request_text(rows[place][1].messages, visible) for place in judged]
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=300)
    )
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    chances = cross_val_predict(model, texts, labels, cv=folds, method="predict_proba")
    issues = find_label_issues(labels, chances, return_indices_ranked_by="self_confidence", n_jobs=1)
    for place in issues.tolist():
        split, example = rows[judged[place]]
        likely = names[int(chances[place].argmax())]
        yield _flag(split, example, NOISE, f"{keys[judged[place]][:60]}, perhaps {likely[:60]}")


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
    return {place: one for place, one in enumerate(told) if one not in own | {"?"}}, counts


Embed = Callable[[Sequence[str]], NDArray[np.float32]]
Numbers = NDArray[np.int64]

# Cosine of two MiniLM vectors. Measured by `benchmarks/alike.py` on 6,000 requests each of CLINC150 and BANKING77: of
# the pairs with a cosine of at least 0.9, 99.4% and 97.1% have one intent, and 79% and 88% of the near-identical twins
# are among them. From 0.8 on only 97.8% and 88.9% of the pairs have one intent.
ALIKE_AT = 0.9
_BLOCK = 1024
_PAIRS = 4_000_000  # collected before they are merged: 64 MB


def alike(texts: Sequence[str], embed: Embed, at_least: float = ALIKE_AT) -> list[list[int]]:
    """Clusters of distinct texts that mean the same, as lists of indices, the largest first.

    Each text of a cluster has a cosine of at least at_least to another one. Every pair is compared, in blocks, so the
    time grows with the square of the number of texts. Memory holds the vectors ([texts, width], float32), one block of
    products and at most _PAIRS pairs, which are then merged into the clusters.
    """
    vectors = np.ascontiguousarray(embed(texts), dtype=np.float32)
    labels = np.arange(len(texts))
    pairs: list[tuple[Numbers, Numbers]] = []
    waiting = 0
    for first in range(0, len(texts), _BLOCK):
        for second in range(first, len(texts), _BLOCK):
            one, other = vectors[first : first + _BLOCK], vectors[second : second + _BLOCK]
            rows, columns = np.nonzero(one @ other.T >= at_least)
            pairs.append((rows + first, columns + second))
            waiting += len(rows)
            if waiting > _PAIRS:
                labels, pairs, waiting = _merged(labels, pairs), [], 0
    clusters: defaultdict[int, list[int]] = defaultdict(list)
    for place, label in enumerate(_merged(labels, pairs).tolist()):
        clusters[label].append(place)
    return sorted((some for some in clusters.values() if len(some) > 1), key=lambda some: (-len(some), some))


def _merged(labels: Numbers, pairs: Sequence[tuple[Numbers, Numbers]]) -> Numbers:
    """The cluster number of each text after the clusters of each pair are merged: int64[texts]."""
    if not pairs:
        return labels
    left, right = (labels[np.concatenate(side)] for side in zip(*pairs, strict=True))
    return connected(left, right, len(labels))[labels].astype(np.int64)
