"""`register`, `approve`, `refuse`, `verify`, `show`, `export`, `notice` and `papers`: versions and their evidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tunesmith import services
from tunesmith.cli.terminal import (
    Acting,
    Drawn,
    Here,
    NotNegative,
    Region,
    Tenant,
    add_commands,
    printed_text,
    say,
    table,
)
from tunesmith.core.digests import short
from tunesmith.core.errors import UsageError

if TYPE_CHECKING:
    from rich.tree import Tree

    from tunesmith.registry.papers.writing import PaperState
    from tunesmith.registry.risk import Approvals
    from tunesmith.registry.verification import Verification
    from tunesmith.services.lineage import Node
    from tunesmith.services.versions import ExportedVersion, RegisteredVersion, VersionList

Server = Annotated[str | None, typer.Option(metavar="URL", help="Decide on a server; $TUNESMITH_TOKEN is the token.")]
Key = Annotated[Path | None, typer.Option(metavar="FILE", help="With --server: your private key.")]
_NOTHING = "nothing is registered yet: tunesmith run, or tunesmith register"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_commands(app, approve, refuse, verify, show, export, notice, papers, register=register_version)


def register_version(
    here: Acting,
    verdict: str | None = None,
    *,
    name: str | None = None,
    override: str | None = None,
    expires_at: Annotated[str | None, typer.Option("--expires")] = None,
    tenant: Tenant = None,
    region: Region = None,
) -> None:
    """Sign a judged candidate and keep it as the next version of its name.

    verdict: A verdict's digest or its start; by default the last one.
    name: The version's name; by default the project's name.
    override REASON: Admins: register a candidate that did not pass, or whose gates changed, and why.
    expires_at TIME: When its use ends, as 2030-01-31T00:00:00Z.
    """
    here.show(services.versions.register, _draw_registered)


def approve(
    here: Acting,
    version: str,
    *,
    reason: str = "",
    tenant: Tenant = None,
    region: Region = None,
    server: Server = None,
    key: Key = None,
) -> None:
    """Verify a version and approve it with your signature. You may not approve a version that you registered.

    version: NAME@v3, or the start of a version's digest.
    reason: Why; required where the gates were overridden.
    """
    if not _decided_there(here, server, key, "approve"):
        here.show(services.versions.approve, _draw_decision)


def refuse(
    here: Acting,
    version: str,
    *,
    reason: str = "",
    tenant: Tenant = None,
    region: Region = None,
    server: Server = None,
    key: Key = None,
) -> None:
    """Refuse a version with your signature. It serves no request until as many people approve it again as its risk
    class takes.

    version: NAME@v3, NAME@champion, or the start of a version's digest.
    reason: Why; it is signed with the refusal.
    """
    if not _decided_there(here, server, key, "refuse"):
        here.show(services.versions.refuse, _draw_decision)
        for champion in services.rollouts.refused_champions(here.store):
            say(f"warning: {champion.warning}")


def _decided_there(here: Acting, server: str | None, key: Path | None, decision: str) -> bool:
    """Decide on a server, if one is named; returns whether one is."""
    if server is None:
        if key is not None:
            raise UsageError("--key applies to --server", fix="set TUNESMITH_KEYS to the folder of your keys instead")
        return False
    prepare = here.request(services.versions.prepare_decision, decision=decision)
    here.emit(services.versions.decide(server, key, prepare, actor=here.actor), _draw_decision)
    return True


def verify(
    here: Here,
    version: str,
    *,
    trust: Path | None = None,
    base: Path | None = None,
    lineage_only: bool = False,
    tenant: Tenant = None,
    region: Region = None,
) -> int:
    """Verify a version offline: its signature, and every record and blob it was made from. Exit 3 on any difference.

    The trusted keys are those in the store's trust/keys.json. A person who can write that file decides what verifies:
    bring your own copy with --trust if you do not trust the store.

    version: NAME@v3 (reads files only), NAME@champion or a digest.
    trust FILE: Your own list of keys instead of the store's.
    base FOLDER: Also verify the base model's files.
    lineage_only: Verify only what the version was made from, not the whole store.
    """
    verification = services.versions.verify_offline(
        here.store, version, trust=trust, base=base, lineage_only=lineage_only, scope=here.scope
    )
    here.emit(verification, _draw_verification)
    return 0 if verification.ok else 3


def show(
    here: Here,
    what: str | None = None,
    *,
    name: str = "",
    limit: NotNegative = 100,
    tenant: Tenant = None,
    region: Region = None,
) -> None:
    """Show what a record was made from and what was made from it; without an argument, list versions and aliases.

    what: A version, or any record's digest or its start.
    name TEXT: List versions whose name contains this.
    limit: Newest versions to list; 0 lists all.
    """
    if what is not None:
        if name:
            raise UsageError("--name lists versions, and WHAT names one record", fix="leave one of them out")
        node = services.lineage.tree(here.store, what, scope=here.scope)
        here.emit(node, _draw_lineage)
        return
    listed = services.versions.list_versions(here.store, name=name, limit=limit)
    if not listed.versions and not here.as_json:
        say(f"no version's name contains {name!r}" if name else _NOTHING)
    here.emit(listed, _draw_versions)


def export(
    here: Acting,
    version: str,
    target: Path,
    *,
    form: Literal["peft", "merged", "gguf", "ollama"],
    dtype: Literal["bf16", "fp32"] = "bf16",
    tenant: Tenant = None,
    region: Region = None,
) -> None:
    """Write an approved version's weights for other programs, after comparing them with those that were measured.

    The same held-out requests go through the adapter as trained, as served and as exported. Exit 3 if their
    log-probabilities differ by more than the tolerance. The store keeps the figures: `tunesmith show VERSION`.

    version: NAME@v3, NAME@champion, or the start of a version's digest.
    target FOLDER: The folder to write; it must not exist yet.
    form: peft: the adapter alone; merged: a Hugging Face folder; gguf: for llama.cpp; ollama: with a Modelfile.
    dtype: Of merged weights; an adapter stays as it is.
    """
    here.show(services.versions.export, _draw_export)


def notice(here: Here, version: str, *, tenant: Tenant = None, region: Region = None) -> None:
    """Print what the licences of a version's rows ask for (NOTICE.md).

    version: NAME@v3, NAME@champion, or the start of a version's digest.
    """
    made = services.versions.notice(here.store, version, scope=here.scope)
    here.emit(made, printed_text(made.notice))


def papers(
    here: Acting,
    version: str,
    *,
    papers: Annotated[list[str] | None, typer.Option("--for", metavar="card|bom|provenance|ai-act")] = None,
    to: Path | None = None,
    tenant: Tenant = None,
    region: Region = None,
) -> None:
    """Write and sign papers about a version for people outside, from its records and papers.yaml.

    version: NAME@v3, NAME@champion, or the start of a version's digest.
    papers: A paper to write; may be repeated; by default all four.
    to FOLDER: Also put every paper of the version here, each with the envelope that signs it.
    """
    done = here.do(services.versions.papers)
    if to is not None:
        services.versions.save_papers(here.store, done, to)
    here.emit(done, _draw_papers)


def _draw_papers(done: services.versions.WrittenPapers) -> Drawn:
    yield from _papers(done.papers)
    if done.asks:
        yield "what nobody filled in; write it into papers.yaml, then write the papers again:"
        yield table([(key, said) for key, said in done.asks.items()])


def _papers(states: Sequence[PaperState]) -> Drawn:
    for state in states:
        lacks = f", {len(state.lacks)} entries of papers.yaml missing" if state.lacks else ""
        said = f"signed by {state.by} on {state.at}{lacks}" if state.record else "missing"
        yield f"paper {state.paper}: {said}" + (f" ({state.why})" if state.why else "")


def _draw_registered(version: RegisteredVersion) -> Drawn:
    yield f"{version.label} is registered and signed by {version.signer}"
    if version.override is not None:
        yield f"its gates were overridden: {version.override}", "bold red"
    for mark in version.marks:
        yield f"it was {mark}: not meant for service", "bold red"
    if version.risk is not None:
        yield f"risk class {version.risk.risk_class}: it needs {' and '.join(version.needs)}"
    yield f"next: tunesmith approve {version.label} --as SOMEBODY-ELSE"


def _draw_decision(done: services.versions.RecordedDecision) -> Drawn:
    said = "approved" if done.decision == "approve" else "refused"
    yield f"{done.version} ({done.digest}) is {said} by {done.approver}"
    if done.decision == "refuse":
        return
    if done.override:
        yield f"although its gates were overridden: {done.override}", "bold red"
    for mark in done.marks:
        yield f"although it was {mark}: not meant for service", "bold red"
    if done.missing:
        yield f"it needs {' and '.join(done.missing)}"
    else:
        yield f"next: tunesmith rollout start {done.version}"


def _draw_verification(verification: Verification) -> Drawn:
    for problem in verification.problems:
        yield f"{problem.path}: {problem.reason}", "red"
    for note in verification.notes:
        yield note, "dim"
    outcome = "verifies" if verification.ok else f"does not verify: {len(verification.problems)} problems"
    yield f"{verification.version} {outcome} ({verification.checked} files checked)"


def _draw_lineage(node: Node) -> Drawn:
    from rich.tree import Tree

    yield f"{node.kind} {node.says}", "bold"
    yield node.digest
    for name, blob in sorted((node.blobs or {}).items()):
        yield f"  {name}  {blob}", "dim"
    if node.approvals is not None:
        yield from _draw_approvals(node.approvals)
    if node.held is not None:
        yield node.held.said, "bold red"
    yield from _papers(node.papers or ())
    for title, nodes in (("made from", node.parents), ("used for", node.children)):
        if nodes:
            trunk = Tree(title)
            _grow(trunk, nodes)
            yield trunk


def _draw_approvals(approvals: Approvals) -> Drawn:
    if approvals.risk is not None:
        yield f"risk class {approvals.risk.risk_class}"
    if approvals.approvers:
        yield f"approved by {', '.join(approvals.approvers)}"
    if approvals.refused_by is not None:
        yield f"refused by {approvals.refused_by}: {approvals.reason}", "red"
    if approvals.missing:
        yield f"it needs {' and '.join(approvals.missing)}"


def _grow(trunk: Tree, nodes: Sequence[Node]) -> None:
    from rich.text import Text

    for node in nodes:
        upwards = node.children is None
        role = f"{node.role}: " if node.role != node.kind and upwards else ""
        line = Text(f"{role}{node.kind} ")
        line.append(node.short, style="dim").append(f" {node.says}").append(" ..." if node.seen else "")
        _grow(trunk.add(line), node.parents or node.children or ())


def _draw_versions(listed: VersionList) -> Drawn:
    rows = []
    for version in listed.versions:
        aliases = (one for one in listed.aliases if one.version == version.digest)
        pointing = ", ".join("/".join(filter(None, (one.alias, one.tenant, one.region))) for one in aliases)
        scope = "/".join(filter(None, (version.tenant, version.region)))
        notes = [*(["gates overridden"] if version.override else []), *version.marks]
        marked = version.label + (f" ({', '.join(notes)})" if notes else "")
        rows.append((marked, short(version.digest), version.signer, scope, pointing))
    if rows:
        yield table(rows, "version", "digest", "signed by", "for", "aliases")
    if len(rows) < listed.total:
        yield f"the newest {len(rows)} of {listed.total}; --limit 0 shows all", "dim"


def _draw_export(done: ExportedVersion) -> Drawn:
    yield f"{done.version} is exported to {done.folder}"
    yield done.line
    yield from done.notes
    for name, file in done.files.items():
        yield f"  {name}  {file.bytes:,} bytes", "dim"
