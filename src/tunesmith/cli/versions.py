"""`register`, `approve`, `refuse`, `verify`, `show`, `export` and `audit`: versions and the evidence for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tunesmith.cli.terminal import Acting, Here, Region, Tenant, add_commands, draw_table, say
from tunesmith.core.errors import UsageError
from tunesmith.core.scope import Scope

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

    from tunesmith.registry.lineage import Node
    from tunesmith.registry.risk import Approvals
    from tunesmith.registry.verification import Verification
    from tunesmith.services.audit import Anchored, AuditLog, AuditVerification
    from tunesmith.services.decisions import RecordedDecision
    from tunesmith.services.versions import ExportedVersion, RegisteredVersion, VersionList


Server = Annotated[
    str | None, typer.Option("--server", metavar="URL", help="Decide on a server, with the token in $TUNESMITH_TOKEN.")
]
Key = Annotated[Path | None, typer.Option("--key", metavar="FILE", help="With --server: your private key.")]


_NOTHING = "nothing is registered yet: tunesmith run, or tunesmith register"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, approve, refuse, verify, show, export, register=register_version)
    audit = typer.Typer(help="The log of every change.", no_args_is_help=True)
    add_commands(audit, verify=verify_audit, anchor=anchor_audit, show=show_audit)
    app.add_typer(audit, name="audit")


def register_version(
    here: Acting,
    verdict: Annotated[
        str | None, typer.Argument(help="A verdict's digest or its start; by default the last one.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The version's name; by default the project's name.")
    ] = None,
    override: Annotated[
        str | None,
        typer.Option(
            "--override",
            metavar="REASON",
            help="Admins: register a candidate that did not pass, or whose gates changed, and why.",
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="TIME", help="When its use ends, as 2030-01-31T00:00:00Z.")
    ] = None,
    tenant: Tenant = None,
    region: Region = None,
) -> None:
    """Sign a judged candidate and keep it as the next version of its name."""
    from tunesmith.services import versions

    version = here.do(
        versions.register,
        verdict=verdict,
        name=name,
        override=override,
        expires_at=expires,
        tenant=tenant,
        region=region,
    )
    here.emit(version, _draw_registered)


def approve(
    here: Acting,
    version: Annotated[str, typer.Argument(help="NAME@v3, or the start of a version's digest.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; required where the gates were overridden.")] = "",
    tenant: Tenant = None,
    region: Region = None,
    server: Server = None,
    key: Key = None,
) -> None:
    """Verify a version and approve it with your signature. You may not approve a version that you registered."""
    from tunesmith.services import decisions

    if not _decided_there(
        here, server, key, version=version, decision="approve", reason=reason, tenant=tenant, region=region
    ):
        done = here.do(decisions.approve, version=version, reason=reason, tenant=tenant, region=region)
        here.emit(done, _draw_decision)


def refuse(
    here: Acting,
    version: Annotated[str, typer.Argument(help="NAME@v3, NAME@champion, or the start of a version's digest.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; it is signed with the refusal.")] = "",
    tenant: Tenant = None,
    region: Region = None,
    server: Server = None,
    key: Key = None,
) -> None:
    """Refuse a version with your signature. It serves no request until as many people approve it again as its risk
    class takes."""
    from tunesmith.services import decisions
    from tunesmith.services.rollouts import refused_champions

    if _decided_there(
        here, server, key, version=version, decision="refuse", reason=reason, tenant=tenant, region=region
    ):
        return
    done = here.do(decisions.refuse, version=version, reason=reason, tenant=tenant, region=region)
    here.emit(done, _draw_decision)
    for champion in refused_champions(here.store):
        say(f"warning: {champion.warning}")


def _decided_there(here: Acting, server: str | None, key: Path | None, **asked: str | None) -> bool:
    """Decide on a server, if one is named; returns whether one is. asked: fields of a decision to prepare."""
    from tunesmith.services import decisions

    if server is None:
        if key is not None:
            raise UsageError("--key applies to --server", fix="set TUNESMITH_KEYS to the folder of your keys instead")
        return False
    prepare = decisions.prepare.request({name: value for name, value in asked.items() if value is not None})
    here.emit(decisions.decide(server, key, prepare, actor=here.actor), _draw_decision)
    return True


def verify(
    here: Here,
    version: Annotated[str, typer.Argument(help="NAME@v3 (reads files only), NAME@champion or a digest.")],
    trust: Annotated[
        Path | None, typer.Option("--trust", metavar="FILE", help="Your own list of keys instead of the store's.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", metavar="FOLDER", help="Also verify the base model's files.")
    ] = None,
    lineage_only: Annotated[
        bool, typer.Option("--lineage-only", help="Verify only what the version was made from, not the whole store.")
    ] = False,
    tenant: Tenant = None,
    region: Region = None,
) -> None:
    """Verify a version offline: its signature, and every record and blob it was made from. Exit 3 on any difference.

    The trusted keys are those in the store's trust/keys.json. A person who can write that file decides what verifies:
    bring your own copy with --trust if you do not trust the store.
    """
    from tunesmith.services import versions

    scope = Scope(tenant or "", region or "")
    found = versions.verify_offline(here.store, version, trust=trust, base=base, lineage_only=lineage_only, scope=scope)
    here.emit(found, _draw_verification)
    raise typer.Exit(0 if found.ok else 3)


def show(
    here: Here,
    what: Annotated[str | None, typer.Argument(help="A version, or any record's digest or its start.")] = None,
    name: Annotated[str, typer.Option("--name", metavar="TEXT", help="List versions whose name contains this.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Newest versions to list; 0 lists all.")] = 100,
    tenant: Tenant = None,
    region: Region = None,
) -> None:
    """Show what a record was made from and what was made from it; without an argument, list versions and aliases."""
    from tunesmith.services import lineage, versions

    store = here.store
    if what is not None:
        if name:
            raise UsageError("--name lists versions, and WHAT names one record", fix="leave one of them out")
        here.emit(lineage.show(store, what, scope=Scope(tenant or "", region or "")), _draw_lineage)
        return
    found = versions.list_versions(store, name=name, limit=limit)
    if not found.versions and not here.as_json:
        say(f"no version's name contains {name!r}" if name else _NOTHING)
    here.emit(found, _draw_versions)


def export(
    here: Here,
    version: Annotated[str, typer.Argument(help="NAME@v3, NAME@champion, or the start of a version's digest.")],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write; it must not exist yet.")],
    form: Annotated[
        Literal["peft", "merged", "gguf"],
        typer.Option("--as", help="peft: the adapter alone; merged: a Hugging Face folder; gguf: for llama.cpp."),
    ],
    dtype: Annotated[
        Literal["bf16", "fp32"], typer.Option("--dtype", help="Of merged weights; an adapter stays as it is.")
    ] = "bf16",
    tenant: Tenant = None,
    region: Region = None,
    actor: Annotated[
        str | None, typer.Option("--by", metavar="USER", help="Who acts; by default $TUNESMITH_USER, else the owner.")
    ] = None,
) -> None:
    """Write an approved version's weights for other programs, after comparing them with those that were measured.

    The same held-out requests go through the adapter as trained, as served and as exported. Exit 3 if their
    log-probabilities differ by more than the tolerance. The store keeps the figures: `tunesmith show VERSION`.
    """
    from tunesmith.services import versions

    acting = Acting(here.directory, here.as_json, actor)  # --as is the form here
    done = acting.do(
        versions.export, version=version, target=target, form=form, dtype=dtype, tenant=tenant, region=region
    )
    here.emit(done, _draw_export)


TsaRoots = Annotated[
    Path | None,
    typer.Option("--tsa-roots", metavar="FILE", help="Root certificates (PEM) of the time-stamping authority."),
]


def anchor_audit(
    here: Acting,
    place: Annotated[str, typer.Argument(help="A file, or s3://BUCKET/FOLDER in a bucket with Object Lock.")],
    keep_days: Annotated[
        float, typer.Option(min=1, max=36500, help="How long nobody can remove it from the bucket, in days.")
    ] = 3650,
    time_stamp: Annotated[
        str | None,
        typer.Option("--time-stamp", metavar="URL", help="A time-stamping authority (RFC 3161) that signs the anchor."),
    ] = None,
    tsa_roots: TsaRoots = None,
) -> None:
    """Write the newest entry of the log to a place outside the store, to notice an old store that is put back."""
    from tunesmith.services import audit

    done = here.do(audit.anchor, place=place, keep_days=keep_days, time_stamp=time_stamp, tsa_roots=tsa_roots)
    here.emit(done, _draw_anchored)


def verify_audit(
    here: Here,
    head: Annotated[
        list[str] | None,
        typer.Option("--head", metavar="NUMBER:DIGEST", help="A newest entry that you kept elsewhere; repeatable."),
    ] = None,
    anchor: Annotated[
        list[str] | None,
        typer.Option("--anchor", metavar="PLACE", help="A place that `audit anchor` wrote to; repeatable."),
    ] = None,
    tsa_roots: TsaRoots = None,
) -> None:
    """Compare the audit log with itself, with signed records and with the current state. Exit 3 on any difference."""
    from tunesmith.services import audit

    found = audit.verify_audit(here.store, head or (), anchor or (), tsa_roots)
    here.emit(found, _draw_audit_verification)
    raise typer.Exit(0 if found.ok else 3)


def show_audit(
    here: Here,
    subject: Annotated[str | None, typer.Argument(help="Only entries about this name or digest.")] = None,
    action: Annotated[str | None, typer.Option("--action", help="Only this action, such as version.approve.")] = None,
    search: Annotated[str, typer.Option("--search", help="Only entries with this text, the detail included.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Newest entries to show; 0 shows all.")] = 50,
) -> None:
    """Show who did what, and when."""
    from tunesmith.services import audit

    found = audit.show_audit(here.store, subject=subject, action=action, containing=search, limit=limit)
    here.emit(found, _draw_audit)


def _draw_registered(console: Console, version: RegisteredVersion) -> None:
    from tunesmith.registry.risk import missing

    console.print(f"{version.label} is registered and signed by {version.signer}")
    if version.override is not None:
        console.print(f"its gates were overridden: {version.override}", style="bold red")
    for mark in version.marks:
        console.print(f"it was {mark}: not meant for service", style="bold red")
    if version.risk is not None:
        console.print(f"risk class {version.risk.risk_class}: it needs {' and '.join(missing(version.risk, {}))}")
    console.print(f"next: tunesmith approve {version.label} --as SOMEBODY-ELSE")


def _draw_decision(console: Console, done: RecordedDecision) -> None:
    said = "approved" if done.decision == "approve" else "refused"
    console.print(f"{done.version} ({done.digest}) is {said} by {done.approver}")
    if done.decision == "refuse":
        return
    if done.override:
        console.print(f"although its gates were overridden: {done.override}", style="bold red")
    for mark in done.marks:
        console.print(f"although it was {mark}: not meant for service", style="bold red")
    if done.missing:
        console.print(f"it needs {' and '.join(done.missing)}")
    else:
        console.print(f"next: tunesmith rollout start {done.version}")


def _draw_verification(console: Console, found: Verification) -> None:
    for problem in found.problems:
        console.print(f"{problem.path}: {problem.reason}", style="red", soft_wrap=True)
    for note in found.notes:
        console.print(note, style="dim")
    outcome = "verifies" if found.ok else f"does not verify: {len(found.problems)} problems"
    console.print(f"{found.version} {outcome} ({found.checked} files checked)")


def _draw_lineage(console: Console, node: Node) -> None:
    from rich.tree import Tree

    console.print(f"{node.kind} {node.says}", style="bold")
    console.print(node.digest)
    for name, blob in sorted((node.blobs or {}).items()):
        console.print(f"  {name}  {blob}", style="dim", soft_wrap=True)
    if node.approvals is not None:
        _draw_approvals(console, node.approvals)
    for title, nodes in (("made from", node.parents), ("used for", node.children)):
        if nodes:
            trunk = Tree(title)
            _grow(trunk, nodes)
            console.print(trunk)


def _draw_approvals(console: Console, found: Approvals) -> None:
    if found.risk is not None:
        console.print(f"risk class {found.risk.risk_class}")
    if found.approvers:
        console.print(f"approved by {', '.join(found.approvers)}")
    if found.refused_by is not None:
        console.print(f"refused by {found.refused_by}: {found.reason}", style="red")
    if found.missing:
        console.print(f"it needs {' and '.join(found.missing)}")


def _grow(trunk: Tree, nodes: Sequence[Node]) -> None:
    from rich.text import Text

    for node in nodes:
        upwards = node.children is None
        role = f"{node.role}: " if node.role != node.kind and upwards else ""
        line = Text(f"{role}{node.kind} ")
        line.append(node.short, style="dim").append(f" {node.says}").append(" ..." if node.seen else "")
        _grow(trunk.add(line), node.parents or node.children or ())


def _draw_versions(console: Console, found: VersionList) -> None:
    from tunesmith.core.digests import short

    rows = []
    for version in found.versions:
        pointing = ", ".join(
            "/".join(part for part in (alias.alias, alias.tenant, alias.region) if part)
            for alias in found.aliases
            if alias.version == version.digest
        )
        scope = "/".join(part for part in (version.tenant, version.region) if part)
        notes = [*(["gates overridden"] if version.override else []), *version.marks]
        marked = version.label + (f" ({', '.join(notes)})" if notes else "")
        rows.append((marked, short(version.digest), version.signer, scope, pointing))
    if rows:
        draw_table(console, rows, "version", "digest", "signed by", "for", "aliases")
    if len(rows) < found.total:
        console.print(f"the newest {len(rows)} of {found.total}; --limit 0 shows all", style="dim")


def _draw_export(console: Console, done: ExportedVersion) -> None:
    console.print(f"{done.version} is exported to {done.folder}", soft_wrap=True)
    console.print(done.line)
    for note in done.notes:
        console.print(note, soft_wrap=True)
    for name, file in done.files.items():
        console.print(f"  {name}  {file.bytes:,} bytes", style="dim")


def _draw_anchored(console: Console, done: Anchored) -> None:
    what = "is written to" if done.written else "needs no new anchor: nothing happened since the last one in"
    console.print(f"entry {done.head.seq} {what} {done.place}", soft_wrap=True)
    if done.kept_until is not None:
        console.print(f"nobody can remove it before {done.kept_until[:10]}")
    if done.stamped_at is not None:
        console.print(f"time-stamped at {done.stamped_at}")


def _draw_audit_verification(console: Console, found: AuditVerification) -> None:
    for problem in found.problems:
        console.print(problem.reason, style="red", soft_wrap=True)
    for note in found.notes:
        console.print(note, style="dim", soft_wrap=True)
    outcome = "verifies" if found.ok else f"does not verify: {len(found.problems)} problems"
    console.print(f"the log of {found.checked} entries {outcome}")
    newest = f"{found.head.seq}:{found.head.digest}"
    console.print(f"its newest entry, to be kept elsewhere: {newest}", style="dim")


def _draw_audit(console: Console, log: AuditLog) -> None:
    from tunesmith.core.digests import short

    rows = []
    for entry in log.entries:
        about = short(entry.subject) if entry.subject.startswith("sha256:") else entry.subject
        at = f"{entry.at[:19]}Z"  # to the second; --json has all of it
        rows.append((entry.seq, at, entry.actor, entry.action, about))
    draw_table(console, rows, "entry", "at", "who", "action", "about")
    if len(log.entries) < log.total:
        shown = f"the newest {len(log.entries)} of {log.total}; --limit 0 shows all"
        console.print(shown, style="dim")
