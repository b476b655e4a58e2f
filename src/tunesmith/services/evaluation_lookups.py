"""Evaluations as people look them up: which there are, and what one showed.

Everything is limited to what a user may see. An evaluation belongs to the project: people without a tenant and a region
see all, people of a tenant or region those from which a version of theirs was registered. Its requests one by
one: services/held_out_requests.py.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from tunesmith.candidates.candidate import load_candidate
from tunesmith.core.errors import Inconclusive, NextStep, NotThere, Refused, TunesmithError, UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.text.names import VersionRef
from tunesmith.core.view import View
from tunesmith.evaluation.report.data import report_data
from tunesmith.evaluation.report.evidence import EvidenceReport
from tunesmith.evaluation.summary import (
    EvaluationSummary,
    VerdictSummary,
    evaluation_summary,
    leading_verdict,
    rival_of,
    verdict_summary,
)
from tunesmith.records.evaluation import EvaluationBody, MetricInterval
from tunesmith.records.verdict import Outcome, VerdictBody
from tunesmith.registry.versions import load_version
from tunesmith.services.evaluations import READ_PERMISSION, without_texts
from tunesmith.store import database
from tunesmith.store.database import within
from tunesmith.store.people.identities import User
from tunesmith.store.records import recalls_of
from tunesmith.store.store import Store
from tunesmith.store.tables import EdgeRow, RecordRow, VersionRow

LISTED = 25  # evaluations on a page
_NO_EVALUATION = "there is no such evaluation, or no such verdict on it"


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

    recalled: why its evidence may no longer be used, None if it may. unreadable: why its record, or that of a verdict
    on it, cannot be read, None if they can; without them, what they state is empty.
    """

    evaluation: str
    at: str
    n: int = 0
    primary: str = ""
    candidates: int = 0
    best: str = ""
    score: MetricInterval | None = None
    verdicts: tuple[ListedVerdict, ...] = ()
    versions: tuple[RegisteredFrom, ...]
    recalled: str | None
    unreadable: str | None = None


class EvaluationList(View):
    """A page of evaluations, newest first. total: how many there are on all pages."""

    evaluations: tuple[ListedEvaluation, ...]
    total: int


class EvaluationPage(View):
    """One evaluation: what was measured, and the leading verdict on it, or the one asked for.

    endpoint: whether the verdict is about an endpoint, which cannot be registered.
    """

    summary: EvaluationSummary
    at: str
    dataset: str
    verdicts: tuple[ListedVerdict, ...]
    verdict: VerdictSummary | None
    endpoint: bool
    versions: tuple[RegisteredFrom, ...]
    recalled: str | None


class CandidatePair(View):
    """Two candidates that one evaluation measured. focus, rival: their names; against: the rival's version, or "".

    evaluation, verdict: digests.
    """

    evaluation: str
    verdict: str
    focus: str
    rival: str
    against: str


def list_evaluations(store: Store, user: User, page: int = 1) -> EvaluationList:
    """A page of the evaluations that a user may see, newest first."""
    with database.reading(store.engine) as session:
        seen = _visible(user.scope)
        total = session.scalar(select(func.count()).select_from(seen.subquery())) or 0
        ordered = seen.order_by(RecordRow.created_at.desc(), RecordRow.digest).offset((page - 1) * LISTED)
        rows = session.execute(ordered.limit(LISTED)).all()
        digests = [digest for digest, _ in rows]
        verdicts = _verdicts(session, user.scope, digests)
        versions = _versions(session, user.scope, digests)
        reasons = recalls_of(session, digests)
    listed = []
    for digest, at in rows:
        try:
            stated = _stated(store, digest, verdicts[digest])
        except (Refused, UsageError) as error:  # it must not hide the others
            stated = {"unreadable": error.what}
        index = {"at": at, "versions": tuple(versions[digest]), "recalled": reasons.get(digest)}
        listed.append(ListedEvaluation(evaluation=digest, **index, **stated))
    return EvaluationList(evaluations=tuple(listed), total=total)


def _stated(store: Store, digest: str, verdicts: Sequence[str]) -> dict[str, Any]:
    """What the list takes from the records of an evaluation and its verdicts."""
    body = EvaluationBody.read(store, digest)
    best = max(sorted(body.candidates), key=body.mean)
    return {
        "n": body.n,
        "primary": body.primary,
        "candidates": len(body.candidates),
        "best": best,
        "score": body.candidates[best].metrics[body.primary],
        "verdicts": tuple(_verdict(store, each) for each in verdicts),
    }


def _verdict(store: Store, digest: str) -> ListedVerdict:
    body = VerdictBody.read(store, digest)
    return ListedVerdict(digest=digest, candidate=body.name, verdict=body.verdict)


def newest_evaluation(store: Store, user: User) -> str:
    """Digest of the newest evaluation that a user may see. Raises UsageError where there is none."""
    with database.reading(store.engine) as session:
        found = _visible(user.scope).order_by(RecordRow.created_at.desc(), RecordRow.digest).limit(1)
        digest: str | None = session.scalars(found).first()
    if digest is None:
        raise UsageError("nothing has been evaluated yet", fix=NextStep("evaluate the candidates first", "evaluate"))
    return digest


def show_evaluation(store: Store, user: User, digest: str, verdict: str | None = None) -> EvaluationPage:
    """One evaluation with a verdict, by default the leading one. Raises NotThere for those that a user does not see."""
    with database.reading(store.engine) as session:
        at = when_made(session, user.scope, digest)
        if at is None:
            raise NotThere(_NO_EVALUATION)
        verdicts = _verdicts(session, user.scope, [digest])[digest]
        versions = _versions(session, user.scope, [digest])[digest]
        reason = recalls_of(session, [digest]).get(digest)
    chosen = verdict or leading_verdict(store, digest, verdicts)
    if chosen is not None and chosen not in verdicts:
        raise NotThere(_NO_EVALUATION)
    return EvaluationPage(
        summary=evaluation_summary(store, digest),
        at=at,
        dataset=store.record(digest).parents["dataset"],
        verdicts=tuple(_verdict(store, each) for each in verdicts),
        verdict=None if chosen is None else verdict_summary(store, chosen),
        endpoint=chosen is not None and _of_endpoint(store, chosen),
        versions=tuple(versions),
        recalled=reason,
    )


def _of_endpoint(store: Store, verdict: str) -> bool:
    candidate = store.record(verdict, kind="verdict").parents["candidate"]
    return load_candidate(store, candidate).kind == "endpoint"


def find_verdict(store: Store, user: User, start: str) -> str:
    """The verdict whose digest begins with start, with or without `sha256:`, if a user may see its evaluation.

    Raises NotThere, and UsageError for several.
    """
    query = select(RecordRow.digest).where(RecordRow.kind == "verdict", *_released(user.scope, "verdict"))
    begins = RecordRow.digest.startswith(f"sha256:{start.removeprefix('sha256:')}", autoescape=True)
    with database.reading(store.engine) as session:
        found = list(session.scalars(query.where(begins).limit(2)))
    if not found:
        raise NotThere("there is no such verdict", where="verdict", fix=NextStep("judge a candidate", "gate"))
    if len(found) > 1:
        raise UsageError("several verdicts begin so", where="verdict", fix="give more digits")
    return found[0]


def compare_versions(store: Store, user: User, version: str, before: str = "") -> CandidatePair | None:
    """A version's candidate, and the one to compare it with in its evaluation; None where the user sees no such.

    version, before: digests of versions. The candidate of before where the same evaluation measured it, else the one
    that the report compares with.
    """
    try:
        with database.reading(store.engine) as session:
            found = load_version(store, version, session)
            other = load_version(store, before, session) if before else None
        page = show_evaluation(store, user, found.evaluation, found.verdict)
    except TunesmithError:  # not this user's, or a record that cannot be read
        return None
    if page.verdict is None:
        return None
    focus, stated = page.verdict.candidate, EvaluationBody.read(store, found.evaluation).candidates
    names = [name for name in stated if name != focus]
    same = [name for name in names if other is not None and stated[name].candidate == other.candidate]
    rival = same[0] if same else rival_of(page.summary, page.verdict, focus)[0]
    return CandidatePair(
        evaluation=found.evaluation,
        verdict=found.verdict,
        focus=focus,
        rival=rival or max(names, key=page.summary.mean, default=""),
        against=other.label if same and other is not None else "",
    )


def show_findings(store: Store, user: User, digest: str, verdict: str | None = None) -> EvidenceReport:
    """What the report computes of an evaluation, without requests, answers, versions and audit log.

    Groups of rows, whose names may say whose rows they hold, are for readers of all tenants and regions. Takes seconds
    the first time. Raises NotThere as `show_evaluation` does, and Refused for evidence that is not consistent or does
    not state what a report shows.
    """
    page = show_evaluation(store, user, digest, verdict)
    with refused_if_inconsistent():
        found = _findings(store, digest, None if page.verdict is None else page.verdict.digest)
    groups = user.may(READ_PERMISSION) and user.scope == Scope()
    return found if groups else found.model_copy(update={"by_group": None})


@contextlib.contextmanager
def refused_if_inconsistent() -> Iterator[None]:
    """Raise Refused for evidence that is not consistent."""
    try:
        yield
    except Inconclusive as error:
        raise Refused(error.what, where=error.where, fix=error.fix) from error


@lru_cache(maxsize=32)
def _findings(store: Store, digest: str, verdict: str | None) -> EvidenceReport:
    return without_texts(report_data(store, digest, verdict))


# The index of records


def _visible(scope: Scope) -> Any:
    """A query of (digest, created_at) of every evaluation that people of a scope may see."""
    query = select(RecordRow.digest, RecordRow.created_at).where(RecordRow.kind == "evaluation")
    return query.where(*_released(scope, "evaluation"))


def _released(scope: Scope, role: Literal["evaluation", "verdict"]) -> list[ColumnElement[bool]]:
    """Conditions on a record: people of a tenant or region see the evaluations and verdicts of their versions."""
    if scope == Scope():
        return []
    own = select(EdgeRow.parent).join(VersionRow, VersionRow.digest == EdgeRow.child)
    return [RecordRow.digest.in_(own.where(EdgeRow.role == role, *within(VersionRow, scope)))]


def when_made(session: Session, scope: Scope, digest: str) -> str | None:
    """When an evaluation was made; None where people of a scope see none with this digest."""
    row = session.execute(_visible(scope).where(RecordRow.digest == digest)).first()
    return None if row is None else str(row[1])


def _verdicts(session: Session, scope: Scope, evaluations: Sequence[str]) -> dict[str, list[str]]:
    """Evaluation -> its verdicts, oldest first. People of a tenant or region see those that released theirs."""
    query = select(EdgeRow.parent, EdgeRow.child).join(RecordRow, RecordRow.digest == EdgeRow.child)
    query = query.where(EdgeRow.parent.in_(evaluations), EdgeRow.role == "evaluation", RecordRow.kind == "verdict")
    query = query.where(*_released(scope, "verdict"))
    found = defaultdict[str, list[str]](list)
    for evaluation, digest in session.execute(query.order_by(RecordRow.created_at, RecordRow.digest)):
        found[evaluation].append(digest)
    return found


def _versions(session: Session, scope: Scope, evaluations: Sequence[str]) -> dict[str, list[RegisteredFrom]]:
    """Evaluation -> the versions of a scope that were registered from it."""
    verdict = select(EdgeRow.child, EdgeRow.parent).where(EdgeRow.role == "verdict").subquery()
    query = select(EdgeRow.parent, VersionRow.name, VersionRow.number, VersionRow.digest, verdict.c.parent)
    query = query.join(VersionRow, VersionRow.digest == EdgeRow.child)
    query = query.join(verdict, verdict.c.child == EdgeRow.child)
    query = query.where(EdgeRow.parent.in_(evaluations), EdgeRow.role == "evaluation", *within(VersionRow, scope))
    found = defaultdict[str, list[RegisteredFrom]](list)
    rows = session.execute(query.order_by(VersionRow.name, VersionRow.number))
    for evaluation, name, number, digest, judged in rows:
        one = RegisteredFrom(version=str(VersionRef(name, number)), digest=digest, verdict=judged)
        found[evaluation].append(one)
    return found
