"""Evaluations as people look them up: which there are, what one showed, and its requests one by one.

Everything is limited to what a user may see. An evaluation belongs to the project: people without a tenant and a region
see all, people of a tenant or region those from which a version of theirs was registered. The texts of requests and
answers take the permission `evidence.read`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tunesmith.core.access import Caller
from tunesmith.core.errors import Inconclusive, Refused, UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.text.differences import Change, differences
from tunesmith.core.version_ref import VersionRef
from tunesmith.core.view import View
from tunesmith.evaluation.gates.judging import Outcome
from tunesmith.evaluation.report.data import report_data
from tunesmith.evaluation.report.matrix import CHANGES, Filter, Matrix, Reader, Selected, Sight
from tunesmith.evaluation.report.matrix import Change as RowChange
from tunesmith.evaluation.summary import (
    EvaluationSummary,
    MetricInterval,
    VerdictSummary,
    evaluation_summary,
    verdict_summary,
)
from tunesmith.services.evaluation import EvidenceReport
from tunesmith.store import database
from tunesmith.store.identities import User
from tunesmith.store.recalls import reasons_of_recalls, recalled
from tunesmith.store.store import Store
from tunesmith.store.tables import EdgeRow, RecordRow, VersionRow

LISTED = 25  # evaluations on a page
READ_PERMISSION = "evidence.read"
REFERENCE = "reference"  # what an answer may be compared with, beside candidates
_SHOWN_REQUEST, _SHOWN_ANSWER = 120, 60  # characters of a text in the matrix


class RegisteredFrom(View):
    """A version that was registered from an evaluation. verdict: digest of the verdict that let it."""

    version: str
    digest: str
    verdict: str


class ListedVerdict(View):
    """A verdict on one candidate of an evaluation."""

    digest: str
    candidate: str
    verdict: Outcome


class ListedEvaluation(View):
    """One line of the list. best: the candidate with the highest mean by the primary metric, and its interval.

    recalled: why its evidence may no longer be used, None if it may.
    """

    evaluation: str
    at: str
    n: int
    primary: str
    candidates: int
    best: str
    score: MetricInterval
    verdicts: tuple[ListedVerdict, ...]
    versions: tuple[RegisteredFrom, ...]
    recalled: str | None


class EvaluationList(View):
    """A page of evaluations, newest first. total: how many there are on all pages."""

    evaluations: tuple[ListedEvaluation, ...]
    total: int


class EvaluationPage(View):
    """One evaluation: what was measured, and a verdict on it, the newest unless one was asked for."""

    summary: EvaluationSummary
    at: str
    dataset: str
    verdicts: tuple[ListedVerdict, ...]
    verdict: VerdictSummary | None
    versions: tuple[RegisteredFrom, ...]
    recalled: str | None


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

    compared: what the answers' changes start from, REFERENCE or a candidate. place: from 0 among the chosen requests,
    None if the filter leaves it out; previous, next: ids of its neighbours there.
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


def list_evaluations(store: Store, user: User, *, first: int = 0, most: int = LISTED) -> EvaluationList:
    """The evaluations that a user may see, newest first, from a place on."""
    with database.reading(store.engine) as session:
        seen = _visible(user.scope)
        total = session.scalar(select(func.count()).select_from(seen.subquery())) or 0
        ordered = seen.order_by(RecordRow.created_at.desc(), RecordRow.digest).offset(first).limit(most)
        rows = session.execute(ordered).all()
        digests = [digest for digest, _ in rows]
        verdicts = _verdicts(session, store, user.scope, digests)
        versions = _versions(session, user.scope, digests)
        reasons = reasons_of_recalls(session, digests)
    found = []
    for digest, at in rows:
        body = store.record(digest, kind="evaluation").body
        primary = body["primary"]
        scores = {name: stated["metrics"][primary] for name, stated in body["candidates"].items()}
        best = max(sorted(scores), key=lambda name: scores[name]["mean"])
        found.append(
            ListedEvaluation(
                evaluation=digest,
                at=at,
                n=body["n"],
                primary=primary,
                candidates=len(scores),
                best=best,
                score=scores[best],
                verdicts=tuple(verdicts.get(digest, ())),
                versions=tuple(versions.get(digest, ())),
                recalled=reasons.get(digest),
            )
        )
    return EvaluationList(evaluations=tuple(found), total=total)


def newest_evaluation(store: Store, user: User) -> str:
    """Digest of the newest evaluation that a user may see. Raises UsageError where there is none."""
    with database.reading(store.engine) as session:
        found = _visible(user.scope).order_by(RecordRow.created_at.desc(), RecordRow.digest).limit(1)
        digest: str | None = session.scalars(found).first()
    if digest is None:
        raise UsageError("nothing has been evaluated yet", fix="run `tunesmith evaluate` first")
    return digest


def show_evaluation(store: Store, user: User, digest: str, verdict: str | None = None) -> EvaluationPage | None:
    """One evaluation with a verdict; None where the user sees none with this digest, or no such verdict on it."""
    with database.reading(store.engine) as session:
        at = _found(session, user.scope, digest)
        if at is None:
            return None
        verdicts = _verdicts(session, store, user.scope, [digest]).get(digest, [])
        versions = _versions(session, user.scope, [digest]).get(digest, [])
        reason = recalled(session, digest, as_evidence=True)
    chosen = verdict or (verdicts[-1].digest if verdicts else None)
    if chosen is not None and chosen not in {one.digest for one in verdicts}:
        return None
    return EvaluationPage(
        summary=evaluation_summary(store, digest),
        at=at,
        dataset=store.record(digest).parents["dataset"],
        verdicts=tuple(verdicts),
        verdict=None if chosen is None else verdict_summary(store, chosen),
        versions=tuple(versions),
        recalled=reason,
    )


def show_findings(store: Store, user: User, digest: str, verdict: str | None = None) -> EvidenceReport | None:
    """What the report computes of an evaluation, without rows, versions and audit log; None as `show_evaluation`.

    Takes seconds the first time. Raises Refused for evidence that is not consistent.
    """
    page = show_evaluation(store, user, digest, verdict)
    if page is None:
        return None
    try:
        return _findings(store, digest, None if page.verdict is None else page.verdict.digest)
    except Inconclusive as error:
        raise Refused(error.what, where=error.where, fix=error.fix) from error


def show_requests(
    store: Store, user: User, region: str, digest: str, chosen: Mapping[str, str], first: int = 0, most: int = 0
) -> RequestMatrix | None:
    """A piece of the matrix; None where the user sees no such evaluation.

    region: of the server, for documents' labels. chosen: fields of Filter; what is left out is chosen as the report
    chooses it. Raises Refused without the permission, for a recalled evaluation and for evidence that is not
    consistent; UsageError for a candidate or metric that was not measured.
    """
    matrix = _readable(store, user, digest)
    if matrix is None:
        return None
    reader = _reader(user, region)
    use = _filter(store, digest, matrix, chosen)
    found, sight = matrix.select(use, reader), matrix.sight(reader)
    changes = matrix.changes(use.focus, use.rival, use.metric)
    names = tuple(dict.fromkeys((use.focus, use.rival, *matrix.candidates)))
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
                request=_last_turn(matrix, place)[:_SHOWN_REQUEST],
                change=CHANGES[changes[place]],
                cells=tuple(_cell(matrix, sight, name, use.metric, place) for name in names),
            )
            for number, place in enumerate(found.places[first : first + most].tolist())
        ),
    )


def show_request(
    store: Store, user: User, region: str, digest: str, row: str, chosen: Mapping[str, str], compared: str = REFERENCE
) -> OpenedRequest | None:
    """One request with its answers; None where the user sees no such evaluation or row. As `show_requests`.

    compared: what the answers are compared with word by word, REFERENCE or a candidate.
    """
    matrix = _readable(store, user, digest)
    reader = _reader(user, region)
    place = None if matrix is None else matrix.place.get(row)
    if matrix is None or place is None or place not in matrix.sight(reader).rows:
        return None
    sight, example = matrix.sight(reader), matrix.rows[place]
    use = _filter(store, digest, matrix, chosen)
    if compared not in (REFERENCE, *matrix.candidates):
        raise UsageError(f"there is no candidate {compared[:80]!r} to compare with", fix="name one of the evaluation")
    start = example.answer if compared == REFERENCE else _text(matrix, sight, compared, place)
    at, before, after = _neighbours(matrix, matrix.select(use, reader), place)
    return OpenedRequest(
        evaluation=digest,
        id=example.id,
        source=example.source,
        group=example.group,
        labels=tuple(matrix.labels_of(place)),
        turns=tuple((turn.role, turn.text) for turn in example.request),
        reference=example.answer,
        candidates=tuple(matrix.candidates),
        primary=matrix.primary,
        compared=compared,
        answers=tuple(_opened(matrix, sight, name, place, start) for name in matrix.candidates),
        place=at,
        chosen=len(matrix.select(use, reader).places),
        previous=before,
        next=after,
    )


# Reading


@lru_cache(maxsize=4)
def _matrix(store: Store, digest: str) -> Matrix:
    return Matrix(store, digest)


@lru_cache(maxsize=32)
def _findings(store: Store, digest: str, verdict: str | None) -> EvidenceReport:
    data = report_data(store, digest, verdict)
    return EvidenceReport.model_validate({**data, "examples": None})


def _readable(store: Store, user: User, digest: str) -> Matrix | None:
    """The matrix, where the user may read its texts. Raises Refused as `show_requests` says."""
    with database.reading(store.engine) as session:
        if _found(session, user.scope, digest) is None:
            return None
        reason = recalled(session, digest, as_evidence=True)
    if not user.may(READ_PERMISSION):
        raise Refused(
            f"{user.name} may not read requests and answers",
            fix="ask an admin for the role engineer, steward or approver",
        )
    if reason is not None:
        raise Refused(f"this evaluation was recalled, so its texts are not shown: {reason}", fix="evaluate again")
    try:
        return _matrix(store, digest)
    except Inconclusive as error:
        raise Refused(error.what, where=error.where, fix=error.fix) from error


def _reader(user: User, region: str) -> Reader:
    return Reader(user.scope, Caller(Scope(user.tenant, region), frozenset(user.groups)))


def _filter(store: Store, digest: str, matrix: Matrix, chosen: Mapping[str, str]) -> Filter:
    """The filter; candidates that are not named are the ones that a verdict or the scores put in front."""
    means = {name: float(matrix.scores[name, matrix.primary].mean()) for name in matrix.candidates}
    ranked = sorted(means, key=lambda name: (matrix.candidates[name].tuned, means[name]), reverse=True)
    focus = chosen.get("focus") or ranked[0]
    others = [name for name in ranked if name != focus] or [focus]
    rival = chosen.get("rival") or max(others, key=lambda name: (not matrix.candidates[name].tuned, means[name]))
    given = {key: chosen[key] for key in ("show", "group", "label", "search") if chosen.get(key)}
    return Filter(focus, rival, chosen.get("metric") or matrix.primary, **given)  # type: ignore[arg-type]


def _last_turn(matrix: Matrix, place: int) -> str:
    return matrix.rows[place].request[-1].text


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
        retrieved=tuple(FoundText(source=one.source, title=one.title, text=one.text) for one in found),
    )


def _neighbours(matrix: Matrix, found: Selected, place: int) -> tuple[int | None, str | None, str | None]:
    """A row's place among the chosen ones, and the ids before and after it."""
    at = next(iter((found.places == place).nonzero()[0].tolist()), None)
    if at is None:
        return None, None, None
    ids = [matrix.rows[each].id for each in found.places[max(0, at - 1) : at + 2].tolist()]
    return at, ids[0] if at else None, ids[-1] if at + 1 < len(found.places) else None


# The index of records


def _visible(scope: Scope) -> Any:
    """A query of (digest, created_at) of every evaluation that people of a scope may see."""
    query = select(RecordRow.digest, RecordRow.created_at).where(RecordRow.kind == "evaluation")
    if scope == Scope():
        return query
    own = select(EdgeRow.parent).join(VersionRow, VersionRow.digest == EdgeRow.child)
    own = _of_scope(own.where(EdgeRow.role == "evaluation"), scope)
    return query.where(RecordRow.digest.in_(own))


def _of_scope(query: Any, scope: Scope) -> Any:
    """A query's versions, only those that people of a scope may see: those that it covers."""
    columns = {"tenant": VersionRow.tenant, "region": VersionRow.region}
    return query.where(*(columns[key] == name for key, name in scope.fields().items() if name))


def _found(session: Session, scope: Scope, digest: str) -> str | None:
    """When an evaluation was made; None where people of a scope see none with this digest."""
    row = session.execute(_visible(scope).where(RecordRow.digest == digest)).first()
    return None if row is None else str(row[1])


def _verdicts(
    session: Session, store: Store, scope: Scope, evaluations: Sequence[str]
) -> dict[str, list[ListedVerdict]]:
    """Evaluation -> its verdicts, oldest first. People of a tenant or region see those that released theirs."""
    query = select(EdgeRow.parent, EdgeRow.child).join(RecordRow, RecordRow.digest == EdgeRow.child)
    query = query.where(EdgeRow.parent.in_(evaluations), EdgeRow.role == "evaluation", RecordRow.kind == "verdict")
    if scope != Scope():
        released = select(EdgeRow.parent).join(VersionRow, VersionRow.digest == EdgeRow.child)
        query = query.where(EdgeRow.child.in_(_of_scope(released.where(EdgeRow.role == "verdict"), scope)))
    found: dict[str, list[ListedVerdict]] = {}
    for evaluation, digest in session.execute(query.order_by(RecordRow.created_at, RecordRow.digest)).all():
        body = store.record(digest, kind="verdict").body
        one = ListedVerdict(digest=digest, candidate=body["name"], verdict=body["verdict"])
        found.setdefault(evaluation, []).append(one)
    return found


def _versions(session: Session, scope: Scope, evaluations: Sequence[str]) -> dict[str, list[RegisteredFrom]]:
    """Evaluation -> the versions of a scope that were registered from it."""
    verdict = select(EdgeRow.child, EdgeRow.parent).where(EdgeRow.role == "verdict").subquery()
    query = select(EdgeRow.parent, VersionRow.name, VersionRow.number, VersionRow.digest, verdict.c.parent)
    query = query.join(VersionRow, VersionRow.digest == EdgeRow.child)
    query = query.join(verdict, verdict.c.child == EdgeRow.child)
    query = _of_scope(query.where(EdgeRow.parent.in_(evaluations), EdgeRow.role == "evaluation"), scope)
    found: dict[str, list[RegisteredFrom]] = {}
    for evaluation, name, number, digest, judged in session.execute(
        query.order_by(VersionRow.name, VersionRow.number)
    ).all():
        one = RegisteredFrom(version=str(VersionRef(name, number)), digest=digest, verdict=judged)
        found.setdefault(evaluation, []).append(one)
    return found
