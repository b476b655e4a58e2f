"""Evaluate and judge candidates, compare them, and report the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.core.errors import NextStep, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.scope import Scope
from tunesmith.core.system.files import write_atomic
from tunesmith.evaluation.compare import Comparison, Side, compare, side_of_candidate, side_of_digest
from tunesmith.evaluation.planning import Plan
from tunesmith.evaluation.report.evidence import PAGE, EvidenceReport, TrailEntry
from tunesmith.evaluation.summary import (
    EvaluationSummary,
    VerdictSummary,
    evaluation_summary,
    leading_verdict,
    verdict_summary,
)
from tunesmith.pipeline.answers import plan as plan_gates
from tunesmith.pipeline.context import PipelineContext
from tunesmith.pipeline.verdicts import evaluation, latest, verdict
from tunesmith.project import Project
from tunesmith.records.version import VersionBody
from tunesmith.registry.versions import Version, resolve
from tunesmith.services.actions import audit_words
from tunesmith.store import audit, database
from tunesmith.store.people.identities import User
from tunesmith.store.records import recalls_of
from tunesmith.store.store import Store

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
    return evaluation_summary(project.store, evaluation(PipelineContext(project, progress), names))


def gate(project: Project, name: str | None = None, *, progress: Progress = SILENT) -> VerdictSummary:
    """Apply the gates to a candidate, by default to the one that the project would release."""
    return verdict_summary(project.store, verdict(PipelineContext(project, progress), name))


def compare_candidates(project: Project, first: str, second: str) -> Comparison:
    """Compare two candidates or versions request by request. Differences are second minus first."""
    return compare(project.store, _side(project, first), _side(project, second))


def report(project: Project, version: str | None = None) -> EvidenceReport:
    """The evidence for a version, by default for the last evaluation: what the report page shows."""
    from tunesmith.evaluation.report.data import report_data

    measured, judged, digest = _reported(project, version)
    name = VersionBody.read(project.store, digest).name if digest else project.settings.name
    return report_data(project.store, measured, judged, digest, release_trail(project.store, name, digest))


def version_report(store: Store, user: User, version: Version, *, texts: bool = True) -> EvidenceReport:
    """The evidence for a version, as a user may see it. texts: with requests and answers, where they may read them.

    Only people of all tenants and regions see texts, groups of rows, and other versions of the name in the trail.
    Raises Refused for an evaluation that does not state what a report shows.
    """
    from tunesmith.evaluation.report.data import report_data

    everything = user.scope == Scope()
    texts = texts and everything and user.may(READ_PERMISSION)
    trail = release_trail(store, version.name if everything else version.label, version.digest)
    found = report_data(store, version.evaluation, version.verdict, version.digest, trail)
    with database.reading(store.engine) as session:
        texts = texts and not recalls_of(session, [version.evaluation])
    found = found if texts else without_texts(found)
    return found if everything else found.model_copy(update={"by_group": None})


def release_trail(store: Store, name: str, version: str | None) -> list[TrailEntry]:
    """The audit log's newest entries about a model: its versions, approvals, aliases and rollouts, oldest first."""
    with database.reading(store.engine) as session:
        found = [
            TrailEntry.of(row, does=audit_words(row.action))
            for row in audit.entries(session)
            if row.subject in (name, version) or row.subject.startswith(f"{name}@")
        ]
    return found[-_SHOWN_TRAIL:]


def without_texts(found: EvidenceReport) -> EvidenceReport:
    """A report without requests and answers."""
    policy = found.policy
    if policy is not None:
        checks = tuple(check.model_copy(update={"shown": ()}) for check in policy.checks)
        policy = policy.model_copy(update={"checks": checks})
    return found.model_copy(update={"examples": None, "policy": policy})


def report_html(found: EvidenceReport) -> str:
    """A report as one HTML page, without scripts or files of its own."""
    from tunesmith.evaluation.report.html import render

    return render(found)


def report_sections(found: EvidenceReport, requests: str) -> str:
    """A report's sections as HTML that wears the sheets of `style_sheets`. requests: address of its requests."""
    from tunesmith.evaluation.report.html import render_sections

    return render_sections(found, requests)


def style_sheets() -> dict[str, Path]:
    """The style sheets of reports by name. The console's pages share them."""
    return {sheet.name: sheet for sheet in PAGE.glob("*.css")}


def report_page(found: EvidenceReport, path: Path) -> None:
    """Write a report as one HTML page."""
    write_atomic(path, report_html(found).encode())


def latest_evaluation(project: Project) -> str:
    """Digest of the project's last evaluation. Raises UsageError where there is none."""
    found = latest(project, "evaluation")
    if found is None:
        raise UsageError("nothing has been evaluated yet", fix=NextStep("evaluate the candidates first", "evaluate"))
    return found


def _reported(project: Project, version: str | None) -> tuple[str, str | None, str | None]:
    """Digests of the evaluation, verdict and version that a report is about."""
    store = project.store
    if version is not None:
        found = resolve(store, version)
        return found.evaluation, found.verdict, found.digest
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
