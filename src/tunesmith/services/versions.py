"""Versions: register, approve, refuse and verify them, and show what they were made from."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tunesmith.core.errors import UsageError
from tunesmith.core.scope import Scope
from tunesmith.core.view import View
from tunesmith.pipeline.verdicts import changed_since, latest
from tunesmith.project import Project
from tunesmith.registry import approvals, registration, versions
from tunesmith.registry.aliases import Alias, list_aliases
from tunesmith.registry.lineage import Node, tree
from tunesmith.registry.risk import Approvals, Requirement
from tunesmith.registry.serving import approvals_of
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import Decision, envelope_of, read_statement
from tunesmith.registry.signing.release import Version
from tunesmith.registry.verification import Verification, verify_version
from tunesmith.registry.versions import resolve
from tunesmith.store import database
from tunesmith.store.people.identities import acting, get_user
from tunesmith.store.store import Store

LISTED = 100  # versions in a list, unless told otherwise


class RegisteredVersion(Version):
    """A version as the registry keeps it. version: its label, NAME@v3."""

    version: str


class VersionList(View):
    """Versions by name and number, and the aliases that point at them. total: how many there are with older ones."""

    versions: tuple[RegisteredVersion, ...]
    aliases: tuple[Alias, ...]
    total: int


class ApprovedVersion(View):
    """An approval. approval: its record's digest; override: why the gates were overridden, empty if they were not.

    missing: what the version takes besides, such as "1 more approver with the role steward".
    """

    approval: str
    version: str
    digest: str
    approver: str
    override: str
    missing: tuple[str, ...]
    marks: Annotated[tuple[str, ...], Field(exclude=True)]


class PreparedDecision(View):
    """What an approver is to sign. statement: the in-toto statement, for people and for `submit`.

    payload: the bytes to sign, base64: DSSE's encoding of the statement. keys: fingerprints of the approver's active
    keys, newest first. risk: the version's class and what it takes, None for one approver. missing: what it still takes
    before this decision.
    """

    statement: dict[str, Any]
    payload: str
    keys: tuple[str, ...]
    risk: Requirement | None = None
    missing: tuple[str, ...] = ()


class RecordedDecision(View):
    """An approval or refusal that counts. record: its digest; digest: the version's.

    missing: what the version takes before it may serve, this decision counted.
    """

    record: str
    version: str
    digest: str
    decision: Decision
    approver: str
    reason: str
    missing: tuple[str, ...] = ()


def register(
    project: Project,
    verdict: str | None = None,
    *,
    name: str | None = None,
    actor: str | None = None,
    override: str | None = None,
    expires_at: str | None = None,
    scope: Scope = Scope(),
) -> RegisteredVersion:
    """Sign a judged candidate and keep it as the next version of a name, by default of the project's.

    verdict: the start of its digest, by default the last one. override: an admin's reason to register a candidate that
    did not pass, or whose gates or policy checks changed since: without it Refused is raised. The version states the
    project's risk from now on.
    """
    store, risk = project.store, project.settings.risk
    digest = latest(project, "verdict") if verdict is None else store.find_record(verdict)
    if digest is None:
        raise UsageError("nothing was judged yet", where=str(store.root), fix="tunesmith gate, or tunesmith run")
    version = registration.register(
        store,
        name=name or project.settings.name,
        verdict=digest,
        changed=changed_since(project, digest),
        actor=acting(store, actor),
        scope=scope,
        override=override,
        expires_at=expires_at,
        risk=None if risk is None else risk.requirement,
    )
    return registered(version)


def approve(
    store: Store, version: str, *, reason: str = "", actor: str | None = None, scope: Scope = Scope()
) -> ApprovedVersion:
    """Verify a version and approve it with the actor's signature. The one who registered it may not approve it."""
    found, recorded = _decide(store, version, "approve", reason, actor, scope)
    return ApprovedVersion(
        approval=recorded.digest,
        version=found.label,
        digest=found.digest,
        approver=recorded.approval.approver,
        override=found.override or "",
        missing=approvals_for(store, found).missing,
        marks=found.marks,
    )


def refuse(
    store: Store, version: str, *, reason: str, actor: str | None = None, scope: Scope = Scope()
) -> RecordedDecision:
    """Refuse a version with the actor's signature: it serves no request until as many people approve it again as its
    risk class takes.
    """
    found, recorded = _decide(store, version, "refuse", reason, actor, scope)
    return _recorded(store, found, recorded)


def approvals_for(store: Store, version: Version) -> Approvals:
    """Who approved or refused a version, and what it still takes before it may serve."""
    with database.reading(store.engine) as session:
        return approvals_of(session, version)


def prepare(
    store: Store, version: str, decision: Decision, reason: str = "", *, actor: str, scope: Scope = Scope()
) -> PreparedDecision:
    """State what the actor signs to approve or refuse a version, after verifying it. Changes nothing."""
    found = resolve(store, version, scope=scope)
    request = approvals.prepare_approval(store, found, actor, reason, decision)
    keys_of_actor = get_user(store, actor).active_keys
    return PreparedDecision(
        statement=request.statement,
        payload=base64.b64encode(request.payload).decode(),
        keys=tuple(key.fingerprint for key in keys_of_actor),
        risk=found.risk,
        missing=approvals_for(store, found).missing,
    )


def submit(store: Store, statement: dict[str, Any], key: str, signature: bytes, *, actor: str) -> RecordedDecision:
    """Check a decision that was signed elsewhere and record it.

    key: the fingerprint of the key that signed. signature: DER, or r and s of 32 bytes each. Raises Refused if it is
    not the actor's decision or may not be recorded now.
    """
    recorded = approvals.submit_approval(store, envelope_of(statement, key, signature), by=actor)
    _, digest, _ = read_statement(statement)
    return _recorded(store, versions.load_version(store, digest), recorded)


def verify(
    store: Store,
    version: str,
    *,
    trust: Path | None = None,
    base: Path | None = None,
    lineage_only: bool = False,
    scope: Scope = Scope(),
) -> Verification:
    """Recompute the digests and signatures of a version and of everything that it was made from.

    NAME@v3 is verified from files alone, without the database. trust: a list of trusted keys in place of the store's.
    base: the base model's folder, verified too. lineage_only: do not verify the rest of the store.
    """
    label = version if "@v" in version else resolve(store, version, scope=scope).label
    return verify_version(store, label, trust=trust, base_folder=base, whole_store=not lineage_only)


def show(store: Store, what: str, *, scope: Scope = Scope()) -> Node:
    """The lineage of a version or of any record, named by the start of its digest; a version's approvals too."""
    digest = resolve(store, what, scope=scope).digest if "@" in what else store.find_record(what)
    node = tree(store, digest)
    if node.kind != "version":
        return node
    return node.model_copy(update={"approvals": approvals_for(store, versions.load_version(store, digest))})


def list_versions(store: Store, *, name: str = "", limit: int = LISTED) -> VersionList:
    """Versions, and the aliases that point at them.

    name: only versions whose name contains this text. limit: only the last so many that were registered; 0: all.
    """
    found = tuple(registered(one) for one in versions.list_versions(store, containing=name, newest=limit or None))
    listed = {version.digest for version in found}
    aliases = tuple(alias for alias in list_aliases(store) if alias.version in listed)
    return VersionList(versions=found, aliases=aliases, total=versions.count_versions(store, containing=name))


def _decide(
    store: Store, version: str, decision: Decision, reason: str, actor: str | None, scope: Scope
) -> tuple[Version, approvals.RecordedApproval]:
    """The version, and the actor's approval or refusal of it as recorded."""
    approver = acting(store, actor)
    found = resolve(store, version, scope=scope)
    request = approvals.prepare_approval(store, found, approver, reason, decision)
    user = keys.ensure_key(store, approver)
    return found, approvals.submit_approval(store, approvals.sign(request, keys.load_signing_key(store, user)))


def _recorded(store: Store, version: Version, recorded: approvals.RecordedApproval) -> RecordedDecision:
    return RecordedDecision.of(
        recorded.approval,
        record=recorded.digest,
        version=version.label,
        digest=version.digest,
        missing=approvals_for(store, version).missing,
    )


def registered(version: Version) -> RegisteredVersion:
    """A version as lists and pages show it."""
    return RegisteredVersion(version=version.label, **version.model_dump())
