"""Drift of served traffic, and recalls of data and versions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import get_args

from pydantic import ValidationError

from tunesmith.core.errors import UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.data.governance.licences import spelled
from tunesmith.monitoring import pending_retrains, recall_status
from tunesmith.monitoring import recall as recalls
from tunesmith.monitoring.drift import Report, watch
from tunesmith.monitoring.features import measured_baseline
from tunesmith.monitoring.pending_retrains import PendingRetrain
from tunesmith.monitoring.recall import Cause, CauseKind, Recall
from tunesmith.monitoring.recall_status import RecallStatus
from tunesmith.project import Project
from tunesmith.registry.versions import Version, list_versions, resolve
from tunesmith.rollout.controller import give_up
from tunesmith.rollout.standing import Champion
from tunesmith.services.rollouts import refused_champions
from tunesmith.store import database
from tunesmith.store.people.identities import acting
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


class VersionOnBase(View):
    """A version that was made from a base. aliases: `champion` and the like, with the tenant and region they are for.

    requests: answered by it, as far as the server's records say; last: the time of the last one, "" for none.
    """

    version: str
    digest: str
    tenant: str
    region: str
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


def impact(store: Store, base: str) -> Impact:
    """Every version, alias and tenant that depends on a base. base: as a project file names it, or its digest's start.

    Raises UsageError where no record here has that base.
    """
    specs = {digest: str(store.record(digest).body.get("spec", "")) for digest in store.records_of("base")}
    named = [digest for digest, spec in specs.items() if spec == base]
    digest = named[-1] if named else store.find_record(base)
    if digest not in specs:
        raise UsageError("it is not a base", where=base, fix=f"name one of {', '.join(sorted(set(specs.values())))}")
    with database.reading(store.engine) as session:
        found, _ = recalls.find_reached(store, session, Cause(kind="base", value=digest), "", done=False)
    reached = {one.digest for one in found.reached if one.kind == "version"}
    return Impact(
        base=digest,
        spec=specs[digest],
        versions=tuple(_on_base(each, found) for each in list_versions(store) if each.digest in reached),
        tenants=found.tenants,
        adapters=len(found.adapters),
    )


def _on_base(version: Version, found: recalls.Recall) -> VersionOnBase:
    served = [one for one in found.served if one.version == version.digest]
    aliases = (one for one in found.aliases if one.version == version.digest)
    return VersionOnBase(
        version=version.label,
        digest=version.digest,
        **version.scope.fields(),
        aliases=tuple(f"{one.alias}{Scope(one.tenant, one.region).options()}" for one in aliases),
        requests=sum(one.requests for one in served),
        last=max((one.last for one in served), default=""),
    )


def cause_of(store: Store, named: Mapping[str, str]) -> Cause:
    """The one thing to recall. named: kind -> value; a version or base is found by its label or digest, and
    a licence takes SPDX's spelling.

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
    if kind == "licence":
        value = spelled(value)
    try:
        return Cause.model_validate({"kind": kind, "value": value})
    except ValidationError:
        raise UsageError(f"{kind[:40]!r} {value[:80]!r} is nothing that can be recalled") from None


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
    if found.other_licences:
        lines.append(f"not withdrawn, since they do not need it: {'; '.join(found.other_licences)}")
    if any(one.kind == "version" for one in found.reached):
        lines.append("`tunesmith recall --pending` lists the names that need a new version, until it serves")
    lines.append(f"`tunesmith recall --{kind} {shlex.quote(value)} --check` shows whether it is gone")
    return lines
