"""What operators look after: drift, retraining, recalls of data and versions, whether workers work, and webhooks."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any, get_args

from pydantic import Field, ValidationError
from sqlalchemy import func, select

from tunesmith.core.clock import now
from tunesmith.core.digests import digest_of
from tunesmith.core.errors import NextStep, NotThere, TunesmithError, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.core.values import ScopedView, View
from tunesmith.data.governance.licences import spelled
from tunesmith.jobs import queue
from tunesmith.jobs.arguments import run_arguments
from tunesmith.monitoring import recall as recalls
from tunesmith.monitoring.cases import list_cases
from tunesmith.monitoring.causes import CAUSES as RETRAIN_CAUSES
from tunesmith.monitoring.causes import Due, RetrainCause, RetrainingSettings, Seen
from tunesmith.monitoring.drift import Report, drift_report, last_request, measured_baseline
from tunesmith.monitoring.recall import Cause, CauseKind, PendingRetrain, Recall, RecallStatus
from tunesmith.project import Project
from tunesmith.records.candidate import BaseBody
from tunesmith.registry.versions import Version, get_alias, list_versions, load_version, resolve
from tunesmith.rollout.champions import Champion
from tunesmith.rollout.controller import give_up
from tunesmith.services.actions import Acting, Bare, Because, Named, Request, action
from tunesmith.services.rollouts import refused_champions
from tunesmith.store.database import within
from tunesmith.store.people.identities import require
from tunesmith.store.store import Store
from tunesmith.store.tables import JobRow, RecallRow, RequestRow
from tunesmith.webhooks import deliveries
from tunesmith.webhooks.events import event_body
from tunesmith.webhooks.sending import Outgoing, secret_of, send
from tunesmith.webhooks.settings import TEST, WebhookSettings

CAUSES: tuple[CauseKind, ...] = get_args(CauseKind)
_LOG = logging.getLogger("tunesmith.retraining")
_BUDGET = timedelta(days=30)
_LISTED = 1000  # jobs that are looked through for those that a cause queued
_EXAMPLES = 3  # for each feature that moved
_RECALLS = 100
_TAKEN_SECONDS = 60.0  # a worker takes a job that is due sooner than this


class Monitored(Report):
    """The drift report of a version; the retrains that recalls left pending, and the champions refused, of its name."""

    refused_champions: tuple[Champion, ...]
    pending_retrains: tuple[PendingRetrain, ...]


class PendingRetrains(View):
    """The retrains that recalls left pending."""

    pending_retrains: tuple[PendingRetrain, ...]


class Recalled(Recall):
    """What a recall reached. aborted_rollouts: rollouts that it ended; next: what a person has to do."""

    aborted_rollouts: tuple[int, ...]
    next: tuple[NextStep, ...]


class VersionOnBase(ScopedView):
    """A version that was made from a base. aliases: `champion` and the like, with the tenant and region they are for.

    requests: answered by it, as far as the server's records say; last: the time of the last one, "" for none.
    """

    version: str
    digest: str
    aliases: tuple[str, ...]
    requests: int
    last: str


class Impact(View):
    """What depends on a base. tenants: those that a version was made for or answered, or whose alias points at one.

    adapters: weights that were trained on it.
    """

    base: str
    spec: str
    versions: tuple[VersionOnBase, ...]
    tenants: tuple[str, ...]
    adapters: int


class MovedExample(View):
    """A request whose caller asked to keep it, far from what the version was measured on.

    feature: what moved. value: the request's; usual: the median of the test rows. answer: None where it failed.
    """

    request: str
    at: str
    feature: str
    value: float
    usual: float
    asked: str
    answer: str | None


class Drift(View):
    """The drift report of the project's champion, and kept requests that show what moved. problem: why there is none.

    examples: empty without drift, and where no caller had a request kept.
    """

    version: str
    report: Report | None
    problem: str
    examples: tuple[MovedExample, ...]


class RecalledCause(View):
    """Something that was recalled. records: how many records it reached then. at: of its first recall."""

    cause: str
    reason: str
    at: str
    records: int


class RecallList(View):
    """What was recalled, the newest first."""

    recalls: tuple[RecalledCause, ...]


class PartHealth(View):
    """Whether a part is well."""

    part: str
    ok: bool
    says: str


class StartRecall(Request):
    """What to withdraw. kind, value: such as version and NAME@v3, or row and an example's id.

    reason: kept in the audit log, and shown by refusals. dry_run: change nothing, and answer what it would reach.
    """

    kind: CauseKind
    value: str = Field(min_length=1, max_length=300)
    reason: Because
    dry_run: bool = False


def monitor(
    project: Project, which: str | None = None, *, hours: float | None = None, tenant: str | None = None
) -> tuple[Monitored, str]:
    """The drift report of a version, by default of the project's champion, and the version's label.

    hours: the window, by default the project's. tenant: consider only this tenant's requests.
    """
    settings = project.settings.monitoring
    if hours is not None:
        settings = settings.model_copy(update={"window_hours": hours})
    version = resolve(project.store, which or f"{project.settings.name}@champion", scope=Scope(tenant or ""))
    report = drift_report(project.store, settings, version, tenant)
    pending = tuple(recalls.list_pending_retrains(project.store, version.name))
    refused = tuple(refused_champions(project.store, version.name))
    return Monitored(**dict(report), pending_retrains=pending, refused_champions=refused), version.label


def drift(acting: Acting) -> Drift:
    """Whether the requests to the project's champion drifted.

    With kept requests as examples of what moved, for people who may review rows.
    """
    project, texts = acting.project, acting.permits("rows") and acting.user.may("row.review")
    try:
        report, label = monitor(project)
        examples = _examples(acting.store, report) if texts and report.verdict == "drift" else []
    except TunesmithError as error:
        return Drift(version="", report=None, problem=error.what, examples=())
    return Drift(version=label, report=report, problem="", examples=tuple(examples))


def list_recalls(store: Store) -> RecallList:
    """What was recalled, and why."""
    first = func.min(RecallRow.at)
    query = select(RecallRow.cause, func.min(RecallRow.reason), first, func.count()).group_by(RecallRow.cause)
    with store.reading() as session:
        rows = session.execute(query.order_by(first.desc()).limit(_RECALLS)).all()
    listed = (RecalledCause(cause=cause, reason=reason, at=at, records=n) for cause, reason, at, n in rows)
    return RecallList(recalls=tuple(listed))


def queue_health(store: Store, scope: Scope) -> PartHealth:
    """Whether workers take and perform the jobs of a scope."""
    at = queue.time_now(store)
    running, queued, jobs = JobRow.state == "running", JobRow.state == "queued", func.count()
    late, lost = JobRow.due < at - _TAKEN_SECONDS, JobRow.until < at
    query = select(jobs, jobs.filter(running), jobs.filter(queued, late), jobs.filter(running, lost))
    with store.reading() as session:
        total, runs, waits, silent = session.execute(query.where(running | queued, *within(JobRow, scope))).one()
    if silent:
        return PartHealth(part="worker", ok=False, says=f"{silent} running jobs were not heard of: start a worker")
    if waits and not runs:
        return PartHealth(part="worker", ok=False, says=f"{waits} jobs wait and no worker takes them: start one")
    says = f"jobs: {runs} running, {total - runs} waiting" if total else "no job waits"
    return PartHealth(part="worker", ok=True, says=says)


def list_pending_retrains(store: Store) -> PendingRetrains:
    """The retrains that recalls left pending."""
    return PendingRetrains(pending_retrains=tuple(recalls.list_pending_retrains(store)))


def impact(store: Store, base: str) -> Impact:
    """Every version, alias and tenant that depends on a base. base: as a project file names it, or its digest's start.

    Raises UsageError where no record here has that base.
    """
    specs = {digest: BaseBody.read(store, digest).spec for digest in store.records_of("base")}
    named = [digest for digest, spec in specs.items() if spec == base]
    digest = named[-1] if named else store.find_record(base)
    if digest not in specs:
        raise UsageError("it is not a base", where=base, fix=f"name one of {', '.join(sorted(set(specs.values())))}")
    with store.reading() as session:
        recall, _ = recalls.find_reached(store, session, Cause(kind="base", value=digest), "", done=False)
    reached = {one.digest for one in recall.reached if one.kind == "version"}
    return Impact(
        base=digest,
        spec=specs[digest],
        versions=tuple(_on_base(each, recall) for each in list_versions(store) if each.digest in reached),
        tenants=recall.tenants,
        adapters=len(recall.adapters),
    )


def _on_base(version: Version, recall: recalls.Recall) -> VersionOnBase:
    served = [one for one in recall.served if one.version == version.digest]
    aliases = (one for one in recall.aliases if one.version == version.digest)
    return VersionOnBase(
        version=version.label,
        digest=version.digest,
        **version.scope.fields(),
        aliases=tuple(f"{one.alias}{one.scope.options()}" for one in aliases),
        requests=sum(one.requests for one in served),
        last=max((one.last for one in served), default=""),
    )


def cause_of(store: Store, kind: str, value: str) -> Cause:
    """What to recall. value: a version or base is found by its label or digest, and a licence takes SPDX's spelling.

    Raises UsageError for what cannot be recalled.
    """
    if kind == "version" and "@" in value:
        labels = {version.label: version.digest for version in list_versions(store, value.partition("@")[0])}
        value = labels.get(value, value)
    if kind in ("version", "base"):
        value = store.find_record(value)
    if kind == "licence":
        value = spelled(value)
    try:
        return Cause.model_validate({"kind": kind, "value": value})
    except ValidationError:
        raise UsageError(f"{kind[:40]!r} {value[:80]!r} is nothing that can be recalled") from None


@action(
    "recall.start", says="recalled data or versions", permission="recall.start", tokens=("operate",), at="/recalls",
    whole=True, reads_files=True,
)  # fmt: skip
def recall(acting: Acting, asked: StartRecall) -> Recalled:
    """Withdraw something and everything that was made from it, and abort the rollouts that it reaches."""
    store, reason = acting.store, asked.reason
    cause = cause_of(store, asked.kind, asked.value)
    reached = recalls.recall(store, cause, reason=reason, actor=acting.actor, dry_run=asked.dry_run)
    aborted: list[int] = []
    if not asked.dry_run:
        aborted = [give_up(store, number, f"recalled: {reason}").id for number in reached.rollouts]
    return Recalled(**dict(reached), aborted_rollouts=tuple(aborted), next=tuple(_next_steps(reached)))


def recall_status_of(store: Store, kind: str, value: str) -> RecallStatus:
    """Whether nothing uses what was recalled any more. Raises UsageError if it was never recalled."""
    return recalls.recall_status(store, cause_of(store, kind, value))


def _next_steps(recall: Recall) -> Iterator[NextStep]:
    kind, _, value = recall.cause.partition(" ")
    if not recall.done:
        yield NextStep("nothing was changed; withdraw it", "recall", reason=..., **{kind: value})
        return
    for champion in recall.champions:
        words = f"{champion.name}@champion is withdrawn and no longer answers"
        yield NextStep(words, "rollout rollback", rollout=champion.name, **champion.scope.fields())
    if any(one.kind == "dataset" for one in recall.reached):
        yield NextStep("build, train and measure again without these rows", "run")
    elif recall.adapters:
        yield NextStep("change what these weights were trained on (rows, settings or base), then run", "run")
    if recall.other_licences:
        yield NextStep(f"not withdrawn, since they do not need it: {'; '.join(recall.other_licences)}")
    if any(one.kind == "version" for one in recall.reached):
        yield NextStep("list the names that need a new version, until it serves", "recall", pending=True)
    yield NextStep("see whether it is gone", "recall", check=True, **{kind: value})


def _examples(store: Store, report: Report) -> list[MovedExample]:
    """Of each feature that moved, the kept requests that lie farthest from the test rows' median."""
    kept = {case.request: case for case in list_cases(store, everything=True) if case.version == report.version}
    if not kept:
        return []
    with store.reading() as session:
        query = select(RequestRow.id, RequestRow.features).where(
            RequestRow.id.in_(kept), RequestRow.at >= report.since, RequestRow.at <= report.until
        )
        features: dict[str, dict[str, Any]] = dict(session.execute(query).all())
    measured = measured_baseline(store, load_version(store, report.version)).features
    examples = []
    for finding in report.findings:
        if finding.outcome != "drift" or finding.name not in measured:
            continue
        usual = float(median(measured[finding.name]))
        values = {request: float(each[finding.name]) for request, each in features.items() if finding.name in each}
        farthest = sorted(values, key=lambda request: -abs(values[request] - usual))[:_EXAMPLES]
        for request in farthest:
            facts = {"value": values[request], "usual": usual, "asked": last_request(kept[request].messages)}
            examples.append(MovedExample.of(kept[request], feature=finding.name, **facts))
    return examples


class WebhookView(View):
    """A webhook. host: of its URL. waiting: events to be sent, now or again; given_up: those that failed too often."""

    name: str
    host: str
    events: tuple[str, ...]
    waiting: int
    given_up: int


class FailedDelivery(View):
    """An event that did not arrive. error: what went wrong last."""

    webhook: str
    event: str
    type: str
    attempts: int
    given_up: bool
    error: str


class WebhookList(View):
    """The project's webhooks, and the newest events that did not arrive."""

    webhooks: tuple[WebhookView, ...]
    failed: tuple[FailedDelivery, ...]


class Retried(View):
    """How many events of a webhook a worker tries again now."""

    webhook: str
    events: int


class Tested(View):
    """An event of the type webhook.test that was sent. problem: why it did not arrive, "" where it did."""

    webhook: str
    event: str
    problem: str


class NameWebhook(Request):
    """A webhook of the project, by its name."""

    webhook: Named


def list_webhooks(project: Project) -> WebhookList:
    """The project's webhooks, and what did not arrive."""
    counts = deliveries.count(project.store, project.settings.name)
    shown = tuple(
        WebhookView.of(webhook, name=name, waiting=counts.get((name, False), 0), given_up=counts.get((name, True), 0))
        for name, webhook in project.settings.webhooks.items()
    )
    failed = deliveries.failed(project.store, project.settings.name)
    return WebhookList(webhooks=shown, failed=tuple(FailedDelivery.of(each) for each in failed))


@action(
    "webhook.retry", says="sent a webhook's failed requests again", permission="webhook.retry", tokens=("operate",),
    at="/webhooks/{webhook}/retry", whole=True, form=True,
)  # fmt: skip
def retry_webhook(acting: Acting, asked: NameWebhook) -> Retried:
    """Let a worker try again at once what did not arrive, given up or not."""
    name, project, detail = asked.webhook, acting.project, {"events": 0}
    _named(project, name)
    with acting.store.change(acting.actor, "webhook.retry", name, detail) as session:
        require(session, acting.actor, "webhook.retry")
        detail["events"] = deliveries.try_again(session, project.settings.name, name, time.time())
    return Retried(webhook=name, events=detail["events"])


@action("webhook.test", permission="webhook.retry", whole=True)
def test_webhook(acting: Acting, asked: NameWebhook) -> Tested:
    """Send an event of the type webhook.test now. Raises UsageError where the secret is missing."""
    name, project = asked.webhook, acting.project
    webhook = _named(project, name)
    event = f"evt_{uuid.uuid4().hex}"
    body = event_body(event, TEST, now(), {"project": project.settings.name, "webhook": name})
    ((problem,),) = send([[Outgoing(webhook.url, secret_of(name, webhook), event, body)]])
    return Tested(webhook=name, event=event, problem=problem)


def _named(project: Project, name: str) -> WebhookSettings:
    webhooks = project.settings.webhooks
    if name not in webhooks:
        known = f"they are {', '.join(webhooks)}" if webhooks else "the project file has none"
        raise NotThere(f"there is no webhook {name[:40]!r}; {known}", where="webhooks", fix="add it to tunesmith.yaml")
    return webhooks[name]


# Retraining. A cause (monitoring/causes.py) names what it is about, so that the same cause queues one run only: drift
# of NAME@v3 is a cause once, whatever comes of its run. Nothing here approves or serves a version.


class DueCause(View):
    """A cause for a new version. job: the run that was queued for it; null where none was.

    waits: why no run may be queued for it now; "" where one may, or was.
    """

    cause: RetrainCause
    about: str
    says: str
    job: int | None
    waits: str


class Retraining(View):
    """Why a new version is due. version: the champion, "" where the name has none."""

    version: str
    causes: tuple[DueCause, ...]


@action("job.retrain", permission="job.add", whole=True)
def retrain(acting: Acting, _asked: Bare) -> Retraining:
    """Look for causes of a new version, and queue a run for the first that had none, if one may be queued."""
    return look(acting.project, by=acting.actor)


def look(
    project: Project,
    *,
    by: str | None = None,
    clock: Callable[[], datetime] = now,
    say: Callable[[str], None] = _LOG.warning,
) -> Retraining:
    """The causes of `retraining.causes` that are given now.

    by: queue a run as this person for the first that had none, if one may be queued. say: hears of causes that could
    not be looked for. Where no other one is given, the first such error is raised. Raises UsageError where the project
    file has no `retraining:`.
    """
    settings = project.settings.retraining
    if settings is None:
        raise UsageError(
            "the project does not say when to retrain",
            where="retraining",
            fix="add `retraining: {causes: [drift, rows]}`",
        )
    champion = _champion(project)
    if champion is None:
        return Retraining(version="", causes=())
    stated, causes = project.settings, list[DueCause]()
    place = project.store, project.root, stated.bases, stated.data.sources, stated.monitoring
    seen = Seen(*place, settings, champion, clock())
    runs, errors = _runs(project), dict[RetrainCause, TunesmithError]()
    for cause in settings.causes:
        try:
            due = RETRAIN_CAUSES[cause].look(seen)
        except TunesmithError as error:  # it must not hide the others
            errors[cause] = error
            continue
        if due is None:
            continue
        key = _key(project, cause, due)
        job = next((each.id for each in runs if each.key == key), None)
        waits = "" if job is not None else _waits(settings, seen.at, runs)
        if by is not None and job is None and not waits:
            arguments = run_arguments(project, {}) | {"cause": f"{cause}: {due.about}"}
            job = queue.add(project.store, "run", arguments, project=project.settings.name, actor=by, key=key).id
            runs = _runs(project)
        causes.append(DueCause(cause=cause, about=due.about, says=due.says, job=job, waits=waits))
    for cause, failure in errors.items():
        if not causes:
            raise failure
        say(f"the cause {cause} could not be looked for: {failure}")
    return Retraining(version=champion.label, causes=tuple(causes))


def look_again(root: Path, say: Callable[[str], None]) -> None:
    """Read the project file anew, and look and queue a run where one may be queued. For a worker."""
    project = Project.load(root)
    settings = project.settings.retraining
    if settings is None or _waits(settings, now(), before := _runs(project)):
        return  # causes cost time: drift is measured, and files are read
    known = {job.id for job in before}
    for each in look(project, by=project.actor(), say=say).causes:
        if each.job is not None and each.job not in known:
            say(f"job {each.job}: queued because of {each.cause}: {each.says}")


def _champion(project: Project) -> Version | None:
    """The version that the project's name means for callers without a tenant."""
    alias = get_alias(project.store, project.settings.name)
    return None if alias is None else load_version(project.store, alias.version)


def _runs(project: Project) -> list[JobRow]:
    """The project's runs that have not ended, and those that a cause queued; newest first."""
    jobs = queue.list_jobs(project.store, most=_LISTED)
    own = (job for job in jobs if (job.project, job.kind) == (project.settings.name, "run"))
    return [job for job in own if job.ended is None or job.cause]


def _key(project: Project, cause: str, due: Due) -> str:
    """Names a cause and the settings of its run: other settings may give what these did not."""
    stated = {"cause": cause, "about": due.about, "settings": project.settings.digest}
    return f"retrain {digest_of(stated)}"


def _waits(settings: RetrainingSettings, at: datetime, runs: list[JobRow]) -> str:
    """Why no run may be queued now; "" where one may."""
    unfinished = next((job for job in runs if job.ended is None), None)
    if unfinished is not None:
        return f"job {unfinished.id} is {unfinished.state}"
    queued = [datetime.fromtimestamp(job.created, tz=at.tzinfo) for job in runs]
    if queued and at < (until := max(queued) + timedelta(hours=settings.wait_hours)):
        return (
            f"the last was queued less than {settings.wait_hours:g} hours ago (wait_hours): from {until:%F %H:%M} UTC"
        )
    recent = sum(each > at - _BUDGET for each in queued)
    if recent >= settings.runs_in_30_days:
        return f"{recent} were queued in the last 30 days (runs_in_30_days)"
    return ""
