"""Evaluations: measure, judge, compare and report candidates; which evaluations there are, and what one showed.

An evaluation belongs to the project: people without a tenant and a region see all, people of a tenant or region those
from which a version of theirs was registered.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session, aliased

from tunesmith.candidates.candidate import load_candidate
from tunesmith.core.digests import short
from tunesmith.core.errors import Inconclusive, NextStep, NotThere, Refused, TunesmithError, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.text.names import Scope
from tunesmith.core.values import Page, View
from tunesmith.evaluation.compare import Comparison, Side, compare, scored_alike, side_of_candidate, side_of_digest
from tunesmith.evaluation.planning import Plan
from tunesmith.evaluation.report.approach_ladder import approach_of
from tunesmith.evaluation.report.data import report_data
from tunesmith.evaluation.report.evidence import PAGE, EvidenceReport, TrailEntry
from tunesmith.evaluation.summary import (
    EvaluationSummary,
    VerdictSummary,
    evaluation_summary,
    leading_verdict,
    rival_of,
    verdict_summary,
)
from tunesmith.pipeline.answers import plan as plan_gates
from tunesmith.pipeline.beside import best_untuned
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.verdicts import evaluation, latest, verdict
from tunesmith.project import Project
from tunesmith.records.evaluation import AnswerPrice, EvaluationBody, MetricInterval, Outcome, VerdictBody
from tunesmith.records.version import VersionBody
from tunesmith.registry.versions import Version, list_aliases, list_versions, load_version, resolve
from tunesmith.services.actions import Acting, audit_words
from tunesmith.store import audit
from tunesmith.store.database import paged, within
from tunesmith.store.records import recalled, recalls_of
from tunesmith.store.store import Store
from tunesmith.store.tables import EdgeRow, RecordRow, VersionRow

READ_PERMISSION = "evidence.read"
_SHOWN_TRAIL = 40  # audit entries in a report


def plan(
    project: Project,
    *,
    lift: float | None = None,
    differing: float | None = None,
    between: Sequence[str] = (),
    progress: Progress = SILENT,
) -> Plan:
    """What the test rows can show to each comparing gate, before anything is trained.

    lift: the true difference hoped for. differing: assumed share of rows on which two candidates differ; between: two
    candidates on whose answers to the validation rows it is measured instead.
    """
    if differing is not None and between:
        raise UsageError("the differing share is either given or measured", fix="leave one of the options out")
    return plan_gates(PipelineContext(project, progress), lift, differing, between)


def evaluate(project: Project, names: Sequence[str] | None = None, *, progress: Progress = SILENT) -> EvaluationSummary:
    """Measure candidates, by default all, on the same held-out rows."""
    return evaluation_summary(project.store, evaluation(PipelineContext(project, progress, beside=best_untuned), names))


def gate(project: Project, name: str | None = None, *, progress: Progress = SILENT) -> VerdictSummary:
    """Apply the gates to a candidate, by default to the one that the project would release."""
    return verdict_summary(project.store, verdict(PipelineContext(project, progress, beside=best_untuned), name))


def compare_candidates(project: Project, first: str, second: str) -> Comparison:
    """Compare two candidates or versions request by request. Differences are second minus first."""
    return compare(project.store, _side(project, first), _side(project, second))


def report(project: Project, version: str | None = None) -> EvidenceReport:
    """The evidence for a version, by default for the last evaluation: what the report page shows."""
    measured, judged, digest = _reported(project, version)
    name = VersionBody.read(project.store, digest).name if digest else project.settings.name
    return report_data(project.store, measured, judged, digest, release_trail(project.store, name, digest))


def version_report(acting: Acting, version: Version) -> EvidenceReport:
    """The evidence for a version, as a user may see it, with requests and answers where they and their token may.

    Only people of all tenants and regions see texts, groups of rows, and other versions of the name in the trail.
    Raises Refused for an evaluation that does not state what a report shows.
    """
    store, everything = acting.store, acting.user.scope.unlimited
    texts = acting.permits("rows") and everything and acting.user.may(READ_PERMISSION)
    trail = release_trail(store, version.name if everything else version.label, version.digest)
    report = report_data(store, version.evaluation, version.verdict, version.digest, trail)
    with store.reading() as session:
        texts = texts and not recalls_of(session, [version.evaluation])
    report = report if texts else without_texts(report)
    return report if everything else report.model_copy(update={"by_group": None})


def release_trail(store: Store, name: str, version: str | None) -> list[TrailEntry]:
    """The audit log's newest entries about a model: its versions, approvals, aliases and rollouts, oldest first."""
    with store.reading() as session:
        trail = [
            TrailEntry.of(row, does=audit_words(row.action))
            for row in audit.entries(session)
            if row.subject in (name, version) or row.subject.startswith(f"{name}@")
        ]
    return trail[-_SHOWN_TRAIL:]


def without_texts(report: EvidenceReport) -> EvidenceReport:
    """A report without requests and answers."""
    policy = report.policy
    if policy is not None:
        checks = tuple(check.model_copy(update={"shown": ()}) for check in policy.checks)
        policy = policy.model_copy(update={"checks": checks})
    return report.model_copy(update={"examples": None, "policy": policy})


def report_sections(report: EvidenceReport, requests: str) -> str:
    """A report's sections as HTML that wears the sheets of `style_sheets`. requests: address of its requests."""
    from tunesmith.evaluation.report.html import render_sections

    return render_sections(report, requests)


def style_sheets() -> dict[str, Path]:
    """The style sheets of reports by name. The console's pages share them."""
    return {sheet.name: sheet for sheet in PAGE.glob("*.css")}


def page_of(report: EvidenceReport, document: Literal["report.html", "report.md"]) -> str:
    """A report as one HTML page, without scripts or files of its own, or as Markdown for a pull request."""
    from tunesmith.evaluation.report.html import render, report_markdown

    return render(report) if document == "report.html" else report_markdown(report)


def latest_evaluation(project: Project) -> str:
    """Digest of the project's last evaluation. Raises UsageError where there is none."""
    digest = latest(project, "evaluation")
    if digest is None:
        raise UsageError("nothing has been evaluated yet", fix=NextStep("evaluate the candidates first", "evaluate"))
    return digest


def _reported(project: Project, version: str | None) -> tuple[str, str | None, str | None]:
    """Digests of the evaluation, verdict and version that a report is about."""
    store = project.store
    if version is not None:
        registered = resolve(store, version)
        return registered.evaluation, registered.verdict, registered.digest
    measured = latest_evaluation(project)
    last = latest(project, "verdict")
    if last is None or store.record(last).parents["evaluation"] != measured:
        return measured, None, None
    children = {child for _, _, child in store.children(measured)}
    verdicts = [each for each in store.records_of("verdict") if each in children]
    judged = leading_verdict(store, measured, [*verdicts, last]) or last
    versions = [child for _, kind, child in store.children(judged) if kind == "version"]
    newest = max(versions, key=lambda digest: VersionBody.read(store, digest).number, default=None)
    return measured, judged, newest


def _side(project: Project, text: str) -> Side:
    """A candidate of the newest evaluation, or a version."""
    if text in project.settings.candidates:
        return side_of_candidate(project.store, latest_evaluation(project), text)
    version = resolve(project.store, text)
    return side_of_digest(project.store, version.evaluation, version.candidate, version.label)


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


class EvaluationList(Page):
    """A page of evaluations, newest first."""

    evaluations: tuple[ListedEvaluation, ...]


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


def list_evaluations(acting: Acting, page: int = 1) -> EvaluationList:
    """A page of the evaluations that a user may see, newest first."""
    store, scope = acting.store, acting.user.scope
    with store.reading() as session:
        at, newest = paged(session, _visible(scope), page, LISTED)
        rows = session.execute(newest).all()
        digests = [digest for digest, _ in rows]
        verdicts = _verdicts(session, scope, digests)
        versions = _versions(session, scope, digests)
        reasons = recalls_of(session, digests)
    listed = []
    for digest, made in rows:
        try:
            stated = _stated(store, digest, verdicts[digest])
        except (Refused, UsageError) as error:  # it must not hide the others
            stated = {"unreadable": error.what}
        index = {"at": made, "versions": tuple(versions[digest]), "recalled": reasons.get(digest)}
        listed.append(ListedEvaluation(evaluation=digest, **index, **stated))
    return EvaluationList(**dict(at), evaluations=tuple(listed))


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


def newest_evaluation(acting: Acting) -> str:
    """Digest of the newest evaluation that a user may see. Raises UsageError where there is none."""
    with acting.store.reading() as session:
        digest: str | None = session.scalars(_visible(acting.user.scope).limit(1)).first()
    if digest is None:
        raise UsageError("nothing has been evaluated yet", fix=NextStep("evaluate the candidates first", "evaluate"))
    return digest


def show_evaluation(acting: Acting, digest: str, verdict: str | None = None) -> EvaluationPage:
    """One evaluation with a verdict, by default the leading one. Raises NotThere for those that a user does not see."""
    store, scope = acting.store, acting.user.scope
    with store.reading() as session:
        at = when_made(session, scope, digest)
        if at is None:
            raise NotThere(_NO_EVALUATION)
        verdicts = _verdicts(session, scope, [digest])[digest]
        versions = _versions(session, scope, [digest])[digest]
        reason = recalls_of(session, [digest]).get(digest)
    chosen = verdict or leading_verdict(store, digest, verdicts)
    if chosen is not None and chosen not in verdicts:
        raise NotThere(_NO_EVALUATION)
    judged = None if chosen is None else store.record(chosen, kind="verdict")
    return EvaluationPage(
        summary=evaluation_summary(store, digest),
        at=at,
        dataset=store.record(digest).parents["dataset"],
        verdicts=tuple(_verdict(store, each) for each in verdicts),
        verdict=None if chosen is None else verdict_summary(store, chosen),
        endpoint=judged is not None and load_candidate(store, judged.parents["candidate"]).kind == "endpoint",
        versions=tuple(versions),
        recalled=reason,
    )


def find_verdict(acting: Acting, start: str) -> str:
    """The verdict whose digest begins with start, with or without `sha256:`, if a user may see its evaluation.

    Raises NotThere, and UsageError for several.
    """
    query = select(RecordRow.digest).where(RecordRow.kind == "verdict", *_released(acting.user.scope, "verdict"))
    begins = RecordRow.digest.startswith(f"sha256:{start.removeprefix('sha256:')}", autoescape=True)
    with acting.store.reading() as session:
        digests = list(session.scalars(query.where(begins).limit(2)))
    if not digests:
        raise NotThere("there is no such verdict", where="verdict", fix=NextStep("judge a candidate", "gate"))
    if len(digests) > 1:
        raise UsageError("several verdicts begin so", where="verdict", fix="give more digits")
    return digests[0]


def compare_versions(acting: Acting, version: str, before: str = "") -> CandidatePair | None:
    """A version's candidate, and the one to compare it with in its evaluation; None where the user sees no such.

    version, before: digests of versions. The candidate of before where the same evaluation measured it, else the one
    that the report compares with.
    """
    store = acting.store
    try:
        with store.reading() as session:
            loaded = load_version(store, version, session)
            other = load_version(store, before, session) if before else None
        page = show_evaluation(acting, loaded.evaluation, loaded.verdict)
    except (TunesmithError, KeyError):  # not this user's, or a record that cannot be read
        return None
    if page.verdict is None:
        return None
    focus, stated = page.verdict.candidate, EvaluationBody.read(store, loaded.evaluation).candidates
    names = [name for name in stated if name != focus]
    same = [name for name in names if other is not None and stated[name].candidate == other.candidate]
    rival = same[0] if same else rival_of(page.summary, page.verdict, focus)[0]
    return CandidatePair(
        evaluation=loaded.evaluation,
        verdict=loaded.verdict,
        focus=focus,
        rival=rival or max(names, key=page.summary.mean, default=""),
        against=other.label if same and other is not None else "",
    )


def show_findings(acting: Acting, digest: str, verdict: str | None = None) -> EvidenceReport:
    """What the report computes of an evaluation, without requests, answers, versions and audit log.

    Groups of rows, whose names may say whose rows they hold, are for readers of all tenants and regions. Takes seconds
    the first time. Raises NotThere as `show_evaluation` does, and Refused for evidence that is not consistent or does
    not state what a report shows.
    """
    page = show_evaluation(acting, digest, verdict)
    with refused_if_inconsistent():
        report = _findings(acting.store, digest, None if page.verdict is None else page.verdict.digest)
    groups = acting.user.may(READ_PERMISSION) and acting.user.scope.unlimited
    return report if groups else report.model_copy(update={"by_group": None})


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
    """A query of (digest, created_at) of every evaluation that people of a scope may see, the newest first."""
    query = select(RecordRow.digest, RecordRow.created_at).where(RecordRow.kind == "evaluation")
    return query.where(*_released(scope, "evaluation")).order_by(RecordRow.created_at.desc(), RecordRow.digest)


def _released(scope: Scope, role: Literal["evaluation", "verdict"]) -> list[ColumnElement[bool]]:
    """Conditions on a record: people of a tenant or region see the evaluations and verdicts of their versions."""
    if scope.unlimited:
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
    verdicts = defaultdict[str, list[str]](list)
    for measured, digest in session.execute(query.order_by(RecordRow.created_at, RecordRow.digest)):
        verdicts[measured].append(digest)
    return verdicts


def _versions(session: Session, scope: Scope, evaluations: Sequence[str]) -> dict[str, list[RegisteredFrom]]:
    """Evaluation -> the versions of a scope that were registered from it."""
    verdict = aliased(EdgeRow)
    query = select(EdgeRow.parent, VersionRow, verdict.parent).join(VersionRow, VersionRow.digest == EdgeRow.child)
    query = query.join(verdict, verdict.child == EdgeRow.child).where(verdict.role == "verdict")
    query = query.where(EdgeRow.parent.in_(evaluations), EdgeRow.role == "evaluation", *within(VersionRow, scope))
    versions = defaultdict[str, list[RegisteredFrom]](list)
    for measured, row, judged in session.execute(query.order_by(VersionRow.name, VersionRow.number)):
        versions[measured].append(RegisteredFrom(version=row.label, digest=row.digest, verdict=judged))
    return versions


# The leaderboard: versions ranked among those that were measured on the same held-out rows by the same scorer


class BoardRow(MetricInterval):
    """A version on a board: its mean by the board's metric, and its paired difference from the first (behind)."""

    version: str
    digest: str
    created_at: str
    alias: str | None
    candidate: str
    approach: str
    verdict: str
    recalled: str | None
    price: AnswerPrice
    behind: MetricInterval | None = None


class Board(View):
    """Versions of one name, measured by one metric on the same rows; the best first. dataset: its digest.

    evaluation: that of the best, where another board differs from this one in the metric's scorer alone.
    """

    name: str
    dataset: str
    metric: str
    n: int
    evaluation: str | None = None
    versions: tuple[BoardRow, ...]

    @property
    def title(self) -> str:
        """A board's title, one line."""
        told = f"{self.name}: {self.metric} on {self.n} held-out requests of dataset {short(self.dataset)}"
        return told if self.evaluation is None else f"{told}, scored as in evaluation {short(self.evaluation)}"


_Entry: TypeAlias = tuple[Version, EvaluationBody, BoardRow]


class Leaderboard(View):
    """One board for each name, dataset version, leading metric and scorer. The board with the newest version comes
    first."""

    boards: tuple[Board, ...]


def leaderboard(store: Store, name: str | None = None) -> Leaderboard:
    """Rank the versions of a name, or of every name."""
    entries: defaultdict[tuple[str, str, str], list[list[_Entry]]] = defaultdict(list)
    serving = {alias.version: alias.alias for alias in list_aliases(store)}
    for version in list_versions(store, name):
        record = store.record(version.evaluation, kind="evaluation")
        body = EvaluationBody.of(record)
        metric = body.primary
        entry = version, body, _row(store, version, body, serving.get(version.digest))
        boards_of = entries[version.name, record.parents["dataset"], metric]
        alike = (rows for rows in boards_of if scored_alike(rows[0][1], body, metric))
        if (rows := next(alike, None)) is not None:
            rows.append(entry)
        else:
            boards_of.append([entry])
    boards = [
        _board(store, key, rows, alone=len(boards_of) == 1) for key, boards_of in entries.items() for rows in boards_of
    ]
    newest = sorted(boards, key=lambda board: max(row.created_at for row in board.versions), reverse=True)
    return Leaderboard(boards=tuple(newest))


def _board(store: Store, key: tuple[str, str, str], rows: list[_Entry], *, alone: bool) -> Board:
    """alone: whether no other board has the same name, dataset and metric (key)."""
    owner, dataset, metric = key
    (best, body, first), *others = sorted(rows, key=lambda row: (-row[2].mean, row[0].number))
    behind = (row.model_copy(update={"behind": _behind(store, each, best, metric)}) for each, _, row in others)
    shown = None if alone else best.evaluation
    return Board(name=owner, dataset=dataset, metric=metric, n=body.n, evaluation=shown, versions=(first, *behind))


def _row(store: Store, version: Version, body: EvaluationBody, alias: str | None) -> BoardRow:
    verdict = VerdictBody.read(store, version.verdict)
    stated = next(one for one in body.candidates.values() if one.candidate == version.candidate)
    with store.reading() as session:
        withdrawn = recalled(session, version.digest)
    return BoardRow(
        version=version.label,
        digest=version.digest,
        created_at=version.created_at,
        alias=alias,
        candidate=verdict.name,
        approach=approach_of(store, load_candidate(store, version.candidate)),
        verdict=verdict.verdict,
        recalled=withdrawn,
        price=stated.price,
        **dict(stated.metrics[body.primary]),
    )


def _behind(store: Store, version: Version, best: Version, metric: str) -> MetricInterval | None:
    """The paired difference, version minus best, on the same rows; None if their scores cannot be paired."""
    sides = [side_of_digest(store, one.evaluation, one.candidate, one.label) for one in (best, version)]
    try:
        return compare(store, *sides).metrics[metric].difference
    except (TunesmithError, KeyError):
        return None
