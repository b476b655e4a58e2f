"""Drift of served traffic, and recalls of data and versions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import get_args

from tunesmith.core.errors import UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.monitoring import pending_retrains, recall_status
from tunesmith.monitoring import recall as recalls
from tunesmith.monitoring.baseline import measured_baseline
from tunesmith.monitoring.drift import Report, watch
from tunesmith.monitoring.pending_retrains import PendingRetrain
from tunesmith.monitoring.recall import Cause, CauseKind, Recall
from tunesmith.monitoring.recall_status import RecallStatus
from tunesmith.project import Project
from tunesmith.registry.versions import list_versions, resolve
from tunesmith.rollout.controller import give_up
from tunesmith.rollout.standing import Champion
from tunesmith.services.rollouts import refused_champions
from tunesmith.store.identities import acting
from tunesmith.store.store import Store


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
    next: tuple[str, ...]


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
    report = watch(
        project.store,
        settings,
        name=version.name,
        version=version.digest,
        measure=lambda: measured_baseline(project.store, version),
        tenant=tenant,
    )
    pending = tuple(pending_retrains.list_pending_retrains(project.store, version.name))
    refused = tuple(refused_champions(project.store, version.name))
    return Monitored(**dict(report), pending_retrains=pending, refused_champions=refused), version.label


def list_pending_retrains(store: Store) -> PendingRetrains:
    """The retrains that recalls left pending."""
    return PendingRetrains(pending_retrains=tuple(pending_retrains.list_pending_retrains(store)))


def cause_of(store: Store, named: Mapping[str, str]) -> Cause:
    """The one thing to recall. named: kind -> value; a version or base is found by its label or digest.

    Raises UsageError unless exactly one thing is named.
    """
    if len(named) != 1:
        options = ", ".join(f"--{kind}" for kind in get_args(CauseKind))
        raise UsageError(f"name exactly one thing to recall, not {len(named)}", fix=f"one of {options}")
    ((kind, value),) = named.items()
    if kind == "version" and "@" in value:
        labels = {version.label: version.digest for version in list_versions(store, value.partition("@")[0])}
        value = labels.get(value, value)
    if kind in ("version", "base"):
        value = store.find_record(value)
    return Cause.model_validate({"kind": kind, "value": value})


def recall(store: Store, cause: Cause, *, reason: str, actor: str | None = None, dry_run: bool = False) -> Recalled:
    """Withdraw something and everything that was made from it, and abort the rollouts that it reaches.

    dry_run: change nothing, and return what a recall would reach.
    """
    found = recalls.recall(store, cause, reason=reason, actor=acting(store, actor), dry_run=dry_run)
    aborted: list[int] = []
    if not dry_run:
        aborted = [give_up(store, number, f"recalled: {reason}").id for number in found.rollouts]
    return Recalled(**dict(found), aborted_rollouts=tuple(aborted), next=tuple(_next_steps(found)))


def recall_status_of(store: Store, cause: Cause) -> RecallStatus:
    """Whether nothing uses what was recalled any more. Raises UsageError if it was never recalled."""
    return recall_status.recall_status(store, cause)


def _next_steps(found: Recall) -> list[str]:
    if not found.done:
        return ["nothing was changed; without --dry-run it is withdrawn"]
    lines = []
    for champion in found.champions:
        scope = Scope(champion.tenant, champion.region)
        command = f"tunesmith rollout rollback {champion.name}{scope.options()}"
        lines.append(f"{champion.name}@champion is withdrawn and no longer answers: {command}")
    kind, _, value = found.cause.partition(" ")
    if any(one.kind == "dataset" for one in found.reached):
        lines.append("`tunesmith run` builds, trains and measures again without these rows")
    elif found.adapters:
        lines.append("change what these weights were trained on (rows, settings or base), then `tunesmith run`")
    if any(one.kind == "version" for one in found.reached):
        lines.append("`tunesmith recall --pending` lists the names that need a new version, until it serves")
    lines.append(f"`tunesmith recall --{kind} {shlex.quote(value)} --check` shows whether it is gone")
    return lines
