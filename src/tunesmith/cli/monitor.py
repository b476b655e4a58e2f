"""`monitor`: does served traffic still look like what was measured? `recall`: withdraw something and all it became."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.terminal import HERE, As, Directory, Json, emit, say

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.monitoring.drift import Baseline, Report
    from tunesmith.monitoring.pending_retrains import Due
    from tunesmith.monitoring.recall import Cause, Recall
    from tunesmith.project import Project
    from tunesmith.registry.versions import Version
    from tunesmith.store.store import Store


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(monitor)
    app.command()(recall)


def monitor(
    which: Annotated[
        str | None,
        typer.Argument(metavar="[VERSION]", help="NAME@champion or NAME@v3; the project's champion if left out."),
    ] = None,
    directory: Directory = HERE,
    as_json: Json = False,
    hours: Annotated[
        float | None, typer.Option("--hours", min=0.001, help="The window; the project's if left out.")
    ] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Look at one tenant's requests alone.")] = None,
) -> None:
    """Hold served requests against the test split. Exit code 3: they drifted; 4: too few to say.

    Below it stands what a recall left to be trained anew (`recall --due`), which decides no exit code here.
    """
    from tunesmith.monitoring.drift import watch
    from tunesmith.monitoring.pending_retrains import list_due
    from tunesmith.project import open_project
    from tunesmith.registry.versions import resolve

    project = open_project(directory)
    settings = project.settings.monitoring
    if hours is not None:
        settings = settings.model_copy(update={"window_hours": hours})
    version = resolve(project.store, which or f"{project.settings.name}@champion", tenant=tenant or "")
    report = watch(
        project.store,
        settings,
        name=version.name,
        version=version.digest,
        measure=lambda: _baseline(project, version),
        tenant=tenant,
    )
    due = list_due(project.store, version.name)

    def draw(console: Console) -> None:
        _draw(console, version.label, report)
        _draw_due(console, due)

    emit({**report.as_json(), "due": [one.model_dump(mode="json") for one in due]}, as_json, draw)
    if report.verdict != "stable":
        raise typer.Exit(3 if report.verdict == "drift" else 4)


def recall(
    reason: Annotated[
        str, typer.Option("--reason", help="Why; the audit log and every refusal to serve give it.")
    ] = "",
    row: Annotated[str | None, typer.Option("--row", metavar="ID", help="An example's id.")] = None,
    source: Annotated[str | None, typer.Option("--source", help="A source, as `data show` names it.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="All rows under an SPDX licence expression.")] = None,
    subject: Annotated[str | None, typer.Option("--subject", help="All rows about a person.")] = None,
    version: Annotated[str | None, typer.Option("--version", help="NAME@v3 or the start of its digest.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="The start of a base record's digest.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what it would reach.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Show whether what was recalled is gone (exit 3: not).")
    ] = False,
    due: Annotated[
        bool,
        typer.Option("--due", help="List what recalls left to be trained anew and put into service (exit 3: some)."),
    ] = False,
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
) -> None:
    """Withdraw something and everything that came of it: it is served and built on no more.

    The next `tunesmith run` builds, trains and measures again without the rows, whatever the sources still hold.
    """
    from tunesmith.core.errors import UsageError
    from tunesmith.monitoring import recall as recalls
    from tunesmith.project import open_store
    from tunesmith.rollout.controller import give_up
    from tunesmith.store.identities import acting

    given = {"row": row, "source": source, "licence": licence, "subject": subject, "version": version, "base": base}
    named = {kind: value for kind, value in given.items() if value is not None}
    if due:
        if named or dry_run or check or reason:
            raise UsageError("--due lists what is due and withdraws nothing", fix="tunesmith recall --due")
        _list_due(open_store(directory), as_json)
        return
    if len(named) != 1:
        options = ", ".join(f"--{kind}" for kind in given)
        raise UsageError(f"name exactly one thing to withdraw, not {len(named)}", fix=f"one of {options}")
    store = open_store(directory)
    (kind, value), *_ = named.items()
    if check:
        _check(store, _cause(store, kind, value), as_json)
        return
    found = recalls.recall(
        store, _cause(store, kind, value), reason=reason, actor=acting(store, actor), dry_run=dry_run
    )
    aborted = []
    if not dry_run:
        aborted = [give_up(store, number, f"recalled: {reason}").id for number in found.rollouts]
    document = {**found.model_dump(mode="json"), "aborted_rollouts": aborted, "next": _next(found)}
    emit(document, as_json, lambda console: _tell(console, found))
    for line in _next(found):
        say(line)


def _baseline(project: Project, version: Version) -> Baseline:
    """The test split's features, and the evaluation's share of valid JSON."""
    from tunesmith.candidates.candidate import load_candidate
    from tunesmith.candidates.retrieval import example_index
    from tunesmith.data.dataset import load_dataset
    from tunesmith.monitoring.drift import Baseline
    from tunesmith.monitoring.features import last_request, measured_features

    store = project.store
    candidate = load_candidate(store, version.candidate)
    evaluation = store.record(version.evaluation, kind="evaluation")
    dataset = load_dataset(store, evaluation.parents["dataset"])
    nearest = None
    if candidate.dataset is not None:
        index = example_index(load_dataset(store, candidate.dataset).examples("train"))

        def nearest(messages: Any) -> float:
            return index.similarity(last_request(messages))

    measured = [one for one in evaluation.body["candidates"].values() if one["candidate"] == version.candidate]
    valid = measured[0]["metrics"].get("json_valid") if measured else None
    return Baseline(
        features=measured_features(dataset.examples("test"), nearest),
        json_valid=None if valid is None else (valid["mean"], valid["low"], valid["high"]),
    )


def _cause(store: Store, kind: str, value: str) -> Cause:
    from tunesmith.monitoring.recall import Cause
    from tunesmith.registry.versions import list_versions

    if kind == "version" and "@" in value:
        labels = {version.label: version.digest for version in list_versions(store, value.partition("@")[0])}
        value = labels.get(value, value)
    if kind in ("version", "base"):
        value = store.find_record(value)
    return Cause.model_validate({"kind": kind, "value": value})


def _next(found: Recall) -> list[str]:
    """What is left to do by hand."""
    if not found.done:
        return ["nothing was changed; without --dry-run it is withdrawn"]
    lines = []
    for champion in found.champions:
        place = "".join(f" --{key} {getattr(champion, key)}" for key in ("tenant", "region") if getattr(champion, key))
        command = f"tunesmith rollout rollback {champion.name}{place}"
        lines.append(f"{champion.name}@champion is withdrawn and answers no more: {command}")
    kind, _, value = found.cause.partition(" ")
    if any(one.kind == "dataset" for one in found.reached):
        lines.append("`tunesmith run` builds, trains and measures again without these rows")
    elif found.adapters:
        lines.append("change what made these weights (rows, settings or base), then `tunesmith run`")
    if any(one.kind == "version" for one in found.reached):
        lines.append("`tunesmith recall --due` lists what served and is to be made anew, until what replaces it serves")
    lines.append(f"`tunesmith recall --{kind} {shlex.quote(value)} --check` shows whether it is gone")
    return lines


def _check(store: Store, cause: Cause, as_json: bool) -> None:
    from tunesmith.monitoring.recall_status import check_gone

    standing = check_gone(store, cause)

    def draw(console: Console) -> None:
        console.print(f"{standing.cause}: {'gone' if standing.gone else 'not gone'}", markup=False)
        for line in standing.left:
            console.print(f"  {line}", markup=False)
        for name, label in standing.replaced.items():
            console.print(f"  {name}: {label} stands without it", markup=False)
        for name in standing.retrain:
            console.print(f"  {name}: nothing replaces it yet: `tunesmith run`", markup=False)

    emit(standing.model_dump(mode="json"), as_json, draw)
    if not standing.gone:
        raise typer.Exit(3)


def _list_due(store: Store, as_json: bool) -> None:
    from tunesmith.monitoring.pending_retrains import list_due

    found = list_due(store)

    def draw(console: Console) -> None:
        _draw_due(console, found)
        if not found:
            console.print("nothing is due")

    emit({"due": [one.model_dump(mode="json") for one in found]}, as_json, draw)
    if found:
        raise typer.Exit(3)


def _draw_due(console: Console, due: list[Due]) -> None:
    for one in due:
        place = "".join(f", {key} {value}" for key, value in (("tenant", one.tenant), ("region", one.region)) if value)
        serves = f"{one.serves} serves" if one.answers else "nothing serves"
        made = f"{one.replacement} was made without it" if one.replacement else "to be trained anew"
        console.print(f"due: {one.name}{place}: {one.version} was recalled, {made}; {serves}", markup=False)
        console.print(f"  by {', '.join(one.causes)}", markup=False)
        for step in one.next:
            console.print(f"  next: {step}", markup=False)


def _tell(console: Console, found: Recall) -> None:
    verb = "withdrew" if found.done else "would withdraw"
    console.print(f"{verb} {found.cause} ({found.reason}); {len(found.reached)} records:", markup=False)
    for one in found.reached:
        rows = ", ".join(f"{count} in {split}" for split, count in one.rows.items() if count)
        console.print(f"  {one.kind:<11} {one.label}{f': {rows}' if rows else ''}", markup=False)
    for alias in found.aliases:
        place = " ".join(filter(None, (alias.tenant and f"tenant {alias.tenant}", alias.region)))
        console.print(f"  alias       {alias.name}@{alias.alias} {place}".rstrip(), markup=False)
    for served in found.served:
        whom = f"tenant {served.tenant}" if served.tenant else "no tenant"
        console.print(f"  answered    {served.requests} requests of {whom}, the last {served.last}", markup=False)
    for number in found.rollouts:
        console.print(f"  rollout     {number}: {'aborted' if found.done else 'would be aborted'}", markup=False)


def _draw(console: Console, label: str, report: Report) -> None:
    console.print(f"{label}: {report.verdict} ({report.reason})", markup=False)
    console.print(f"  {report.requests} requests, {report.since} to {report.until}", markup=False)
    for tenant, count in report.capped.items():
        console.print(
            f"  {count} requests of tenant {tenant!r} left out: they would drown out the others", markup=False
        )
    for finding in report.findings:
        p_value = "" if finding.p_value is None else f" (KS p = {finding.p_value:.2g})"
        console.print(f"  {finding.outcome:<12} {finding.reason}{p_value}", markup=False)
    if report.recommendation:
        console.print(f"  {report.recommendation}", markup=False)
