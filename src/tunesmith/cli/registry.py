"""`register`, `approve`, `verify`, `show`, and `audit verify|show`: versions, and what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import users
from tunesmith.cli.terminal import HERE, As, Directory, Json, emit, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

    from tunesmith.store.audit import Head
    from tunesmith.store.store import Store

Tenant = Annotated[str, typer.Option("--tenant", help="The tenant it is for; none where left out.")]
Region = Annotated[str, typer.Option("--region", help="The region it is for; none where left out.")]


def register(app: typer.Typer) -> None:
    """Add the verbs, and with them those of the people behind versions."""
    app.command("register")(register_version)
    app.command()(approve)
    app.command()(verify)
    app.command()(show)
    audit = typer.Typer(help="The log of every change.", no_args_is_help=True)
    audit.command("verify")(verify_audit)
    audit.command("show")(show_audit)
    app.add_typer(audit, name="audit")
    users.register(app)


def register_version(
    verdict: Annotated[str | None, typer.Argument(help="A verdict's digest or its start; the newest without.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="What it is called; the project's name without.")] = None,
    override: Annotated[
        str | None, typer.Option("--override", metavar="REASON", help="Admins: let through what did not pass, and why.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="TIME", help="Until when it may be used, 2030-01-31T00:00:00Z.")
    ] = None,
    tenant: Tenant = "",
    region: Region = "",
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
) -> None:
    """Sign a judged candidate and keep it as the next version of its name."""
    from tunesmith.core.errors import UsageError
    from tunesmith.project import open_project, open_store
    from tunesmith.registry import versions
    from tunesmith.store.identities import acting

    store = open_store(directory)
    if verdict is None:
        known = store.records_of("verdict")
        if not known:
            raise UsageError("nothing was judged yet", where=str(store.root), fix="tunesmith gate, or tunesmith run")
        digest = known[-1]
    else:
        digest = store.find_record(verdict)
    version = versions.register(
        store,
        name=name or open_project(directory).settings.name,
        verdict=digest,
        actor=acting(store, actor),
        tenant=tenant,
        region=region,
        override=override,
        expires_at=expires,
    )
    document = {"version": version.label, **version.model_dump(mode="json")}

    def draw(console: Console) -> None:
        console.print(f"{version.label} is registered and signed by {version.signer}", markup=False)
        if version.override is not None:
            console.print(f"its gates were overridden: {version.override}", style="bold red", markup=False)
        for mark in version.marks:
            console.print(f"it was {mark}: not meant for service", style="bold red", markup=False)
        console.print(f"next: tunesmith approve {version.label} --as SOMEBODY-ELSE", markup=False)

    emit(document, as_json, draw)


def approve(
    version: Annotated[str, typer.Argument(help="NAME@v3, NAME@challenger, or the start of a version's digest.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; needed where its gates were overridden.")] = "",
    tenant: Tenant = "",
    region: Region = "",
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
) -> None:
    """Approve a version by your signature, after it was verified with all it came of. Not one that you registered."""
    from tunesmith.project import open_store
    from tunesmith.registry import approvals
    from tunesmith.registry.versions import resolve
    from tunesmith.store.identities import acting

    store = open_store(directory)
    who = acting(store, actor)
    found = resolve(store, version, tenant=tenant, region=region)
    digest = approvals.approve(store, found, approver=who, reason=reason)
    document = {"approval": digest, "version": found.label, "digest": found.digest, "approver": who}
    document["override"] = found.override or ""

    def draw(console: Console) -> None:
        console.print(f"{found.label} is approved by {who}", markup=False)
        if found.override is not None:
            console.print(f"although its gates were overridden: {found.override}", style="bold red", markup=False)
        for mark in found.marks:
            console.print(f"although it was {mark}: not meant for service", style="bold red", markup=False)
        console.print(f"next: tunesmith rollout start {found.label}", markup=False)

    emit(document, as_json, draw)


def verify(
    version: Annotated[str, typer.Argument(help="NAME@v3 (files alone are read), NAME@champion or a digest.")],
    trust: Annotated[
        Path | None, typer.Option("--trust", metavar="FILE", help="Your own list of keys, not the store's.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", metavar="FOLDER", help="The base model's files, to be checked too.")
    ] = None,
    lineage_only: Annotated[
        bool, typer.Option("--lineage-only", help="Look at what it came of alone, not at the whole store.")
    ] = False,
    tenant: Tenant = "",
    region: Region = "",
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Recompute a version offline: its signature, and every record and blob it came of. Exit 3 where anything differs.

    The keys that are believed are those in the store's trust/keys.json: whoever can write that file decides what
    verifies, so bring your own copy with --trust where you do not trust the place.
    """
    from tunesmith.project import open_store
    from tunesmith.registry.versions import resolve, verify_version

    store = open_store(directory)
    files_alone = "@v" in version  # an alias or a digest is the database's to resolve
    label = version if files_alone else resolve(store, version, tenant=tenant, region=region).label
    found = verify_version(store.root, label, trust=trust, base_folder=base, whole_store=not lineage_only)

    def draw(console: Console) -> None:
        for problem in found.problems:
            console.print(f"{problem.path}: {problem.reason}", style="red", markup=False, soft_wrap=True)
        for note in found.notes:
            console.print(note, style="dim", markup=False)
        outcome = "is whole" if found.ok else f"does not verify: {len(found.problems)} problems"
        console.print(f"{label} {outcome} ({found.checked} files checked)", markup=False)

    emit(found.model_dump(mode="json"), as_json, draw)
    if not found.ok:
        raise typer.Exit(3)


def show(
    what: Annotated[str | None, typer.Argument(help="A version, or any record's digest or its start.")] = None,
    tenant: Tenant = "",
    region: Region = "",
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """What a record came of and what came of it; without one, every version and where the aliases point."""
    from tunesmith.project import open_store
    from tunesmith.registry.lineage import tree
    from tunesmith.registry.versions import resolve

    store = open_store(directory)
    if what is None:
        _show_versions(store, as_json)
        return
    digest = resolve(store, what, tenant=tenant, region=region).digest if "@" in what else store.find_record(what)
    node = tree(store, digest)

    def draw(console: Console) -> None:
        from rich.tree import Tree

        console.print(f"{node['kind']} {node['says']}", style="bold", markup=False)
        console.print(node["digest"], markup=False)
        for name, blob in sorted(node["blobs"].items()):
            console.print(f"  {name}  {blob}", style="dim", markup=False, soft_wrap=True)
        for title, way in (("came of", "parents"), ("led to", "children")):
            if node[way]:
                trunk = Tree(title)
                _grow(trunk, node[way], way)
                console.print(trunk)

    emit(node, as_json, draw)


def verify_audit(
    head: Annotated[
        list[str] | None,
        typer.Option("--head", metavar="NUMBER:DIGEST", help="A newest entry that you kept elsewhere; repeatable."),
    ] = None,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Hold the audit log against itself, signed witnesses and the state it led to. Exit 3 where anything differs."""
    from tunesmith.project import open_store
    from tunesmith.registry.history import verify_log
    from tunesmith.store import audit, database

    store = open_store(directory)
    reasons = verify_log(store, [_head(text) for text in head or ()])
    with database.reading(store.engine) as session:
        newest = audit.newest(session)
    problems = [{"path": "audit log", "reason": reason} for reason in reasons]
    document = {"ok": not problems, "checked": newest.seq, "problems": problems, "head": newest.model_dump()}

    def draw(console: Console) -> None:
        for reason in reasons:
            console.print(reason, style="red", markup=False, soft_wrap=True)
        outcome = "is whole" if not reasons else f"is not whole: {len(reasons)} problems"
        console.print(f"the log of {newest.seq} entries {outcome}", markup=False)
        console.print(
            f"its newest entry, to be kept elsewhere: {newest.seq}:{newest.digest}", style="dim", markup=False
        )

    emit(document, as_json, draw)
    if problems:
        raise typer.Exit(3)


def show_audit(
    subject: Annotated[str | None, typer.Argument(help="Only entries about this name or digest.")] = None,
    action: Annotated[str | None, typer.Option("--action", help="Only this action, such as version.approve.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Newest entries to show; 0 shows all.")] = 50,
    directory: Directory = HERE,
    as_json: Json = False,
) -> None:
    """Who did what, and when."""
    from tunesmith.project import open_store
    from tunesmith.store import audit, database

    store = open_store(directory)
    with database.reading(store.engine) as session:
        rows = [
            {
                "seq": row.seq,
                "at": row.at,
                "actor": row.actor,
                "action": row.action,
                "subject": row.subject,
                "detail": row.detail,
            }
            for row in audit.entries(session)
            if subject in (None, row.subject) and action in (None, row.action)
        ]
    shown = rows[-limit:] if limit else rows

    def draw(console: Console) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table("entry", "at", "who", "action", "about")
        for row in shown:
            about = str(row["subject"])
            plain = about.removeprefix("sha256:")[:12] if about.startswith("sha256:") else about
            at = f"{str(row['at'])[:19]}Z"  # to the second; --json has all of it
            table.add_row(str(row["seq"]), at, Text(str(row["actor"])), Text(str(row["action"])), Text(plain))
        console.print(table)
        if len(shown) < len(rows):
            console.print(f"the newest {len(shown)} of {len(rows)}; --limit 0 shows all", style="dim", markup=False)

    emit({"entries": shown, "total": len(rows)}, as_json, draw)


def _show_versions(store: Store, as_json: bool) -> None:
    from tunesmith.registry.aliases import list_aliases
    from tunesmith.registry.versions import list_versions

    versions, aliases = list_versions(store), list_aliases(store)
    if not versions and not as_json:
        say("nothing is registered yet: tunesmith run, or tunesmith register")

    def draw(console: Console) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table("version", "digest", "signed by", "for", "points here")
        for version in versions:
            pointing = ", ".join(
                "/".join(part for part in (alias.alias, alias.tenant, alias.region) if part)
                for alias in aliases
                if alias.version == version.digest
            )
            scope = "/".join(part for part in (version.tenant, version.region) if part)
            notes = [*(["gates overridden"] if version.override else []), *version.marks]
            marked = version.label + (f" ({', '.join(notes)})" if notes else "")
            cells = (marked, version.digest.removeprefix("sha256:")[:12], version.signer, scope, pointing)
            table.add_row(*map(Text, cells))
        if versions:
            console.print(table)

    emit(
        {
            "versions": [{"version": version.label, **version.model_dump(mode="json")} for version in versions],
            "aliases": [alias.model_dump(mode="json") for alias in aliases],
        },
        as_json,
        draw,
    )


def _grow(trunk: Tree, nodes: Sequence[Mapping[str, Any]], way: str) -> None:
    from rich.text import Text

    for node in nodes:
        role = f"{node['role']}: " if node["role"] != node["kind"] and way == "parents" else ""
        line = Text(f"{role}{node['kind']} ")
        line.append(node["short"], style="dim").append(f" {node['says']}").append(" ..." if node["seen"] else "")
        _grow(trunk.add(line), node[way], way)


def _head(text: str) -> Head:
    from tunesmith.core.digests import is_digest
    from tunesmith.core.errors import UsageError
    from tunesmith.store.audit import Head

    number, _, digest = text.partition(":")
    if not number.isdecimal() or not is_digest(digest):
        raise UsageError(f"{text[:100]!r} is not an entry", fix="write 12:sha256:..., as `audit verify` prints it")
    return Head(seq=int(number), digest=digest)
