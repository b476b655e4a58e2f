"""How much of a candidate's answers is in the house's style: measured, written to `style.jsonl`, read back and judged.

The house's style is that of the reference answers. A classifier tells them from the bare base model's answers to the
same held-out requests, then it sees the candidates' answers. Every answer is classified by a model that saw no answer
to a request of its group.

The share of answers that are taken for the house's is corrected for the classifier's own errors (Rogan and Gladen 1978,
American Journal of Epidemiology 107): with a share s of the references and f of the base's answers taken for the
house's, a share a of a candidate's answers means that (a - f) / (s - f) of them are in its style. 0 is the base, 1 the
references. The interval resamples groups, and with them all three shares at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, NamedTuple

import numpy as np
from pydantic import Field

from tunesmith.candidates.candidate import load_candidate
from tunesmith.core.digests import short
from tunesmith.core.errors import Inconclusive
from tunesmith.core.text.folding import visible
from tunesmith.core.text.wording import points
from tunesmith.data.dataset import Example
from tunesmith.evaluation.lines import Line, Lines, Name, answers_to, read_answer_lines
from tunesmith.evaluation.probes import numbers
from tunesmith.evaluation.probes.suites import drawn
from tunesmith.evaluation.scores import metric_interval, rounded
from tunesmith.evaluation.stats.statistics import GAPS, Floats, Interval, Level, drawn_means, interval, resampled_figure
from tunesmith.evaluation.style.classifier import Told, cross_fitted, read_answer, words_of
from tunesmith.records.evaluation import (
    EvaluationBody,
    NoStyle,
    StyleAccount,
    StyleFeatures,
    StyleShare,
    StyleSides,
)
from tunesmith.store.records import Record
from tunesmith.store.store import Store

SUITE: Final = "style"
REVISION: Final = 3  # raise it when the classifier decides otherwise
_REFERENCE, _BASE = "reference", "base"
_ROWS: Final = "rows with style"
FEWEST_APART: Final = 0.25  # share of references taken for the house's, minus that of the base's answers


Flag = Annotated[int, Field(ge=0, le=1)]


class StyleLine(Line):
    """The answers to one request: 1 where the classifier takes them for the house's, else 0."""

    file = "style.jsonl"
    unique = ("id",)
    id: Name
    group: Name
    reference: Flag
    base: Flag
    candidates: dict[str, Flag]


class Classified(NamedTuple):
    """Which answers the classifier takes for the house's: 1 or 0 for each row. groups: one for each row.

    cut: candidate -> how many of its answers were cut off at max_tokens. They are never taken for the house's.
    """

    groups: tuple[str, ...]
    reference: Floats
    base: Floats
    candidates: Mapping[str, Floats]
    cut: Mapping[str, int] = {}

    def apart(self, level: Level) -> Interval:
        """How much more often references are taken for the house's than the base's answers are."""
        return interval(self.reference - self.base, self.groups, GAPS, level)

    def share(self, name: str, level: Level) -> Interval:
        """The share of a candidate's answers in the house's style: (a - f) / (s - f), from 0 to 1, with its interval.

        Each is resampled over groups and with a worst-case group (as statistics.py): for the lower end its candidate
        answer is not taken for the house's, and the base's is; for the upper end the candidate's is, and the reference
        is not. Raises Inconclusive for too few groups, and where the classifier does not tell references from base
        answers.
        """
        numbers.check_groups(_ROWS, self.groups)
        apart = self.apart(level)
        if apart.low < FEWEST_APART:
            raise Inconclusive(
                f"the classifier takes {self.reference.mean():.0%} of the references for the house's and "
                f"{self.base.mean():.0%} of the base model's answers, a difference of {points(apart.mean)} points "
                f"({points(apart.low)} to {points(apart.high)}): too little to tell the two styles apart, since the "
                f"interval must start at {FEWEST_APART * 100:.0f} points or more"
            )
        rates = np.stack([self.candidates[name], self.base, self.reference], axis=1)
        means, columns = drawn_means(rates, self.groups, np.array((0.0, 1.0, 1.0)), np.array((1.0, 0.0, 0.0)))

        def drawn(weights: Floats) -> tuple[Floats, Floats]:
            low, high = means(weights)
            return _ratio(low.T, 0.0), _ratio(high.T, 1.0)

        mean = float(_ratio(np.array([each.mean() for each in rates.T]), 0.0))
        return resampled_figure(mean, drawn, level, columns)


def measure_style(
    store: Store,
    digest: str | None,
    dataset: str,
    test: Sequence[Example],
    answers: Mapping[str, Lines],
    level: Level,
) -> tuple[list[StyleLine], StyleAccount | NoStyle | None]:
    """The lines of style.jsonl, and the evaluation record's account.

    digest: of the bare base model's answers, without which there are no lines and no account. answers: candidate -> row
    id -> line. Unusable answers give no lines and NoStyle, so that only the style gate is inconclusive. Rows to which
    the base's answer is empty are left out, and counted as "silent".
    """
    if digest is None:
        return [], None
    try:
        base = _base_answers(store, digest, dataset, test)
        rows = [row for row in test if visible(base.get(row.id, ""))]  # an empty answer shows no style
        silent = len(base) - len(rows)
        what = f"rows with style (to {silent} more the bare base model's answer is empty)" if silent else _ROWS
        numbers.check_groups(what, [row.group for row in rows])
    except Inconclusive as error:
        return [], NoStyle(unusable=error.reason)
    asked = [words_of("\n".join(turn.content for turn in row.request if turn.role == "user")) for row in rows]
    sets = {_REFERENCE: [row.answer for row in rows], _BASE: [base[row.id] for row in rows]}
    sets |= {f"candidate:{name}": [str(own[row.id]["text"]) for row in rows] for name, own in answers.items()}
    groups = tuple(row.group for row in rows)
    told = cross_fitted(
        {name: [read_answer(*pair) for pair in zip(own, asked, strict=True)] for name, own in sets.items()},
        _REFERENCE,
        _BASE,
        groups,
    )
    flags = {name: taken(own, told.probabilities[name]) for name, own in sets.items()}
    # A short answer may look like the references because it was cut off. Nobody knows what would have followed.
    whole = {name: np.array([lines[row.id]["finish"] != "length" for row in rows]) for name, lines in answers.items()}
    own_flags = {name: flags[f"candidate:{name}"] * whole[name] for name in answers}
    cut = {name: int((~each).sum()) for name, each in whole.items()}
    classified = Classified(groups, flags[_REFERENCE], flags[_BASE], own_flags, cut)
    lines = [
        StyleLine(
            id=row.id,
            group=row.group,
            reference=int(classified.reference[place]),
            base=int(classified.base[place]),
            candidates={name: int(own[place]) for name, own in classified.candidates.items()},
        )
        for place, row in enumerate(rows)
    ]
    return lines, _account(classified, told, silent, level)


def read_style(store: Store, evaluation: Record) -> Classified | None:
    """The classified rows; None where style was not measured. Raises Inconclusive, naming the line, for invalid ones.

    That is: a line with other keys, values but 0 and 1, other candidates than the record's, or shares that differ from
    the record's account.
    """
    if StyleLine.file not in evaluation.blobs:
        return None
    stated = EvaluationBody.of(evaluation).style
    if not isinstance(stated, StyleAccount):
        raise Inconclusive("the evaluation record does not account for its classified rows")
    names, lines = sorted(stated.candidates), StyleLine.read(store, evaluation)
    if any(sorted(line.candidates) != names for line in lines):
        raise Inconclusive("a line does not classify the answers of all candidates", where=StyleLine.file)
    rows = [[line.reference, line.base, *(line.candidates[name] for name in names)] for line in lines]
    values = np.array(rows, dtype=np.float64).reshape(len(rows), 2 + len(names))
    shares = [rounded(column.mean()) for column in values.T] if rows else []
    promised = [stated.taken.reference, stated.taken.base, *(stated.candidates[name].taken for name in names)]
    if stated.n != len(rows) or shares != promised:
        raise Inconclusive("the evaluation record contradicts its classified rows")
    columns = dict(zip(names, values.T[2:], strict=True))
    cut = {name: stated.candidates[name].cut for name in names}
    return Classified(tuple(line.group for line in lines), values[:, 0], values[:, 1], columns, cut)


def _base_answers(store: Store, digest: str, dataset: str, test: Sequence[Example]) -> dict[str, str]:
    """Row id -> the bare base model's answer. Raises Inconclusive where these are other answers."""
    where = f"answers {short(digest)}"
    record, body = answers_to(store, digest, SUITE, where, dataset=dataset)
    candidate = load_candidate(store, record.parents["candidate"])
    if candidate.tuned or not candidate.asks_base or candidate.prompt or candidate.shots or candidate.retrieve:
        raise Inconclusive("these are not the answers of the bare base model", where=where)
    lines = read_answer_lines(store, record, [row.id for row in drawn(test, body.rows or 0)], where)
    if any(not isinstance(line.get("text"), str) for line in lines.values()):
        raise Inconclusive("an answer has no text", where=where)
    return {name: line["text"] for name, line in lines.items()}


def taken(texts: Sequence[str], probabilities: Floats) -> Floats:
    """1 where an answer is taken for the house's. An empty one never is."""
    written = np.array([bool(visible(text)) for text in texts])
    return np.asarray((probabilities > 0.5) & written, dtype=np.float64)


def _account(classified: Classified, told: Told, silent: int, level: Level) -> StyleAccount:
    house, base = ((told.probabilities[name], classified.groups) for name in (_REFERENCE, _BASE))
    auc = numbers.auc_interval(house, base, level)
    candidates: dict[str, StyleShare] = {}
    for name, flags in classified.candidates.items():
        share, why = None, None
        try:
            share = metric_interval(classified.share(name, level))
        except Inconclusive as error:
            why = error.what
        taken = rounded(flags.mean())
        candidates[name] = StyleShare(taken=taken, cut=classified.cut[name], share=share, unusable=why)
    return StyleAccount(
        revision=REVISION,
        n=len(classified.groups),
        groups=len(set(classified.groups)),
        auc=metric_interval(auc),
        auc_by_form=rounded(numbers.auc(told.by_form[_REFERENCE], told.by_form[_BASE])),
        taken=StyleSides(
            reference=rounded(classified.reference.mean()),
            base=rounded(classified.base.mean()),
        ),
        apart=metric_interval(classified.apart(level)),
        features=StyleFeatures(house=tuple(told.house), base=tuple(told.base)),
        candidates=candidates,
        silent=silent,
    )


def _ratio(rates: Floats, otherwise: float) -> Floats:
    """(a - f) / (s - f) between 0 and 1 of the rates a, f and s; otherwise where s - f is too small to divide by."""
    own, base, reference = rates
    part, whole = own - base, reference - base
    usable = whole > 0.01
    return np.where(usable, np.clip(part / np.where(usable, whole, 1.0), 0.0, 1.0), otherwise)
