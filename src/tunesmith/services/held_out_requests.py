"""The held-out requests of an evaluation, as people look them up: a matrix by candidates, and one request opened.

Requests and answers are texts of rows: they take the permission `evidence.read` and an evaluation that the user may see
(services/evaluation_lookups.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from tunesmith.core.access import Caller
from tunesmith.core.errors import NextStep, NotThere, Refused, UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.text.display import Change, differences
from tunesmith.core.view import View
from tunesmith.evaluation.report.approach_ladder import CONTROL, approach_of
from tunesmith.evaluation.report.matrix import CHANGES, Filter, Matrix, Reader, Selected, Sight
from tunesmith.evaluation.report.matrix import Change as RowChange
from tunesmith.evaluation.summary import EvaluationSummary, rival_of, verdict_summary
from tunesmith.services.evaluation_lookups import refused_if_inconsistent, show_evaluation, when_made
from tunesmith.services.evaluations import READ_PERMISSION
from tunesmith.store import database
from tunesmith.store.people.identities import User
from tunesmith.store.records import recalls_of
from tunesmith.store.store import Store

REFERENCE = "reference"  # what an answer may be compared with, beside candidates
_SHOWN_REQUEST, _SHOWN_ANSWER = 120, 60  # characters of a text in the matrix


class MatrixCell(View):
    """One answer in the matrix. valid: None where no metric measures the form; cut: it reached the longest length.

    text: its beginning; None where the reader may not see what it was made with.
    """

    score: float
    valid: bool | None
    cut: bool
    text: str | None


class MatrixRow(View):
    """One request. place: from 0, among the chosen ones. cells: in the order of the matrix's candidates."""

    place: int
    id: str
    group: str
    request: str
    change: RowChange
    cells: tuple[MatrixCell, ...]


class RequestMatrix(View):
    """A piece of the matrix of requests by candidates, in the order shown: losses and wins first.

    candidates: the two compared first. total: requests that the reader may see; chosen: those that the filter keeps;
    changes: of all, loss, win, differs or same -> requests; rows: those asked for. labels: the most frequent labels
    with their rows. measures_form: whether a metric says that answers are invalid.
    """

    evaluation: str
    dataset: str
    candidates: tuple[str, ...]
    metrics: tuple[str, ...]
    filter: dict[str, str]
    total: int
    chosen: int
    changes: dict[RowChange, int]
    labels: tuple[tuple[str, int], ...]
    measures_form: bool
    rows: tuple[MatrixRow, ...]


class FoundText(View):
    """A passage or training example that an answer was made with. title: the headings above a passage, or empty."""

    source: str
    title: str
    text: str


class OpenedAnswer(View):
    """One candidate's answer. changes: from what it is compared with to this answer, word by word.

    text, changes, retrieved: None, empty where the reader may not see something that the answer was made with.
    """

    candidate: str
    text: str | None
    scores: dict[str, float]
    valid: bool | None
    cut: bool
    prompt_tokens: int
    completion_tokens: int
    changes: tuple[Change, ...]
    retrieved: tuple[FoundText, ...]


class OpenedRequest(View):
    """A held-out request with all answers. turns: (role, text) before the answer; reference: the right answer.

    candidates, answers: the two compared first. compared: what the answers' changes start from, REFERENCE or a
    candidate. place: from 0 among the chosen requests, None if the filter leaves it out; previous, next: ids of its
    neighbours there.
    """

    evaluation: str
    id: str
    source: str
    group: str
    labels: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    reference: str
    candidates: tuple[str, ...]
    primary: str
    compared: str
    answers: tuple[OpenedAnswer, ...]
    place: int | None
    chosen: int
    previous: str | None
    next: str | None


@refused_if_inconsistent()
def show_requests(
    store: Store, user: User, region: str, digest: str, chosen: Mapping[str, str], first: int = 0, most: int = 0
) -> RequestMatrix:
    """A piece of the matrix.

    region: of the server, for documents' labels. chosen: fields of Filter; what is left out is chosen as the report
    chooses it. Raises Forbidden without the permission, NotThere where the user sees no such evaluation, Refused for a
    recalled one and for evidence that is not consistent, UsageError for a candidate or metric that was not measured.
    """
    matrix = _readable(store, user, digest)
    reader = _reader(user, region)
    use = _filter(store, user, digest, matrix, chosen)
    found, sight = matrix.select(use, reader), matrix.sight(reader)
    changes = matrix.changes(use.focus, use.rival, use.metric)
    names = _names(use, matrix)
    return RequestMatrix(
        evaluation=digest,
        dataset=matrix.dataset,
        candidates=names,
        metrics=matrix.metrics,
        filter={key: getattr(use, key) for key in Filter.__slots__},
        total=len(sight.rows),
        chosen=len(found.places),
        changes=dict(found.counts),
        labels=tuple(sight.labels),
        measures_form=matrix.measures_form,
        rows=tuple(
            MatrixRow(
                place=first + number,
                id=matrix.rows[place].id,
                group=matrix.rows[place].group,
                request=matrix.rows[place].request[-1].text[:_SHOWN_REQUEST],
                change=CHANGES[changes[place]],
                cells=tuple(_cell(matrix, sight, name, use.metric, place) for name in names),
            )
            for number, place in enumerate(found.places[first : first + most].tolist())
        ),
    )


@refused_if_inconsistent()
def show_request(
    store: Store, user: User, region: str, digest: str, row: str, chosen: Mapping[str, str], compared: str = REFERENCE
) -> OpenedRequest:
    """One request with its answers.

    compared: what the answers are compared with word by word, REFERENCE or a candidate. Raises as `show_requests` does,
    and NotThere for a row that the user may not see.
    """
    matrix = _readable(store, user, digest)
    reader = _reader(user, region)
    place = matrix.place.get(row)
    if place is None or place not in matrix.sight(reader).rows:
        raise NotThere("there is no such request", fix=NextStep("list those of the newest evaluation", "requests"))
    sight, example = matrix.sight(reader), matrix.rows[place]
    use = _filter(store, user, digest, matrix, chosen)
    if compared not in (REFERENCE, *matrix.candidates):
        raise UsageError(f"there is no candidate {compared[:80]!r} to compare with", fix="name one of the evaluation")
    start = example.answer if compared == REFERENCE else _text(matrix, sight, compared, place)
    found, names = matrix.select(use, reader), _names(use, matrix)
    at, before, after = _neighbours(matrix, found, place)
    return OpenedRequest(
        evaluation=digest,
        id=example.id,
        source=example.source,
        group=example.group,
        labels=tuple(matrix.labels_of(place)),
        turns=tuple((turn.role, turn.text) for turn in example.request),
        reference=example.answer,
        candidates=names,
        primary=matrix.primary,
        compared=compared,
        answers=tuple(_opened(matrix, sight, name, place, start) for name in names),
        place=at,
        chosen=len(found.places),
        previous=before,
        next=after,
    )


# Reading


@lru_cache(maxsize=4)
def _matrix(store: Store, digest: str) -> Matrix:
    return Matrix(store, digest)


def _readable(store: Store, user: User, digest: str) -> Matrix:
    """The matrix, where the user may read its texts. Raises as `show_requests` says."""
    user.require(READ_PERMISSION)
    with database.reading(store.engine) as session:
        if when_made(session, user.scope, digest) is None:
            raise NotThere("there is no such evaluation", fix=NextStep("list the evaluations", "evaluations"))
        reason = recalls_of(session, [digest]).get(digest)
    if reason is not None:
        raise Refused(f"this evaluation was recalled, so its texts are not shown: {reason}", fix="evaluate again")
    return _matrix(store, digest)


def _reader(user: User, region: str) -> Reader:
    return Reader(user.scope, Caller(Scope(user.tenant, region), frozenset(user.groups)))


def _filter(store: Store, user: User, digest: str, matrix: Matrix, chosen: Mapping[str, str]) -> Filter:
    """The filter. Candidates that are not named: the one that the leading verdict judges, and the report's rival of it.

    Without a verdict, the best tuned candidate that is not a control.
    """
    focus, rival = chosen.get("focus"), chosen.get("rival")
    if not (focus and rival):
        page = show_evaluation(store, user, digest)
        focus = focus or (page.verdict.candidate if page.verdict else _best(store, matrix, page.summary))
        judged = [one.digest for one in page.verdicts if one.candidate == focus]
        verdict = verdict_summary(store, judged[-1]) if judged else None
        others = [name for name in sorted(matrix.candidates) if name != focus] or [focus]
        rival = rival or rival_of(page.summary, verdict, focus)[0] or max(others, key=page.summary.mean)
    given = {key: chosen[key] for key in ("show", "group", "label", "search") if chosen.get(key)}
    return Filter(focus, rival, chosen.get("metric") or matrix.primary, **given)  # type: ignore[arg-type]


def _names(use: Filter, matrix: Matrix) -> tuple[str, ...]:
    return tuple(dict.fromkeys((use.focus, use.rival, *matrix.candidates)))


def _best(store: Store, matrix: Matrix, measured: EvaluationSummary) -> str:
    def rank(name: str) -> tuple[bool, bool, float]:
        candidate = matrix.candidates[name]
        return approach_of(store, candidate) != CONTROL, candidate.tuned, measured.mean(name)

    return max(sorted(matrix.candidates), key=rank)


def _text(matrix: Matrix, sight: Sight, name: str, place: int) -> str | None:
    return None if place in sight.withheld[name] else str(matrix.lines[name][place]["text"])


def _cell(matrix: Matrix, sight: Sight, name: str, metric: str, place: int) -> MatrixCell:
    text = _text(matrix, sight, name, place)
    return MatrixCell(
        score=float(matrix.scores[name, metric][place]),
        valid=matrix.valid(name, place),
        cut=matrix.cut(name, place),
        text=None if text is None else text[:_SHOWN_ANSWER],
    )


def _opened(matrix: Matrix, sight: Sight, name: str, place: int, start: str | None) -> OpenedAnswer:
    line, text = matrix.lines[name][place], _text(matrix, sight, name, place)
    found = [matrix.found[name][identifier] for identifier in line.get("retrieved", ()) if text is not None]
    return OpenedAnswer(
        candidate=name,
        text=text,
        scores={metric: float(matrix.scores[name, metric][place]) for metric in matrix.metrics},
        valid=matrix.valid(name, place),
        cut=matrix.cut(name, place),
        prompt_tokens=line.get("prompt_tokens", 0),
        completion_tokens=line.get("completion_tokens", 0),
        changes=() if start is None or text is None else tuple(differences(start, text)),
        retrieved=tuple(FoundText.of(one) for one in found),
    )


def _neighbours(matrix: Matrix, found: Selected, place: int) -> tuple[int | None, str | None, str | None]:
    """A row's place among the chosen ones, and the ids before and after it."""
    at = next(iter((found.places == place).nonzero()[0].tolist()), None)
    if at is None:
        return None, None, None
    ids = [matrix.rows[each].id for each in found.places[max(0, at - 1) : at + 2].tolist()]
    return at, ids[0] if at else None, ids[-1] if at + 1 < len(found.places) else None
