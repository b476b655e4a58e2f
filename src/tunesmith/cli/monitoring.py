"""`monitor`, `impact`, `recall`, `recalls`, `cases` and `webhooks`: watch traffic, withdraw data and versions, collect
failed requests, tell other systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith import services
from tunesmith.cli.terminal import Acting, Drawn, Here, add_commands, add_group, say, table, worded
from tunesmith.core.errors import UsageError
from tunesmith.core.text.wording import visible

if TYPE_CHECKING:
    from tunesmith.monitoring.recall import PendingRetrain, Recall, RecallStatus
    from tunesmith.services.review import AddedCases, CaseList

_All = Annotated[bool, typer.Option("--all", help="Also those that were answered correctly.")]
_EXITS = {"stable": 0, "drift": 3, "inconclusive": 4}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, monitor, impact, recall, recalls)
    group = add_group(app, "cases", "Turn requests that failed in service into test rows.")
    add_commands(group, show=show_cases, correct=correct_case, add=add_cases, drop=drop_cases)
    group = add_group(app, "webhooks", "Show, repeat and test what is sent to other systems.")
    add_commands(group, retry=retry_webhook, test=test_webhook, list=list_webhooks)


def monitor(
    here: Here,
    version: str | None = None,
    *,
    hours: Annotated[float | None, typer.Option(min=0.001)] = None,
    tenant: str | None = None,
) -> int:
    """Compare served requests with the test split. Exit code 3: they drifted; 4: too few requests to say.

    Also lists champions that may not serve, and the retrains that recalls left pending (`recall --pending`). These do
    not change the exit code.

    version: NAME@champion or NAME@v3; by default the project's champion.
    hours: The window; by default the project's.
    tenant: Look at one tenant's requests only.
    """
    report, label = services.monitoring.monitor(here.project, version, hours=hours, tenant=tenant)
    here.emit(report, lambda monitored: _draw_monitored(label, monitored))
    return _EXITS[report.verdict]


def impact(here: Here, base: str) -> None:
    """List every version, alias and tenant that depends on a base, and the requests that each version answered.

    base: As tunesmith.yaml names it, or the start of its record's digest.
    """
    here.emit(services.monitoring.impact(here.store, base), _draw_impact)


def recall(
    here: Acting,
    *,
    reason: str = "",
    row: str | None = None,
    source: str | None = None,
    licence: str | None = None,
    subject: str | None = None,
    tenant: str | None = None,
    version: str | None = None,
    base: str | None = None,
    dry_run: bool = False,
    check: bool = False,
    pending: bool = False,
) -> int:
    """Withdraw something and everything made from it, so that it is no longer served or built on.

    The next `tunesmith run` builds, trains and measures again without the rows, even if the sources still hold them.

    reason: Why; kept in the audit log and shown by refusals.
    row ID: An example's id.
    source: A source, as `data show` names it.
    licence: All rows whose licence needs this one.
    subject: All rows about a person.
    tenant: All rows and documents of a tenant.
    version: NAME@v3 or the start of its digest.
    base: The start of a base record's digest.
    dry_run: Change nothing; show what a recall would reach.
    check: Show whether what was recalled is gone (exit 3: it is not).
    pending: List names whose recalled version is not replaced yet (exit 3: some).
    """
    causes = services.monitoring.CAUSES
    named = [(kind, here.given[kind]) for kind in causes if here.given[kind] is not None]
    if pending:
        if named or dry_run or check or reason:
            raise UsageError("--pending only lists, and takes no other options", fix="tunesmith recall --pending")
        listed = services.monitoring.list_pending_retrains(here.store)
        here.emit(listed, _draw_pending_list)
        return 3 if listed.pending_retrains else 0
    kind, value = only_one(here.given, causes, "recall")
    if check:
        status = services.monitoring.recall_status_of(here.store, kind, value)
        here.emit(status, _draw_status)
        return 0 if status.gone else 3
    done = here.show(services.monitoring.recall, _draw_recall, kind=kind, value=value)
    for line in done.next:
        say(worded(line))
    return 0


def only_one(given: Mapping[str, Any], kinds: Sequence[str], act: str) -> tuple[str, str]:
    """The one of these options that was given, and its value. Raises UsageError for none and for several."""
    named = [(kind, given[kind]) for kind in kinds if given[kind] is not None]
    if len(named) != 1:
        options = ", ".join(f"--{kind}" for kind in kinds)
        raise UsageError(f"name exactly one thing to {act}, not {len(named)}", fix=f"one of {options}")
    return named[0]


def recalls(here: Here) -> None:
    """List what was recalled and why, newest first."""
    here.emit(services.monitoring.list_recalls(here.store), _draw_recalls)


def show_cases(here: Here, *, everything: _All = False) -> None:
    """Show the requests that callers asked to keep and that wait for a review."""
    here.emit(services.review.list_cases(here.project.store, everything=everything), _draw_cases)


def add_cases(here: Acting, target: Path, *, licence: str, everything: _All = False) -> None:
    """Append the cases to a source file, each with its origin; `data build` then reads them.

    target: A JSONL source of the project; created if it does not exist.
    licence: SPDX expression of the requests' licence.
    """
    here.show(services.review.add_cases, _draw_added)


def correct_case(here: Acting, request: str, *, expected: str) -> None:
    """Say what the answer to a case should have been; cases without that are not added to a source.

    request: The id of a request, as `cases show` lists it.
    expected: What the answer should have been.
    """
    here.show(services.review.correct_case, f"{request} is corrected")


def drop_cases(here: Acting, requests: list[str]) -> None:
    """Delete cases, with their texts.

    requests: Ids of requests, as `cases show` lists them.
    """
    here.show(services.review.drop_cases, lambda dropped: f"{dropped.dropped} dropped")


def list_webhooks(here: Here) -> int:
    """List the webhooks, and the events that did not arrive. Exit code 1: some failed too often and are given up."""
    listed = services.monitoring.list_webhooks(here.project)
    here.emit(listed, _draw_webhooks)
    return 1 if any(webhook.given_up for webhook in listed.webhooks) else 0


def retry_webhook(here: Acting, webhook: str) -> None:
    """Let a worker try again at once what did not arrive, given up or not.

    webhook: Its name in tunesmith.yaml.
    """
    here.show(services.monitoring.retry_webhook, lambda retried: f"{retried.events} events are tried again")


def test_webhook(here: Acting, webhook: str) -> int:
    """Send an event of the type webhook.test now. Exit code 1: it did not arrive.

    webhook: Its name in tunesmith.yaml.
    """
    tested = here.show(services.monitoring.test_webhook, lambda sent: f"{sent.event}: {sent.problem or 'arrived'}")
    return 1 if tested.problem else 0


def _draw_impact(impact: services.monitoring.Impact) -> Drawn:
    rows = [
        (one.version, " ".join(filter(None, (one.tenant, one.region))), ", ".join(one.aliases), one.requests, one.last)
        for one in impact.versions
    ]
    yield table(rows, "version", "made for", "aliases", "requests", "last", title=impact.spec)
    tenants = ", ".join(tenant or "no tenant" for tenant in impact.tenants)
    yield f"{impact.adapters} trained weights; tenants: {tenants or 'none'}"


def _draw_monitored(label: str, report: services.monitoring.Monitored) -> Drawn:
    yield f"{label}: {report.verdict} ({report.reason})"
    yield f"  {report.requests} requests, {report.since} to {report.until}"
    for tenant, count in report.capped.items():
        yield f"  {count} requests of tenant {tenant!r} left out: more than the allowed share"
    for finding in report.findings:
        p_value = "" if finding.p_value is None else f" (KS p = {finding.p_value:.2g})"
        yield f"  {finding.outcome:<12} {finding.reason}{p_value}"
    if report.recommendation:
        yield f"  {worded(report.recommendation)}"
    for champion in report.refused_champions:
        yield str(champion.warning), "bold red"
    yield from _draw_pending(report.pending_retrains)


def _draw_pending_list(listed: services.monitoring.PendingRetrains) -> Drawn:
    yield from _draw_pending(listed.pending_retrains)
    if not listed.pending_retrains:
        yield "no retrain is pending"


def _draw_pending(pending: Sequence[PendingRetrain]) -> Drawn:
    for one in pending:
        serves = f"{one.serves} serves" if one.answers else "nothing serves"
        made = f"{one.replacement} was made without it" if one.replacement else "a new version is needed"
        yield f"retrain pending: {one.name}{one.scope.said}: {one.version} was recalled, {made}; {serves}"
        yield f"  by {', '.join(one.causes)}"
        for step in one.next:
            yield f"  next: {worded(step)}"


def _draw_status(status: RecallStatus) -> Drawn:
    yield from _draw_near(status.near)
    yield f"{status.cause}: {'gone' if status.gone else 'not gone'}"
    for line in status.left:
        yield f"  {line}"
    for name, label in status.replaced.items():
        yield f"  {name}: {label} does not contain it"
    for name in status.retrain:
        yield f"  {name}: nothing replaces it yet: `tunesmith run`"
    for licence in status.other_licences:
        yield f"  {licence}: not withdrawn, since it does not need it"


def _draw_near(near: Sequence[str]) -> Drawn:
    for name in near:
        yield f"not withdrawn, and may mean the same: {name}"


def _draw_recall(recall: Recall) -> Drawn:
    verb = "withdrew" if recall.done else "would withdraw"
    yield f"{verb} {recall.cause} ({recall.reason}); {len(recall.reached)} records:"
    for one in recall.reached:
        rows = ", ".join(f"{count} in {split}" for split, count in one.rows.items() if count)
        yield f"  {one.kind:<11} {one.label}{f': {rows}' if rows else ''}"
    for alias in recall.aliases:
        yield f"  alias       {alias.name}@{alias.alias}{alias.scope.said}"
    for served in recall.served:
        tenant = f"tenant {served.tenant}" if served.tenant else "no tenant"
        yield f"  answered    {served.requests} requests of {tenant}, the last {served.last}"
    for number in recall.rollouts:
        yield f"  rollout     {number}: {'aborted' if recall.done else 'would be aborted'}"
    yield from _draw_near(recall.near)


def _draw_cases(listed: CaseList) -> Drawn:
    for case in listed.cases:
        scores = ", ".join(f"{metric} {value:.2f}" for metric, value in case.scores.items())
        yield f"{case.request}  {case.at}  {case.by}  {scores}", "dim"
        yield f"  asked: {visible(case.messages[-1].content)}"
        yield "  it failed" if case.answer is None else f"  answered: {visible(case.answer)}"
        if case.expected is None:
            yield f"  nobody said what was expected: tunesmith cases correct {case.request} --expected TEXT"
        else:
            yield f"  expected: {visible(case.expected)}"
        yield f"  deleted after {case.until}", "dim"
    if not listed.cases:
        yield 'no cases: with `cases:` in the project file, callers make them with "store" or "keep": true'


def _draw_added(added: AddedCases) -> Drawn:
    yield f"{added.added} cases added to {added.source}"
    if added.without_answer:
        yield f"{added.without_answer} left, whose expected answer nobody said: tunesmith cases correct"
    if not added.named:
        yield "add the file to tunesmith.yaml, under data.sources, so that its rows are held out:"
        yield f"  - {{path: {added.source}, split: test}}"
    yield "then run `tunesmith data build`; existing measurements still refer to the earlier rows"


def _draw_recalls(listed: services.monitoring.RecallList) -> Drawn:
    rows = [(one.cause, one.reason, one.at[:16], one.records) for one in listed.recalls]
    yield table(rows, "recalled", "why", "at", "records")


def _draw_webhooks(listed: services.monitoring.WebhookList) -> Drawn:
    if not listed.webhooks:
        yield "no webhooks; `webhooks:` in tunesmith.yaml adds some"
        return
    rows = [(each.name, each.host, each.waiting, each.given_up) for each in listed.webhooks]
    yield table(rows, "webhook", "host", "waiting", "given up")
    failed = [
        (each.webhook, each.type, each.event, f"{each.attempts}{', given up' if each.given_up else ''}", each.error)
        for each in listed.failed
    ]
    if failed:
        yield table(failed, "webhook", "type", "event", "attempts", "error")
